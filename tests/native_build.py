"""Building the C++ programs of tests/native, which run parts of ffi/ without a GPU."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Sequence

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FFI, NATIVE = ROOT / "ffi", ROOT / "tests" / "native"


@functools.cache
def cuda_headers() -> str | None:
    """The folder of CUDA's headers, as nvcc tells it, or None without nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r'INCLUDES="-I([^"]+)"', told)
    assert found, told
    return found[1]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or cuda_headers() is None, reason="needs g++ and CUDA's headers"
)


def build(
    folder: pathlib.Path,
    *sources: pathlib.Path,
    flags: Sequence[str] = ("-Wall", "-Wextra", "-Werror"),
    link: Sequence[str] = (),
) -> pathlib.Path:
    """The program of these sources, made in the folder; a library with link=["-shared"]."""
    headers = [f"-isystem{path}" for path in (jax.ffi.include_dir(), cuda_headers())]
    given = ["-std=c++17", *flags, *headers, f"-I{FFI}", f"-I{NATIVE}"]
    compiling = [subprocess.Popen(["g++", "-c", *given, each], cwd=folder) for each in sources]
    assert [each.wait() for each in compiling] == [0] * len(sources)
    objects = [each.with_suffix(".o").name for each in sources]
    command = ["g++", *link, *objects, "-lpthread", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"
