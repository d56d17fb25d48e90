"""How copies between GPUs are started and timed, with a CUDA that only takes notes."""

# ruff: noqa: N802, N815 (CUDA's names)

import enum
import sys
import types

import pytest
from benchmarking import DEVICES

from benchmarks import peer_copies


class Runtime:
    """cuda.bindings.runtime, where a copy takes a microsecond a byte."""

    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDeviceToDevice=3)

    class cudaError_t(enum.IntEnum):  # noqa: N801
        cudaSuccess = 0
        cudaErrorInvalidValue = 1

    def __init__(self):
        self.device = None
        self.copies = []  # (device that is current, target, source, bytes)
        self.now = []  # of each stream
        self.events = []  # when each was recorded
        self.waited = set()

    def done(self, *result):
        return (self.cudaError_t.cudaSuccess, *result)

    def cudaSetDevice(self, ordinal):
        self.device = ordinal
        return self.done()

    def cudaStreamCreate(self):
        self.now.append(0)
        return self.done(len(self.now) - 1)

    def cudaEventCreate(self):
        self.events.append(None)
        return self.done(len(self.events) - 1)

    def cudaEventRecord(self, event, stream):
        self.events[event] = self.now[stream]
        self.waited.discard(event)
        return self.done()

    def cudaStreamWaitEvent(self, stream, event, flags):
        self.now[stream] = max(self.now[stream], self.events[event])
        return self.done()

    def cudaMemcpyAsync(self, target, source, num_bytes, kind, stream):
        if kind != 3:
            return (self.cudaError_t.cudaErrorInvalidValue,)
        self.copies.append((self.device, target, source, num_bytes))
        self.now[stream] += num_bytes
        return self.done()

    def cudaEventSynchronize(self, event):
        self.waited.add(event)
        return self.done()

    def cudaEventElapsedTime(self, start, end):
        assert end in self.waited
        return self.done((self.events[end] - self.events[start]) * 1e-3)


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    module = types.ModuleType("cuda.bindings")
    module.runtime = made
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)
    return made


def test_every_gpu_sends_to_all_others_and_the_slowest_counts(runtime, monkeypatch):
    """Copies to different GPUs run side by side: 2 ends with its 70 bytes to 1, nothing is 16."""
    made = {}
    filled = peer_copies._filled

    def noted(device, num_bytes):
        array = filled(device, num_bytes)
        made[array.unsafe_buffer_pointer()] = (device, array)
        return array

    monkeypatch.setattr(peer_copies, "_filled", noted)
    remote = [[0, 20, 30], [40, 0, 50], [60, 70, 0]]
    devices = [DEVICES[i] for i in (3, 1, 2)]
    assert peer_copies.peer_copies_us(devices, remote) == pytest.approx(70)
    turns = (1 + peer_copies.NUM_REPEATS) * peer_copies.NUM_COPIES
    for rank, device in enumerate(devices):
        sent = [copy for copy in runtime.copies if copy[0] == device.local_hardware_id]
        assert all(made[source][0] == device for _, _, source, _ in sent)
        found = [(made[target][0], num_bytes) for _, target, _, num_bytes in sent]
        others = [(rank + 1) % 3, (rank + 2) % 3]  # each begins with another one
        assert found == [(devices[peer], remote[rank][peer]) for peer in others] * turns
    assert peer_copies.peer_copies_us(devices[:2], [[0, 0], [0, 0]]) == pytest.approx(16)


def test_a_call_that_fails_is_named(runtime):
    runtime.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDeviceToDevice=4)
    with pytest.raises(RuntimeError, match=r"cudaMemcpyAsync: .*cudaErrorInvalidValue"):
        peer_copies.peer_copies_us(DEVICES[:2], [[0, 1], [1, 0]])


def test_without_cudas_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"pip install 'cuda-bindings==13"):
        peer_copies.peer_copies_us(DEVICES[:2], [[0, 1], [1, 0]])


def test_a_dry_run_copies_for_every_pair():
    assert peer_copies.wall_peer_copies_us(DEVICES[:3], [[0, 1, 2], [3, 0, 4], [5, 6, 0]]) > 0
