"""The routing of one batch, as plain arrays."""

import dataclasses

import jax
from jaxtyping import Array, Int32

from jax_moe_ep.config import EpConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every assignment of the group goes, seen from one rank.

    A pytree of int32 arrays: it can be kept, scanned over, reused for further payloads and saved
    by `jax.checkpoint` (name `ep_plan`). -1 means "no expert", "no row", "nobody" everywhere.
    The letters are T tokens a rank, K top-k, R ranks, E experts, L = E/R local experts, C rows.

    Attributes:
      slots: [R*T, K] for every assignment of the group, its row on this rank, or -1 (elsewhere,
        invalid, dropped).
      owners: [T, K] for every assignment of my tokens, the rank that holds its row, or -1 (invalid
        or dropped there).
      group_counts: [L] live rows of each local expert, after drops.
      group_sizes: [L] aligned sizes; their sum is at most C. What a grouped GEMM takes.
      group_starts: [L] the first row of each group: exclusive sums of group_sizes.
      source_counts: [R, L] live rows by source rank.
      num_assignments: [] valid assignments to my experts, before drops.
      num_dropped: [] how many of them were dropped.
      required_rows: [] aligned rows that a buffer without any cap would need.
      config: the EpConfig.
      num_ranks: R.
      num_tokens: T.
      capacity: C.
    """

    slots: Int32[Array, "RT K"]
    owners: Int32[Array, "T K"]
    group_counts: Int32[Array, "L"]
    group_sizes: Int32[Array, "L"]
    group_starts: Int32[Array, "L"]
    source_counts: Int32[Array, "R L"]
    num_assignments: Int32[Array, ""]
    num_dropped: Int32[Array, ""]
    required_rows: Int32[Array, ""]
    config: EpConfig = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    num_tokens: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})

    @property
    def top_k(self) -> int:
        """K, the assignments of one token."""
        return self.slots.shape[-1]

    @property
    def num_local_experts(self) -> int:
        """L, the experts of one rank."""
        return self.config.num_experts // self.num_ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Totals over all ranks, the same on each: they may leave shard_map through `P()`.

    Attributes:
      num_assignments: [] int32, valid assignments, before drops.
      num_dropped: [] int32, how many of them were dropped.
      required_rows: [] int32, the largest `Plan.required_rows` of any rank.
      expert_counts: [E] int32, live rows of every expert, after drops.
    """

    num_assignments: Int32[Array, ""]
    num_dropped: Int32[Array, ""]
    required_rows: Int32[Array, ""]
    expert_counts: Int32[Array, "E"]
