"""Every option: what it does, or the error that says why it cannot."""

import dataclasses
import math
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_calls import calls_of_a_layer
from helpers import (
    AXIS,
    Case,
    make_floats,
    make_ids,
    make_mesh,
    make_priority,
    on_ranks,
    planner,
    run_plan,
)
from jax.sharding import Mesh

import jax_moe_ep as ep
from jax_moe_ep import cuda

CASE = Case(T=6, K=2, E=8, R=2, A=4)


def rows_and_plan(case=CASE, maker="empty_expert"):
    """The rows and the plans of a small layer."""

    def layer(x, ids, priority):
        plan = ep.plan(ids, case.config(), priority=priority)
        return ep.dispatch(x, plan), plan

    run = on_ranks(layer, make_mesh(case.R))
    x = make_floats(case.R, case.T, case.H)
    return jax.device_get(run(x, make_ids(maker, case), make_priority(case)))


def changed(**options):
    return dataclasses.replace(CASE, **options)


# The custom calls of a layer and its gradient: of one rank, and of a group, whose weights are one
# rank's matter once they are gathered.
ROWS = {"dispatch", "combine", "combine_backward", "row_weights", "row_weights_backward"}
GROUP = {f"group_{op}" for op in ("plan", "dispatch", "combine", "combine_backward", "gather")}


def calls_with(attribute, **options):
    """Which custom calls have the attribute in the programs for CUDA of one rank and of two."""
    if not cuda.has_extension():
        pytest.skip("needs the CUDA extension")
    calls = [
        call
        for axes in ((), AXIS)
        for call in calls_of_a_layer(make_mesh(2), axes, CASE, **options)
    ]
    is_in = re.compile(rf"\b{attribute}\b").search
    return {name for name, _ in calls} - {name for name, call in calls if not is_in(call)}


def shows_num_experts():
    plan = run_plan(changed(E=4), make_ids("uniform", CASE))  # 4 to 7 are no experts any more
    ids = make_ids("uniform", CASE)
    return plan.group_counts.shape == (2, 2) and plan.num_assignments.sum() == (ids < 4).sum()


def shows_axis_name():
    mesh = Mesh(np.array(make_mesh(2).devices).reshape(1, 2), ("other", "mine"))
    config = CASE.config(axis_name="mine")
    plan = on_ranks(lambda ids: ep.plan(ids, config), mesh, ("mine",), False)
    return plan(make_ids("uniform", CASE)).num_ranks == 2


def shows_alignment():
    return (rows_and_plan()[1].group_sizes % 4 == 0).all()


def shows_capacity():
    return rows_and_plan(changed(capacity=24))[0].shape == (2, 24, CASE.H)


def shows_expert_capacity():
    return rows_and_plan(changed(expert_capacity=1))[1].group_counts.max() == 1


def shows_drop_policy():
    limited = {"expert_capacity": 1}
    _, by_position = rows_and_plan(changed(**limited))
    _, by_priority = rows_and_plan(changed(**limited, drop_policy="priority"))
    return (by_position.slots != by_priority.slots).any()


def shows_distinct_experts():
    """12 tokens, K = 2, 1 local expert: room for 12 rows, or for 24."""
    case = changed(E=2, A=1)
    twice = dataclasses.replace(case, distinct_experts=False)
    return (rows_and_plan(case)[1].capacity, rows_and_plan(twice)[1].capacity) == (12, 24)


def shows_empty_groups():
    none, block = rows_and_plan()[1], rows_and_plan(changed(empty_groups="block"))[1]
    return none.group_sizes.min() == 0 and block.group_sizes.min() == 4


def shows_tail():
    zero, undefined = rows_and_plan()[0], rows_and_plan(changed(tail="undefined"))[0]
    return np.isfinite(zero).all() and np.isnan(undefined).any()


def shows_implementation():
    run = on_ranks(lambda ids: ep.plan(ids, CASE.config("cuda")), make_mesh(2))
    with pytest.raises(NotImplementedError, match="implementation='cuda' needs CUDA devices"):
        run.trace(make_ids("uniform", CASE)).lower(lowering_platforms=("cpu",))
    return True


