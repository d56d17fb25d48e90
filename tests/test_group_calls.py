"""The custom calls of groups, as far as a machine without GPUs shows them: who is in a group, what
all ranks must agree on, and the memory they share."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_calls import attribute, calls_of_a_layer, custom_calls
from helpers import (
    AXIS,
    CASES,
    Case,
    make_floats,
    make_ids,
    make_mesh,
    make_priority,
    on_ranks,
    planner,
)
from jax.sharding import Mesh

import jax_moe_ep as ep
from jax_moe_ep import cuda

pytestmark = pytest.mark.skipif(not cuda.has_extension(), reason="needs the CUDA extension")

CASE = Case(T=4, K=2, E=8, R=2, H=16)
GROUP_OPS = {"dispatch": 1, "combine": 2, "combine_backward": 3, "gather": 4, "plan": 5}


def lowered(mesh, axes, case=CASE, dtype=np.float32, **options):
    """The text of each custom call of a layer and its gradient."""
    return dict(calls_of_a_layer(mesh, axes, case, dtype, **options))


def groups_of(call):
    ids = [int(i) for i in attribute(call, "groups").strip("[]").split(",")]
    return np.array(ids).reshape(-1, int(attribute(call, "num_ranks"))).tolist()


MESHES = {
    "one_group": ((2,), (AXIS,), AXIS, [[0, 1]]),
    "beside_data": ((2, 2), ("data", AXIS), AXIS, [[0, 1], [2, 3]]),
    "data_inside": ((2, 2), (AXIS, "data"), AXIS, [[0, 2], [1, 3]]),
    "two_axes": ((2, 2), ("a", "b"), ("a", "b"), [[0, 1, 2, 3]]),
    "two_axes_in_reverse": ((2, 2), ("a", "b"), ("b", "a"), [[0, 2, 1, 3]]),
    "around_another": ((2, 2, 2), ("a", "data", "b"), ("b", "a"), [[0, 4, 1, 5], [2, 6, 3, 7]]),
}


@pytest.mark.parametrize("name", MESHES)
def test_groups_are_those_of_all_gather(name):
    """In the forward and the backward call, and the same devices in the same order as XLA's own
    all_gather over the axes, which brings each rank's place in the mesh here."""
    shape, names, axes, expected = MESHES[name]
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    mesh = Mesh(np.array(devices).reshape(shape), names)
    case = dataclasses.replace(CASE, R=len(expected[0]))
    calls = lowered(mesh, axes, case)
    for op in GROUP_OPS:
        assert groups_of(calls[f"group_{op}"]) == expected, op
    places = np.arange(len(devices), dtype=np.int32).reshape(shape)
    gathered = on_ranks(lambda place: jax.lax.all_gather(place, axes), mesh, names)(places)
    assert sorted({tuple(row) for row in np.asarray(gathered).reshape(-1, case.R).tolist()}) == [
        tuple(group) for group in sorted(expected)
    ]


def test_one_rank_asks_for_no_group():
    calls = lowered(make_mesh(1), AXIS, dataclasses.replace(CASE, R=1))
    assert not any(name.startswith("group_") for name in calls)
    assert {"dispatch", "combine", "combine_backward"} <= calls.keys()


