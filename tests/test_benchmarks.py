"""The benchmarks between GPUs as they run, but for the kernels: programs, results, a step."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import typer
from benchmarking import DEVICES, TINY, tiny_bench, tiny_inputs
from matplotlib import image

from benchmarks import ep as benchmark
from benchmarks import group, limits, local, maps, report, shapes, stock
from benchmarks import point as point_benchmark
from benchmarks import step as step_benchmark
from benchmarks.shapes import GroupShape

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
    """Programs of 2 inputs, with 6 and 2 calls, take 60, 90 and 600 us: 15 and 45 a call."""

    def times(calls):
        assert [len(inputs) for _, (inputs,) in calls] == [6, 2]
        return [[600.0, 60.0, 90.0]] * 2

    inputs, _, _ = tiny_inputs()
    bench = dataclasses.replace(tiny_bench(), times=times)
    programs = {calls: bench.in_turn(lambda i: i.x, inputs, num_calls=calls) for calls in (7, 2)}
    assert bench.us(programs) == {7: 15, 2: 45}


def noted_bench(monkeypatch, calls_an_iteration):
    """Whose loops have 4 and 20 iterations, of which 16 take 160, 320 and 960 us, and so many calls
    of handlers an iteration; the options they are compiled with, and what they compute."""
    options, computed, host_calls = [], [], [0]
    on_ranks = group.Bench.on_ranks

    def note_options(bench, op, xla=None):
        options.append(xla)
        return on_ranks(bench, op, xla)

    def longer(*calls):
        computed.extend(program(given) for program, (given,) in calls)
        host_calls[0] += int(calls_an_iteration * 24 * 3 * 2)  # thrice, on two devices
        return [320.0, 960.0, 160.0]

    monkeypatch.setattr(group.Bench, "on_ranks", note_options)
    monkeypatch.setattr(group.Bench, "num_host_calls", lambda _: host_calls[0])
    return dataclasses.replace(tiny_bench(), longer=longer), options, computed


@pytest.mark.parametrize("form", group.LOOPS)
def test_an_iteration_of_a_loop(monkeypatch, form):
    inputs, _, _ = tiny_inputs()
    bench, all_options, computed = noted_bench(monkeypatch, 0.5)
    assert bench.in_loop_us(lambda i: i.x, inputs[0], form) == 20
    assert len(computed) == 2
    assert all((each == inputs[0].x).all() for each in computed)
    (options,) = {tuple(each.items()) for each in all_options}
    captured = dict(options).get("xla_gpu_enable_command_buffer", "").split(",")
    assert ("WHILE" in captured) == ("captured" in form)
    assert ("xla_gpu_command_buffer_unroll_loops" in dict(options)) == ("unrolled" in form)


def test_a_loop_that_xla_did_not_capture_is_an_error(monkeypatch):
    inputs, _, _ = tiny_inputs()
    bench, _, _ = noted_bench(monkeypatch, 0.6)
    assert bench.in_loop_us(lambda i: i.x, inputs[0], "in a loop") == 20
    with pytest.raises(RuntimeError, match="launched 86 kernels in 144 iterations"):
        bench.in_loop_us(lambda i: i.x, inputs[0], "in a captured loop")


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


# The whole.


def test_what_is_measured_beside_the_ops():
    forms = {point: benchmark.forms_of(point) for point in shapes.group_sweep(2)}
    assert forms[GroupShape()] == ["stock"]
    assert forms[GroupShape(T=128)] == ["stock", "loops"]
    assert forms[GroupShape(T=128, A=1, capacity="worst")] == ["loops"]
    assert forms[GroupShape(H=2048)] == []
    assert [s.T for s, f in forms.items() if "stock" in f] == [4096, 16, 128, 1024, 8192, 16384]
    assert benchmark.forms_of(GroupShape(R=8)) == ["stock"]


def test_a_dry_run_writes_its_results(monkeypatch, tmp_path, capsys):
    """One point with everything; the clock is asked as often as there are rows, and once more."""
    monkeypatch.setattr(jax, "devices", lambda: DEVICES)
    monkeypatch.setattr(benchmark, "quick_points", lambda ranks: [GroupShape(T=128, R=ranks)])
    benchmark.main(tmp_path, quick=True, wall=True, ranks=2, peer_gbps=100.0)
    result = json.loads((tmp_path / "ep-quick.json").read_text())
    assert {"command", "date", "devices", "commit", "versions", "xla_flags"} <= set(result)
    assert set(result["limits"]) == {"copy_TBps", "P", "P_GBps", "M"}
    assert result["limits"]["P_GBps"] == pytest.approx(100)
    assert result["reads_in_place"] is False  # nothing moves between GPUs here
    assert list(result["seconds"]) == ["T=128"]
    assert "100.0 GB/s" in result["limits"]["P"]
    ops = ["plan", "dispatch", "combine", "dispatch_backward", "combine_backward", "round_trip"]
    forms = [(op, "") for op in ops]
    forms += [(op, name) for op in stock.FORMS for name in stock.FORMS[op]]
    forms += [(op, loop) for op in ("plan_and_dispatch", "combine") for loop in group.LOOPS]
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


def test_a_dry_run_of_four_ranks(monkeypatch, tmp_path, capsys):
    """Beside the results of two and of the whole sweep; P by copies between all of them."""
    others = ["ep.json", "ep-quick.json", "ep-4.json"]
    for other in others:
        (tmp_path / other).write_text(other)
    monkeypatch.setattr(jax, "devices", lambda: DEVICES)
    monkeypatch.setattr(benchmark, "quick_points", lambda ranks: [GroupShape(R=ranks)])
    benchmark.main(tmp_path, quick=True, wall=True, ranks=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*others, "ep-4-quick.json"}
    assert [(tmp_path / other).read_text() for other in others] == others
    result = json.loads((tmp_path / "ep-4-quick.json").read_text())
    rows = {row["op"]: row for row in result["rows"] if row["form"] == ""}
    assert {row["R"] for row in result["rows"]} == {4}
    dispatch = rows["dispatch"]
    rate = dispatch["remote_bytes"] / dispatch["P_us"] * 1e-3
    assert result["limits"]["P_GBps"] == pytest.approx(rate)
    assert dispatch["P_us"] == dispatch["P_at_once_us"]
    for op in ("dispatch", "combine", "combine_backward", "round_trip"):
        row = rows[op]
        for which in ("remote", "routed"):
            assert row[f"{which}_GBps"] == pytest.approx(row[f"{which}_bytes"] / row["us"] * 1e-3)
        assert row["routed_GBps"] > row["remote_GBps"] > 0
    assert "remote_GBps" not in rows["plan"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "│ dispatch  " in line]
    for key in ("P_us", "M_us"):
        assert f" {dispatch['us'] / dispatch[key]:.2f} " in line


def test_names_of_results(monkeypatch):
    """Those of two ranks have none in them, as long as there were no others."""
    assert [report.result_name("ep", r) for r in (1, 2, 4, 8)] == ["ep-1", "ep", "ep-4", "ep-8"]
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    assert report.result_name("ep", 2) == "ep-processes"
    assert report.result_name("step", 8) == "step-8-processes"


@pytest.mark.parametrize("program", [local, maps], ids=["local", "maps"])
def test_quick_results_of_one_gpu_have_a_file_of_their_own(monkeypatch, tmp_path, program):
    row = {"T": 1, "H": 8, "K": 1, "A": 1, "E": 2, "tail": "zero", "op": "plan", "us": 3.5}
    monkeypatch.setattr(program, "measure", lambda *args, **kwargs: [row])
    program.main(tmp_path, quick=True)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{program.__name__.removeprefix('benchmarks.')}-quick.json"
    assert row in json.loads(path.read_text())["rows"]


def test_processes_without_a_rank_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(typer.BadParameter, match="--ranks 2 leaves some of the 4 processes"):
        benchmark.main(ranks=2, wall=True)


def test_plot_is_not_blank(tmp_path):
    """With and without limits and stock forms, of two ranks and of four."""
    for R, limit, forms in ((2, {"P_us": 4.0, "M_us": 5.0}, ["", "stock"]), (4, {}, [""])):
        shape = GroupShape(R=R)
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


def test_an_unknown_gemm_is_an_error():
    with pytest.raises(typer.BadParameter, match="--gemm cublas is none of tokamax, lax"):
        step_benchmark.main(wall=True, ranks=2, gemm="cublas")


def test_a_step_calls_each_op_in_the_loops(monkeypatch):
    """One loop forward and one backward, with the exchange in both and none outside."""
    bench = tiny_bench()
    inputs = step_benchmark.make_inputs(bench, TINY, 4, 3)
    forms = step_benchmark.steps(TINY, bench, step_benchmark.grouped_gemms(1)["lax"])
    text = bench.on_ranks(forms["all_to_all"]).lower(inputs).compile().as_text()
    entry = text.split("\nENTRY ")[1]
    assert entry.count(" while(") == 2
    assert " all-to-all(" not in entry
    assert text.count(" all-to-all(") == 4


# One point.


@pytest.mark.parametrize("loop", [False, True])
def test_one_point(capsys, loop):
    point_benchmark.main(["combine", "plan"], loop=loop, ranks=2, wall=True)
    shown = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    forms = [f" {form}" for form in group.LOOPS] if loop else [""]
    names = [op + form for op in ("combine", "plan") for form in forms]
    assert [(name, unit) for name, _, unit in shown] == [(name, "us") for name in names]
    assert all(float(us) != 0 for _, us, _ in shown)


def test_one_point_of_an_unknown_op():
    with pytest.raises(typer.BadParameter, match=r"is none of .*'combine'"):
        point_benchmark.main(["sum"], ranks=2, wall=True)
