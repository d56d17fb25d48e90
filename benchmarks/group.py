"""How an op is measured between GPUs: its inputs on every rank, the programs that call it."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from benchmarks.peer_copies import peer_copies_us, wall_peer_copies_us
from benchmarks.shapes import GroupShape
from benchmarks.stock import AXIS, StockPlan, stock_plan
from benchmarks.timing import longer_us, program_times_us, wall_times_us
from jax_moe_ep import cuda

BYTES_BEYOND_L2 = 200e6  # four times the 50 MB of an H200
MOST_BUFFER_BYTES = 12e9  # of the rows that one program reads, and of those that it writes
FEWEST_CALLS, USUAL_CALLS, MOST_CALLS = 8, 16, 32  # of one program
BYTES_OF_A_PROGRAM = 6e9  # of rows: some milliseconds, beside which its start is little
NUM_ITERATIONS = 100
LONGER = 5  # times as many
TIMEOUT_S = 60.0


class Inputs(NamedTuple):
    """Of one call, on one rank."""

    ids: jax.Array
    plan: ep.Plan
    x: jax.Array
    y: jax.Array
    weights: jax.Array
    stock: StockPlan | None


Step = Callable[[Inputs], Any]
XlaOptions = dict[str, bool | int | str]

# By default XLA captures the calls of a program but no loop: the host launches each kernel in it.
# Captured, a loop is one CUDA graph, with a node that is its condition or with all iterations.
CAPTURE: XlaOptions = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
UNROLL: XlaOptions = {"xla_gpu_command_buffer_unroll_loops": True}
LOOPS: dict[str, XlaOptions] = {
    "in a loop": {},
    "in a captured loop": CAPTURE,
    "in a captured loop, unrolled": CAPTURE | UNROLL,
}


class Program(NamedTuple):
    """num_calls calls of one step."""

    run: Callable[[Any], Any]
    inputs: Any
    num_calls: int


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    times, peer_copies, longer: program_times_us, peer_copies_us and longer_us, or those of the
        host's clock and of fewer repeats, to try the benchmark out.
    peer_gbps: GB/s of a peer copy, if it is known from elsewhere.
    """

    mesh: Mesh
    implementation: Any = "cuda"
    times: Callable[..., list[list[float]]] = program_times_us
    peer_copies: Callable[..., dict[str, float]] = peer_copies_us
    longer: Callable[..., list[float]] = longer_us
    peer_gbps: float | None = None
    most_calls: int = MOST_CALLS
    num_iterations: int = NUM_ITERATIONS

    def config(self, shape: GroupShape) -> ep.EpConfig:
        more = {"timeout_s": TIMEOUT_S} if self.implementation == "cuda" else {}
        return shape.config(implementation=self.implementation, **more)

    def on_ranks(self, op: Callable[..., Any], xla: XlaOptions | None = None) -> Callable[..., Any]:
        """op on every rank's shard, jitted; arrays have one entry a rank in front."""

        def shard(*args: Any) -> Any:
            own = jax.tree.map(lambda a: jnp.squeeze(a, 0), args)
            return jax.tree.map(lambda a: a[None], op(*own))

        spec = P(AXIS)
        mapped = jax.shard_map(
            shard, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        return jax.jit(mapped, compiler_options=xla)

    def in_turn(
        self,
        step: Callable[[Any], Any],
        inputs: Sequence[Any],
        num_calls: int,
        xla: XlaOptions | None = None,
    ) -> Program:
        """The step for all inputs in turn, as often as needed to have so many calls."""
        calls = [*inputs] * max(num_calls // len(inputs), 1)
        return Program(self.on_ranks(in_turn(step), xla), calls, len(calls))

    def in_loop_us(self, step: Step, inputs: Inputs, form: str) -> float:
        """Of the step in one of LOOPS: of an iteration that a long one has more than a short one.
        Its inputs may be in L2. That XLA has captured it is seen from the handlers, which the host
        calls for each launch that is not replayed."""
        counts = self.num_iterations, LONGER * self.num_iterations
        short, long = (self.on_ranks(in_loop(step, count), LOOPS[form]) for count in counts)
        before = self.num_host_calls()
        times = self.longer((short, (inputs,)), (long, (inputs,)))
        host_calls = self.num_host_calls() - before
        iterations = sum(counts) * len(times) * len(self.mesh.local_devices)
        if LOOPS[form] and 2 * host_calls > iterations:
            raise RuntimeError(
                f"{form}: XLA has captured none, the host launched {host_calls} kernels in "
                f"{iterations} iterations"
            )
        return statistics.median(times) / (counts[1] - counts[0])

    def num_host_calls(self) -> int:
        """Of the kernels' handlers in this process, ever."""
        is_cuda = self.implementation == "cuda"
        return cuda.extension("benchmarks").num_executions() if is_cuda else 0

    def us[Key](self, programs: Mapping[Key, Program]) -> dict[Key, float]:
        """Of one call of each program's step."""
        times = self.times([(p.run, (p.inputs,)) for p in programs.values()])
        return {
            key: statistics.median(each) / program.num_calls
            for (key, program), each in zip(programs.items(), times, strict=True)
        }


def make_bench(ranks: int | None, wall: bool, peer_gbps: float | None = None) -> Bench:
    """On so many devices, or all; wall: a dry run on any, by the reference and the host's clock."""
    mesh = Mesh(np.array(jax.devices()[:ranks]), (AXIS,))
    if wall:
        host = wall_times_us, wall_peer_copies_us, functools.partial(longer_us, num_repeats=1)
        return Bench(mesh, "reference", *host, peer_gbps=peer_gbps, most_calls=2)
    return Bench(mesh, peer_gbps=peer_gbps)


def one_by_one(calls: Sequence[tuple[Callable[[Any], Any], Any]]) -> list[Any]:
    """What each step makes of its inputs, none before the one before it has ended: XLA would merge
    the exchanges of independent plans into one, and two exchanges at once may wait for each
    other."""
    outs: list[Any] = []
    for step, inputs in calls:
        if outs:
            outs[-1], inputs = lax.optimization_barrier((outs[-1], inputs))
        outs.append(step(inputs))
    return outs


def in_turn(step: Callable[[Any], Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """The step for each of the inputs, traced once, however many there are."""
    step = jax.jit(step)
    return lambda inputs: one_by_one([(step, each) for each in inputs])


def in_loop(step: Step, num_iterations: int) -> Step:
    """The step again and again, its ids and weights made to depend on the last result, or XLA
    would do it once before the loop."""

    def run(inputs: Inputs) -> Any:
        def body(_: Any, carry: Any) -> Any:
            _, ids, weights = carry
            out = step(inputs._replace(ids=ids, weights=weights))
            return lax.optimization_barrier((out, ids, weights))

        shapes = jax.eval_shape(step, inputs)
        out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.fori_loop(0, num_iterations, body, (out, inputs.ids, inputs.weights))[0]

    return run


def ops(config: ep.EpConfig) -> dict[str, Step]:
    def plan_and_dispatch(i: Inputs) -> Any:
        plan = ep.plan(i.ids, config)
        return ep.dispatch(i.x, plan), plan

    def round_trip(i: Inputs) -> Any:
        rows, plan = plan_and_dispatch(i)
        return ep.combine(rows, plan, i.weights)

    def combine_backward(i: Inputs) -> Any:
        return jax.vjp(lambda y, w: ep.combine(y, i.plan, w), i.y, i.weights)[1](i.x)

    return {
        "plan": lambda i: ep.plan(i.ids, config).slots,
        "dispatch": lambda i: ep.dispatch(i.x, i.plan),
        "combine": lambda i: ep.combine(i.y, i.plan, i.weights),
        "dispatch_backward": lambda i: jax.vjp(lambda x: ep.dispatch(x, i.plan), i.x)[1](i.y)[0],
        "combine_backward": combine_backward,
        "round_trip": round_trip,
        "plan_and_dispatch": lambda i: plan_and_dispatch(i)[0],
    }


def make_inputs(
    bench: Bench, shape: GroupShape, with_stock: bool = False
) -> tuple[list[Inputs], np.ndarray, int]:
    """Different inputs that together exceed L2 (at T = 16 just so), the ids of the first, and how
    many calls a program makes of them; nothing is dropped."""
    most = most_calls(bench, shape.row_bytes * shape.num_rows)
    touched = shape.row_bytes * shape.T * shape.K
    num_inputs = int(np.clip(BYTES_BEYOND_L2 / touched, 2, most))
    sharding = NamedSharding(bench.mesh, P(AXIS))
    config = bench.config(shape)
    make_plan = bench.on_ranks(lambda ids: ep.plan(ids, config))
    make_stock = bench.on_ranks(stock_plan)
    payloads = make_payloads(bench.mesh, shape.T, shape.H, shape.K, shape.num_rows, num_inputs)
    random = np.random.default_rng(0)
    all_ids = [shape.ids(random).reshape(shape.R, shape.T, shape.K) for _ in range(num_inputs)]
    inputs = []
    for host_ids, payload in zip(all_ids, payloads, strict=True):
        ids = jax.make_array_from_callback(host_ids.shape, sharding, host_ids.__getitem__)
        plan = make_plan(ids)
        assert largest(plan.num_dropped) == 0, f"{shape} drops rows"
        maps = make_stock(ids, plan) if with_stock else None
        inputs.append(Inputs(ids, plan, *payload, maps))
    num_calls = number_of_calls(bench, shape.row_bytes * shape.num_rows)
    return inputs, all_ids[0].reshape(-1, shape.K), num_calls


def most_calls(bench: Bench, buffer_bytes: float) -> int:
    return min(bench.most_calls, max(int(MOST_BUFFER_BYTES / buffer_bytes), 2))


def number_of_calls(bench: Bench, buffer_bytes: float) -> int:
    """Of one program: as many as its start does not matter for, within memory."""
    enough = np.clip(BYTES_OF_A_PROGRAM / buffer_bytes, FEWEST_CALLS, USUAL_CALLS)
    return min(int(enough), most_calls(bench, buffer_bytes))


@functools.lru_cache(maxsize=2)  # the sweep goes back and forth between two at the most
def make_payloads(
    mesh: Mesh, num_tokens: int, hidden: int, top_k: int, num_rows: int, count: int
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """x, y and weights, which depend on neither routing nor tail."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P(AXIS)))
    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        sizes = (mesh.size, num_tokens, hidden), (mesh.size, num_rows, hidden)
        x, y = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys[:2], sizes, strict=True))
        return x, y, jax.random.uniform(keys[2], (mesh.size, num_tokens, top_k))

    return [make(jax.random.key(i)) for i in range(count)]


def largest(values: jax.Array) -> float:
    """Over all ranks, on every process."""
    return float(jax.jit(jnp.max)(values))