def test_what_the_ranks_agree_on(monkeypatch):
    """The sizes are those of the call; options and dtypes change the hash, ranks do not.

    The options of a call count too: of those, only which kernels plan runs is not in the config.
    """
    monkeypatch.delenv("JAX_MOE_EP_FORCE_LARGE", raising=False)
    calls = lowered(make_mesh(2), AXIS, num_sms=5, timeout_s=1.5)
    for name, op in GROUP_OPS.items():
        call = calls[f"group_{name}"]
        expected = {
            "op": op,
            "num_tokens": 4,
            "top_k": 2,
            "row_bytes": 8 if name in ("gather", "plan") else 64,
            "num_sms": 5,
            "timeout_ns": 1_500_000_000,
        }
        assert {key: int(attribute(call, key)) for key in expected} == expected
    plain = lowered(make_mesh(2), AXIS)
    hashes = [
        attribute(each["group_dispatch"], "options_hash")
        for each in (
            plain,
            lowered(make_mesh(2), AXIS, alignment=8),
            lowered(make_mesh(2), AXIS, tail="undefined"),
            lowered(make_mesh(2), AXIS, dtype=jnp.bfloat16, case=dataclasses.replace(CASE, H=32)),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert attribute(lowered(make_mesh(2), AXIS)["group_dispatch"], "options_hash") == hashes[0]
    monkeypatch.setenv("JAX_MOE_EP_FORCE_LARGE", "1")
    plans = plain["group_plan"], lowered(make_mesh(2), AXIS)["group_plan"]
    assert [attribute(each, "force_large") for each in plans] == ["false", "true"]
    assert attribute(plans[0], "options_hash") != attribute(plans[1], "options_hash")


@pytest.mark.parametrize("name", ["two_ranks", "priority_per_expert"])
def test_ids_and_priorities_travel_in_one_call(name):
    """4 bytes an assignment, 8 with its priority; and no collective of XLA's."""
    case = dataclasses.replace(CASES[name], R=2)
    ids, priority = make_ids("uniform", case), make_priority(case)
    run = on_ranks(planner(case.config("cuda")), make_mesh(2))
    ((name, call),) = custom_calls(run, ids, priority)
    assert name == "group_plan"
    arrays = 1 if priority is None else 2
    assert int(attribute(call, "row_bytes")) == 4 * case.K * arrays
    assert call.count(f"tensor<{2 * case.T}x{case.K}xi32>") == 2  # all ids, slots
    assert call.count(f"tensor<{2 * case.T}x{case.K}xf32>") == arrays - 1
    text = run.trace(ids, priority).lower(lowering_platforms=("cuda",)).as_text()
    assert "all_gather" not in text
    assert "partition_id" not in text  # the call knows its rank


def test_environment_for_tests(monkeypatch):
    monkeypatch.delenv("JAX_MOE_EP_FORCE_STAGED", raising=False)
    assert attribute(lowered(make_mesh(2), AXIS)["group_combine"], "force_staged") == "false"
    monkeypatch.setenv("JAX_MOE_EP_FORCE_STAGED", "1")
    monkeypatch.setenv("JAX_MOE_EP_FORCE_VECTOR", "1")
    call = lowered(make_mesh(2), AXIS, timeout_s=3.0)["group_combine"]
    assert attribute(call, "force_staged") == "true"
    assert attribute(call, "force_vector") == "true"


# ep.memory: the halves of a region hold one call, rounded up to a power of two; flags lie beside.

MIB = 2**20


def region(half):
    """Two halves and a header, in multiples of 2 MiB."""
    return -(-(2 * half + 256) // (2 * MIB)) * 2 * MIB


def control_bytes():
    return ep.memory(ep.EpConfig(8, AXIS), 1, 8, 1, "float32", 2).one_process - region(MIB)


def test_memory_of_the_largest_call():
    """T = 4096, H = 7168, bf16, R = 2: combine's landing of one peer, 58.7 MB, needs halves of
    64 MiB; staging needs as much. The ids of all ranks, 262 KB, have the smallest class, and in one
    process combine's backward has it too."""
    config = ep.EpConfig(256, AXIS)
    memory = ep.memory(config, 4096, 7168, 8, jnp.bfloat16, 2)
    control = control_bytes()
    assert memory.several_processes == control + region(64 * MIB) + region(MIB)
    assert memory.one_process == control + region(64 * MIB) + region(MIB)
    assert 8 * MIB <= control <= 12 * MIB


def test_memory_of_the_gradient_of_dispatch():
    """H = 8192: landing alone fills halves of 64 MiB exactly; with weights it needs the next class.
    dispatch's gradient is a combine without weights."""
    memory = ep.memory(ep.EpConfig(256, AXIS), 4096, 8192, 8, jnp.bfloat16, 2)
    regions = region(128 * MIB) + region(64 * MIB)
    assert memory.one_process == control_bytes() + regions + region(MIB)


@pytest.mark.parametrize(("num_tokens", "half_of_gradients"), [(2047, 8), (2048, 4)])
def test_memory_of_parts_of_rows(num_tokens, half_of_gradients):
    """K = 160, rows of 8 KB: with T = 2047, R = 2 in two parts, each with a table of 1.3 MB of dw
    beside the weights' 2.6 MB. Landing is 16 MiB, without weights and with them; ids have
    halves of 4."""
    memory = ep.memory(ep.EpConfig(256, AXIS), num_tokens, 4096, 160, jnp.bfloat16, 2)
    regions = {half_of_gradients, 4, 16, 32}
    assert memory.one_process == control_bytes() + sum(region(half * MIB) for half in regions)


def test_memory_grows_with_the_ranks():
    """R = 8: landing of 7 peers, 411 MB, in halves of 512 MiB; ids, 1 MiB. Priorities as much."""
    memory = ep.memory(ep.EpConfig(256, AXIS), 4096, 7168, 8, jnp.bfloat16, 8)
    regions = region(512 * MIB) + region(64 * MIB)
    assert memory.several_processes == control_bytes() + regions + region(MIB)
    config = ep.EpConfig(256, AXIS, drop_policy="priority", capacity=1024)
    memory = ep.memory(config, 4096, 7168, 8, jnp.bfloat16, 8)
    assert memory.several_processes == control_bytes() + regions + region(2 * MIB)


def test_memory_of_nothing():
    config = ep.EpConfig(8, AXIS)
    assert ep.memory(config, 64, 64, 2, "float32", 1) == ep.ArenaBytes(0, 0)
    assert ep.memory(config, 0, 64, 2, "float32", 2) == ep.ArenaBytes(0, 0)
    assert ep.memory(config, 64, 0, 2, "float32", 2) == ep.memory(config, 1, 8, 2, "float32", 2)
    reference = ep.EpConfig(8, AXIS, implementation="reference")
    assert ep.memory(reference, 64, 64, 2, "float32", 2) == ep.ArenaBytes(0, 0)


def test_errors_of_memory():
    config, sizes = ep.EpConfig(8, AXIS), (64, 64, 2, "float32", 2)
    for place, name, wrong, lowest in (
        (0, "num_tokens", -1, 0),
        (1, "hidden", 8.0, 0),
        (2, "top_k", 0, 1),
        (4, "num_ranks", -2, 1),
    ):
        message = f"jax_moe_ep.memory: {name} must be an int of at least {lowest}, got {wrong}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ep.memory(config, *sizes[:place], wrong, *sizes[place + 1 :])
    with pytest.raises(ValueError, match="num_experts=8 is not a multiple of the 3 ranks"):
        ep.memory(config, *sizes[:4], 3)
    with pytest.raises(
        TypeError, match=r"jax_moe_ep\.memory: config must be an EpConfig, got None"
    ):
        ep.memory(None, *sizes)
    with pytest.raises(TypeError, match="bf16"):
        ep.memory(dataclasses.replace(config, implementation="reference"), 64, 64, 2, "bf16", 2)


def test_check_and_reset_where_nothing_failed():
    ep.check()
    ep.reset()
    ep.check()
    plan = on_ranks(lambda ids: ep.plan(ids, CASE.config()), make_mesh(2))
    x, ids = make_floats(2, CASE.T, CASE.H), make_ids("uniform", CASE)
    rows = on_ranks(lambda x, ids: ep.dispatch(x, ep.plan(ids, CASE.config())), make_mesh(2))
    assert rows(x, ids).shape == (2, int(plan(ids).capacity), CASE.H)


def test_check_tells_all_failures(monkeypatch):
    monkeypatch.setattr(cuda, "failures", lambda: ["rank 0 gave up", "rank 1 stopped"])
    with pytest.raises(RuntimeError, match="rank 0 gave up\nrank 1 stopped"):
        ep.check()
