"""Gradients through plan, dispatch and combine, next to a dense Mixture of Experts.

    python examples/02_gradients.py [--implementation auto|cuda|reference]

The dense layer sends every token through every expert and masks; its gradients are JAX's own. The
expert-parallel layer must give the same, also when `jax.checkpoint` throws all activations away
and keeps the plan, so that the backward pass need not route again.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import jax_moe_ep as ep

NUM_TOKENS, TOP_K, HIDDEN, NUM_EXPERTS = 64, 2, 32, 8  # tokens of all ranks, K, H, E

Layer = Callable[..., jax.Array]  # (x [T, H], weights [T, K], experts [E, H, H], ids) -> [T, H]


def dense_layer(
    x: jax.Array, topk_weights: jax.Array, experts: jax.Array, topk_idx: jax.Array
) -> jax.Array:
    # one_hot is zero for ids outside [0, E).
    gates = (jax.nn.one_hot(topk_idx, NUM_EXPERTS) * topk_weights[..., None]).sum(1)  # [T, E]
    return jnp.einsum("tx,txh->th", gates, jnp.tanh(jnp.einsum("th,xhi->txi", x, experts)))


def expert_parallel_layer(
    mesh: Mesh, config: ep.EpConfig, policy: Callable[..., bool] | None = None
) -> Layer:
    """The same layer with the experts spread over the ranks; policy: what the remat saves."""

    def layer(
        x: jax.Array, topk_weights: jax.Array, experts: jax.Array, topk_idx: jax.Array
    ) -> jax.Array:
        plan = ep.plan(topk_idx, config)
        rows = ep.dispatch(x, plan)
        y = jnp.tanh(jax.lax.ragged_dot(rows, experts, plan.group_sizes))
        return ep.combine(y, plan, topk_weights)

    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    return jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def inputs() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.uniform(size=(NUM_TOKENS, TOP_K)).astype(np.float32)
    experts = rng.normal(size=(NUM_EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN**0.5
    ids = np.stack([rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(NUM_TOKENS)])
    ids[::7, 1] = -1  # "no expert": its weight gets a gradient of exactly zero
    return x, weights, experts, ids.astype(np.int32)


def gradients(layer: Layer) -> tuple[list[np.ndarray], int]:
    """d loss / d (x, weights, experts), and how many plan arrays the program computes."""

    def loss(
        x: jax.Array, topk_weights: jax.Array, experts: jax.Array, topk_idx: jax.Array
    ) -> jax.Array:
        return (layer(x, topk_weights, experts, topk_idx) ** 2).mean()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    num_planned = str(jax.make_jaxpr(gradient)(*inputs())).count("name=ep_plan")
    return [np.asarray(each) for each in jax.jit(gradient)(*inputs())], num_planned


def main(implementation: Literal["auto", "cuda", "reference"] = "auto") -> None:
    jax.config.update("jax_num_cpu_devices", 4)  # before JAX is used; no effect on GPUs
    # TF32, the default for fp32 on GPUs, would make 2^-11 of a difference in a factor's last bit.
    jax.config.update("jax_default_matmul_precision", "highest")
    num_ranks = next(n for n in (8, 4, 2, 1) if n <= jax.device_count())
    devices = jax.devices()[:num_ranks]
    mesh = jax.make_mesh((num_ranks,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
    config = ep.EpConfig(NUM_EXPERTS, "expert", implementation=implementation)

    expected, _ = gradients(dense_layer)
    policies = {
        "all saved": None,
        "ep_plan saved": jax.checkpoint_policies.save_only_these_names("ep_plan"),
        "nothing saved": jax.checkpoint_policies.nothing_saveable,
    }
    names = ("d x", "d weights", "d experts")
    table = Table("", *names, "plan arrays", title="largest difference from the dense gradient")
    table.add_row("(largest gradient)", *(f"{np.abs(each).max():.1e}" for each in expected), "")
    planned = {}
    for label, policy in policies.items():
        actual, planned[label] = gradients(expert_parallel_layer(mesh, config, policy))
        errors = [np.abs(a - b).max() for a, b in zip(actual, expected, strict=True)]
        table.add_row(label, *(f"{error:.1e}" for error in errors), str(planned[label]))
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert not actual[1][::7, 1].any(), "the weights of -1 must have no gradient"
    assert planned["ep_plan saved"] == planned["all saved"] < planned["nothing saved"]
    console = Console()
    console.print(table)
    console.print(f"the gradients on {num_ranks} ranks agree; the saved plan was not made again")


if __name__ == "__main__":
    typer.run(main)
