"""The kernels between GPUs at their edges: meshes, groups beside each other, routings and sizes.
The semantic suite runs there too."""

import dataclasses

import group_steps
import jax
import numpy as np
import oracle
import pytest
from groups import (
    BASE,
    GPUS,
    LONG_DELAY_NS,
    MAX_FEW_WEIGHTS,
    R,
    assert_layer_right,
    check_layer,
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
    make_ids,
    make_mesh,
    one_process,
)
from jax.sharding import Mesh

import jax_moe_ep as ep
from jax_moe_ep import cuda

pytestmark = needs_gpus

# Meshes.


@one_process
def test_a_mesh_in_reverse_right_after_one_in_order():
    """A11: the same shapes, options and devices; the ranks have changed."""
    for devices in (GPUS, GPUS[::-1], GPUS):
        check_layer(BASE, mesh=Mesh(np.array(devices), (AXIS,)))


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("shape", sorted({(1, R), (2, R // 2), (R // 2, 2), (R, 1)}))
def test_a_group_over_two_axes(shape, axes):
    """Ranks count in row-major order of the tuple: with ("b", "a") not in the order of devices."""
    mesh = Mesh(np.array(GPUS).reshape(shape), ("a", "b"))
    inputs = make_inputs(BASE)
    layer = layer_of(cuda_config(BASE, axes))
    assert_layer_right(run_on(mesh, layer, *inputs, axes=(axes,)), BASE, inputs)


# EP beside a data axis: R / num_ranks groups, whose ranks are neighbours or R / num_ranks apart.
each_order = pytest.mark.parametrize("axes", [("data", AXIS), (AXIS, "data")], ids="-".join)
each_group_size = pytest.mark.parametrize(
    "num_ranks",
    [
        pytest.param(n, marks=pytest.mark.skipif(2 * n > R, reason=f"needs {2 * n} GPUs"))
        for n in (1, 2, 4)
    ],
)


def mesh_of_groups(num_ranks, axes):
    sizes = {"data": R // num_ranks, AXIS: num_ranks}
    return Mesh(np.array(GPUS).reshape([sizes[axis] for axis in axes]), axes)


@each_group_size
@each_order
def test_groups_beside_each_other(axes, num_ranks):
    """Each with inputs of its own, whoever is late; a group of one has no arena and waits for
    nobody."""
    case, mesh = dataclasses.replace(BASE, R=num_ranks), mesh_of_groups(num_ranks, axes)
    layer = layer_of(cuda_config(case))
    inputs = [x.reshape(*mesh.devices.shape, *x.shape[1:]) for x in make_inputs(BASE)]
    for late in (None, 0, R - 1):
        set_delay(late)
        results = run_on(mesh, layer, *inputs, axes=axes)
        for i in range(R // num_ranks):

            def of_group(leaf, i=i):
                return np.take(leaf, i, axes.index("data"))

            assert_layer_right(jax.tree.map(of_group, results), case, [of_group(x) for x in inputs])


@each_group_size
@each_order
def test_a_late_rank_in_one_of_several_groups(axes, num_ranks):
    """The other groups run ahead of it; tokens, weights and gradients change in every step."""
    case, mesh = dataclasses.replace(BASE, R=num_ranks), mesh_of_groups(num_ranks, axes)
    ids = make_ids("uniform", BASE).reshape(*mesh.devices.shape, BASE.T, BASE.K)
    for steps in (group_steps.dispatch_steps, group_steps.combine_steps):
        program = steps_of(steps, case, 20)
        for late in (None, 0, R - 1):
            set_delay(late, LONG_DELAY_NS)
            wrong = run_on(mesh, program, ids, axes=axes, check_vma=False)
            assert not wrong.any(), (steps.__name__, late)


@pytest.mark.skipif(R < 4, reason="needs 4 GPUs")
def test_every_gpu_in_two_groups():
    """A10: layers over "a" and over "b" of a mesh in turn. Each GPU has an arena and an epoch of
    either, and a late rank holds up one group through the other."""
    mesh = Mesh(np.array(GPUS).reshape(2, R // 2), ("a", "b"))
    x, ids, *_ = make_inputs(BASE)
    x = np.round(8 * np.abs(x))  # sums are exact, and there is no -0
    x, ids = (each.reshape(2, R // 2, *each.shape[1:]) for each in (x, ids))
    configs = [cuda_config(BASE, axis) for axis in ("a", "b")]

    def program(x, ids):
        for config in 3 * configs:
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan) / BASE.K
        return x

    for late in (None, *range(R)):
        set_delay(late)
        assert_bitwise_equal(run_on(mesh, program, x, ids, axes=("a", "b")), x)


# Routings at the edges.


@pytest.mark.parametrize("maker", ["masked", "one_rank", "one_expert", "empty_expert"])
def test_a_rank_with_no_rows_or_no_tokens(maker):
    """masked: the last rank has no tokens. one_rank: only the last has rows."""
    check_layer(BASE, maker)


def test_drops_at_one_receiver_only():
    case = dataclasses.replace(BASE, capacity=2 * BASE.T)
    ids = make_ids("one_rank", case)
    dropped = oracle.plan(case, ids)["num_dropped"].tolist()
    assert dropped[-1] > 0
    assert dropped[:-1] == [0] * (R - 1)
    check_layer(case, "one_rank")


@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_sms(num_sms):
    check_layer(BASE, num_sms=num_sms)


def test_more_experts_a_token_than_lanes():
    check_layer(Case(T=9, K=40, E=64, R=R, A=2, H=64))


@pytest.mark.parametrize("hidden", [4, 64 * 1024], ids=["16B", "256KB"])
def test_row_lengths(hidden):
    check_layer(dataclasses.replace(BASE, T=8, H=hidden))


def test_more_tokens_than_flags():
    """T = 16,384 + 40: neighbouring tokens share a flag."""
    case = Case(T=16 * 1024 + 40, K=2, E=8, R=R, A=1, H=8)
    config = cuda_config(case)

    def step(x, ids):
        plan = ep.plan(ids, config)
        return ep.combine(ep.dispatch(x, plan), plan)

    x, ids, *_ = make_inputs(case, "masked")
    count = ((ids >= 0) & (ids < case.E)).sum(-1, keepdims=True)
    out = run_on(make_mesh(R), step, x, ids)
    assert_bitwise_equal(out, np.where(count == 0, 0, count * x).astype(np.float32) + 0)


@pytest.mark.parametrize("more", [0, 1], ids=["words", "table"])
def test_as_many_weights_as_words(more):
    """R * T * K of them cross in words, one more a token and rank in a table that is staged."""
    check_layer(Case(T=MAX_FEW_WEIGHTS // (4 * R) + more, K=4, E=16, R=R, H=8))


@pytest.mark.parametrize("epoch", [2**32 - 3, 2**62 - 3])
def test_epochs_pass_the_ends_of_32_and_62_bits(epoch):
    check_layer(BASE)
    cuda.extension("test").set_epoch(epoch)
    for _ in range(3):
        check_layer(BASE)


def test_a_hog_on_most_sms():
    """Blocks that cannot run yet own no work that others wait for."""
    check_layer(BASE)  # compiled
    for device in GPUS:
        if device.process_index == jax.process_index():
            cuda.extension("test").hog(device=device.local_hardware_id, num_sms=130, ns=300_000_000)
    check_layer(BASE)
