"""What follows from the facts: problems with their remedies, and what can run."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jax_moe_ep.doctor.facts import (
    NCCL_PACKAGES,
    OPERATIONS,
    PLUGINS,
    Device,
    Extension,
    Host,
    Native,
    load_extension,
    message,
    read_devices,
    read_extension,
    read_host,
)

Runnable = Literal["cuda", "reference"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something amiss and its remedy. One that blocks no implementation is a limit to know of."""

    what: str
    remedy: str
    blocks: tuple[Runnable, ...] = ()


@dataclasses.dataclass(frozen=True)
class Auto:
    """What implementation="auto" chooses on the default platform, and the ops that fail then."""

    implementation: Runnable
    fails: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All of it. `platform` is JAX's default, None when JAX has no devices."""

    platform: str | None
    devices: tuple[Device, ...]
    host: Host
    extension: Extension
    auto: Auto
    problems: tuple[Problem, ...]
    usable: tuple[Runnable, ...]

    def blockers(self, implementation: Runnable) -> tuple[Problem, ...]:
        """The problems because of which the implementation cannot run here."""
        return tuple(each for each in self.problems if implementation in each.blocks)


def inspect(
    *,
    devices: Callable[[], Sequence[Device]] = read_devices,
    host: Callable[[], Host] = read_host,
    extension: Callable[[], Native | None] = load_extension,
) -> Report:
    """What this installation and this machine can run. Starts JAX's platforms; never raises.

    Args:
      devices, host, extension: how to read the facts; tests give made-up ones.

    Returns:
      The `Report`.
    """
    problems: list[Problem] = []
    found: tuple[Device, ...] = ()
    try:
        found = tuple(devices())
    except Exception as error:  # whatever JAX raises: the report is to say it
        problems.append(
            Problem(
                f"JAX cannot start its platforms: {message(error)}",
                "Check JAX_PLATFORMS against the JAX plugins that are installed",
                blocks=("cuda", "reference"),
            )
        )
    facts, native = host(), read_extension(extension)  # NCCL is loaded by the devices, if at all
    problems += _problems(found, facts, native)
    default = found[0].platform if found else None
    blocked = {name for problem in problems for name in problem.blocks}
    return Report(
        platform=default,
        devices=found,
        host=facts,
        extension=native,
        auto=_auto(default, native, "cuda" in blocked),
        problems=tuple(problems),
        usable=tuple(name for name in ("cuda", "reference") if name not in blocked),
    )


def _problems(devices: Sequence[Device], host: Host, extension: Extension) -> Iterator[Problem]:
    cuda = [each for each in devices if each.platform == "cuda"]
    if devices and not cuda:
        yield _no_cuda_device(host)
    if extension.state != "built":
        yield _no_extension(host, extension)
        return
    yield from _build_problems(host, extension)
    yield from _kernel_problems(extension)
    if cuda:
        yield from _architecture_problems(cuda, extension)
        yield from _peer_problems(extension)
    if len(cuda) > 1 and host.nccl is None:
        yield Problem(
            "NCCL is not found, and a group of several GPUs meets through it",
            f"pip install {' or '.join(NCCL_PACKAGES)}, as the CUDA plugin",
            blocks=("cuda",),
        )


def _no_cuda_device(host: Host) -> Problem:
    plugins = {name: host.versions.get(name) for name in PLUGINS if host.versions.get(name)}
    jaxlib = host.versions.get("jaxlib")
    allowed = host.jax_platforms
    if allowed and not {"cuda", "gpu"} & set(allowed.split(",")):
        why = f"JAX_PLATFORMS={allowed} leaves CUDA out"
        remedy = "Unset JAX_PLATFORMS, or name cuda in it"
    elif not plugins:
        why = "no CUDA plugin is installed"
        remedy = 'On a machine with NVIDIA GPUs: pip install "jax[cuda13]", or "jax[cuda12]"'
    elif host.driver_release is None:
        why = "no NVIDIA driver is visible"
        remedy = "Install the driver; give a container its GPUs (docker run --gpus all)"
    elif jaxlib not in plugins.values():
        why = f"no CUDA plugin fits jaxlib {jaxlib}, found {plugins}"
        remedy = f"Install the plugin of the same version: {next(iter(plugins))}=={jaxlib}"
    else:
        why = "the plugin found none"
        remedy = "JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' prints JAX's reason"
    return Problem(f"JAX has no CUDA device: {why}", remedy, blocks=("cuda",))


def _no_extension(host: Host, extension: Extension) -> Problem:
    reinstall = "reinstall jax_moe_ep (pip's --no-cache-dir --force-reinstall)"
    if extension.state == "does not load":
        what = f"The CUDA extension does not load: {extension.error}"
        remedy = f"For this Python, jaxlib and system, {reinstall}"
    else:
        what = "The CUDA extension is not built"
        remedy = f"Put nvcc of CUDA 12.4 or newer on PATH or in CUDACXX, then {reinstall}"
        if host.nvcc:
            remedy = f"With nvcc at {host.nvcc}, {reinstall}"
    return Problem(what, remedy, blocks=("cuda",))


