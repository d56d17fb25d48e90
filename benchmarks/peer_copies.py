"""Copies between the GPUs of this process by the copy engines, each started by the GPU that sends.

That is the faster side: of four H200s each sent 370 GB/s to the others and fetched 200. JAX's
device_put leaves no choice, and reached 250. All GPUs are held back until everything is queued, or
what the host needs to start one after the other would count. Timed by events, with the same memory
each time, in two orders: of four GPUs, copies to all peers at once reached 356 GB/s in one run and
284 in another.
"""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

NUM_COPIES = 8  # of each pair, one after the other, so that those of all pairs run together
NUM_REPEATS = 20
LEAST_BYTES = 16  # of a pair, though it has none
# To all peers at once; or to one after the other, each GPU beginning with another one.
ORDERS = "at_once", "in_turn"

Remote = Sequence[Sequence[int]]  # bytes from each GPU to each


def peer_copies_us(devices: Sequence[jax.Device], remote: Remote) -> dict[str, float]:
    """Microseconds in which all send to all others, by each of ORDERS; of the slowest GPU, median
    of some runs."""
    try:
        from cuda.bindings import driver, runtime
    except ImportError:
        raise RuntimeError(
            "copies are started through NVIDIA's cuda-bindings: pip install 'cuda-bindings==13.*' "
            "for cuda13 and 12.* for cuda12"
        ) from None
    cuda = Cuda(driver, runtime)
    gate = Gate(cuda)
    num_ranks = len(devices)
    senders = [
        Sender(
            cuda,
            gate,
            device,
            [
                (devices[peer], remote[rank][peer])
                for peer in ((rank + distance) % num_ranks for distance in range(1, num_ranks))
            ],
        )
        for rank, device in enumerate(devices)
    ]

    def run(order: str) -> float:
        with gate.closed():
            for sender in senders:
                sender.start(is_in_turn=order == "in_turn")
        return max([sender.elapsed_us() for sender in senders])

    times = {order: [run(order) for _ in range(1 + NUM_REPEATS)] for order in ORDERS}
    for sender in senders:
        sender.destroy()
    gate.destroy()
    return {order: statistics.median(each[1:]) / NUM_COPIES for order, each in times.items()}


def wall_peer_copies_us(devices: Sequence[jax.Device], remote: Remote) -> dict[str, float]:
    """The host's time of one copy for each pair, at once: to try a benchmark out without a GPU."""
    pairs = [(a, b) for a in range(len(devices)) for b in range(len(devices)) if a != b]
    sources = [_filled(devices[a], remote[a][b]) for a, b in pairs]
    start = time.perf_counter()
    jax.block_until_ready(jax.device_put(sources, [devices[b] for _, b in pairs]))
    return {"at_once": (time.perf_counter() - start) * 1e6}


class Cuda:
    """Functions of the driver and the runtime, whose errors are exceptions."""

    def __init__(self, driver: Any, runtime: Any) -> None:
        self.driver, self.runtime = driver, runtime

    def call(self, name: str, *args: Any) -> Any:
        module = self.runtime if name.startswith("cuda") else self.driver
        error, *result = getattr(module, name)(*args)
        if int(error) != 0:
            raise RuntimeError(f"{name}: {error!r}")
        return result[0] if result else None


class Gate:
    """A word of host memory that streams of all GPUs wait for."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        flags = cuda.runtime.cudaHostAllocPortable | cuda.runtime.cudaHostAllocMapped
        self.address = int(cuda.call("cudaHostAlloc", 4, flags))
        self.word = ctypes.c_uint32.from_address(self.address)
        self.word.value = 0

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Streams that are held in here go on when it ends, however it does."""
        try:
            yield
        finally:
            self.word.value += 1

    def hold(self, stream: Any) -> None:
        until = self.word.value + 1
        at_least = self.cuda.driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self.cuda.call("cuStreamWaitValue32", int(stream), self.address, until, int(at_least))

    def destroy(self) -> None:
        self.cuda.call("cudaFreeHost", self.address)


class Sender:
    """One GPU, a stream for each GPU it sends to, and the memory of both."""

    def __init__(
        self, cuda: Cuda, gate: Gate, device: jax.Device, targets: Sequence[tuple[jax.Device, int]]
    ) -> None:
        self.call, self.gate = cuda.call, gate
        self.kind = cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.ordinal = device.local_hardware_id
        self.copies = [(_filled(device, size), _filled(peer, size)) for peer, size in targets]
        self.call("cudaSetDevice", self.ordinal)
        self.streams = [self.call("cudaStreamCreate") for _ in targets]
        self.begin, self.end, *self.done = [
            self.call("cudaEventCreate") for _ in range(2 + len(targets))
        ]

    def start(self, is_in_turn: bool) -> None:
        """All copies, between two events of the first stream, once the gate opens. In turn: all on
        that stream."""
        streams = self.streams[:1] * len(self.streams) if is_in_turn else self.streams
        self.call("cudaSetDevice", self.ordinal)
        self.gate.hold(self.streams[0])
        self.call("cudaEventRecord", self.begin, self.streams[0])
        for stream in self.streams[1:]:
            self.call("cudaStreamWaitEvent", stream, self.begin, 0)
        for _ in range(NUM_COPIES):
            for (source, target), stream in zip(self.copies, streams, strict=True):
                addresses = target.unsafe_buffer_pointer(), source.unsafe_buffer_pointer()
                self.call("cudaMemcpyAsync", *addresses, source.nbytes, self.kind, stream)
        for stream, done in zip(self.streams, self.done, strict=True):
            self.call("cudaEventRecord", done, stream)
            self.call("cudaStreamWaitEvent", self.streams[0], done, 0)
        self.call("cudaEventRecord", self.end, self.streams[0])

    def elapsed_us(self) -> float:
        """Of the copies just started, once they have ended."""
        self.call("cudaSetDevice", self.ordinal)
        self.call("cudaEventSynchronize", self.end)
        return self.call("cudaEventElapsedTime", self.begin, self.end) * 1e3

    def destroy(self) -> None:
        self.call("cudaSetDevice", self.ordinal)
        for stream in self.streams:
            self.call("cudaStreamDestroy", stream)
        for event in (self.begin, self.end, *self.done):
            self.call("cudaEventDestroy", event)


def _filled(device: jax.Device, num_bytes: int) -> jax.Array:
    ones = jnp.ones(max(num_bytes, LEAST_BYTES), jnp.uint8)
    return jax.block_until_ready(jax.device_put(ones, device))
