"""The kernels between GPUs where they could go wrong: who waits for whom, what is reused when."""

import dataclasses

import group_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import (
    BASE,
    LONG_DELAY_NS,
    MANY_WEIGHTS,
    R,
    cuda_config,
    layer_of,
    make_inputs,
    needs_gpus,
    no_failure,  # noqa: F401  # of every test here
    run_on,
    set_delay,
    steps_of,
)
from helpers import (
    AXIS,
    Case,
    assert_bitwise_equal,
    collect,
    make_floats,
    make_ids,
    make_mesh,
    on_ranks,
    spread,
)
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import cuda

pytestmark = needs_gpus


def check_steps(steps, case, *args, late=None, num_steps=20):
    """No element is wrong, on any rank, while one is late."""
    program = steps_of(steps, case, num_steps)
    for rank in (None, late):  # first compiled, and the group has met
        set_delay(rank, LONG_DELAY_NS)
        wrong = run_on(make_mesh(R), program, *args, check_vma=False)
        assert wrong.tolist() == [0] * R


each_late = pytest.mark.parametrize("late", [*sorted({0, R // 2, R - 1}), None])


@pytest.mark.parametrize("maker", ["uniform", "one_rank"])
@each_late
def test_tokens_are_not_overwritten_before_they_are_read(late, maker):
    """Edge 5. With one_rank all rows are on the last rank. When that is late, the others need
    nothing of anybody, and the next kernel overwrites x: in one process the end of dispatch must
    wait until x has been read, between processes dispatch must not stage into memory that is read.
    """
    check_steps(group_steps.dispatch_steps, BASE, make_ids(maker, BASE), late=late)


@pytest.mark.parametrize("late", [0, R - 1])
def test_many_tokens_are_not_overwritten_while_they_are_read(late):
    """Edges 4 and 5: 16 MB a rank, whose reading takes longer than all of a small call."""
    case = Case(T=1024, K=1, E=16, R=R, H=4096, capacity=R * 1024)
    check_steps(group_steps.dispatch_steps, case, make_ids("one_rank", case), late=late)


def test_peers_are_told_once_all_tokens_are_there():
    """Edges 1 and 2. Rank 0 is late; only the last 64 of its 4096 tokens have rows, on a rank that
    already waits for them and reads them the moment it is told. Staging 64 MB takes far longer."""
    case = Case(T=4096, K=1, E=16, R=R, H=4096, capacity=R * 64)
    ids = make_ids("one_rank", case)
    ids[:, :-64] = -1
    check_steps(group_steps.dispatch_steps, case, ids, late=0, num_steps=10)


def test_tokens_that_are_written_late_are_waited_for():
    """Edge 1. The reader comes to dispatch while the last kernels that write rank 0's x have not
    been launched: what it finds at the address of the call before is not the tokens."""
    num_slow = np.zeros(R, np.int32)
    num_slow[0] = group_steps.GROWTH
    check_steps(group_steps.slow_dispatch_steps, BASE, make_ids("one_rank", BASE), num_slow)


@pytest.mark.parametrize("maker", ["uniform", "one_rank"])
@pytest.mark.parametrize("case", [BASE, MANY_WEIGHTS], ids=["few", "many"])
@each_late
def test_changing_weights_and_gradients(late, case, maker):
    """Edges 1, 2, 6 and 7: weights and dout of this step, partials and weight gradients of all
    ranks, although a rank is late whose memory still holds those of the last steps. Many weights
    cross in tables."""
    check_steps(group_steps.combine_steps, case, make_ids(maker, case), late=late)


@each_late
def test_calls_that_use_one_half_for_different_things(late):
    """Edge 5. The last rank stages its tokens where the weights of a combine two calls later lie,
    which the others write without waiting for that rank."""
    case = MANY_WEIGHTS
    check_steps(group_steps.mixed_steps, case, make_ids("one_rank", case), late=late)


@pytest.mark.parametrize("num_tokens", [3, 64, 8192])
def test_a_thousand_plans_of_changing_ids(num_tokens):
    """The ids of both parities are overwritten with either rank ahead: 12 words a rank, by one
    block, and 128 KB by several. Rows are exactly where XLA's all_gather has the rank's experts."""
    case = dataclasses.replace(BASE, T=num_tokens)
    config = cuda_config(case)

    def program(ids):
        def step(i, wrong):
            now = (ids + i) % case.E
            everyone = lax.all_gather(now, AXIS, tiled=True)
            is_here = everyone // case.num_local == lax.axis_index(AXIS)
            return wrong + ((ep.plan(now, config).slots >= 0) != is_here).sum()

        return lax.fori_loop(0, 100, step, jnp.zeros((), jnp.int32))

    ids = make_ids("uniform", case)
    for turn in range(10):
        wrong = run_on(make_mesh(R), program, ids, check_vma=False)
        assert wrong.tolist() == [0] * R, turn
        set_delay(turn % R, 20_000)


@pytest.mark.parametrize("num_shapes", [1, 2])
def test_a_thousand_combines_with_changing_rows(num_shapes):
    """The landing areas of both parities are reused with either rank ahead; with two shapes that
    lie differently in one region. Values are small integers: sums are exact."""
    cases = [BASE, dataclasses.replace(BASE, T=24, H=128)][:num_shapes]
    configs = [cuda_config(case) for case in cases]
    ids = [make_ids("uniform", case) for case in cases]

    def program(*ids):
        plans = [ep.plan(i, config) for i, config in zip(ids, configs, strict=True)]

        def step(i, wrong):
            for case, plan in zip(cases, plans, strict=True):
                rank = lax.axis_index(AXIS)
                row = jnp.arange(plan.capacity, dtype=jnp.float32)[:, None] % 13
                y = row + i + rank + jnp.zeros((1, case.H))
                out = ep.combine(y, plan)
                want = jnp.zeros((case.T, case.H))
                landed = lax.all_gather(plan.slots, AXIS).reshape(R, R, case.T, case.K)
                for peer in range(R):
                    slots = landed[peer, rank]
                    value = (slots % 13) + i + peer
                    want += jnp.where(slots >= 0, value, 0).sum(-1, keepdims=True)
                wrong += (out != want).sum()
            return wrong

        return lax.fori_loop(0, 100, step, jnp.zeros((), jnp.int32))

    for turn in range(10):
        wrong = run_on(make_mesh(R), program, *ids, check_vma=False)
        assert wrong.tolist() == [0] * R, turn
        set_delay(turn % R, 20_000)


def test_the_same_bits_on_every_run():
    case = dataclasses.replace(BASE, K=8)
    inputs = make_inputs(case)
    layer = layer_of(cuda_config(case))
    first = run_on(make_mesh(R), layer, *inputs)
    for turn in range(10):
        set_delay(turn if turn < R else None)
        again = run_on(make_mesh(R), layer, *inputs)
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
            assert_bitwise_equal(got, want)


def test_calls_without_a_dependency_between_them():
    """A10: two layers beside each other in one program, with two routings."""
    config = cuda_config(BASE)

    def program(x, first, second):
        plans = [ep.plan(ids, config) for ids in (first, second)]
        return [ep.combine(ep.dispatch(x, plan), plan) for plan in plans]

    x, *_ = make_inputs(BASE)
    ids = [make_ids("uniform", BASE, seed) for seed in (0, 1)]
    for out in run_on(make_mesh(R), program, x, *ids):
        assert_bitwise_equal(out, x * np.float32(BASE.K))


def test_captured_and_replayed_with_other_routings():
    """C3, C5: 200 executions of changing routing with few launches by the host."""
    config = cuda_config(BASE)

    def program(x, ids):
        for _ in range(4):
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan)
        return x

    x = np.round(make_floats(R, BASE.T, BASE.H) * 8)
    mesh = make_mesh(R)
    run = on_ranks(program, mesh)
    routings = [spread(make_ids("uniform", BASE, seed), mesh, P(AXIS)) for seed in range(4)]
    x = spread(x, mesh, P(AXIS))
    want = collect(x) * np.float32(BASE.K**4) + np.float32(0)  # combine has no -0
    assert_bitwise_equal(collect(run(x, routings[0])), want)
    before = cuda.extension("test").num_executions()
    for i in range(200):
        out = run(x, routings[i % 4])
        if i % 20 == 0:
            assert_bitwise_equal(collect(out), want)
    assert_bitwise_equal(collect(out), want)
    executions = cuda.extension("test").num_executions() - before
    assert executions < 200 * 8 * len(jax.local_devices()) / 2


@pytest.mark.parametrize("unroll", [False, True])
def test_a_loop_that_xla_captures(unroll):
    """A hundred layers, forward and backward, of changing routing, as one CUDA graph with a node
    that is the loop's condition or with all iterations; either rank ahead. Sums are exact."""
    config = cuda_config(BASE)
    options = (
        ("xla_gpu_enable_command_buffer", "FUSION,CUSTOM_CALL,WHILE"),
        ("xla_gpu_graph_min_graph_size", 1),
        ("xla_gpu_command_buffer_unroll_loops", unroll),
    )

    def program(x, ids):
        def step(i, wrong):
            plan = ep.plan((ids + i) % BASE.E, config)
            now = x + i
            out, pull = jax.vjp(lambda x: ep.combine(ep.dispatch(x, plan), plan), now)
            (dx,) = pull(now - 3)
            wrong_out, wrong_dx = out != BASE.K * now, dx != BASE.K * (now - 3)
            return wrong + wrong_out.sum() + wrong_dx.sum()

        return lax.fori_loop(0, 100, step, jnp.zeros((), jnp.int32))

    mesh = make_mesh(R)
    run = on_ranks(program, mesh, check_vma=False, xla=options)
    args = spread([np.round(make_floats(R, BASE.T, BASE.H) * 8), make_ids("uniform", BASE)], mesh)
    assert collect(run(*args)).tolist() == [0] * R
    before = cuda.extension("test").num_executions()
    for turn in range(10):
        set_delay(turn % R, 20_000)
        assert collect(run(*args)).tolist() == [0] * R, turn
    executions = cuda.extension("test").num_executions() - before
    assert executions < 10 * 100 * len(jax.local_devices())  # of five times as many calls
