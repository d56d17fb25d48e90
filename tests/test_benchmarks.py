"""The benchmark between GPUs, up to its timing: bytes, shapes, stock forms, programs, results."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from jax import lax
from jax.sharding import Mesh
from matplotlib import image

from benchmarks import ep as benchmark
from benchmarks import group, limits, report, shapes, stock, timing
from benchmarks import point as point_benchmark
from benchmarks import step as step_benchmark
from benchmarks.shapes import GroupShape, Shape

DEVICES = jax.devices("cpu")[:2]  # also beside GPUs: what is tested here is not the kernels
TINY = GroupShape(T=5, H=8, K=2, A=4, E=8, capacity="worst")


@functools.cache
def tiny_bench():
    """Of the reference on two devices; `times` is given by the tests that need it."""
    mesh = Mesh(np.array(DEVICES), (stock.AXIS,))
    return group.Bench(mesh, "reference", timing.wall_times_us, 2, 4)


@functools.cache
def tiny_inputs():
    return group.make_inputs(tiny_bench(), TINY, with_stock=True)


# Bytes.


def routing_by_hand():
    """R = 2, T = 2, K = 2, E = 4, A = 3. Experts 0 and 1 live on rank 0, 2 and 3 on rank 1.

    Rank 0's tokens name (0, 1) and (1, 2), rank 1's (3, 2) and (0, 3): experts 0 to 3 have 2 rows
    each, so both ranks have 4 live rows and 6 aligned ones.
    """
    ids = np.array([[0, 1], [1, 2], [3, 2], [0, 3]], np.int32)
    return GroupShape(T=2, H=8, K=2, A=3, E=4, R=2, capacity="worst"), ids


def test_bytes_by_hand():
    """16 bytes a row; C = 2 * up(4, 3) = 12, two experts that all four tokens name.

    Both of rank 0's tokens have a row there and one crosses to rank 1, and the other way round. So
    dispatch reads 2 + 1 tokens and writes 12 rows; combine reads 4 rows, has one partial written
    and read, and writes 2 tokens; its backward does 2 + 1 + 4 + 12.
    """
    shape, ids = routing_by_hand()
    assert shape.num_rows == 12
    for op, rows in {"dispatch": 15, "combine": 8, "combine_backward": 19}.items():
        moved = shapes.traffic(op, shape, ids)
        assert moved.local.tolist() == [16 * rows] * 2, op
        assert moved.remote.tolist() == [[0, 16], [16, 0]], op
    undefined = dataclasses.replace(shape, tail="undefined")  # writes the 6 aligned rows
    assert shapes.traffic("dispatch", undefined, ids).local.tolist() == [16 * 9] * 2


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one_rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("tail", ["zero", "undefined"])
def test_bytes_are_those_of_loops(routing, num_ranks, tail):
    shape = GroupShape(9, 8, 3, 4, tail, 16, num_ranks, routing, "worst")
    ids = shape.ids(np.random.default_rng(1))
    read, aligned = np.zeros(num_ranks, int), np.zeros(num_ranks, int)
    crossing = np.zeros((num_ranks, num_ranks), int)
    own = np.zeros(num_ranks, int)
    for expert in range(16):
        rows = sum(expert in token for token in ids.tolist())
        read[expert // shape.num_local] += rows
        while rows % 4:
            rows += 1
        aligned[expert // shape.num_local] += rows
    for t, token in enumerate(ids.tolist()):
        for rank in {expert // shape.num_local for expert in token}:
            if rank == t // 9:
                own[rank] += 1
            else:
                crossing[t // 9, rank] += 1
    written = shape.num_rows if tail == "zero" else aligned
    sent = crossing.sum(1)
    expected = {
        "dispatch": own + sent + written,
        "combine": read + 2 * sent + 9,
        "combine_backward": own + sent + read + written,
    }
    for op, rows in expected.items():
        moved = shapes.traffic(op, shape, ids)
        np.testing.assert_array_equal(moved.local, 16 * rows)
        np.testing.assert_array_equal(
            moved.remote, 16 * (crossing.T if op == "combine" else crossing)
        )


def test_bytes_of_the_standard_point():
    """C = 42,624 rows of 14,336 bytes; the megabytes of a rank that the limits are known by."""
    shape = GroupShape()
    assert shape.num_rows == 42_624
    ids = shape.ids(np.random.default_rng(0))
    for op, megabytes in {"dispatch": 728, "combine": 646, "combine_backward": 1200}.items():
        moved = shapes.traffic(op, shape, ids)
        np.testing.assert_allclose(moved.local / 1e6, megabytes, rtol=5e-3)
        np.testing.assert_allclose(moved.remote.max() / 1e6, 58.5, rtol=5e-3)


def test_bytes_of_one_rank_are_as_before():
    """747, 528 and 1217 MB are those of docs/benchmarks.md for T = 4096: all tokens are own."""
    shape = Shape()
    live, aligned = 4096 * 8, 48_000
    assert shapes.bytes_moved("dispatch", shape, live, aligned, 65_280) == 14_336 * (4096 + aligned)
    assert shapes.bytes_moved("combine", shape, live, aligned, 65_280) == 14_336 * (4096 + live)
    both = shapes.bytes_moved("combine_backward", shape, live, aligned, 65_280)
    assert both == 14_336 * (4096 + live + aligned)


# Shapes.


def test_sweep_changes_one_letter_at_a_time():
    """But for the tail and a batch of 128 of the quick points, and for capacities that fit."""
    points = shapes.group_sweep(2)
    assert len(set(points)) == len(points)
    quick = points[:4]
    assert quick == shapes.quick_points(2)
    standard = GroupShape(4096, 7168, 8, 128, "zero", 256, 2, "uniform", "typical", None)
    assert points[0] == standard
    values = {name: set() for name in vars(standard)}
    for point in points[4:]:
        changed = [name for name in values if getattr(point, name) != getattr(standard, name)]
        assert len(changed) == 1 or changed == ["routing", "capacity"]
    for point in points:
        for name in values:
            values[name].add(getattr(point, name))
    assert values["T"] == {16, 128, 1024, 4096, 8192, 16384}
    assert values["K"] == {1, 2, 8}
    assert values["H"] == {2048, 4096, 7168}
    assert values["A"] == {1, 16, 128}
    assert values["tail"] == {"zero", "undefined"}
    assert values["num_sms"] == {None, 24, 32, 64, 96}
    assert values["routing"] == {"uniform", "skewed", "one_rank"}
    assert values["capacity"] == {"typical", "worst"}


def test_every_short_point_of_the_sweep_drops_nothing():
    """And its rows fit in the memory of a GPU: 12 GB are read and 12 GB written at the most."""
    for point in shapes.group_sweep(2):
        assert 2 * point.num_rows * point.row_bytes < group.MOST_BUFFER_BYTES
        if point.T <= 4096:
            ids = point.ids(np.random.default_rng(0))
            assert all(len(set(token)) == point.K for token in ids[:100].tolist())
            assert shapes.load(point, ids).aligned_rows.max() <= point.num_rows


class Unlucky:
    """Scores of which the first `times` send every token to expert 0."""

    def __init__(self, times):
        self.times, self.good = times, np.random.default_rng(0)

    def random(self, size, dtype):
        self.times -= 1
        return (
            np.tile(np.arange(size[1]), (size[0], 1)) if self.times >= 0 else self.good.random(size)
        )


def test_a_routing_that_does_not_fit_is_drawn_again():
    """32 tokens of 2 ranks with K = 1 need 32 rows if all go to expert 0, and 24 are there."""
    shape = GroupShape(T=16, K=1, A=4, E=4)
    assert shape.num_rows == 24
    assert len(set(shape.ids(Unlucky(3)).ravel().tolist())) == 4
    with pytest.raises(ValueError, match=r"100 routings exceed the 24 rows of .*capacity='worst'"):
        shape.ids(Unlucky(1000))


def test_routings():
    random = np.random.default_rng(0)
    one = dataclasses.replace(TINY, routing="one_rank").ids(random)
    assert one.max() < TINY.num_local
    skewed = GroupShape(T=500, K=2, E=16, routing="skewed", capacity="worst")
    uniform = dataclasses.replace(skewed, routing="uniform")
    loads = [np.sort(np.bincount(s.ids(random).ravel(), minlength=16)) for s in (skewed, uniform)]
    assert loads[0][-1] > 3 * loads[0][8]
    assert loads[1][-1] < 1.5 * loads[1][8]


def test_options_reach_the_kernels():
    bench = dataclasses.replace(tiny_bench(), implementation="cuda")
    config = bench.config(dataclasses.replace(TINY, num_sms=24, tail="undefined", A=16))
    assert (config.num_sms, config.tail, config.alignment) == (24, "undefined", 16)
    assert (config.implementation, config.timeout_s) == ("cuda", group.TIMEOUT_S)
    assert tiny_bench().config(TINY).implementation == "reference"


# Stock JAX.


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
    """Of every form, the ragged ones in an emulation, in one program."""
    inputs, _, _ = tiny_inputs()
    forms = [(op, name, form) for op in stock.FORMS for name, form in stock.FORMS[op].items()]
    for op, ragged in stock.RAGGED.items():
        for name, form in ragged.items():
            forms.append((op, name, functools.partial(form, transport=emulated)))
    ours = group.ops(tiny_bench().config(TINY))

    def differences(i):
        return [
            stock.largest_difference(benchmark.stock_step(op, form)(i), ours[op](i))
            for op, _, form in forms
        ]

    values = jax.device_get(tiny_bench().on_ranks(differences)(inputs[0]))
    return {(op, name): value for (op, name, _), value in zip(forms, values, strict=True)}


def names_of(op):
    return [*stock.FORMS[op], *stock.RAGGED[op]]


@pytest.mark.parametrize("name", names_of("dispatch"))
def test_stock_dispatch_gives_the_same_rows(stock_differences, name):
    assert stock_differences["dispatch", name].tolist() == [0, 0]


@pytest.mark.parametrize("name", names_of("combine"))
def test_stock_combine_gives_the_same_sums(stock_differences, name):
    """But for roundings of bf16."""
    assert stock_differences["combine", name].max() <= benchmark.TOLERANCE


def test_differences_are_found():
    one = jnp.array([1.0, 2, 4], jnp.bfloat16)
    assert stock.largest_difference(one, one) == 0
    assert stock.largest_difference(one.at[0].set(2), one) == 0.25
    assert stock.largest_difference(one.at[0].set(jnp.nan), one) == jnp.inf


def test_a_wrong_stock_form_is_not_measured():
    inputs, _, _ = tiny_inputs()
    forms = {"dispatch": {"wrong": lambda x, maps: 2 * stock.gathered(x, maps)}}
    with pytest.raises(AssertionError, match="wrong is off by"):
        benchmark.stock_programs(tiny_bench(), forms, inputs, 2)


def test_both_kinds_of_ragged_are_measured_one_by_one(monkeypatch):
    """NCCL's before XLA's own kernel, each compiled with its setting."""
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


# Programs.


def test_calls_in_turn_and_in_a_loop_compute_the_step():
    inputs, _, _ = tiny_inputs()
    bench = tiny_bench()
    step = group.ops(bench.config(TINY))["round_trip"]
    expected = [bench.on_ranks(step)(each) for each in inputs]
    in_turn = bench.on_ranks(group.in_turn(step))(inputs)
    in_loop = bench.on_ranks(group.in_loop(step, 3))(inputs[0])
    for actual, wanted in zip([*in_turn, in_loop], [*expected, expected[0]], strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))
        assert np.abs(np.asarray(wanted, np.float32)).max() > 0


def test_a_loop_plans_in_each_iteration_and_calls_plan_one_by_one():
    """The exchange of ids is in the loop's body; two calls have two, though XLA combines those of
    independent calls."""
    inputs, _, _ = tiny_inputs()
    step = group.ops(tiny_bench().config(TINY))["plan"]
    program = tiny_bench().on_ranks(group.in_loop(step, 3))
    text = program.lower(inputs[0]).compile().as_text()
    loop, entry = text.split("\nENTRY ")  # the entry computation comes last
    assert " all-gather(" in loop
    assert " all-gather(" not in entry
    program = tiny_bench().on_ranks(group.in_turn(step)).lower(inputs)
    assert program.as_text().count("optimization_barrier") == 1
    assert program.compile().as_text().count(" all-gather(") == 2


def test_one_call_of_the_programs_is_reported():
    """A program of 2 inputs, 6 calls, takes 60, 90 and 600 us: 15 a call; a loop of 4 a quarter."""

    def times(calls):
        (_, (in_turn,)), (_, (in_loop,)) = calls
        assert len(in_turn) == 6
        assert isinstance(in_loop, group.Inputs)
        return [[600.0, 60.0, 90.0]] * 2

    inputs, _, _ = tiny_inputs()
    bench = dataclasses.replace(tiny_bench(), times=times)
    programs = {
        "in turn": bench.in_turn(lambda i: i.x, inputs, num_calls=7),
        "in a loop": bench.in_loop(lambda i: i.x, inputs[0]),
    }
    assert bench.us(programs) == {"in turn": 15, "in a loop": 22.5}


def test_tokens_and_rows_are_made_once_for_points_of_one_size():
    bench = tiny_bench()
    first, _, _ = tiny_inputs()
    skewed = dataclasses.replace(TINY, routing="skewed", tail="undefined")
    second, ids, _ = group.make_inputs(bench, skewed)
    assert first[0].y is second[0].y
    assert np.array_equal(ids.reshape(2, 5, 2), second[0].ids)
    assert not np.array_equal(first[0].ids, second[0].ids)


def test_a_program_moves_enough_in_few_calls():
    """12 GB at the most and 6 at the least, in 8 to 16 calls if they fit."""
    bench = dataclasses.replace(tiny_bench(), most_calls=group.MOST_CALLS)
    for size, calls in ((1e3, 16), (0.5e9, 12), (1e9, 8), (3e9, 4), (8e9, 2)):
        assert group.number_of_calls(bench, size) == calls


# Times.


def plane(*streams):
    """A GPU of a profile, with (start, duration) of its events in microseconds."""
    lines = [
        types.SimpleNamespace(
            name=name,
            events=[
                types.SimpleNamespace(start_ns=s * 1e3, duration_ns=d * 1e3) for s, d in events
            ],
        )
        for name, events in streams
    ]
    return types.SimpleNamespace(lines=lines)


def test_executions_of_a_profile():
    """Two executions on two streams: 0-10, 20-30, 25-45 and 28-32; 5 ms later 5000-12000, in which
    5001-5002 and 11000-11500 lie.

    From start to end they take 45 and 7000; the first is busy for 10 + 25.
    """
    gpu = plane(
        ("Stream #1", [(20, 10), (0, 10), (28, 4), (5000, 7000)]),
        ("Stream #2", [(25, 20), (5001, 1), (11000, 500)]),
        ("XLA Ops", [(0, 9000)]),
    )
    executions = timing._executions(gpu)
    assert [timing.span_ns(e) for e in executions] == [45e3, 7e6]
    assert [timing.busy_ns(e) for e in executions] == [35e3, 7e6]


def profiled(monkeypatch, *profiles):
    """program_times_us of two calls, with profiles that are already there."""
    left = list(profiles)

    class ProfileData:
        from_file = staticmethod(lambda path: types.SimpleNamespace(planes=left.pop(0)))

    class Trace:
        def __init__(self, folder, profiler_options):
            (Path(folder) / "a.xplane.pb").touch()

        __enter__ = __exit__ = lambda self, *_: None

    monkeypatch.setattr(timing.jax.profiler, "trace", Trace)
    monkeypatch.setattr(timing.jax.profiler, "ProfileData", ProfileData)
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    arrays = [jax.device_put(jnp.zeros(1), device) for device in DEVICES]
    return timing.program_times_us([(lambda x: x, (arrays,))] * 2)


def profile(*durations):
    """Of one GPU for each list of durations, in microseconds, every 5 ms."""
    gpus = [plane(("Stream #7", [(5000 * i, d) for i, d in enumerate(each)])) for each in durations]
    for i, each in enumerate(gpus):
        each.name = f"/device:GPU:{i}"
    return gpus


def test_the_slowest_gpu_counts(monkeypatch):
    """Executions take 10 + i and 25 us; a third GPU, which nobody uses, has an empty plane."""
    n = timing.NUM_REPEATS
    planes = profile([10 + i for i in range(2 * n)], [25] * 2 * n, [])
    first, second = profiled(monkeypatch, planes)
    np.testing.assert_allclose(first + second, [max(10 + i, 25) for i in range(2 * n)])
    assert len(first) == n


def test_a_profile_with_a_divided_execution_is_made_again(monkeypatch):
    n = timing.NUM_REPEATS
    divided, whole = profile([10] * (2 * n + 1), [10] * 2 * n), profile([7] * 2 * n, [8] * 2 * n)
    assert profiled(monkeypatch, divided, whole) == [pytest.approx([8] * n)] * 2


def test_profiles_without_a_gpu_are_refused(monkeypatch):
    only = profile([10] * 2 * timing.NUM_REPEATS)
    with pytest.raises(RuntimeError, match=r"40 executions on each of 2 GPUs, .* has \[40\]"):
        profiled(monkeypatch, only, only)


def test_processes_start_together(monkeypatch):
    """From 13 ms on, by a clock that is read every 2 ms, the next multiple of 10 ms is 20."""
    readings = iter(range(13_000_000, 100_000_000, 2_000_000))
    monkeypatch.setattr(timing.time, "monotonic_ns", lambda: next(readings))
    timing._await_common_start()
    assert next(readings) == 13_000_000  # one process need not wait
    monkeypatch.setattr(timing.jax, "process_count", lambda: 2)
    timing._await_common_start()
    assert next(readings) == 23_000_000


# Limits.


def test_peer_copies_move_every_pairs_bytes():
    """48 and 80 bytes, several times, all pairs together; nothing at all is 16 bytes."""
    seen = []

    def times(calls, duration):
        assert duration is timing.busy_ns
        ((program, (sources,)),) = calls
        for source, copied in zip(sources, program(sources), strict=True):
            (start,), (end,) = source.devices(), copied.devices()
            seen.append((start.id, end.id, copied.nbytes))
        return [[8.0 * limits.NUM_PEER_COPIES]]

    bench = dataclasses.replace(tiny_bench(), times=times)
    a, b = (device.id for device in bench.mesh.devices.flat)
    assert limits.peer_us(bench, np.array([[0, 48], [80, 0]])) == 8
    assert seen == [(a, b, 48), (b, a, 80)] * limits.NUM_PEER_COPIES
    assert limits.peer_us(bench, np.array([[0, 48], [80, 0]])) == 8
    assert len(seen) == 2 * limits.NUM_PEER_COPIES, "measured twice"
    seen.clear()
    assert limits.peer_us(bench, np.array([[0, 0], [80, 0]])) == 8
    assert set(seen) == {(a, b, 16), (b, a, 80)}


def test_limits_by_hand():
    """16 bytes at 1e-3 GB/s take 16 us. At 10 bytes a microsecond 240 bytes take 24, 128 12.8."""
    shape, ids = routing_by_hand()
    bench = dataclasses.replace(tiny_bench(), peer_gbps=1e-3)
    limit = limits.limits(bench, shape, ids, bytes_per_us=10)
    known = {"local_bytes": 240, "remote_bytes": 16, "P_us": 16.0, "M_us": 24.0}
    assert limit["dispatch"] == limit["plan_and_dispatch"] == known
    assert limit["combine"] == limit["dispatch_backward"]
    assert limit["combine"] == {**known, "local_bytes": 128, "M_us": 16.0}
    assert limit["combine_backward"]["M_us"] == 30.4
    assert limit["round_trip"]["M_us"] == 40
    assert "plan" not in limit


def test_without_p_there_is_no_m(capsys):
    def times(*args, **options):
        raise RuntimeError("no profile")

    shape, ids = routing_by_hand()
    bench = dataclasses.replace(tiny_bench(), times=times)
    limit = limits.limits(bench, shape, ids, bytes_per_us=10)
    assert limit["dispatch"] == {"local_bytes": 240, "remote_bytes": 16}
    assert "P is left out: no profile" in capsys.readouterr().err
    row = report.make_row(shape, "dispatch", "", 5.0, limit["dispatch"])
    assert "ratio" not in row


# The whole.


def test_what_is_measured_beside_the_ops():
    forms = {point: benchmark.forms_of(point) for point in shapes.group_sweep(2)}
    assert forms[GroupShape()] == ["stock"]
    assert forms[GroupShape(T=128)] == ["stock", "loop"]
    assert forms[GroupShape(T=128, A=1, capacity="worst")] == ["loop"]
    assert forms[GroupShape(H=2048)] == []
    assert [s.T for s, f in forms.items() if "stock" in f] == [4096, 16, 128, 1024, 8192, 16384]


def test_a_dry_run_writes_its_results(monkeypatch, tmp_path, capsys):
    """One point with everything; the clock is asked as often as there are rows, and once more."""
    monkeypatch.setattr(benchmark, "quick_points", lambda ranks: [GroupShape(T=128, R=ranks)])
    benchmark.main(tmp_path, quick=True, wall=True, ranks=2, peer_gbps=100.0)
    result = json.loads((tmp_path / "ep.json").read_text())
    assert {"command", "date", "devices", "commit", "versions", "xla_flags"} <= set(result)
    assert set(result["limits"]) == {"copy_TBps", "P", "M"}
    assert list(result["seconds"]) == ["T=128"]
    assert "100.0 GB/s" in result["limits"]["P"]
    ops = ["plan", "dispatch", "combine", "dispatch_backward", "combine_backward", "round_trip"]
    forms = [(op, "") for op in ops]
    forms += [("plan_and_dispatch", "in a loop"), ("combine", "in a loop")]
    forms += [(op, name) for op in stock.FORMS for name in stock.FORMS[op]]
    assert [(row["op"], row["form"]) for row in result["rows"]] == forms
    for row in result["rows"]:
        assert row["us"] > 0
        assert row["op"] == "plan" or row["ratio"] == pytest.approx(row["us"] / row["M_us"])
        assert {"T", "H", "K", "A", "tail", "C", "num_sms", "routing", "E", "R"} <= set(row)
    out = capsys.readouterr().out
    assert "us/M" in out
    stock_us = [r["us"] for r in result["rows"] if r["form"] in stock.FORMS["dispatch"]]
    (line,) = [line for line in out.splitlines() if "│ dispatch  " in line]
    assert f" {min(stock_us):.1f} " in line
    assert "T=128: " in out


def test_plot_is_not_blank(tmp_path):
    """With and without limits and stock forms."""
    shape = GroupShape()
    for limit, forms in (({"P_us": 4.0, "M_us": 5.0}, ["", "stock"]), ({}, [""])):
        rows = [
            report.make_row(dataclasses.replace(shape, T=t), op, form, t * 0.5, limit)
            for t in (16, 128)
            for op in limits.LIMITED
            for form in forms
        ]
        report.plot(rows, tmp_path / "ep.png")
        pixels = image.imread(tmp_path / "ep.png")[..., :3]
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


# A step.


def test_steps_of_all_forms_have_the_same_gradients(tmp_path, capsys):
    """Or they would be left out."""
    step_benchmark.main(tmp_path, wall=True, ranks=2)
    result = json.loads((tmp_path / "step.json").read_text())
    forms = ["jax_moe_ep, zero tail", "jax_moe_ep, undefined tail", *step_benchmark.STOCK]
    assert [row["form"] for row in result["rows"]] == [*forms, "no exchange"]
    for row in result["rows"]:
        assert row["us"] > 0
        assert {"T", "H", "F", "K", "A", "E", "R", "C", "layers", "gemm"} <= set(row)
    assert "us a layer" in capsys.readouterr().out


def test_steps_with_wrong_gradients_are_left_out(monkeypatch, capsys):
    def twice(y, weights, maps):
        return 2 * stock.scattered(y, weights, maps)

    monkeypatch.setattr(step_benchmark, "STOCK", {"wrong": (stock.gathered, twice)})
    rows = step_benchmark.measure(tiny_bench(), TINY, 4, 2, "lax")
    assert "wrong" not in {row["form"] for row in rows}
    assert len(rows) == 3
    assert "wrong is left out: its gradients are off by" in capsys.readouterr().err


def test_a_step_calls_each_op_in_the_loops(monkeypatch):
    """One loop forward and one backward, with the exchange in both and none outside."""
    bench = tiny_bench()
    inputs = step_benchmark.make_inputs(bench, TINY, 4, 3)
    forms = step_benchmark.steps(TINY, bench, step_benchmark.GEMMS["lax"])
    text = bench.on_ranks(forms["all_to_all"]).lower(inputs).compile().as_text()
    entry = text.split("\nENTRY ")[1]
    assert entry.count(" while(") == 2
    assert " all-to-all(" not in entry
    assert text.count(" all-to-all(") == 4


# One point.


@pytest.mark.parametrize("loop", [False, True])
def test_one_point(capsys, loop):
    point_benchmark.main(["combine", "plan"], loop=loop, ranks=2, wall=True)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(op, unit) for op, _, unit in shown] == [("combine", "us"), ("plan", "us")]
    assert all(float(us) > 0 for _, us, _ in shown)


def test_one_point_of_an_unknown_op():
    with pytest.raises(typer.BadParameter, match=r"is none of .*'combine'"):
        point_benchmark.main(["sum"], ranks=2, wall=True)
