"""A7: the reference and the kernels train the same model, on one GPU."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ON_GPUS, assert_bitwise_equal, make_floats, make_mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

pytestmark = pytest.mark.skipif(not ON_GPUS, reason="needs a CUDA GPU")

NUM_STEPS = 50
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "03_flax_moe_lm.py"


def test_rows_of_every_step_are_equal():
    """From the same parameters, each of 50 steps dispatches bitwise equal rows."""
    T, H, E, K = 256, 64, 8, 2
    configs = [
        ep.EpConfig(E, "expert", alignment=16, implementation=i) for i in ("reference", "cuda")
    ]

    def rows(config, x, router):
        weights, ids = jax.lax.top_k(jax.nn.softmax(x @ router), K)
        plan = ep.plan(ids, config)
        return ep.dispatch(x, plan), plan, weights

    def loss(params, x, target):
        moved, plan, weights = rows(configs[1], x, params[0])
        experts = jnp.repeat(jnp.arange(E), plan.group_sizes, total_repeat_length=plan.capacity)
        y = jnp.einsum("ch,chd->cd", moved, params[1][experts])
        return ((ep.combine(y, plan, weights) - target) ** 2).mean()

    def step(params, x, target):
        moved = [rows(config, x, params[0])[0] for config in configs]
        gradients = jax.grad(loss)(params, x, target)
        return [p - 0.5 * g for p, g in zip(params, gradients, strict=True)], moved

    mesh = make_mesh(1)
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    params = [jnp.asarray(make_floats(H, E)), jnp.asarray(make_floats(E, H, H)) / 8]
    first = params[0]
    for i in range(NUM_STEPS):
        x = jnp.asarray(make_floats(T, H, seed=i))
        params, (reference, cuda) = step(params, x, jnp.tanh(x))
        assert_bitwise_equal(cuda, reference, f"rows of step {i}")
    assert bool((params[0] != first).any())


def test_losses_of_the_example_agree(tmp_path, capsys):
    """Run freely in fp32, the losses of 50 steps agree within 1e-4.

    The weights' gradients differ in the order of an fp32 sum. Matmuls in TF32, JAX's default for
    fp32 on GPUs, would make 2^-11 of that 2^-24; atomics would add their own.
    """
    summaries = {}
    for implementation in ("reference", "cuda"):
        out = tmp_path / implementation
        options = f"--small --steps {NUM_STEPS} --ep 1 --dp 1 --implementation {implementation}"
        environment = {
            **os.environ,
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, EXAMPLE, *options.split(), "--out", out]
        subprocess.run(command, check=True, env=environment)
        summaries[implementation] = json.loads((out / "summary.json").read_text())
    losses = {name: np.array(summary["loss"]) for name, summary in summaries.items()}
    with capsys.disabled():
        for name, summary in summaries.items():
            rates = f"{summary['steps_per_s']:.1f} steps/s, {summary['tokens_per_s']:.0f} tokens/s"
            print(f"\n{name}: {rates}", end="")
        print(f"\nlargest difference {np.abs(losses['cuda'] - losses['reference']).max():.1e}")
    assert len(losses["cuda"]) == NUM_STEPS
    assert np.abs(losses["cuda"] - losses["reference"]).max() <= 1e-4
    assert losses["cuda"][-1] < losses["cuda"][0] - 1
