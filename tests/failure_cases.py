"""What a group says when it fails: one case a process, run by test_group_failures.py.

    python tests/failure_cases.py NAME NUM_RANKS [RANK COORDINATOR]

With a rank, the process drives one GPU of NUM_RANKS.
"""

import dataclasses
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import cuda

T, K, E, H = 64, 4, 16, 256
R = int(sys.argv[2])
ODD = R // 2  # the rank that fails; not that of jax.distributed's service
TIMEOUT_S = 2.0
SPEC = P(("data", "expert"))


class Group:
    """All GPUs, in groups of num_ranks beside each other, plans on them, which lets them meet, and
    programs of calls."""

    def __init__(self, num_ranks=R, **options):
        devices = np.array(jax.devices()[:R]).reshape(-1, num_ranks)
        self.mesh = Mesh(devices, ("data", "expert"))
        self.config = self.make_config(**options)
        rng = np.random.default_rng(0)
        ids = np.argsort(rng.random((R, T, E)), axis=2)[..., :K].astype(np.int32)
        self.ids = self.spread(ids)
        self.x = self.spread(rng.integers(-4, 4, (R, T, H)).astype(np.float32))
        self.plan = self.run(lambda ids: ep.plan(ids, self.config), self.ids)

    def make_config(self, **options):
        return ep.EpConfig(
            E, "expert", implementation="cuda", **{"timeout_s": TIMEOUT_S, **options}
        )

    def spread(self, array):
        sharding = NamedSharding(self.mesh, SPEC)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def program(self, op):
        def shard(*args):
            args = jax.tree.map(lambda leaf: leaf[0], args)
            return jax.tree.map(lambda leaf: leaf[None], op(*args))

        return jax.jit(
            jax.shard_map(shard, mesh=self.mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False)
        )

    def run(self, op, *args):
        return jax.block_until_ready(self.program(op)(*args))

    def round_trip(self):
        """x, K times over."""
        return self.program(lambda x, plan: ep.combine(ep.dispatch(x, plan), plan))


def mine(array):
    """This process's part of a result, without a collective."""
    return np.stack([np.asarray(shard.data)[0] for shard in array.addressable_shards])


def is_right(group, out):
    return bool((mine(out) == K * mine(group.x)).all())


def error_of(action):
    """The text of the error that it raises."""
    try:
        jax.block_until_ready(action())
    except Exception as error:  # JAX wraps errors of calls in several types
        return str(error)
    raise AssertionError("no error")


def device_of(rank):
    return jax.devices()[rank].local_hardware_id


def set_fault(rank, **fault):
    cuda.extension("test").set_fault(device=device_of(rank), **fault)


def assert_goes_on(group, step):
    """After a reset."""
    set_fault(ODD)
    ep.reset()
    ep.check()
    for _ in range(3):
        assert is_right(group, step(group.x, group.plan))
    ep.check()


# One process.


def stopped_and_reset():
    """A rank takes no part after a good call: poison, errors, and on after a reset."""
    group = Group()
    step = group.round_trip()
    assert is_right(group, step(group.x, group.plan))
    ep.check()
    set_fault(ODD, skips=True)
    start = time.monotonic()
    out = jax.block_until_ready(step(group.x, group.plan))
    seconds = time.monotonic() - start
    assert TIMEOUT_S < seconds < 2 * TIMEOUT_S, seconds
    assert np.isnan(mine(out)).all()
    print("check:", error_of(ep.check))
    start = time.monotonic()
    print("next execution:", error_of(lambda: step(group.x, group.plan)))
    assert time.monotonic() - start < TIMEOUT_S / 2
    assert_goes_on(group, step)


def later_than_the_budget():
    """A rank comes when the others have given up: it says so, and does nothing."""
    group = Group()
    step = group.round_trip()
    assert is_right(group, step(group.x, group.plan))
    set_fault(ODD, delay_ns=int(2 * TIMEOUT_S * 1e9))
    out = jax.block_until_ready(step(group.x, group.plan))
    assert np.isnan(mine(out)).all()
    print("check:", error_of(ep.check))
    assert_goes_on(group, step)


