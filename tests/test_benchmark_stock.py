"""Stock JAX's forms give what ours do, or are not measured."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from benchmarking import TINY, tiny_bench, tiny_inputs
from jax import lax

from benchmarks import ep as benchmark
from benchmarks import group, stock


def emulated(operand, output, here, sent, there, received, *, axis_name):
    """lax.ragged_all_to_all after its documentation: the CPU has none."""
    gather = functools.partial(lax.all_gather, axis_name=axis_name)
    per_rank = len(sent) // lax.axis_size(axis_name)
    first = lax.axis_index(axis_name) * per_rank  # the updates for me, of every rank
    mine = [lax.dynamic_slice_in_dim(gather(a), first, per_rank, 1) for a in (here, sent, there)]
    data = gather(operand)
    row = jnp.arange(len(output))
    for rank in range(lax.axis_size(axis_name)):
        for i in range(per_rank):
            start, size, target = (a[rank, i] for a in mine)
            size = jnp.minimum(size, received[rank * per_rank + i])
            is_here = (row >= target) & (row < target + size)
            output = jnp.where(is_here[:, None], data[rank, start + row - target], output)
    return output


@pytest.fixture(scope="module")
def stock_differences():
    """Of every form on four ranks, the ragged ones in an emulation, in one program."""
    inputs, _, _ = tiny_inputs(4)
    forms = [(op, name, form) for op in stock.FORMS for name, form in stock.FORMS[op].items()]
    for op, ragged in stock.RAGGED.items():
        for name, form in ragged.items():
            forms.append((op, name, functools.partial(form, transport=emulated)))
    bench = tiny_bench(4)
    ours = group.ops(bench.config(dataclasses.replace(TINY, R=4)))

    def differences(i):
        return [
            stock.largest_difference(benchmark.stock_step(op, form)(i), ours[op](i))
            for op, _, form in forms
        ]

    values = jax.device_get(bench.on_ranks(differences)(inputs[0]))
    return {(op, name): value for (op, name, _), value in zip(forms, values, strict=True)}


def names_of(op):
    return [*stock.FORMS[op], *stock.RAGGED[op]]


@pytest.mark.parametrize("name", names_of("dispatch"))
def test_stock_dispatch_gives_the_same_rows(stock_differences, name):
    assert stock_differences["dispatch", name].tolist() == [0] * 4


@pytest.mark.parametrize("name", names_of("combine"))
def test_stock_combine_gives_the_same_sums(stock_differences, name):
    """But for roundings of bf16."""
    assert stock_differences["combine", name].max() <= benchmark.TOLERANCE


def test_differences_are_found():
    one = jnp.array([1.0, 2, 4], jnp.bfloat16)
    assert stock.largest_difference(one, one) == 0
    assert stock.largest_difference(one.at[0].set(2), one) == 0.25
    assert stock.largest_difference(one.at[0].set(jnp.nan), one) == jnp.inf


def test_a_wrong_stock_form_is_named_and_not_measured(capsys):
    inputs, _, _ = tiny_inputs()
    forms = {
        "dispatch": {"wrong": lambda x, maps: 2 * stock.gathered(x, maps), "right": stock.gathered},
        "combine": {"nan": lambda y, weights, maps: jnp.nan * stock.returned(y, weights, maps)},
    }
    found = benchmark.stock_programs(tiny_bench(), forms, inputs, 2)
    assert list(found) == [("dispatch", "right")]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "dispatch, wrong is left out: it is off by 1.0",
        "combine, nan is left out: it is off by inf",
    ]


def test_a_wrong_ragged_all_to_all_leaves_no_row(monkeypatch):
    forms = {"dispatch": {"wrong": lambda x, maps: 2 * stock.gathered(x, maps)}}
    monkeypatch.setattr(stock, "RAGGED", forms)
    assert list(benchmark.measure_ragged(tiny_bench(), TINY, 60, [True])) == [[]]


def test_both_kinds_of_ragged_are_measured_one_by_one(monkeypatch):
    """Each compiled with its setting."""
    stepped = {
        op: {name: functools.partial(form, transport=emulated) for name, form in forms.items()}
        for op, forms in stock.RAGGED.items()
    }
    monkeypatch.setattr(stock, "RAGGED", stepped)
    settings, jit = [], jax.jit

    def recorded(*args, compiler_options=None, **options):
        if compiler_options:
            settings.append(compiler_options[benchmark.ONE_SHOT])
        return jit(*args, compiler_options=compiler_options, **options)

    monkeypatch.setattr(group.jax, "jit", recorded)
    found = list(benchmark.measure_ragged(tiny_bench(), TINY, 60, [False, True]))
    names = [(op, name) for op in stepped for name in stepped[op]]
    expected = [(op, f"{name}, {kind}") for kind in ("NCCL", "one-shot") for op, name in names]
    assert [(row["op"], row["form"]) for (row,) in found] == expected
    assert settings == [False] * 2 * len(names) + [True] * 2 * len(names)
    found = list(benchmark.measure_ragged(tiny_bench(), TINY, 60, [False, True], 3))
    assert [(row["op"], row["form"]) for (row,) in found] == expected[3:]


@pytest.mark.parametrize(("form", "wrong"), [("gathered", "dweights"), ("scattered", "dx")])
def test_wrong_gradients_end_the_run(monkeypatch, form, wrong):
    """Those of ours and stock JAX's agree, or nothing is measured."""
    (inputs, *_), _, _ = tiny_inputs()
    benchmark.check_gradients(tiny_bench(), inputs)
    right = getattr(stock, form)
    monkeypatch.setattr(stock, form, lambda *args: 1.5 * right(*args))
    with pytest.raises(AssertionError, match=f"{wrong} is off by"):
        benchmark.check_gradients(tiny_bench(), inputs)
