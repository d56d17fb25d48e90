"""Every error, by its text: it names the op, what was given, and what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from helpers import (
    AXIS,
    IMPLEMENTATIONS,
    Case,
    make_mesh,
    on_ranks,
    planner,
    run_plan,
)

import jax_moe_ep as ep

CASE = Case(T=4, K=2, E=4, R=2, H=4)
IDS = np.zeros((2, 4, 2), np.int32)


def a_plan(**options):
    return run_plan(dataclasses.replace(CASE, **options), IDS)


def run_on_two(op, *args):
    return on_ranks(op, make_mesh(2))(*args)


# plan.


def plan_with(ids, priority=None, **options):
    return run_on_two(planner(dataclasses.replace(CASE, **options).config()), ids, priority)


@pytest.mark.parametrize("dtype", [np.uint32, np.int16, np.float32])
def test_ids_of_another_dtype(dtype):
    message = f"jax_moe_ep.plan: topk_idx must be int32 or int64, got {np.dtype(dtype)}. "
    with raises(TypeError, message):
        plan_with(IDS.astype(dtype))


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1), (4, 0)])
def test_ids_of_another_shape(shape):
    message = f"jax_moe_ep.plan: topk_idx must be [T, K] with K >= 1, got shape {shape}"
    with raises(ValueError, message, "Reshape a batch [B, S, K] to [B*S, K]"):
        plan_with(np.zeros((2, *shape), np.int32))


def test_experts_not_a_multiple_of_the_ranks():
    message = f"num_experts=5 is not a multiple of the 2 ranks of axis '{AXIS}'"
    with raises(ValueError, "jax_moe_ep.plan:", message):
        plan_with(IDS, E=5)


def test_axis_that_is_not_bound():
    with raises(ValueError, "jax_moe_ep.plan: axis 'expert' is not bound", "jax.shard_map"):
        ep.plan(IDS[0], CASE.config())
    with raises(ValueError, "is not bound", "or use axis_name=() for one rank"):
        ep.plan(IDS[0], CASE.config())
    with raises(ValueError, "jax_moe_ep.plan: axis 'other' is not bound"):
        run_on_two(planner(CASE.config(axis_name="other")), IDS)
    with raises(ValueError, "jax_moe_ep.plan: axis ('expert', 'other') is not bound"):
        run_on_two(planner(CASE.config(axis_name=(AXIS, "other"))), IDS)


@pytest.mark.parametrize(
    "op",
    [
        lambda plan: ep.dispatch(IDS[0], plan),
        lambda plan: ep.combine(np.zeros((8, 4), np.float32), plan),
        lambda plan: ep.row_weights(np.zeros((4, 2), np.float32), plan),
        ep.row_sources,
        ep.stats,
    ],
    ids=["dispatch", "combine", "row_weights", "row_sources", "stats"],
)
def test_ops_outside_shard_map(op, request):
    plan = jax.tree.map(lambda leaf: leaf[0], a_plan())
    name = request.node.callspec.id
    with raises(ValueError, f"jax_moe_ep.{name}: axis 'expert' is not bound", "shard_map"):
        op(plan)


def test_config_of_another_type():
    with raises(TypeError, "jax_moe_ep.plan: config must be an EpConfig, got 4"):
        run_on_two(lambda ids: ep.plan(ids, 4), IDS)


def test_priority_without_its_policy_and_the_policy_without_priority():
    priority = np.zeros(IDS.shape, np.float32)
    with raises(ValueError, "priority is given, but drop_policy='position' does not use it"):
        plan_with(IDS, priority)
    with raises(ValueError, "jax_moe_ep.plan: drop_policy='priority' needs priority, [T, K]"):
        plan_with(IDS, drop_policy="priority")


def test_priority_of_another_dtype_or_shape():
    with raises(TypeError, "jax_moe_ep.plan: priority must be floating, got int32"):
        plan_with(IDS, IDS, drop_policy="priority")
    with raises(ValueError, "priority must have the shape of topk_idx, (4, 2), got (4, 3)"):
        plan_with(IDS, np.zeros((2, 4, 3), np.float32), drop_policy="priority")


def test_blocks_that_do_not_fit():
    """2 local experts with a block of 8 each need 16 rows."""
    message = "capacity=15 gives 15 rows, but empty_groups='block' needs a block of 8 for each of"
    with raises(ValueError, "jax_moe_ep.plan:", message, "2 local experts"):
        plan_with(IDS, A=8, capacity=15, empty_groups="block")
    assert plan_with(IDS, A=8, capacity=16, empty_groups="block").capacity == 16


def test_row_numbers_beyond_int32():
    """R*T*K = 2 * 2^20 * 2^10 = 2^31 assignments; only shapes are needed to refuse them."""
    ids = jax.ShapeDtypeStruct((2, 2**20, 2**10), jnp.int32)
    plan = on_ranks(planner(CASE.config()), make_mesh(2))
    with raises(ValueError, "jax_moe_ep.plan: R*T*K = 2*1048576*1024", "2147483647", "Split"):
        plan.trace(ids)


# The other ops.


@pytest.mark.parametrize("op", [ep.dispatch, ep.combine, ep.row_weights, ep.row_sources, ep.stats])
def test_something_else_than_a_plan(op):
    name = op.__name__
    args = (IDS,) if name in ("row_sources", "stats") else (np.zeros((2, 4, 2), np.float32), IDS)
    with raises(TypeError, f"jax_moe_ep.{name}: plan must be a Plan, got "):
        run_on_two(op, *args)


@pytest.mark.parametrize("op", [ep.dispatch, ep.combine, ep.row_weights, ep.row_sources, ep.stats])
def test_plan_of_another_number_of_ranks(op):
    plan = jax.tree.map(lambda leaf: leaf[:1], a_plan())
    takes_plan_only = op in (ep.row_sources, ep.stats)
    args = (plan,) if takes_plan_only else (np.zeros((1, 4, 2), np.float32), plan)
    message = f"jax_moe_ep.{op.__name__}: the plan was made for 2 ranks, but axis 'expert' has 1"
    with raises(ValueError, message):
        on_ranks(op, make_mesh(1))(*args)


@pytest.mark.parametrize("op", [ep.dispatch, ep.combine, ep.row_weights, ep.row_sources, ep.stats])
def test_plans_that_are_stacked(op):
    """Of two layers, not yet taken apart: rows of the first would hold tokens of the second."""
    plan = jax.tree.map(lambda leaf: leaf[:, None], a_plan())
    takes_plan_only = op in (ep.row_sources, ep.stats)
    args = (plan,) if takes_plan_only else (np.zeros((2, 4, 2), np.float32), plan)
    message = f"jax_moe_ep.{op.__name__}: slots of the plan must have shape (8, 2), got (1, 8, 2)"
    with raises(ValueError, message, "jax.tree.map(lambda a: a[i], plan)"):
        run_on_two(op, *args)


def test_arrays_of_a_plan_that_do_not_fit():
    plan = ep.plan(IDS[0], ep.EpConfig(4, ()))
    for name, shape in (("owners", (4, 2)), ("group_sizes", (4,)), ("source_counts", (1, 4))):
        wrong = dataclasses.replace(plan, **{name: getattr(plan, name)[None]})
        with raises(ValueError, f"{name} of the plan must have shape {shape}, got {(1, *shape)}"):
            ep.row_sources(wrong)


def test_axes_of_stats():
    plan = ep.plan(IDS[0], ep.EpConfig(4, ()))
    with raises(ValueError, "jax_moe_ep.stats: axis 'other' is not bound here", "jax.shard_map"):
        ep.stats(plan, axis_name="other")
    for axis_name in (3, (AXIS, AXIS)):
        with raises(TypeError, "jax_moe_ep.stats: axis_name must be a mesh axis name", "got"):
            ep.stats(plan, axis_name=axis_name)


def test_tokens_of_another_number():
    message = "jax_moe_ep.dispatch: x must be [T, ...] with T = 4 as in the plan, got shape"
    with raises(ValueError, message, "(5, 3)"):
        run_on_two(ep.dispatch, np.zeros((2, 5, 3), np.float32), a_plan())
    with raises(ValueError, message, "()"):
        run_on_two(ep.dispatch, {"a": np.zeros((2, 4)), "b": np.zeros(2)}, a_plan())


def test_rows_of_another_number():
    plan = a_plan()
    message = f"jax_moe_ep.combine: y must be [C, ...] with C = {plan.capacity} as in the plan"
    with raises(ValueError, message, "(4, 3)"):
        run_on_two(ep.combine, np.zeros((2, 4, 3), np.float32), plan)


def test_rows_of_another_dtype():
    plan = a_plan()
    for dtype in (np.int32, np.bool_, np.complex64):
        y = np.zeros((2, plan.capacity, 4), dtype)
        with raises(TypeError, "y must be floating with at most 32 bits, got", "Convert y"):
            run_on_two(ep.combine, y, plan)
    with jax.enable_x64(True), raises(TypeError, "at most 32 bits, got float64"):
        run_on_two(ep.combine, np.zeros((2, plan.capacity, 4), np.float64), plan)


def test_the_gradient_of_wide_tokens_is_refused_in_its_own_name():
    plan = ep.plan(IDS[0], ep.EpConfig(4, ()))
    with jax.enable_x64(True):
        for dtype in (np.float64, np.complex128):
            _, pull = jax.vjp(lambda x: ep.dispatch(x, plan), jnp.zeros((4, 4), dtype))
            message = "jax_moe_ep.dispatch: for a gradient, "
            with raises(TypeError, message, "x must be", "32 bits, got float64", "Convert x"):
                pull(jnp.zeros((plan.capacity, 4), dtype))


@pytest.mark.parametrize("op", [ep.combine, ep.row_weights])
def test_weights_of_another_shape_or_dtype(op):
    plan, name = a_plan(), op.__name__
    first = (np.zeros((2, plan.capacity, 4), np.float32),) if op is ep.combine else ()

    def call(weights):
        order = (*first, plan, weights) if op is ep.combine else (weights, plan)
        return run_on_two(op, *order)

    message = f"jax_moe_ep.{name}: topk_weights must be [T, K] = (4, 2) as in the plan, got (4, 3)"
    with raises(ValueError, message):
        call(np.zeros((2, 4, 3), np.float32))
    with raises(TypeError, f"jax_moe_ep.{name}: topk_weights must be floating, got int32"):
        call(IDS)


# vmap.


def vmapped(op):
    """The op on two batches per rank."""
    return {
        "plan": lambda: run_on_two(
            jax.vmap(lambda ids: ep.plan(ids, CASE.config("auto"))), np.stack([IDS] * 2, 1)
        ),
        "dispatch": lambda: run_on_two(
            lambda x, plan: jax.vmap(lambda x: ep.dispatch(x, plan))(x),
            np.zeros((2, 3, 4, 2), np.float32),
            a_plan(),
        ),
        "combine": lambda: run_on_two(
            lambda y, plan, w: jax.vmap(lambda w: ep.combine(y, plan, w))(w),
            np.zeros((2, a_plan().capacity, 2), np.float32),
            a_plan(),
            np.zeros((2, 3, 4, 2), np.float32),
        ),
        "combine_backward": lambda: run_on_two(
            lambda y, plan, w, dout: jax.vmap(
                jax.vjp(lambda y, w: ep.combine(y, plan, w), y, w)[1]
            )(dout),
            np.zeros((2, a_plan().capacity, 2), np.float32),
            a_plan(),
            np.zeros((2, 4, 2), np.float32),
            np.zeros((2, 3, 4, 2), np.float32),
        ),
        "row_weights": lambda: run_on_two(
            lambda w, plan: jax.vmap(lambda w: ep.row_weights(w, plan))(w),
            np.zeros((2, 3, 4, 2), np.float32),
            a_plan(),
        ),
        "row_weights_backward": lambda: run_on_two(
            lambda w, plan, drow: jax.vmap(jax.vjp(lambda w: ep.row_weights(w, plan), w)[1])(drow),
            np.zeros((2, 4, 2), np.float32),
            a_plan(),
            np.zeros((2, 3, a_plan().capacity), np.float32),
        ),
    }[op]


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_vmap_is_refused(op):
    message = f"jax_moe_ep.{op} cannot be vmapped"
    with raises(NotImplementedError, message, "Reshape [B, S, ...] to [B*S, ...]"):
        vmapped(op)()
