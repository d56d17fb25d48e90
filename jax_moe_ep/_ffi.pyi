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

def state_types() -> dict[str, Any]:
    """FFI types: name -> type_id and type_info capsules. To be registered before the targets."""

def op_codes() -> dict[str, int]:
    """The ops of a group, by name."""

def region_bytes(
    *,
    op: str,
    is_one_process: bool,
    has_weights: bool,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    row_bytes: int,
) -> int:
    """Bytes that a call uses of one half of a region."""

def half_bytes(bytes: int) -> int:
    """The size class of a region's halves."""

def arena_bytes(half_bytes: int) -> int:
    """Device memory of an arena with one region of such halves."""

def arenas() -> list[dict[str, int]]:
    """The arenas of this process: device, rank, num_ranks, is_one_process, bytes, and
    num_in_place: executions and captures of calls whose tokens peers read where XLA has them."""

def failures() -> list[str]:
    """What failed since the last reset; first the causes, then who stopped because of them."""

def reset() -> None:
    """Waits for the devices; every group meets again at its next call."""

def set_fault(*, device: int, delay_ns: int = 0, skips: bool = False) -> None:
    """For tests: a device's calls begin late, or take no part."""

def set_epoch(epoch: int) -> None:
    """For tests: the epoch of all idle groups."""

def fail_next_meeting(device: int, reason: str) -> None:
    """For tests: out_of_memory or no_peer_access."""

def hog(*, device: int, num_sms: int, ns: int) -> None:
    """For tests: keeps SMs of a device busy beside XLA's stream; returns at once."""

def used_bytes(device: int) -> int:
    """Device memory in use, by all processes, in bytes."""