def stopped_beside_another_group():
    """Groups of R / 2: the one without the rank that stops has its results, and no failure."""
    group = Group(R // 2)
    step = group.round_trip()
    assert is_right(group, step(group.x, group.plan))
    set_fault(ODD, skips=True)
    out = mine(step(group.x, group.plan))
    assert (out[: R // 2] == K * mine(group.x)[: R // 2]).all()
    assert np.isnan(out[R // 2 :]).all()
    print("check:", error_of(ep.check))
    print("next execution:", error_of(lambda: step(group.x, group.plan)))
    assert_goes_on(group, step)


def stopped_in_a_plan():
    """A rank takes no part in the exchange of ids: nobody has a row, and who asks is told."""
    group = Group()
    set_fault(ODD, skips=True)
    plan = group.run(lambda ids: ep.plan(ids, group.config), group.ids)
    assert (mine(plan.slots) == -1).all()
    assert (mine(plan.group_counts) == 0).all()
    print("check:", error_of(ep.check))


def eight_calls_end_in_one_budget():
    """A step of eight calls, replayed as a graph, gives up once and not eight times."""
    group = Group()

    def eight(x, plan):
        for _ in range(4):
            x = ep.combine(ep.dispatch(x, plan), plan) / K
        return x

    step = group.program(eight)
    for _ in range(5):
        out = step(group.x, group.plan)
    assert (mine(out) == mine(group.x)).all()
    before = cuda.extension("test").num_executions()
    jax.block_until_ready(step(group.x, group.plan))
    assert cuda.extension("test").num_executions() == before, "not replayed"
    set_fault(ODD, skips=True)
    start = time.monotonic()
    out = jax.block_until_ready(step(group.x, group.plan))
    seconds = time.monotonic() - start
    assert seconds < 1.5 * TIMEOUT_S, seconds
    assert np.isnan(mine(out)).all()
    print(f"gave up in {seconds:.1f} s\ncheck:", error_of(ep.check))


def a_stall_survives():
    """A rank 60 s late is waited for."""
    group = Group(timeout_s=300.0)
    step = group.program(lambda x, plan: ep.dispatch(x, plan))
    want = mine(step(group.x, group.plan))
    set_fault(ODD, delay_ns=60_000_000_000)
    start = time.monotonic()
    out = mine(step(group.x, group.plan))
    seconds = time.monotonic() - start
    assert 60 < seconds < 70, seconds
    assert (out == want).all()
    ep.check()
    print("survived")


def out_of_memory():
    """One rank has no memory for its arena: all say so, and the next execution tries again."""
    cuda.extension("test").fail_next_meeting(device_of(ODD), "out_of_memory")
    print("error:", error_of(Group))
    group = Group()
    assert is_right(group, group.round_trip()(group.x, group.plan))
    ep.check()


def no_peer_access():
    cuda.extension("test").fail_next_meeting(device_of(0), "no_peer_access")
    print("error:", error_of(Group))


# One process a GPU.


def leave():
    """Without the farewell of jax.distributed, which would wait for the rank that failed. Its
    service is rank 0's and would take the others along: that rank stays until the test has heard
    them, which closes its stdin then."""
    sys.stdout.flush()
    if jax.process_index() == 0:
        sys.stdin.read()
    os._exit(0)


def killed():
    """A rank dies between two steps. The others give up after their budget, and say so in the next
    step, long before jax.distributed's heartbeat (100 s by default) notices."""
    group = Group()
    step = group.round_trip()
    assert is_right(group, step(group.x, group.plan))
    if jax.process_index() == ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    start = time.monotonic()
    out = mine(step(group.x, group.plan))
    seconds = time.monotonic() - start
    assert TIMEOUT_S / 2 < seconds < 3 * TIMEOUT_S, seconds
    assert np.isnan(out).all()
    print("check:", error_of(ep.check))
    print("next execution:", error_of(lambda: step(group.x, group.plan)))
    leave()


def mismatched(usual, odd):
    """One rank runs a program of its own; plan and x are there, so the programs hold our calls
    only."""
    group = Group()
    step = group.round_trip()
    assert is_right(group, step(group.x, group.plan))
    program = (odd if jax.process_index() == ODD else usual)(group)
    start = time.monotonic()
    jax.block_until_ready(program())
    assert time.monotonic() - start < 10 * TIMEOUT_S
    print("check:", error_of(ep.check))
    leave()


def combine_of(group):
    y = group.run(lambda x, plan: ep.dispatch(x, plan), group.x, group.plan)
    step = group.program(lambda y, plan: ep.combine(y, plan))
    return lambda: step(y, group.plan)


def dispatch_of(group):
    group.run(lambda x, plan: ep.dispatch(x, plan), group.x, group.plan)
    step = group.program(lambda x, plan: ep.dispatch(x * 1, plan))
    return lambda: step(group.x, group.plan)


def half_of(group):
    """dispatch of half the columns."""
    group.run(lambda x, plan: ep.dispatch(x, plan), group.x, group.plan)
    step = group.program(lambda x, plan: ep.dispatch(x[:, : H // 2], plan))
    return lambda: step(group.x, group.plan)


def other_option_of(group):
    """dispatch with another tail."""
    group.run(lambda x, plan: ep.dispatch(x, plan), group.x, group.plan)
    config = group.make_config(tail="undefined")

    def op(x, plan):
        return ep.dispatch(x, dataclasses.replace(plan, config=config))

    step = group.program(op)
    return lambda: step(group.x, group.plan)


def another_order():
    mismatched(dispatch_of, combine_of)


def another_shape():
    mismatched(dispatch_of, half_of)


def another_option():
    mismatched(dispatch_of, other_option_of)


def main() -> None:
    name = sys.argv[1]
    if len(sys.argv) > 3:
        rank, coordinator = int(sys.argv[3]), sys.argv[4]
        jax.distributed.initialize(coordinator, R, rank, local_device_ids=[rank])
    jnp.zeros(1).block_until_ready()
    globals()[name]()
    print("done:", name)


main()
