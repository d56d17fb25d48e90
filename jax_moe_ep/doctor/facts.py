"""Facts about this installation and this machine, as plain data."""

import ctypes
import ctypes.util
import dataclasses
import importlib
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import jax

from jax_moe_ep import __version__

Matrix = tuple[tuple[bool, ...], ...]

# Ops with a kernel of their own: op x is the FFI target jax_moe_ep_x.
OPERATIONS = (
    "plan",
    "dispatch",
    "combine",
    "combine_backward",
    "row_weights",
    "row_weights_backward",
)
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
NCCL_PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
PACKAGES = ("jax", "jaxlib", *PLUGINS, *NCCL_PACKAGES, "numpy", "tokamax")


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as JAX sees it. `platform` tells "cuda" from other GPUs."""

    id: int
    process: int
    platform: str
    kind: str
    compute_capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Host:
    """What is installed around the extension. None: not found.

    `nccl` is the version in this process, else that of the package; "unknown" when there is only a
    system library, whose version cannot be had without loading it. `jax_platforms` is the user's
    restriction of JAX's platforms.
    """

    versions: dict[str, str | None]
    ffi_api: str | None = None
    nccl: str | None = None
    driver_release: str | None = None
    jax_platforms: str | None = None
    nvcc: str | None = None


@dataclasses.dataclass(frozen=True)
class Extension:
    """The native module: what it was built with, and what CUDA tells it about this machine.

    `driver` is the newest CUDA version that the driver runs; `peer_access[i][j]` says whether
    CUDA device i reads and writes the memory of device j. `kernels` are the ops that have one.
    """

    state: Literal["built", "not built", "does not load"]
    error: str | None = None
    cuda: str | None = None
    architectures: tuple[str, ...] = ()
    ffi_api: str | None = None
    collectives: str | None = None
    kernels: tuple[str, ...] = ()
    driver: str | None = None
    peer_access: Matrix | None = None
    peer_access_error: str | None = None


class Native(Protocol):
    """The extension module, `jax_moe_ep._ffi`. The last two raise RuntimeError without CUDA."""

    def build_info(self) -> dict[str, str]: ...
    def registrations(self) -> dict[str, dict[str, Any]]: ...
    def peer_access(self) -> list[list[bool]]: ...
    def driver_version(self) -> str: ...


def read_devices() -> tuple[Device, ...]:
    """The devices of JAX's default platform, then CUDA devices if that is another one.

    Raises what JAX raises when its platforms cannot start.
    """
    default, cuda = jax.devices(), _cuda_devices()
    return tuple(
        Device(
            id=each.id,
            process=each.process_index,
            platform="cuda" if each in cuda else each.platform,
            kind=each.device_kind,
            compute_capability=getattr(each, "compute_capability", None),
        )
        for each in dict.fromkeys([*default, *cuda])
    )


def _cuda_devices() -> list[Any]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def read_host() -> Host:
    """The packages, the runtime's FFI API, NCCL, the driver and nvcc."""
    own = {"jax_moe_ep": __version__, "python": platform.python_version()}
    versions = own | {name: _package_version(name) for name in PACKAGES}
    packaged = next((versions[name] for name in NCCL_PACKAGES if versions[name]), None)
    on_system = "unknown" if ctypes.util.find_library("nccl") else None
    return Host(
        versions=versions,
        ffi_api=_runtime_ffi_api(),
        nccl=_loaded_nccl() or packaged or on_system,
        driver_release=_driver_release(),
        jax_platforms=getattr(jax.config, "jax_platforms", None) or None,
        nvcc=os.environ.get("CUDACXX") or shutil.which("nvcc"),
    )


def load_extension(name: str = "jax_moe_ep._ffi") -> Native | None:
    """The native module; None when there is none.

    Raises ImportError, with the loader's message, when there is one that does not load.
    """
    try:
        return cast("Native", importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def read_extension(load: Callable[[], Native | None]) -> Extension:
    """What the native module says of itself and of this machine, or why it says nothing."""
    try:
        native = load()
        return _describe(native) if native is not None else Extension("not built")
    except Exception as error:  # the loader's, or a module of another version
        return Extension("does not load", error=message(error))


def _describe(native: Native) -> Extension:
    build, targets = native.build_info(), native.registrations()
    peers, driver = _attempt(native.peer_access), _attempt(native.driver_version)
    return Extension(
        state="built",
        cuda=build.get("cuda"),
        architectures=tuple(filter(None, build.get("architectures", "").split(";"))),
        ffi_api=build.get("ffi_api"),
        collectives=build.get("collectives"),
        kernels=tuple(op for op in OPERATIONS if f"jax_moe_ep_{op}" in targets),
        driver=None if isinstance(driver, RuntimeError) else driver,
        peer_access=None if isinstance(peers, RuntimeError) else tuple(map(tuple, peers)),
        peer_access_error=str(peers) if isinstance(peers, RuntimeError) else None,
    )


def _attempt[Value](call: Callable[[], Value]) -> Value | RuntimeError:
    try:
        return call()
    except RuntimeError as error:
        return error


def message(error: Exception) -> str:
    """The exception in one line, by its type when it has no text."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _runtime_ffi_api() -> str | None:
    """The FFI API of the running jaxlib: its headers state it, and they come in the same wheel."""
    try:
        header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    except OSError:
        return None
    return ".".join(re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)) or None


def _loaded_nccl() -> str | None:
    """The version of the NCCL that this process has loaded; loads none."""
    try:
        nccl = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        version = ctypes.c_int()
        if nccl.ncclGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    # NCCL_VERSION(X, Y, Z) of nccl.h since 2.9.
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def _driver_release() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None
