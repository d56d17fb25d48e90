"""The cases, the routings, and how the tests run an op on every rank and compare bytes.

Arrays of the tests hold one entry per rank in front: ids [R, T, K], x [R, T, H], rows [R, C, H].
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

AXIS = "expert"
FIRST_AXIS = P(AXIS)
DEVICES = jax.devices()

NUM_PROCESSES = jax.process_count()

# Which implementations have which op. "cuda" is tested where the devices are GPUs.
IMPLEMENTATIONS = {
    "plan": ("reference", "cuda"),
    "dispatch": ("reference", "cuda"),
    "combine": ("reference", "cuda"),
    "combine_backward": ("reference", "cuda"),
    "row_weights": ("reference", "cuda"),
    "row_weights_backward": ("reference", "cuda"),
}
ON_GPUS = DEVICES[0].platform == "gpu"

# The ranks of tests that serve any number: all GPUs, or one in each process. Elsewhere two, which
# cost the least.
USES_ALL = ON_GPUS or NUM_PROCESSES > 1
NUM_RANKS = max(n for n in (2, 4, 8) if n == 2 or (USES_ALL and n <= len(DEVICES)))

# How far float32 results may be from the exact value, relative to the sum of magnitudes: n terms
# lose at most n roundings of 2^-24, and no test here sums more than 2^7 terms. bf16 and fp16
# results add half a unit of their last place, 2^-9 and 2^-12, once for every cast on the way.
TOLERANCE = {"float32": 2.0**-17, "bfloat16": 2.0**-7, "float16": 2.0**-10}


# For tests that need all devices in this process.
one_process = pytest.mark.skipif(NUM_PROCESSES > 1, reason="runs in one process only")


def sizes(*num_ranks: int) -> list[int]:
    """Those that all processes can run together: one without a rank could not help."""
    return [n for n in num_ranks if NUM_PROCESSES == 1 or n == len(DEVICES)]


def _runs(implementation: str, num_ranks: int) -> bool:
    if not sizes(num_ranks):
        return False
    return implementation != "cuda" or (ON_GPUS and len(DEVICES) >= num_ranks)


def each_implementation(
    op: str, num_ranks: int = NUM_RANKS, name: str = "implementation"
) -> pytest.MarkDecorator:
    """Runs a test on `num_ranks` ranks once for every implementation that can run the op here."""
    names = [i for i in IMPLEMENTATIONS[op] if _runs(i, num_ranks)]
    return pytest.mark.parametrize(name, names)


def each_size(op: str, num_ranks: Iterable[int]) -> pytest.MarkDecorator:
    """Runs a test for numbers of ranks with every implementation that can run the op there."""
    pairs = [(r, i) for r in num_ranks for i in IMPLEMENTATIONS[op] if _runs(i, r)]
    return pytest.mark.parametrize(("num_ranks", "implementation"), pairs)


def each_case(op: str, names: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Runs a test for CASES, by name, with every implementation that can run the op here."""
    chosen = set(CASES if names is None else names)
    pairs = [
        (name, implementation)
        for name in CASES
        for implementation in IMPLEMENTATIONS[op]
        if name.removesuffix(ALONE).removesuffix(TOGETHER) in chosen
        and _runs(implementation, CASES[name].R)
    ]
    return pytest.mark.parametrize(("name", "implementation"), pairs)


@dataclasses.dataclass(frozen=True)
class Case:
    """The static side of a test: the letters of Plan, the alignment A, and other options."""

    T: int
    K: int
    E: int
    R: int
    A: int = 1
    H: int = 16  # every dtype then has rows of a multiple of 16 bytes, as the kernels want
    capacity: int | float | None = None
    expert_capacity: int | float | None = None
    drop_policy: Any = "position"
    distinct_experts: bool = True
    empty_groups: Any = "none"
    tail: Any = "zero"

    @property
    def num_local(self) -> int:
        return self.E // self.R

    def config(self, implementation: Any = "reference", axis_name: Any = AXIS) -> ep.EpConfig:
        return ep.EpConfig(
            self.E,
            axis_name,
            alignment=self.A,
            capacity=self.capacity,
            expert_capacity=self.expert_capacity,
            drop_policy=self.drop_policy,
            distinct_experts=self.distinct_experts,
            empty_groups=self.empty_groups,
            tail=self.tail,
            implementation=implementation,
        )


