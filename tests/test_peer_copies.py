"""How copies between GPUs are started and timed, with a CUDA that only takes notes."""

# ruff: noqa: N802, N815 (CUDA's names)

import ctypes
import enum
import sys
import types

import pytest
from benchmarking import DEVICES

from benchmarks import peer_copies


class Runtime:
    """cuda.bindings.runtime; a copy takes a microsecond a byte. A stream that the host waits for is
    100 behind the others then. Streams and events are used with their device current alone. Copies
    are queued while a word of the host holds the GPU back, and are waited for when it does not."""

    cudaHostAllocPortable, cudaHostAllocMapped = 1, 2
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDeviceToDevice=3)

    class cudaError_t(enum.IntEnum):  # noqa: N801
        cudaSuccess = 0
        cudaErrorInvalidValue = 1

    def __init__(self):
        self.device = None
        self.copies = []  # (device that is current, target, source, bytes)
        self.now = []  # of each stream
        self.times = []  # when each event was recorded
        self.recorded_on = {}
        self.stream_devices, self.event_devices = [], []
        self.waited = set()
        self.destroyed = 0
        self.word = (ctypes.c_uint32 * 2)(7, 7)  # the first is the gate's
        self.held_until = {}  # of each device
        self.streams_in_use = {}  # by copies of a device since its last event
        self.slowdown = 1  # of a copy beside others of its device

    def cudaHostAlloc(self, num_bytes, flags):
        assert (num_bytes, flags) == (4, 3)
        self.held_until.clear()
        return self.done(ctypes.addressof(self.word))

    def cudaFreeHost(self, address):
        assert address == ctypes.addressof(self.word)
        assert self.word[1] == 7
        self.destroyed += 1
        return self.done()

    def done(self, *result):
        return (self.cudaError_t.cudaSuccess, *result)

    def cudaSetDevice(self, ordinal):
        self.device = ordinal
        return self.done()

    def cudaStreamCreate(self):
        self.now.append(0)
        self.stream_devices.append(self.device)
        return self.done(len(self.now) - 1)

    def cudaEventCreate(self):
        self.times.append(None)
        self.event_devices.append(self.device)
        return self.done(len(self.times) - 1)

    def cudaEventRecord(self, event, stream):
        assert self.event_devices[event] == self.stream_devices[stream] == self.device
        self.times[event] = self.now[stream]
        self.recorded_on[event] = stream
        self.waited.discard(event)
        return self.done()

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.now[stream] = max(self.now[stream], self.times[event])
        return self.done()

    def cudaMemcpyAsync(self, target, source, num_bytes, kind, stream):
        if kind != 3:
            return (self.cudaError_t.cudaErrorInvalidValue,)
        assert self.stream_devices[stream] == self.device
        assert self.word[0] < self.held_until[self.device]
        self.copies.append((self.device, target, source, num_bytes))
        self.streams_in_use.setdefault(self.device, set()).add(stream)
        is_alone = len(self.streams_in_use[self.device]) == 1
        self.now[stream] += num_bytes * (1 if is_alone else self.slowdown)
        return self.done()

    def cudaEventSynchronize(self, event):
        self.waited.add(event)
        assert self.word[0] >= max(self.held_until.values())
        self.now[self.recorded_on[event]] += 100
        return self.done()

    def cudaEventElapsedTime(self, start, end):
        assert end in self.waited
        return self.done((self.times[end] - self.times[start]) * 1e-3)

    def cudaStreamDestroy(self, stream):
        self.destroyed += 1
        return self.done()

    def cudaEventDestroy(self, event):
        self.destroyed += 1
        return self.done()


class Driver:
    """cuda.bindings.driver beside it."""

    CUstreamWaitValue_flags = types.SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)

    def __init__(self, runtime):
        self.runtime = runtime

    def cuStreamWaitValue32(self, stream, address, value, flags):
        assert (address, flags) == (ctypes.addressof(self.runtime.word), 0)
        assert self.runtime.stream_devices[stream] == self.runtime.device
        self.runtime.held_until[self.runtime.device] = value
        self.runtime.streams_in_use.pop(self.runtime.device, None)
        return (0,)


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    module = types.ModuleType("cuda.bindings")
    module.runtime, module.driver = made, Driver(made)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)
    return made


def test_every_gpu_sends_to_all_others_and_the_slowest_counts(runtime, monkeypatch):
    """Copies to different GPUs run side by side, which is faster here than one after the other: 2
    ends with its 70 bytes to 1, nothing is 16."""
    made = {}
    filled = peer_copies._filled

    def noted(device, num_bytes):
        array = filled(device, num_bytes)
        made[array.unsafe_buffer_pointer()] = (device, array)
        return array

    monkeypatch.setattr(peer_copies, "_filled", noted)
    remote = [[0, 20, 30], [40, 0, 50], [60, 70, 0]]
    devices = [DEVICES[i] for i in (3, 1, 2)]
    times = peer_copies.peer_copies_us(devices, remote)
    assert times == pytest.approx({"at_once": 70, "in_turn": 130})
    turns = 2 * (1 + peer_copies.NUM_REPEATS) * peer_copies.NUM_COPIES
    for rank, device in enumerate(devices):
        sent = [copy for copy in runtime.copies if copy[0] == device.local_hardware_id]
        assert all(made[source][0] == device for _, _, source, _ in sent)
        found = [(made[target][0], num_bytes) for _, target, _, num_bytes in sent]
        others = [(rank + 1) % 3, (rank + 2) % 3]  # each begins with another one
        assert found == [(devices[peer], remote[rank][peer]) for peer in others] * turns
    assert runtime.destroyed == len(runtime.now) + len(runtime.times) + 1
    least = peer_copies.peer_copies_us(devices[:2], [[0, 0], [0, 0]])
    assert least == pytest.approx({"at_once": 16, "in_turn": 16})


def test_copies_that_slow_each_other_down(runtime):
    """Where a copy takes three times as long beside others of its GPU: 180 us for 2, and 120 in
    turn."""
    runtime.slowdown = 3
    remote = [[0, 20, 30], [40, 0, 50], [60, 60, 0]]
    times = peer_copies.peer_copies_us(DEVICES[:3], remote)
    assert times == pytest.approx({"at_once": 180, "in_turn": 120})


def test_a_call_that_fails_is_named(runtime):
    runtime.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDeviceToDevice=4)
    with pytest.raises(RuntimeError, match=r"cudaMemcpyAsync: .*cudaErrorInvalidValue"):
        peer_copies.peer_copies_us(DEVICES[:2], [[0, 1], [1, 0]])
    assert runtime.word[0] == 1  # no stream is left waiting


def test_without_cudas_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"pip install 'cuda-bindings==13"):
        peer_copies.peer_copies_us(DEVICES[:2], [[0, 1], [1, 0]])


def test_a_dry_run_copies_for_every_pair(monkeypatch):
    """Each pair's bytes to its target, 16 where there are none."""
    copied, put = [], peer_copies.jax.device_put

    def noted(arrays, devices):
        if isinstance(devices, list):
            copied.extend((a.device, d, a.nbytes) for a, d in zip(arrays, devices, strict=True))
        return put(arrays, devices)

    monkeypatch.setattr(peer_copies.jax, "device_put", noted)
    a, b = DEVICES[:2]
    assert peer_copies.wall_peer_copies_us([a, b], [[0, 40], [0, 0]])["at_once"] > 0
    assert copied == [(a, b, 40), (b, a, 16)]