def _build_problems(host: Host, extension: Extension) -> Iterator[Problem]:
    build, runtime = _version(extension.ffi_api), _version(host.ffi_api)
    # XLA takes handlers of its own major version that are not newer than it is.
    if build and runtime and (build[0] != runtime[0] or build > runtime):
        yield Problem(
            f"The extension was built for XLA FFI API {extension.ffi_api}, and the running jaxlib "
            f"has {host.ffi_api}",
            "Reinstall jax_moe_ep against this jaxlib"
            if build[0] != runtime[0]
            else "Upgrade jax and jaxlib, or reinstall jax_moe_ep against this jaxlib",
            blocks=("cuda",),
        )
    cuda, driver = _version(extension.cuda), _version(extension.driver)
    # Minor versions of CUDA are compatible with each other, and newer drivers with older builds.
    if cuda and driver and driver[0] < cuda[0]:
        yield Problem(
            f"The extension was built with CUDA {extension.cuda}, and the driver runs up to CUDA "
            f"{extension.driver}",
            f"Upgrade the NVIDIA driver, or reinstall jax_moe_ep with nvcc of CUDA {driver[0]}",
            blocks=("cuda",),
        )


def _kernel_problems(extension: Extension) -> Iterator[Problem]:
    if missing := _missing_kernels(extension):
        yield Problem(
            f"This version has no CUDA kernel for {', '.join(missing)}",
            "Use implementation='reference', which runs on GPUs too",
            blocks=() if extension.kernels else ("cuda",),
        )


def _architecture_problems(devices: Sequence[Device], extension: Extension) -> Iterator[Problem]:
    for capability in sorted({each.compute_capability or "" for each in devices} - {""}):
        if not any(covers(each, capability) for each in extension.architectures):
            gpus = [each for each in devices if each.compute_capability == capability]
            yield Problem(
                f"The extension is built for architectures {';'.join(extension.architectures)}; "
                f"{gpus[0].kind} (GPU {', '.join(str(each.id) for each in gpus)}) has compute "
                f"capability {capability}",
                f"Reinstall jax_moe_ep with CUDAARCHS={capability.replace('.', '')} set",
                blocks=("cuda",),
            )


def _peer_problems(extension: Extension) -> Iterator[Problem]:
    matrix = extension.peer_access
    if matrix is None:
        yield Problem(
            f"CUDA does not say which GPUs reach each other: {extension.peer_access_error}",
            "Check that nvidia-smi topo -p2p r works",
        )
        return
    apart = [
        f"{i} and {j}"
        for i, j in itertools.combinations(range(len(matrix)), 2)
        if not (matrix[i][j] and matrix[j][i])
    ]
    if apart:
        yield Problem(
            f"CUDA devices without access to each other's memory: {'; '.join(apart)}",
            "Choose GPUs that have it with CUDA_VISIBLE_DEVICES (nvidia-smi topo -p2p r lists "
            "them), or use implementation='reference'",
            blocks=("cuda",),
        )


def _auto(default: str | None, extension: Extension, is_blocked: bool) -> Auto:
    if default is None:
        return Auto("reference", OPERATIONS, "JAX has no devices, so nothing runs")
    if default != "cuda":
        reason = f"JAX's default platform is {default}, and the CUDA kernels need CUDA devices"
        return Auto("reference", (), reason)
    is_cuda = "JAX's default platform is CUDA"
    if is_blocked:
        reason = (
            f"{is_cuda}, but the kernels cannot run here (see the problems); "
            "implementation='reference' runs on GPUs too"
        )
        return Auto("cuda", OPERATIONS, reason)
    if missing := _missing_kernels(extension):
        reason = (
            f"{is_cuda}; {', '.join(extension.kernels)} runs, but {', '.join(missing)} raise "
            "NotImplementedError, as this version has no kernel for them; "
            "implementation='reference' runs on GPUs too"
        )
        return Auto("cuda", missing, reason)
    return Auto("cuda", (), f"{is_cuda}, and every op has a kernel")


def _missing_kernels(extension: Extension) -> tuple[str, ...]:
    return tuple(op for op in OPERATIONS if op not in extension.kernels)


def covers(architecture: str, compute_capability: str) -> bool:
    """Whether code built for a CMAKE_CUDA_ARCHITECTURES entry runs on such a GPU.

    "90" is machine code for 9.0, which runs on 9.x from there, and PTX, which runs on all newer
    GPUs; "90-real" and "90-virtual" are only one of them. "90a" runs on 9.0 alone, "100f" on 10.x.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return True  # "native", "all-major": nvcc chose, and there is nothing to compare
    built, gpu = (int(match[1]), int(match[2])), _version(compute_capability)
    is_in_family = built[0] == gpu[0] and built <= gpu
    if match[3] == "a":
        return built == gpu
    if match[3] == "f":
        return is_in_family
    has_binary = match[4] != "-virtual" and is_in_family
    has_ptx = match[4] != "-real" and built <= gpu
    return has_binary or has_ptx


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text or ""))