CASES = {
    "two_ranks": Case(T=6, K=2, E=8, R=2),
    "one_rank": Case(T=7, K=2, E=4, R=1, A=4),
    "k_beyond_local": Case(T=4, K=5, E=8, R=4, A=2),
    "one_expert_a_rank": Case(T=3, K=3, E=8, R=8, A=8),
    "k_equals_e": Case(T=4, K=4, E=4, R=2),
    "one_token": Case(T=1, K=1, E=2, R=2, A=16),
    "no_tokens": Case(T=0, K=2, E=4, R=2, A=4, empty_groups="block"),
    "blocks": Case(T=5, K=2, E=12, R=4, A=4, empty_groups="block"),
    "duplicates": Case(T=5, K=6, E=4, R=2, A=2, distinct_experts=False),
    "capped": Case(T=8, K=3, E=8, R=2, A=4, capacity=20),
    "no_rows": Case(T=3, K=2, E=4, R=2, capacity=0),
    "capped_blocks": Case(T=6, K=2, E=6, R=2, A=4, capacity=16, empty_groups="block"),
    "half": Case(T=8, K=2, E=8, R=4, A=2, capacity=0.5),
    "mean_per_expert": Case(T=6, K=3, E=6, R=2, A=4, expert_capacity=1.25),
    "priority": Case(T=8, K=3, E=8, R=4, A=2, capacity=10, drop_policy="priority"),
    "priority_per_expert": Case(
        T=6, K=2, E=4, R=2, expert_capacity=2, drop_policy="priority", tail="undefined"
    ),
}

# The same on one rank, where the kernels can be compared; and on all GPUs or processes, of which
# the cases as they stand leave some out.
ALONE, TOGETHER = "_alone", f"_on_{NUM_RANKS}"


def on_all(case: Case) -> Case:
    """The case on NUM_RANKS ranks, with as many experts on each; K stays E where it was."""
    num_experts = case.num_local * NUM_RANKS
    top_k = num_experts if case.K == case.E else case.K
    return dataclasses.replace(case, R=NUM_RANKS, E=num_experts, K=top_k)


_of_any_size = tuple(CASES.items())
if ON_GPUS:
    CASES |= {
        name + ALONE: dataclasses.replace(case, R=1, E=case.num_local)
        for name, case in _of_any_size
    }
if USES_ALL and len(DEVICES) >= NUM_RANKS:
    CASES |= {name + TOGETHER: on_all(case) for name, case in _of_any_size if case.R != NUM_RANKS}


# Routings: ids [R, T, K].


