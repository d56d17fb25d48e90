from typing import Any

def registrations() -> dict[str, dict[str, Any]]:
    """FFI targets: name -> stage -> capsule."""

def build_info() -> dict[str, str]:
    """What this extension was built with: cuda, architectures, ffi_api, collectives."""

def num_executions() -> int:
    """How often XLA ran a handler on the host; replays of a CUDA graph do not count."""

def driver_version() -> str:
    """The CUDA version of the driver. RuntimeError without one."""

def peer_access() -> list[list[bool]]:
    """[from][to]: whether a device can access another's memory. RuntimeError without devices."""

def plan_scratch_size(
    *, num_ranks: int, num_experts: int, assignments_per_rank: int, by_priority: bool
) -> int:
    """int32 words of scratch of a plan."""