def shows_num_sms():
    """A bound of CUDA kernels: given to all of them, refused where it could not be honoured."""
    with pytest.raises(ValueError, match=r"num_sms=8 cannot be honoured with .*'reference'"):
        ep.EpConfig(8, AXIS, num_sms=8, implementation="reference")
    return calls_with("num_sms = 8", num_sms=8) == {"plan"} | ROWS | GROUP


def shows_timeout_s():
    """A bound of CUDA kernels that wait for other ranks, refused where it could not be honoured."""
    with pytest.raises(ValueError, match=r"timeout_s=1.5 cannot be honoured with .*'reference'"):
        ep.EpConfig(8, AXIS, timeout_s=1.5, implementation="reference")
    return calls_with("timeout_ns = 1500000000", timeout_s=1.5) == GROUP


DEMONSTRATIONS = {
    name.removeprefix("shows_"): f for name, f in list(globals().items()) if "shows_" in name
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ep.EpConfig)])
def test_every_option_has_its_effect_or_its_error(name):
    """A9: no option is accepted and ignored; a new field needs its demonstration above."""
    assert DEMONSTRATIONS[name]()


def test_no_demonstration_of_an_option_that_is_gone():
    assert set(DEMONSTRATIONS) == {field.name for field in dataclasses.fields(ep.EpConfig)}


def test_kernels_are_told_of_the_tail():
    """Whether they write it, in every call that makes rows or belongs to a group."""
    assert calls_with("zero_tail = true", tail="zero") == ROWS | GROUP
    assert calls_with("zero_tail = false", tail="undefined") == ROWS | GROUP


def test_no_bound_of_the_blocks_is_the_largest():
    assert calls_with("num_sms = 2147483647") == {"plan"} | ROWS | GROUP


# Errors: (options, error, text).
INVALID = [
    ({"num_experts": 0}, ValueError, "num_experts must be between 1 and 2147483647, got 0"),
    ({"num_experts": 2**31}, ValueError, "num_experts must be between 1 and"),
    ({"num_experts": 8.0}, TypeError, "num_experts must be an int, got 8.0"),
    ({"num_experts": True}, TypeError, "num_experts must be an int, got True"),
    ({"axis_name": None}, TypeError, "axis_name must be a mesh axis name or a tuple of different"),
    ({"axis_name": ("a", "a")}, TypeError, "different ones, () for one rank, got ('a', 'a')"),
    ({"axis_name": 3}, TypeError, "got 3"),
    ({"axis_name": ("a", 3)}, TypeError, "got ('a', 3)"),
    ({"alignment": 0}, ValueError, "alignment must be between 1"),
    ({"alignment": 1.0}, TypeError, "alignment must be an int"),
    ({"capacity": -1}, ValueError, "capacity must be between 0 and 2147483647, got -1"),
    ({"capacity": 0.0}, ValueError, "capacity as a factor must be positive and finite, got 0.0"),
    ({"capacity": math.inf}, ValueError, "capacity as a factor must be positive and finite"),
    ({"capacity": math.nan}, ValueError, "capacity as a factor must be positive and finite"),
    ({"capacity": "all"}, TypeError, "capacity must be None, an int (rows) or a float (factor)"),
    ({"capacity": True}, TypeError, "capacity must be None, an int (rows) or a float (factor)"),
    ({"expert_capacity": 0}, ValueError, "expert_capacity must be between 1"),
    ({"expert_capacity": -1.5}, ValueError, "expert_capacity as a factor must be positive"),
    ({"expert_capacity": [1]}, TypeError, "expert_capacity must be None, an int (rows)"),
    ({"drop_policy": "weight"}, ValueError, "drop_policy must be one of 'position', 'priority'"),
    ({"distinct_experts": "no"}, TypeError, "distinct_experts must be a bool, got 'no'"),
    ({"empty_groups": None}, ValueError, "empty_groups must be one of 'none', 'block', got None"),
    ({"tail": "nan"}, ValueError, "tail must be one of 'zero', 'undefined', got 'nan'"),
    ({"implementation": "gpu"}, ValueError, "must be one of 'auto', 'cuda', 'reference'"),
    ({"num_sms": 0}, ValueError, "num_sms must be between 1"),
    ({"num_sms": 2.5}, TypeError, "num_sms must be an int, got 2.5"),
    ({"timeout_s": 0}, ValueError, "timeout_s must be a positive finite number, got 0"),
    ({"timeout_s": math.inf}, ValueError, "timeout_s must be a positive finite number, got inf"),
    ({"timeout_s": 1e12}, ValueError, "timeout_s must be between 1e-09 and 9000000000.0 seconds"),
    ({"timeout_s": 1e-12}, ValueError, "timeout_s must be between 1e-09 and 9000000000.0 seconds"),
    ({"timeout_s": "1"}, ValueError, "timeout_s must be a positive finite number, got '1'"),
    (
        {"num_experts": 4097, "implementation": "cuda"},
        ValueError,
        "implementation='cuda' supports num_experts up to 4096, got 4097; use implementation=",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), INVALID, ids=lambda value: str(value)[:40])