def _distinct(case: Case, rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """K different experts a token, likelier with larger logits; -1 once there are no more."""
    scores = logits + rng.gumbel(size=(case.R, case.T, case.E))
    best = np.argsort(-scores, axis=-1)[..., : case.K]
    ids = np.where(np.isneginf(np.take_along_axis(scores, best, -1)), -1, best)
    missing = np.full((case.R, case.T, max(case.K - case.E, 0)), -1)
    return np.concatenate([ids, missing], -1)


def uniform(case: Case, rng: np.random.Generator) -> np.ndarray:
    return _distinct(case, rng, np.zeros(case.E))


def skewed(case: Case, rng: np.random.Generator) -> np.ndarray:
    return _distinct(case, rng, -2 * np.log1p(np.arange(case.E)))


def one_expert(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Every token goes to the same expert, and nowhere else."""
    ids = np.full((case.R, case.T, case.K), -1)
    ids[..., rng.integers(case.K)] = case.E // 2
    return ids


def one_rank(case: Case, rng: np.random.Generator) -> np.ndarray:
    """As many assignments as different experts allow go to the last rank."""
    return _distinct(case, rng, np.where(np.arange(case.E) < case.E - case.num_local, -np.inf, 0))


def empty_expert(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Nobody chooses the first and the last expert."""
    is_empty = np.isin(np.arange(case.E), (0, case.E - 1))
    return _distinct(case, rng, np.where(is_empty, -np.inf, 0))


def masked(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Every kind of id that is no expert; rank r has its first tokens only, the last rank none."""
    ids = uniform(case, rng)
    nobody = rng.choice([-1, -7, case.E, case.E + 3, 2**31 - 1, -(2**31)], ids.shape)
    ids = np.where(rng.random(ids.shape) < 0.3, nobody, ids)
    for rank in range(1, case.R):
        ids[rank, case.T * (case.R - 1 - rank) // (case.R - 1) :] = -1
    return ids


def random(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Any experts, the same one several times in a token."""
    return rng.integers(0, case.E, (case.R, case.T, case.K))


MAKERS = {m.__name__: m for m in (uniform, skewed, one_expert, one_rank, empty_expert, masked)}
MAKERS["random"] = random


def make_ids(maker: str, case: Case, seed: int = 0) -> np.ndarray:
    return MAKERS[maker](case, np.random.default_rng(seed)).astype(np.int32)


def make_priority(case: Case, seed: int = 0) -> np.ndarray | None:
    """[R, T, K] with many ties, both zeros, infinities and NaN; None where none is used."""
    if case.drop_policy == "position":
        return None
    values = np.array([-np.inf, -1, -0.0, 0.0, 0.5, 2, np.inf, np.nan], np.float32)
    return np.random.default_rng(seed + 1).choice(values, (case.R, case.T, case.K))


def make_floats(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 2).standard_normal(shape).astype(dtype)


def make_bits(*shape: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Any bit patterns, NaN with payloads among them: what only moves must not change."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).copy()


# Running on every rank.


def devices(num_ranks: int) -> list[jax.Device]:
    """The first of the default backend, or CPU devices where that has fewer."""
    found = DEVICES if len(DEVICES) >= num_ranks else jax.devices("cpu")
    return found[:num_ranks]


@functools.cache
def make_mesh(num_ranks: int) -> Mesh:
    return Mesh(np.array(devices(num_ranks)), (AXIS,))


@functools.cache
def on_ranks(
    op: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | tuple[str, ...]] = (AXIS,),
    check_vma: bool = True,
    xla: tuple[tuple[str, bool | int | str], ...] = (),
) -> Callable[..., Any]:
    """op on every rank's shard, jitted with XLA's options; arrays have one leading axis for each
    entry of `axes`."""
    first = (0,) * len(axes)
    ones = (None,) * len(axes)

    def shard(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[ones], op(*jax.tree.map(lambda x: x[first], args)))

    spec = P(*axes)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.jit(mapped, compiler_options=dict(xla) or None)


@functools.cache
def planner(config: ep.EpConfig) -> Callable[..., ep.Plan]:
    """ep.plan with its config, one function for each config so that `on_ranks` compiles once."""
    return lambda ids, priority=None: ep.plan(ids, config, priority=priority)


def spread(tree: Any, mesh: Mesh, spec: P = FIRST_AXIS) -> Any:
    """Arrays of the host on the devices of all processes; each copies the shards of its own."""

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

    return jax.tree.map(put, tree)


def collect(tree: Any) -> Any:
    """Arrays of all processes on the host of each, bit for bit.

    The shards, one of each array in each process, travel as bytes, which no platform changes, in
    one buffer. Its size is a power of two: every other one has to be compiled.
    """
    if NUM_PROCESSES == 1:
        return jax.device_get(tree)
    leaves, treedef = jax.tree.flatten(tree)
    mine = [np.asarray(leaf.addressable_data(0)).reshape(-1).view(np.uint8) for leaf in leaves]
    ends = np.cumsum([part.size for part in mine])
    buffer = np.zeros(1 << int(ends[-1]).bit_length(), np.uint8)
    buffer[: ends[-1]] = np.concatenate(mine)
    landed = multihost_utils.process_allgather(buffer)  # [processes, bytes]

    def whole(leaf: jax.Array, end: int, size: int) -> np.ndarray:
        out = np.empty(leaf.shape, leaf.dtype)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            shard = landed[device.process_index, end - size : end].view(leaf.dtype)
            out[index] = shard.reshape(out[index].shape)
        return out

    sizes = (part.size for part in mine)
    return treedef.unflatten(map(whole, leaves, ends, sizes))


def run_plan(
    case: Case, ids: Any, priority: Any = None, implementation: str = "reference"
) -> ep.Plan:
    """The plans of all ranks: a Plan whose arrays have the rank in front."""
    mesh = make_mesh(case.R)
    run = on_ranks(planner(case.config(implementation)), mesh)
    return collect(run(*spread((ids, priority), mesh)))


def run(
    op: Callable[..., Any],
    plan: ep.Plan,
    *args: Any,
    implementation: str = "reference",
    check_vma: bool = True,
) -> Any:
    """dispatch(x), combine(y[, weights]) or row_weights(weights) on every rank.

    The plan may come from another implementation than the op.
    """
    config = dataclasses.replace(plan.config, implementation=implementation)
    plan = dataclasses.replace(plan, config=config)
    args = (args[0], plan, *args[1:]) if args else (plan,)
    mesh = make_mesh(plan.num_ranks)
    return collect(on_ranks(op, mesh, check_vma=check_vma)(*spread(args, mesh)))


# Comparing.


def assert_bitwise_equal(actual: Any, expected: Any, what: str = "result") -> None:
    """Equal shapes, dtypes and bytes, so that NaN equals itself and -0.0 is not +0.0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    width = (*actual.shape, actual.dtype.itemsize)
    is_different = (_bytes(actual, width) != _bytes(expected, width)).any(-1)
    if is_different.any():
        index = tuple(int(i) for i in np.argwhere(is_different)[0])
        raise AssertionError(
            f"{what}: {is_different.sum()} of {is_different.size} elements differ, first at "
            f"{index}: {actual[index]} ({actual[index].tobytes().hex()}), not "
            f"{expected[index]} ({expected[index].tobytes().hex()})"
        )


def _bytes(x: np.ndarray, width: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(x.tobytes(), np.uint8).reshape(width)


def assert_plans_equal(plan: ep.Plan, expected: dict[str, np.ndarray]) -> None:
    for name, leaf in expected.items():
        assert_bitwise_equal(getattr(plan, name), leaf, name)


def assert_close(actual: Any, expected: Any, dtype: Any = np.float32) -> None:
    """Within TOLERANCE of the largest magnitude expected."""
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=1.0)
    limit = TOLERANCE[jnp.dtype(dtype).name] * scale
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=limit)
