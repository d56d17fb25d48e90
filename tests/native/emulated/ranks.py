"""Runs calls of a group, a process a rank, whose kernels are threads of the host.

    python ranks.py LIBRARY INPUT.npz OUTPUT.npz

INPUT holds the arrays of all ranks, rank first, and `job`, a JSON of the static side. The call is
repeated on one arena, by which epochs and parities pass: inputs and results have an axis of
`repeats` values after the rank. Needs NumPy only.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
import time

import numpy as np

SCALARS = (
    *("op", "rank", "num_ranks", "is_one_process", "is_read_in_place"),
    *("type", "has_weights", "has_bulk_copy"),
    *("num_tokens", "top_k", "num_groups", "alignment", "capacity", "zero_tail", "row_bytes"),
    *("timeout_ns", "options", "half_bytes", "num_sms"),
)
POINTERS = (
    *("controls", "regions", "launch", "failure"),
    *("slots", "group_counts", "group_sizes", "group_starts", "owners"),
    *("x", "dout", "weights", "out", "dweights"),
    *("numbers", "results"),
)


PR_SET_PDEATHSIG = 1
RESULTS = ("out", "dweights", "results")
CHANGING = ("x", "dout", "weights", *RESULTS)
READ_BY_PEERS = {"x", "dout"}


class Job(ctypes.Structure):
    """kernels.cc's."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in SCALARS),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


def shared(num_bytes):
    """Zeroed bytes that processes forked later share at the same address."""
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)


def share(array):
    """A copy of the array in such bytes."""
    copy = shared(array.nbytes)[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def main():
    library = ctypes.CDLL(sys.argv[1])
    library.control_bytes.restype = library.half_bytes.restype = ctypes.c_int64
    given = dict(np.load(sys.argv[2]))
    static = json.loads(str(given.pop("job")))
    repeats, late, late_s = (static.pop(name) for name in ("repeats", "late", "late_s"))
    odd, odd_options, vector = (static.pop(name) for name in ("odd", "odd_options", "vector"))
    faults, reading = static.pop("faults"), static.pop("reading")
    static["is_one_process"] = int(reading == "in_place")
    num_ranks = static["num_ranks"]
    arrays = {name: share(array) for name, array in given.items()}
    controls = shared(num_ranks * library.control_bytes())
    for rank, (delay_ns, *flags) in faults:
        address, delay_ns = ctypes.c_void_p(controls.ctypes.data), ctypes.c_int64(delay_ns)
        library.set_fault(address, rank, delay_ns, *flags)
    launches = [shared(128) for _ in range(num_ranks)]
    failures = [shared(256) for _ in range(num_ranks)]
    probe = Job(**static)
    half = max(library.half_bytes(ctypes.byref(probe)), 256)
    regions = shared(num_ranks * 2 * half)
    regions[...] = 0xFF  # NaN: what an earlier call may have left

    def work(rank):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hang ends with the test
        mine = {name: array[rank] for name, array in arrays.items()}
        for turn in range(repeats):
            now = {name: mine[name][turn] if name in CHANGING else mine[name] for name in mine}
            options = odd_options if rank == odd else static["options"]
            in_place = reading == "in_place" or (reading == "mixed" and (turn // 2 + rank) % 2 == 0)
            own = {"rank": rank, "options": options, "half_bytes": half}
            if rank == vector:
                own["has_bulk_copy"] = 0
            job = Job(
                **{**static, **own, "is_read_in_place": int(in_place)},
                controls=controls.ctypes.data,
                regions=regions.ctypes.data,
                launch=launches[rank].ctypes.data,
                failure=failures[rank].ctypes.data,
                **{name: array.ctypes.data for name, array in now.items()},
            )
            if late is not None and (turn + rank) % num_ranks == late:
                time.sleep(late_s)
            if status := library.run(ctypes.byref(job)):
                print(f"rank {rank}: error {status}", file=sys.stderr)
                os._exit(1)
            for name in READ_BY_PEERS & now.keys():
                now[name].view(np.uint8)[...] = 0xAA  # XLA would use the memory again
        os._exit(0)

    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            work(rank)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    results = {name: arrays[name] for name in RESULTS if name in arrays}
    results["failures"] = np.stack([f[:16].view(np.int32) for f in failures])
    results["launches"] = np.stack(launches)
    np.savez(sys.argv[3], **results)
    sys.exit(any(codes))


main()
