"""The doctor: what it concludes from made-up facts, and what the command prints and returns."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

import jax_moe_ep as ep
from jax_moe_ep import cuda, reference
from jax_moe_ep.doctor import Device, Host, Report, inspect, render
from jax_moe_ep.doctor.diagnosis import covers
from jax_moe_ep.doctor.facts import OPERATIONS, load_extension, read_devices

PLUGIN = {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2"}
HOST = Host(versions=PLUGIN, ffi_api="0.4", nccl="2.28.9", driver_release="580.95.05")
CPU = Device(0, 0, "cpu", "cpu")


@dataclasses.dataclass(frozen=True)
class FakeNative:
    """An extension module. An exception in place of a value is raised."""

    ops: Sequence[str] = OPERATIONS
    architectures: str = "90;100"
    cuda: str = "13.0"
    ffi_api: str = "0.4"
    peers: list[list[bool]] | RuntimeError = dataclasses.field(
        default_factory=lambda: [[True, True], [True, True]]
    )
    driver: str | RuntimeError = "13.0"

    def build_info(self) -> dict[str, str]:
        return {
            "cuda": self.cuda,
            "architectures": self.architectures,
            "ffi_api": self.ffi_api,
            "collectives": "0.1",
        }

    def registrations(self) -> dict[str, dict[str, Any]]:
        return {f"jax_moe_ep_{op}": {} for op in self.ops}

    def peer_access(self) -> list[list[bool]]:
        return returned(self.peers)

    def driver_version(self) -> str:
        return returned(self.driver)


def returned(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def gpus(*capabilities: str) -> tuple[Device, ...]:
    return tuple(Device(i, 0, "cuda", "NVIDIA X", each) for i, each in enumerate(capabilities))


HOPPERS = gpus("9.0", "9.0")


def examine(native: Any = None, devices: Any = HOPPERS, host: Host = HOST) -> Report:
    """The report on made-up facts; an exception in place of one is raised when it is read."""
    return inspect(
        devices=lambda: returned(devices), host=lambda: host, extension=lambda: returned(native)
    )


def the_problem(report: Report) -> str:
    """The only problem, which blocks CUDA alone, with its remedy."""
    (problem,) = report.problems
    assert report.usable == ("reference",)
    assert report.blockers("cuda") == (problem,)
    return f"{problem.what} -> {problem.remedy}"


# Everything fine.


def test_nothing_is_wrong_on_gpus_that_reach_each_other():
    report = examine(FakeNative())
    assert report.problems == ()
    assert report.usable == ("cuda", "reference")
    assert (report.platform, report.auto.implementation, report.auto.fails) == ("cuda", "cuda", ())
    assert report.extension.state == "built"
    assert report.extension.architectures == ("90", "100")
    assert report.extension.kernels == OPERATIONS
    assert report.extension.peer_access == ((True, True), (True, True))
    assert (report.extension.driver, report.extension.collectives) == ("13.0", "0.1")


def test_operations_are_those_of_both_implementations():
    for op in OPERATIONS:
        assert callable(getattr(cuda, op))
        assert callable(getattr(reference, op))


# The extension.


def test_extension_not_built():
    report = examine(None)
    assert "not built" in the_problem(report)
    assert "nvcc of CUDA 12.4 or newer" in the_problem(report)
    assert report.extension.state == "not built"
    assert (report.auto.implementation, report.auto.fails) == ("cuda", OPERATIONS)
    assert "implementation='reference' runs on GPUs too" in report.auto.reason


def test_extension_not_built_although_nvcc_is_there():
    host = dataclasses.replace(HOST, nvcc="/opt/cuda/bin/nvcc")
    assert "/opt/cuda/bin/nvcc" in the_problem(examine(None, host=host))


def test_extension_fails_to_load():
    report = examine(ImportError("undefined symbol: cudaFoo"))
    assert "does not load: ImportError: undefined symbol: cudaFoo" in the_problem(report)
    assert report.extension.state == "does not load"
    assert report.extension.error == "ImportError: undefined symbol: cudaFoo"


def test_extension_of_another_version():
    """A module without the functions the doctor asks for is reported, not raised."""
    report = examine(object())
    assert "does not load: AttributeError" in the_problem(report)


def test_loader_tells_a_missing_module_from_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "doctor_broken.abi3.so").write_text("not a shared object")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_extension("doctor_missing") is None
    with pytest.raises(ImportError, match=r"doctor_broken\.abi3\.so"):
        load_extension("doctor_broken")


def test_extension_built_for_a_newer_ffi_api():
    problem = the_problem(examine(FakeNative(ffi_api="0.5")))
    assert "FFI API 0.5" in problem
    assert "has 0.4" in problem
    assert "Upgrade jax" in problem


def test_extension_built_for_an_older_ffi_api_is_fine():
    assert examine(FakeNative(ffi_api="0.3")).problems == ()


def test_driver_older_than_the_build():
    problem = the_problem(examine(FakeNative(cuda="13.0", driver="12.8")))
    assert "built with CUDA 13.0" in problem
    assert "up to CUDA 12.8" in problem


@pytest.mark.parametrize("driver", ["12.4", "13.1"])
def test_driver_of_the_same_or_a_newer_major_version_is_fine(driver: str):
    assert examine(FakeNative(cuda="12.8", driver=driver)).problems == ()


# Kernels.


def test_missing_kernels_are_named_and_block_nothing():
    missing = tuple(op for op in OPERATIONS if op != "plan")
    report = examine(FakeNative(ops=["plan"]))
    assert report.usable == ("cuda", "reference")
    (problem,) = report.problems
    assert problem.blocks == ()
    assert ", ".join(missing) in problem.what
    assert (report.auto.implementation, report.auto.fails) == ("cuda", missing)
    assert f"plan runs, but {', '.join(missing)} raise NotImplementedError" in report.auto.reason
    assert "implementation='reference' runs on GPUs too" in report.auto.reason


def test_no_kernel_at_all_blocks_cuda():
    assert "no CUDA kernel for plan" in the_problem(examine(FakeNative(ops=[])))


# Architectures.


def test_architecture_not_covered():
    problem = the_problem(examine(FakeNative(architectures="90;100-real"), gpus("9.0", "8.0")))
    assert "architectures 90;100-real" in problem
    assert "NVIDIA X (GPU 1) has compute capability 8.0" in problem
    assert "CUDAARCHS=80" in problem


@pytest.mark.parametrize(
    ("architecture", "capability", "expected"),
    [
        ("90", "9.0", True),
        ("90", "10.0", True),  # through PTX
        ("90", "8.9", False),
        ("80-real", "8.6", True),
        ("80-real", "9.0", False),
        ("86-real", "8.0", False),
        ("80-virtual", "9.0", True),
        ("90-virtual", "8.0", False),
        ("90a", "9.0", True),
        ("90a", "10.0", False),
        ("100f", "10.3", True),
        ("100f-real", "12.0", False),
        ("100", "12.0", True),
        ("native", "9.0", True),
    ],
)
def test_covers(architecture: str, capability: str, expected: bool):
    assert covers(architecture, capability) is expected


# Between GPUs.


def test_pair_without_peer_access_is_named():
    """0 and 2 lack it in both directions, 1 and 2 in one; 0 and 1 have it."""
    peers = [[True, True, False], [True, True, True], [False, False, True]]
    report = examine(FakeNative(peers=peers), gpus("9.0", "9.0", "9.0"))
    assert "each other's memory: 0 and 2; 1 and 2 ->" in the_problem(report)
    assert "CUDA_VISIBLE_DEVICES" in the_problem(report)


def test_peer_access_that_cuda_does_not_tell_blocks_nothing():
    report = examine(FakeNative(peers=RuntimeError("invalid device ordinal")))
    (problem,) = report.problems
    assert "invalid device ordinal" in problem.what
    assert report.usable == ("cuda", "reference")


def test_only_a_group_of_gpus_needs_nccl():
    host = dataclasses.replace(HOST, nccl=None)
    assert "NCCL is not found" in the_problem(examine(FakeNative(), host=host))
    assert examine(FakeNative(peers=[[True]]), gpus("9.0"), host).problems == ()


# Platforms.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"jax_platforms": "cpu"}, "JAX_PLATFORMS=cpu leaves CUDA out -> Unset JAX_PLATFORMS"),
        ({"versions": {"jaxlib": "0.11.2"}}, 'no CUDA plugin is installed -> .*"jax[cuda13]"'),
        ({"driver_release": None}, "no NVIDIA driver is visible"),
        ({"versions": PLUGIN | {"jaxlib": "0.12.0"}}, "-> .*jax-cuda13-plugin==0.12.0"),
        ({"jax_platforms": "cuda,cpu"}, "the plugin found none -> JAX_PLATFORMS=cuda python"),
    ],
    ids=["JAX_PLATFORMS", "no plugin", "no driver", "other plugin version", "unknown"],
)
def test_reason_for_no_cuda_device(change: dict[str, Any], expected: str):
    no_cuda = RuntimeError("no CUDA driver is installed")
    native = FakeNative(peers=no_cuda, driver=no_cuda)
    report = examine(native, (CPU,), dataclasses.replace(HOST, **change))
    for part in expected.split(".*"):
        assert part in the_problem(report)
    assert (report.auto.implementation, report.auto.fails) == ("reference", ())
    assert "default platform is cpu" in report.auto.reason


@pytest.mark.parametrize("error", [RuntimeError("no backend"), AssertionError()])
def test_jax_that_cannot_start_blocks_everything(error: Exception):
    report = examine(FakeNative(), devices=error)
    (problem,) = report.problems
    assert type(error).__name__ in problem.what
    assert (report.platform, report.devices, report.usable) == (None, (), ())
    assert report.blockers("reference") == report.blockers("cuda") == (problem,)


def test_gpus_of_another_platform_are_not_cuda():
    report = examine(FakeNative(), [Device(0, 0, "gpu", "AMD X")])
    assert "no CUDA device" in the_problem(report)
    assert report.auto.implementation == "reference"


def test_devices_of_this_machine():
    found = read_devices()
    assert [each.id for each in found[: jax.device_count()]] == [each.id for each in jax.devices()]
    assert all(each.compute_capability for each in found if each.platform == "cuda")


# Showing it.


def shown(report: Report) -> str:
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    with console.file:
        console.print(render(report))
        return console.export_text()


def test_render_shows_devices_peers_and_problems():
    text = shown(examine(FakeNative(peers=[[True, False], [True, True]])))
    assert "NVIDIA X" in text
    assert "NO" in text
    assert "each other's memory: 0 and 1" in text
    assert 'implementation="auto" is "cuda" here' in text


def test_render_does_not_take_brackets_for_markup():
    host = dataclasses.replace(HOST, versions={"jaxlib": "0.11.2"})
    assert 'pip install "jax[cuda13]"' in shown(examine(FakeNative(), (CPU,), host))


def test_render_without_problems():
    assert "No problems." in shown(examine(FakeNative()))


# The command.


def doctor(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jax_moe_ep", "doctor", *options],
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_command_prints_tables_without_a_gpu():
    result = doctor(JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
    assert ep.__version__ in result.stdout
    assert jax.__version__ in result.stdout
    assert "JAX_PLATFORMS=cpu leaves CUDA out" in result.stdout
    assert 'implementation="auto" is "reference" here' in result.stdout


def test_command_prints_one_json_object_and_why_cuda_cannot_run():
    result = doctor("--json", "--require", "cuda", JAX_PLATFORMS="cpu")
    assert result.returncode == 1
    assert "cuda cannot run: JAX has no CUDA device: JAX_PLATFORMS=cpu" in result.stderr
    report = json.loads(result.stdout)
    assert report["platform"] == "cpu"
    assert report["usable"] == ["reference"]
    assert report["auto"]["implementation"] == "reference"
    assert report["host"]["versions"]["jax"] == jax.__version__
    assert [int(part) for part in report["host"]["ffi_api"].split(".")] >= [0, 4]
    assert report["extension"]["state"] in ("built", "not built")
    assert all(each["what"] and each["remedy"] for each in report["problems"])


def test_command_finds_that_the_reference_runs():
    result = doctor("--require", "reference", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
    assert "cannot run" not in result.stderr


def test_command_agrees_with_its_report_on_this_machine():
    result = doctor("--json", "--require", "cuda")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if "cuda" in report["usable"] else 1), result.stderr
    assert ("cuda cannot run" in result.stderr) == (result.returncode == 1)


def test_command_refuses_an_unknown_requirement():
    result = doctor("--require", "tpu")
    assert result.returncode == 2
    assert "tpu" in result.stderr
    assert result.stdout == ""
