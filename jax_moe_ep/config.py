"""The options of an expert-parallel group, checked once."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

Implementation = Literal["auto", "cuda", "reference"]
DropPolicy = Literal["position", "priority"]
EmptyGroups = Literal["none", "block"]
Tail = Literal["zero", "undefined"]

MAX_INT32 = 2**31 - 1
MAX_CUDA_EXPERTS = 4096
DEFAULT_TIMEOUT_S = 300.0
LEAST_TIMEOUT_S, MOST_TIMEOUT_S = 1e-9, 9e9  # as nanoseconds in an int64


@dataclasses.dataclass(frozen=True, eq=False)
class EpConfig:
    """Options of one expert-parallel group. Frozen and hashable, so it can be a static argument.

    Args:
      num_experts: E, the number of experts of the group. A multiple of the number of ranks R;
        expert e lives on rank e // (E / R).
      axis_name: the mesh axis of the group, or a tuple of axes whose ranks count in row-major
        order of the tuple. () for no group: one rank, usable outside shard_map.
      alignment: A. Every group of rows starts at a multiple of A and is padded to one.
      capacity: C, the rows of the receive buffer. None: the worst case, nothing is ever dropped.
        An int: C as it stands. A float f: room for f*T*K live rows with the worst padding, at most
        the worst case.
      expert_capacity: the most rows an expert keeps. An int: rows. A float f: f times the mean
        load, ceil(f*R*T*K/E).
      drop_policy: which rows stay where there are too many: the first by position, or those of
        highest `priority` (given to `plan`; ties by position, NaN last).
      distinct_experts: a promise that no token names an expert twice. Duplicates are legal either
        way; the worst case covers them only when this is False.
      empty_groups: rows of an expert that nobody chose: "none", or one "block" of A.
      tail: the rows after the last group: "zero", or "undefined", which saves the writes. The
        reference fills an undefined tail with NaN (integers: -1), so that a model that reads it
        fails where it is easy to debug.
      implementation: "cuda", "reference" (plain JAX, any platform), or "auto": "cuda" on CUDA and
        "reference" elsewhere.
      num_sms: bounds the thread blocks of CUDA kernels, to so many in groups of several ranks, to
        a few times as many on one; None for the default. Small kernels of plan are not bounded.
      timeout_s: seconds a CUDA kernel waits for another rank before it gives up.

    Raises:
      TypeError, ValueError: naming the option, what was given and what is allowed.
    """

    num_experts: int
    axis_name: str | tuple[str, ...]
    _: dataclasses.KW_ONLY
    alignment: int = 1
    capacity: int | float | None = None
    expert_capacity: int | float | None = None
    drop_policy: DropPolicy = "position"
    distinct_experts: bool = True
    empty_groups: EmptyGroups = "none"
    tail: Tail = "zero"
    implementation: Implementation = "auto"
    num_sms: int | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        _check_int("num_experts", self.num_experts, 1)
        _check_int("alignment", self.alignment, 1)
        _check_capacity("capacity", self.capacity, lowest=0)
        _check_capacity("expert_capacity", self.expert_capacity, lowest=1)
        _check_choice("drop_policy", self.drop_policy, get_args(DropPolicy))
        _check_choice("empty_groups", self.empty_groups, get_args(EmptyGroups))
        _check_choice("tail", self.tail, get_args(Tail))
        _check_choice("implementation", self.implementation, get_args(Implementation))
        if type(self.distinct_experts) is not bool:
            raise TypeError(f"distinct_experts must be a bool, got {self.distinct_experts!r}")
        if self.num_sms is not None:
            _check_int("num_sms", self.num_sms, 1)
        if not _is_real(self.timeout_s) or not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a positive finite number, got {self.timeout_s!r}")
        if not LEAST_TIMEOUT_S <= self.timeout_s <= MOST_TIMEOUT_S:
            raise ValueError(
                f"timeout_s must be between {LEAST_TIMEOUT_S} and {MOST_TIMEOUT_S} seconds, got "
                f"{self.timeout_s!r}"
            )
        object.__setattr__(self, "axis_name", _normal_axis_name(self.axis_name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.implementation == "reference":
            for name, default in (("num_sms", None), ("timeout_s", DEFAULT_TIMEOUT_S)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be honoured with "
                        f"implementation='reference': it bounds CUDA kernels. Leave it at {default}"
                    )
        if self.implementation == "cuda" and self.num_experts > MAX_CUDA_EXPERTS:
            raise ValueError(
                f"implementation='cuda' supports num_experts up to {MAX_CUDA_EXPERTS}, got "
                f"{self.num_experts}; use implementation='reference'"
            )

    # Equal only with equal types: capacity=1 is one row and capacity=1.0 a factor, but 1 == 1.0,
    # and jit would take the program of the one for the other.
    def _key(self) -> tuple[object, ...]:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return tuple((type(value), value) for value in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EpConfig) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes of the group, as a tuple."""
        return (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name

    def align(self, num_rows: int) -> int:
        """num_rows rounded up to a multiple of the alignment."""
        return -(-num_rows // self.alignment) * self.alignment

    def rows_per_expert(self, num_assignments: int) -> int | None:
        """The most rows an expert keeps out of the group's R*T*K assignments; None: no limit."""
        if isinstance(self.expert_capacity, float):
            return math.ceil(self.expert_capacity * num_assignments / self.num_experts)
        return self.expert_capacity

    def num_rows(self, num_ranks: int, num_tokens: int, top_k: int) -> int:
        """C, the rows of the receive buffer of one rank, for T tokens a rank and top-k K.

        The worst case has two bounds: L full experts, and all assignments that can reach the
        rank, each opened group wasting at most A - 1 rows.
        """
        if isinstance(self.capacity, int):
            return self.capacity
        num_local = self.num_experts // num_ranks
        group_tokens = num_ranks * num_tokens
        per_token = min(top_k, num_local) if self.distinct_experts else top_k
        per_expert = group_tokens if self.distinct_experts else group_tokens * top_k
        limit = self.rows_per_expert(group_tokens * top_k)
        if limit is not None:
            per_expert = min(per_expert, limit)
        live = min(group_tokens * per_token, num_local * per_expert)
        if self.capacity is not None:
            live = min(math.ceil(self.capacity * num_tokens * top_k), live)
        if self.empty_groups == "block":
            full = num_local * self.align(max(per_expert, 1))
            spread = num_local * self.alignment + self._align_down(max(live - 1, 0))
        else:
            full = num_local * self.align(per_expert)
            spread = self._align_down(live + (self.alignment - 1) * min(num_local, live))
        return min(full, spread)

    def _align_down(self, num_rows: int) -> int:
        return num_rows // self.alignment * self.alignment


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: object, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not lowest <= value <= MAX_INT32:
        raise ValueError(f"{name} must be between {lowest} and {MAX_INT32}, got {value}")


def _check_capacity(name: str, value: object, lowest: int) -> None:
    if value is None:
        return
    if isinstance(value, float):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} as a factor must be positive and finite, got {value}")
    elif isinstance(value, int) and not isinstance(value, bool):
        _check_int(name, value, lowest)
    else:
        raise TypeError(f"{name} must be None, an int (rows) or a float (factor), got {value!r}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def axis_tuple(value: Any) -> tuple[str, ...] | None:
    """One mesh axis, or different ones, as a tuple; None for anything else."""
    names: Any = (value,) if isinstance(value, str) else value
    is_names = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_names and len({*names}) == len(names) else None


def _normal_axis_name(value: Any) -> str | tuple[str, ...]:
    names = axis_tuple(value)
    if names is None:
        raise TypeError(
            f"axis_name must be a mesh axis name or a tuple of different ones, () for one rank, "
            f"got {value!r}"
        )
    return value if isinstance(value, str) else names
