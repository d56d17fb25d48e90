"""How times are read off a profile, and the limits beside them."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarking import DEVICES, routing_by_hand, tiny_bench

from benchmarks import limits, report, timing
from benchmarks.shapes import GroupShape

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


def test_how_much_longer_a_program_takes(monkeypatch):
    """By turns; what comes before the last repeats is not counted: 7 - 2, 9 - 2, 6 - 2 s."""
    now = [0.0]
    taken = {"short": iter([5, 5, 5, 2, 2, 2]), "long": iter([90, 80, 70, 7, 9, 6])}
    order = []

    def run(name):
        order.append(name)
        now[0] += next(taken[name])
        return jnp.zeros(())

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "NUM_WARMUPS", 3)
    times = timing.longer_us((run, ("short",)), (run, ("long",)), num_repeats=3)
    assert times == pytest.approx([5e6, 7e6, 4e6])
    assert order == ["short", "long"] * 6


def test_executions_of_a_profile():
    """Two executions on two streams: 0-10, 20-30, 25-45 and 28-32; 5 ms later 5000-12000, in which
    5001-5002 and 11000-11500 lie.

    From start to end they take 45 and 7000.
    """
    gpu = plane(
        ("Stream #1", [(20, 10), (0, 10), (28, 4), (5000, 7000)]),
        ("Stream #2", [(25, 20), (5001, 1), (11000, 500)]),
        ("XLA Ops", [(0, 9000)]),
    )
    executions = timing._executions(gpu, 2e6)
    assert [timing.span_ns(e) for e in executions] == [45e3, 7e6]
    assert len(timing._executions(gpu, 5e6)) == 1


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
    arrays = [jax.device_put(jnp.zeros(1), device) for device in DEVICES[:2]]
    return timing.program_times_us([(lambda x: x, (arrays,))] * 2)


def profile(*durations, every=5000):
    """Of one GPU for each list of durations, in microseconds as `every`."""
    gpus = [
        plane(("Stream #7", [(every * i, d) for i, d in enumerate(each)])) for each in durations
    ]
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


def test_a_profile_with_a_divided_execution_is_made_again_with_longer_gaps(monkeypatch):
    n = timing.NUM_REPEATS
    divided = profile([10] * (2 * n + 1), [10] * 2 * n)
    whole = profile([7] * 2 * n, [8] * 2 * n, every=50_000)
    for gpu in whole:  # hesitates for 10 ms after 1 us of the third
        (stream,) = gpu.lines
        stream.events.insert(2, types.SimpleNamespace(start_ns=90e6, duration_ns=1e3))
    first, second = profiled(monkeypatch, divided, whole)
    assert first[2] == pytest.approx(10e3 + 8)
    assert first[:2] + first[3:] + second == pytest.approx([8] * (2 * n - 1))


def test_profiles_without_a_gpu_are_refused(monkeypatch):
    only = profile([10] * 2 * timing.NUM_REPEATS, every=50_000)
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


def test_p_is_measured_once_for_the_same_bytes():
    """Of few bytes by a multiple, of many by themselves; P is the faster order."""
    seen = []

    def copies(devices, remote):
        assert devices == list(bench.mesh.devices.flat)
        seen.append(remote)
        return {"at_once": 9.0, "in_turn": 8.0}

    bench = dataclasses.replace(tiny_bench(), peer_copies=copies)
    for _ in range(2):
        few = limits.peer_us(bench, np.array([[0, 10**7], [3 * 10**7, 0]]))
        assert few == {"P_us": 8 / 3, "P_at_once_us": 3.0, "P_in_turn_us": 8 / 3}
        assert limits.peer_us(bench, np.array([[0, 10**8], [0, 0]]))["P_us"] == 8
        assert limits.peer_us(bench, np.zeros((2, 2), int))["P_us"] == 8 / 64e6
    assert seen == [[[0, 3 * 10**7], [9 * 10**7, 0]], [[0, 10**8], [0, 0]], [[0, 0], [0, 0]]]


def test_limits_by_hand():
    """16 bytes at 1e-3 GB/s take 16 us. At 10 bytes a microsecond 240 bytes take 24, 128 12.8."""
    shape, ids = routing_by_hand()
    bench = dataclasses.replace(tiny_bench(), peer_gbps=1e-3)
    limit = limits.limits(bench, shape, ids, bytes_per_us=10)
    known = {"local_bytes": 240, "remote_bytes": 16, "routed_bytes": 48, "P_us": 16.0, "M_us": 24.0}
    assert limit["dispatch"] == limit["plan_and_dispatch"] == known
    assert limit["combine"] == limit["dispatch_backward"]
    assert limit["combine"] == {**known, "local_bytes": 128, "M_us": 16.0}
    assert limit["combine_backward"]["M_us"] == 30.4
    assert limit["round_trip"]["M_us"] == 40
    assert "plan" not in limit


def test_without_p_there_is_no_m(capsys):
    def copies(*args):
        raise RuntimeError("no copy engine")

    shape, ids = routing_by_hand()
    bench = dataclasses.replace(tiny_bench(), peer_copies=copies)
    limit = limits.limits(bench, shape, ids, bytes_per_us=10)
    assert limit["dispatch"] == {"local_bytes": 240, "remote_bytes": 16, "routed_bytes": 48}
    assert "P is left out: no copy engine" in capsys.readouterr().err
    row = report.make_row(shape, "dispatch", "", 5.0, limit["dispatch"])
    assert "ratio" not in row


def test_limits_of_four_ranks_by_hand():
    """Tokens of 16 bytes; expert e lives on rank e. All four are sent to rank 0, three of them by
    others: 48 bytes cross, in 48 us at 1e-3 GB/s, and 64 with its own; in 12 us 4e-3 and 5.3e-3."""
    ids = np.array([[0, 1], [0, 1], [0, 2], [3, 0]], np.int32)
    shape = GroupShape(T=1, H=8, K=2, A=1, E=4, R=4, capacity="worst")
    bench = dataclasses.replace(tiny_bench(4), peer_gbps=1e-3)
    limit = limits.limits(bench, shape, ids, bytes_per_us=1e6)
    for op in limits.LIMITED:
        assert (limit[op]["remote_bytes"], limit[op]["routed_bytes"]) == (48, 64)
        assert limit[op]["P_us"] == limit[op]["M_us"] == 48.0
    row = report.make_row(shape, "dispatch", "", 12.0, limit["dispatch"])
    assert row["remote_GBps"] == pytest.approx(4e-3)
    assert row["routed_GBps"] == pytest.approx(64 / 12e3)
    assert row["ratio"] == 0.25
    described = limits.describe_limits(bench, 1e6, [{}, row])
    assert described["P_GBps"] == pytest.approx(1e-3)
    assert "P_GBps" not in limits.describe_limits(bench, 1e6, [])
