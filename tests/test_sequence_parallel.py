"""Sequence parallelism around an MoE layer: split, mask, plan, dispatch, experts, combine, merge.

Requirements D1 to D7 and A8. Expected values are NumPy's, in float32: the experts have products
only, rounded one by one, and two terms a token sum to the same in any order: all is bitwise.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    AXIS,
    NUM_RANKS,
    Case,
    assert_bitwise_equal,
    assert_close,
    collect,
    devices,
    make_floats,
    make_ids,
    sizes,
    spread,
)
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

H, K, E = 4, 2, 8


def mesh_of(*shape):
    names = {1: (AXIS,), 2: ("a", "b")}[len(shape)]
    return Mesh(np.array(devices(math.prod(shape))).reshape(shape), names)


def experts(rows, plan):
    """(e + 1) times the row, half of that where it is negative, as expert e."""
    expert = jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(plan.capacity), side="right")
    expert += jax.lax.axis_index(plan.config.axis_name) * plan.num_local_experts
    return rows * jnp.where(rows > 0, 1, 0.5) * (expert[:, None] + 1)


def layer(x, ids, weights, is_given, *, split, config, pad="none", order="after"):
    """[T, H] -> [T, H] and the Stats over all ranks; is_given masks tokens beside the pads."""
    num_tokens = x.shape[0]
    parts, is_real = ep.split_tokens((x, ids, weights, is_given), split)
    x, ids, weights, is_given = parts
    ids, weights = ep.mask_routing(ids, weights, is_real & is_given, pad=pad)
    plan = ep.plan(ids, config)
    rows = ep.dispatch(x, plan)
    if order == "before":
        out = ep.combine(experts(rows * ep.row_weights(weights, plan)[:, None], plan), plan)
    else:
        out = ep.combine(experts(rows, plan), plan, weights)
    return ep.merge_tokens(out, split, size=num_tokens), ep.stats(plan, axis_name=split)


def inputs(num_tokens, num_real=None, seed=0, maker="uniform"):
    """x, ids, weights and is_given of num_tokens, the ones after num_real NaN and masked."""
    num_real = num_tokens if num_real is None else num_real
    ids = make_ids(maker, Case(T=num_real, K=K, E=E, R=1), seed)[0]
    x, weights = make_floats(num_real, H, seed=seed), make_floats(num_real, K, seed=seed + 1)
    more = num_tokens - num_real
    return (
        np.pad(x, ((0, more), (0, 0)), constant_values=np.nan),
        np.pad(ids, ((0, more), (0, 0)), constant_values=E // 2),
        np.pad(weights, ((0, more), (0, 0)), constant_values=np.nan),
        np.arange(num_tokens) < num_real,
    )


def expected(x, ids, weights, dout, is_kept=True):
    """out and dx of the layer: sums of two terms, which no order changes; +0 where none is kept."""
    slope = np.where(x > 0, np.float32(1), np.float32(0.5))
    is_kept = np.broadcast_to(is_kept, ids.shape)
    out, dx = np.zeros_like(x), np.zeros_like(x)
    for k in range(K):
        scale, w = ids[:, k, None].astype(np.float32) + 1, weights[:, k, None]
        out += np.where(is_kept[:, k, None], w * (x * slope * scale), 0)
        dx += np.where(is_kept[:, k, None], w * dout * scale * slope, 0)
    return out, dx


# The mesh, the sequence axis, the EP axis, the axis of other batches. 8 CPU devices serve where
# there are no more than two GPUs.
MOST = NUM_RANKS if NUM_RANKS > 2 else 8
WIDE, TALL = (2, MOST // 2), (MOST // 2, 2)
LAYOUTS = {
    "one_rank": ((1,), AXIS, AXIS, None),
    "two_ranks": ((2,), AXIS, AXIS, None),
    "same_axis": ((MOST,), AXIS, AXIS, None),
    "same_axes": (WIDE, ("a", "b"), ("a", "b"), None),
    "ep_is_a_part": (WIDE, ("a", "b"), "b", None),
    "sequence_is_a_part": (TALL, "b", ("a", "b"), "a"),
    "different_axes": (TALL, "a", "b", "b"),
}


@pytest.mark.parametrize(
    "layout", [n for n, (shape, *_) in LAYOUTS.items() if sizes(math.prod(shape))]
)
def test_layer_over_every_kind_of_axes(layout):
    """D1, D3, D5, D6: results and input gradients do not depend on ranks, pads or masked tokens.

    5 real tokens alone, the same before 6 masked ones full of NaN, and 11 real ones: 0 to 5 pads.
    """
    shape, split, group, data = LAYOUTS[layout]
    config = ep.EpConfig(E, group, alignment=2, tail="undefined")
    num_batches = shape[("a", "b").index(data)] if data else 1

    def step(args, dout):
        x, *rest = jax.tree.map(lambda leaf: leaf[0], args)
        out, pull, stats = jax.vjp(
            lambda x: layer(x, *rest, split=split, config=config), x, has_aux=True
        )
        return jax.tree.map(lambda leaf: leaf[None], (out, pull(dout[0])[0])), stats.expert_counts

    def steps(*pairs):
        return [step(*pair) for pair in pairs]

    cases = [(5, 5), (11, 5), (11, 11)]
    batches = [
        jax.tree.map(lambda *leaves: np.stack(leaves), *[inputs(*c, i) for i in range(num_batches)])
        for c in cases
    ]
    douts = [make_floats(num_batches, T, H, seed=7) for T, _ in cases]
    specs = [((P(data), P(data)), P())] * len(cases)
    run = jax.shard_map(steps, mesh=mesh_of(*shape), in_specs=P(data), out_specs=specs)
    results = collect(jax.jit(run)(*zip(batches, douts, strict=True)))
    for (_, num_real), args, dout, ((out, dx), counts) in zip(
        cases, batches, douts, results, strict=True
    ):
        real = np.s_[:, :num_real]
        for i in range(num_batches):
            x, ids, weights = (leaf[i, :num_real] for leaf in args[:3])
            expected_out, expected_dx = expected(x, ids, weights, dout[i, :num_real])
            assert_bitwise_equal(out[i, :num_real], expected_out, "out")
            assert_bitwise_equal(dx[i, :num_real], expected_dx, "gradient")
        assert_bitwise_equal(out[:, num_real:], np.zeros_like(out[:, num_real:]), "masked out")
        assert_bitwise_equal(dx[:, num_real:], np.zeros_like(dx[:, num_real:]), "masked gradient")
        assert counts.tolist() == np.bincount(args[1][real].reshape(-1), minlength=E).tolist()


def run_layer(num_ranks, *args, config=None, **options):
    """The layer on one axis that is both, and the Stats."""
    config = ep.EpConfig(E, AXIS) if config is None else config

    def run(*args):
        return layer(*args, split=AXIS, config=config, **options)

    run = jax.shard_map(run, mesh=mesh_of(num_ranks), in_specs=P(), out_specs=P())
    return collect(jax.jit(run)(*args))


@pytest.mark.parametrize("num_tokens", [0, 4, 5])
def test_result_types_do_not_depend_on_the_number_of_tokens(num_tokens):
    """Under check_vma the part and its mask differ between the ranks of the sequence, with pads or
    none; what is merged, nothing included, only on the axis of the batches, here b."""
    seen = {}

    def program(x):
        part, is_real = ep.split_tokens(x, "a")
        merged = ep.merge_tokens(part, "a", size=num_tokens)
        results = {"part": part, "is_real": is_real, "merged": merged}
        for name, leaf in results.items():
            seen[name] = jax.typeof(leaf).manual_axis_type.varying
        return results

    mesh = AbstractMesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    out_specs = {"part": P(("a", "b")), "is_real": P("a"), "merged": P("b")}
    run = jax.shard_map(program, mesh=mesh, in_specs=P("b"), out_specs=out_specs)
    jax.eval_shape(run, np.zeros((2 * num_tokens, H), np.float32))
    assert seen == {"part": {"a", "b"}, "is_real": {"a"}, "merged": {"b"}}


@pytest.mark.parametrize("num_ranks", sizes(2, max(NUM_RANKS, 4)))
def test_batches_split_on_the_sequence(num_ranks):
    """D4: 3 batches of 5 tokens. The mask [P] serves [B, P, K] as it is."""
    batch = [inputs(5, seed=seed) for seed in range(3)]
    x, ids, weights, _ = (np.stack(leaf) for leaf in zip(*batch, strict=True))
    config = ep.EpConfig(E, AXIS)

    def run(*args):
        (x, ids, weights), is_real = ep.split_tokens(args, AXIS, dim=1)
        ids, weights = ep.mask_routing(ids, weights, is_real)
        plan = ep.plan(ids.reshape(-1, K), config)
        y = experts(ep.dispatch(x.reshape(-1, H), plan), plan)
        out = ep.combine(y, plan, weights.reshape(-1, K)).reshape(x.shape)
        return ep.merge_tokens(out, AXIS, size=5, dim=1)

    run = jax.shard_map(run, mesh=mesh_of(num_ranks), in_specs=P(), out_specs=P())
    outs = collect(jax.jit(run)(x, ids, weights))
    for out, (x_b, ids_b, weights_b, _) in zip(outs, batch, strict=True):
        assert_bitwise_equal(out, expected(x_b, ids_b, weights_b, x_b)[0])


@pytest.mark.parametrize("num_ranks", sizes(1, 2, MOST))
def test_pads_change_no_load_and_no_drop(num_ranks):
    """D2: 11 tokens, at most 3 rows an expert: the first 3 by token stay, however many pads.

    On 2, 4 and 8 ranks there are 1, 1 and 5 pads, of the last rank's tokens or whole ranks.
    """
    args = inputs(11, maker="skewed")
    x, ids, weights, _ = args
    rank_in_expert = np.zeros_like(ids)
    for e in range(E):
        rank_in_expert[ids == e] = np.arange((ids == e).sum())
    is_kept = rank_in_expert < 3
    config = ep.EpConfig(E, AXIS, expert_capacity=3)
    out, stats = run_layer(num_ranks, *args, config=config)
    assert_bitwise_equal(out, expected(x, ids, weights, x, is_kept)[0])
    assert stats.expert_counts.tolist() == np.bincount(ids[is_kept], minlength=E).tolist()
    assert stats.num_dropped == (~is_kept).sum() > 0
    assert stats.num_assignments == ids.size


@pytest.mark.parametrize("num_ranks", sizes(2, MOST))
def test_pads_at_expert_0(num_ranks):
    """D2: the option loads expert 0 with K rows for each pad; real rows stay the same."""
    args = inputs(11)
    x, ids, weights, _ = args
    config = ep.EpConfig(E, AXIS, distinct_experts=False)
    out, stats = run_layer(num_ranks, *args, config=config, pad="expert0")
    assert_bitwise_equal(out, expected(x, ids, weights, x)[0])
    counts = np.bincount(ids.reshape(-1), minlength=E)
    counts[0] += -len(ids) % num_ranks * K  # 1, 1 or 5 pads
    assert stats.expert_counts.tolist() == counts.tolist()


@pytest.mark.parametrize("num_ranks", sizes(2, MOST))
def test_ranks_with_different_numbers_of_tokens(num_ranks):
    """A8, D6: 0 to 4 real tokens a rank, chosen by a mask; NaN in the others and the tail.

    Only real assignments have rows: Stats counts no other, and the masked places of the result and
    of each gradient are +0.
    """
    numbers = {2: (3, 0), 4: (4, 0, 1, 3), 8: (4, 0, 1, 3, 0, 2, 4, 0)}
    R, num_real = num_ranks, numbers[num_ranks]
    case = Case(T=4, K=K, E=E, R=R)
    is_real = np.arange(4) < np.array(num_real)[:, None]
    masked = ~is_real[..., None]
    ids = make_ids("uniform", case)
    x, dout, weights = (
        np.where(masked, np.float32(np.nan), make_floats(R, 4, size, seed=seed))
        for seed, size in enumerate((H, H, K))
    )
    config = ep.EpConfig(E, AXIS, tail="undefined")

    def masked_layer(x, weights, ids, is_real):
        ids, weights = ep.mask_routing(ids, weights, is_real)
        plan = ep.plan(ids, config)
        return ep.combine(experts(ep.dispatch(x, plan), plan), plan, weights), ep.stats(plan)

    def step(*args):
        x, weights, dout, *routing = (leaf[0] for leaf in args)
        out, pull, stats = jax.vjp(
            lambda x, weights: masked_layer(x, weights, *routing), x, weights, has_aux=True
        )
        return jax.tree.map(lambda leaf: leaf[None], (out, *pull(dout))), stats

    mesh = mesh_of(R)
    run = jax.shard_map(step, mesh=mesh, in_specs=P(AXIS), out_specs=(P(AXIS), P()))
    args = spread((x, weights, dout, ids, is_real), mesh)
    (out, dx, dweights), stats = collect(jax.jit(run)(*args))
    real_out, real_dx = expected(*(each[is_real] for each in (x, ids, weights, dout)))
    assert_bitwise_equal(out[is_real], real_out, "out")
    assert_bitwise_equal(dx[is_real], real_dx, "gradient")
    for name, leaf in (("out", out), ("dx", dx), ("dweights", dweights)):
        assert_bitwise_equal(leaf[~is_real], np.zeros_like(leaf[~is_real]), f"masked {name}")
    assert (np.asarray(dweights)[is_real] != 0).all()
    assert stats.num_assignments == sum(num_real) * K
    assert stats.expert_counts.tolist() == np.bincount(ids[is_real].ravel(), minlength=E).tolist()


@pytest.mark.parametrize("num_ranks", sizes(2, max(NUM_RANKS, 4)))
def test_weights_before_or_after_the_experts(num_ranks):
    """D7: row_weights on the rows and a plain combine, or a weighted combine: one rounding apart.

    The experts are linear for positive weights. After is the default and exact in float32.
    """
    x, ids, weights, is_given = inputs(11)
    weights = np.abs(weights)
    after, _ = run_layer(num_ranks, x, ids, weights, is_given)
    before, _ = run_layer(num_ranks, x, ids, weights, is_given, order="before")
    assert_bitwise_equal(after, expected(x, ids, weights, x)[0])
    assert_close(before, after)


@pytest.mark.parametrize("num_ranks", sizes(*{2, NUM_RANKS}))
def test_weights_after_the_experts_are_float32(num_ranks):
    """D7: one bf16 row a token, its product with a float32 weight rounded once.

    1 + 2^-7 times 1 + 2^-8 is 1 + 2^-7 + 2^-8 + 2^-15, which rounds up to 1 + 2^-6; a weight
    rounded to bf16 first would be 1 and give 1 + 2^-7. Rows of 16 bytes, as the kernels want.
    """
    x = np.full((3, 8), 1 + 2.0**-7, jnp.bfloat16)
    ids = np.zeros((3, 1), np.int32)
    weights = np.full((3, 1), 1 + 2.0**-8, np.float32)
    out, _ = run_layer(num_ranks, x, ids, weights, np.ones(3, bool))
    assert_bitwise_equal(out, np.full((3, 8), 1 + 2.0**-6, jnp.bfloat16))
