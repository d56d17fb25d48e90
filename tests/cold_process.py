"""What test_group_cold.py runs on 2, 4 or 8 GPUs in a process of its own: a layer whose experts are
the first matmuls of the process or, with an argument, x or dout as a constant of the program.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

T, K, E, H = 256, 4, 16, 512
R = max(r for r in (2, 4, 8) if r <= len(jax.devices()))


def main() -> None:
    mesh = Mesh(np.array(jax.devices()[:R]), ("expert",))
    config = ep.EpConfig(E, "expert", alignment=16, implementation="cuda", timeout_s=60.0)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((R * T, E)), axis=1)[:, :K].astype(np.int32)
    x = rng.integers(-4, 4, (R * T, H)).astype(np.float32)
    scales = np.repeat(np.arange(1, E + 1, dtype=np.float32), H * H).reshape(E, H, H)
    experts = jnp.asarray(scales * np.eye(H, dtype=np.float32))
    has_tokamax = importlib.util.find_spec("tokamax") is not None

    def grouped(rows, weights, group_sizes):
        if has_tokamax:
            import tokamax

            return tokamax.ragged_dot(rows, weights, group_sizes)
        return jax.lax.ragged_dot(rows, weights, group_sizes)

    def step(x, ids, experts):
        plan = ep.plan(ids, config)
        rows = ep.dispatch(x, plan)
        y = rows @ jnp.eye(H) + grouped(rows, experts, plan.group_sizes)
        return ep.combine(jnp.round(y), plan)

    spec = P("expert")
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    want = x * (ids + 2).sum(1, keepdims=True)
    for _ in range(3):
        out = np.asarray(run(x, ids, experts))
        wrong = int((out != want).sum())
        assert wrong == 0, f"{wrong} of {want.size} wrong"
    ep.check()
    print("right", "with tokamax" if has_tokamax else "without tokamax")


def from_a_constant(name: str) -> None:
    """Tokens, or their gradient in a weighted combine, that the program holds as a constant; then
    the same as an argument, which works on the same group."""
    mesh = Mesh(np.array(jax.devices()[:R]), ("expert",))
    config = ep.EpConfig(E, "expert", implementation="cuda", timeout_s=60.0)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((R * T, E)), axis=1)[:, :K].astype(np.int32)
    tokens = rng.integers(-4, 4, (T, H)).astype(np.float32)

    def dispatch_and_back(x, ids):
        plan = ep.plan(ids, config)
        return ep.combine(ep.dispatch(x, plan), plan)

    def back_of_combine(dout, ids):
        plan = ep.plan(ids, config)
        y, weights = jnp.zeros((plan.capacity, H)), jnp.ones(ids.shape)
        dy = jax.vjp(lambda y: ep.combine(y, plan, weights), y)[1](dout)[0]
        return ep.combine(dy, plan)

    op = {"x": dispatch_and_back, "dout": back_of_combine}[name]
    spec = P("expert")

    def on_ranks(shard):
        return jax.jit(
            jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )

    everywhere = np.tile(tokens, (R, 1))
    try:
        out = jax.block_until_ready(on_ranks(lambda ids: op(tokens, ids))(ids))
    except Exception as error:  # JAX wraps errors of calls in several types
        print("error:", error)
    else:
        assert (np.asarray(out) == K * everywhere).all()
        print("right as a constant")
    ep.check()
    run = on_ranks(op)
    for _ in range(3):
        assert (np.asarray(run(everywhere, ids)) == K * everywhere).all()
    ep.check()
    print("right")


if len(sys.argv) > 1:
    from_a_constant(sys.argv[1])
else:
    main()
