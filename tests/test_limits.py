"""On which devices the kernels with bulk copies run: what was built for older ones has none, and
they need much shared memory."""

import subprocess

import pytest
from helpers import one_process
from native_build import FFI, NATIVE, build, needs_compiler

pytestmark = [needs_compiler, one_process]


@pytest.mark.parametrize(
    ("built_for", "capabilities", "expected"),
    [
        ("80-real;90-real;100", (80, 89, 90, 100, 103), "00111"),
        ("90", (90, 100), "11"),
        ("80", (80, 90, 100), "000"),  # a newer device compiles it anew, without bulk copies
        ("80;100", (90, 100, 103), "011"),
        ("80;100-real", (90, 100, 103, 110), "0110"),
        ("80;90-real", (90, 100), "10"),
        ("80;90-virtual", (80, 90, 100), "011"),
        ("80;90a;90a-real", (80, 90, 100), "010"),  # code for 9.0 alone
        ("80;100f", (100, 103, 110), "110"),  # for 10.0 and its family
        ("native", (80, 90), "01"),
        ("80-real;90-real;100", (120, 121), "00"),  # too little shared memory
    ],
)
def test_bulk_copies_where_they_were_built(tmp_path, built_for, capabilities, expected):
    flags = ["-Wall", "-Wextra", "-Werror", f'-DJAX_MOE_EP_ARCHITECTURES="{built_for}"']
    program = build(tmp_path, NATIVE / "limits.cc", FFI / "rows.cc", flags=flags)
    told = [
        subprocess.run([program, str(each)], capture_output=True, text=True, check=True).stdout
        for each in capabilities
    ]
    assert "".join(each.strip() for each in told) == expected
