"""What test_group_pool.py runs as one process a GPU: dispatch, combine and their gradients of
arrays that XLA keeps wherever the environment says. Prints what was read in place. With the
argument `alone` no process sees the GPU of another.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import join

import jax_moe_ep as ep
from jax_moe_ep import cuda

K, E, H = 4, 16, 512
TOKENS = (64, 512, 4096, 512)
ROUNDS = 3


def layer(x, ids, weights, config):
    """K * x, and the gradients of its sum; experts do nothing."""

    def out_of(x, weights):
        plan = ep.plan(ids, config)
        return ep.combine(ep.dispatch(x, plan), plan, weights)

    out, pull = jax.vjp(out_of, x, weights)
    return out, *pull(jnp.ones_like(out) + x)


def check(num_tokens, mesh):
    """Small integers, so that all sums are exact. Old arrays live on beside new ones."""
    config = ep.EpConfig(E, "expert", implementation="cuda", timeout_s=60.0)
    num_ranks = mesh.size
    sharding = NamedSharding(mesh, P("expert"))
    run = jax.jit(
        jax.shard_map(
            lambda *args: layer(*args, config),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
        )
    )
    kept = []
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        ids = np.argsort(rng.random((num_ranks * num_tokens, E)), axis=1)[:, :K].astype(np.int32)
        x = rng.integers(-4, 4, (num_ranks * num_tokens, H)).astype(np.float32)
        weights = rng.integers(1, 4, ids.shape).astype(np.float32)
        total = weights.sum(1, keepdims=True)
        want = total * x, total * (1 + x), ((1 + x) * x).sum(1, keepdims=True) + 0 * weights
        given = [
            jax.make_array_from_callback(each.shape, sharding, lambda index, each=each: each[index])
            for each in (x, ids, weights)
        ]
        results = run(*given)
        kept.append((given, results))
        for name, result, expected in zip(("out", "dx", "dw"), results, want, strict=True):
            for part in result.addressable_shards:
                wrong = int((np.asarray(part.data) != expected[part.index]).sum())
                assert wrong == 0, f"{num_tokens} tokens, round {seed}: {wrong} of {name} wrong"


def main() -> None:
    join(sees_own_gpu_only="alone" in sys.argv)
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    for num_tokens in TOKENS:
        check(num_tokens, mesh)
    ep.check()
    (arena,) = cuda.extension("test").arenas()
    print(f"right, {arena['num_in_place']} in place")


main()