def test_invalid_options(options, error, text):
    """A9: the error names the option, what was given and what is allowed."""
    with pytest.raises(error, match=re.escape(text)):
        ep.EpConfig(**{"num_experts": 8, "axis_name": AXIS, **options})


@pytest.mark.parametrize(
    ("largest", "options"),
    [(2**31 - 2, {"E": 2, "capacity": 8}), (2**29 - 1, {"E": 8, "empty_groups": "block"})],
    ids=["alignment", "capacity"],
)
def test_row_numbers_beyond_int32(largest, options):
    """2 assignments and L local experts: 2 + L(A - 1) rows of groups, and C of the buffer.

    With L = 1 the first is 2^31 - 1 for A = 2^31 - 2. With L = 4 and blocks C = 4A is 2^31 for
    A = 2^29, where the first is 2^31 - 2. Only traced: nothing is as large.
    """

    def trace(alignment):
        case = Case(T=1, K=1, R=2, A=alignment, **options)
        run = on_ranks(planner(case.config()), make_mesh(2))
        return run.trace(jax.ShapeDtypeStruct((2, 1, 1), jnp.int32))

    trace(largest)
    message = f"assignments with alignment {largest + 1} need row numbers beyond 2147483647"
    with pytest.raises(ValueError, match=message):
        trace(largest + 1)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        ep.EpConfig(8, AXIS, 16)


def test_frozen_hashable_equal_and_picklable():
    config = ep.EpConfig(8, ["a", "b"], alignment=16)
    assert config == ep.EpConfig(8, ("a", "b"), alignment=16)
    assert hash(config) == hash(ep.EpConfig(8, ("a", "b"), alignment=16))
    assert config != ep.EpConfig(8, ("b", "a"), alignment=16)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.axes == ("a", "b")
    assert ep.EpConfig(8, "a").axes == ("a",)
    assert ep.EpConfig(8, []).axis_name == ep.EpConfig(8, ()).axes == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alignment = 8


@pytest.mark.parametrize("option", ["capacity", "expert_capacity"])
def test_rows_and_a_factor_are_different_configs(option):
    """A11: 1 is one row and 1.0 a factor, though 1 == 1.0: a cache must not take one for the other.

    As a static argument of jit the second call would run the first one's program.
    """
    rows, factor = (ep.EpConfig(8, AXIS, **{option: value}) for value in (1, 1.0))
    assert rows != factor
    size = jax.jit(lambda config: jnp.zeros(config.num_rows(2, 6, 2)), static_argnums=0)
    assert size(rows).shape == (rows.num_rows(2, 6, 2),)
    assert size(factor).shape == (factor.num_rows(2, 6, 2),)


def test_public_names():
    for name in ep.__all__:
        assert getattr(ep, name).__doc__
