"""The memory that the GPUs of a group share: its size, and what became of a group."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_moe_ep import cuda
from jax_moe_ep.checks import check_config, check_experts_of_ranks, check_int
from jax_moe_ep.config import EpConfig

# The calls of a layer and its gradients that move rows, and whether weights go with them. The
# gradient of dispatch is a combine without.
CALLS = (("dispatch", False), ("combine", True), ("combine", False), ("combine_backward", True))


@dataclasses.dataclass(frozen=True)
class ArenaBytes:
    """Device memory of each rank outside of XLA's pool, in bytes.

    Attributes:
      one_process: when one process drives all GPUs of the group.
      several_processes: when the group spans processes, with room for tokens that must be staged,
        as those outside of a preallocated pool of XLA's.
    """

    one_process: int
    several_processes: int


def memory(
    config: EpConfig, num_tokens: int, hidden: int, top_k: int, dtype: Any, num_ranks: int
) -> ArenaBytes:
    """The arena of one rank for plan, dispatch, weighted combine and their gradients.

    An arena is allocated with cudaMalloc when the ranks of a group first meet, beside XLA's pool,
    and lives as long as the process: leave room with XLA_PYTHON_CLIENT_MEM_FRACTION or
    XLA_PYTHON_CLIENT_PREALLOCATE=false. Its regions come in powers of two; calls of one class
    share a region, and calls of other sizes add theirs.

    Args:
      config: the options of the group.
      num_tokens: T, tokens a rank.
      hidden: H.
      top_k: K.
      dtype: of tokens and rows.
      num_ranks: R.

    Returns:
      `ArenaBytes`; zeros for a group of one rank, or with implementation="reference".

    Raises:
      TypeError, ValueError: for a wrong config, size or dtype.
      NotImplementedError: without the CUDA extension.

    Example:
      >>> import jax_moe_ep as ep
      >>> config = ep.EpConfig(num_experts=256, axis_name="expert")
      >>> bytes_of = ep.memory(config, 4096, 7168, 8, "bfloat16", 2)  # doctest: +SKIP
    """
    check_config("memory", config)
    check_int("memory", "num_tokens", num_tokens, at_least=0)
    check_int("memory", "hidden", hidden, at_least=0)
    check_int("memory", "top_k", top_k, at_least=1)
    check_int("memory", "num_ranks", num_ranks, at_least=1)
    check_experts_of_ranks("memory", config, num_ranks)
    row_bytes = hidden * jnp.dtype(dtype).itemsize
    if num_ranks == 1 or num_tokens == 0 or config.implementation == "reference":
        return ArenaBytes(0, 0)
    ffi = cuda.extension("memory")
    plan_bytes = top_k * (8 if config.drop_policy == "priority" else 4)  # ids, priorities
    calls = [("plan", False, plan_bytes), *((*call, row_bytes) for call in CALLS)]

    def arena(is_one_process: bool) -> int:
        halves = {
            ffi.half_bytes(
                ffi.region_bytes(
                    op=op,
                    is_one_process=is_one_process,
                    has_weights=has_weights,
                    num_ranks=num_ranks,
                    num_tokens=num_tokens,
                    top_k=top_k,
                    row_bytes=row_bytes,
                )
            )
            for op, has_weights, row_bytes in calls
        }
        control = ffi.arena_bytes(0)
        return control + sum(ffi.arena_bytes(half) - control for half in halves)

    return ArenaBytes(arena(True), arena(False))


def check() -> None:
    """Raises an error if a group of this process has failed since the last `reset`.

    A failure is found on the device: a rank that waited longer than `EpConfig.timeout_s`, or two
    ranks in different calls. It poisons all later results of the group (NaN; all bits set) and is
    raised before the next execution too. Call it after `jax.block_until_ready`.

    Raises:
      RuntimeError: what each rank of this process says, the causes first.
    """
    if failures := cuda.failures():
        raise RuntimeError("\n".join(failures))


def reset() -> None:
    """Lets all groups of this process start anew after a failure. Call it on every process.

    Waits for the devices of this process. The groups meet again at their next call, which waits
    until all ranks have come there. Block on the last step before (`jax.block_until_ready`);
    between processes, all must have launched the same steps, or they have to be started again.
    """
    if cuda.has_extension():
        cuda.extension("reset").reset()
