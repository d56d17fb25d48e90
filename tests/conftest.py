"""The devices of the tests and how hypothesis runs.

On a machine without a GPU the tests run on 8 virtual CPU devices. Where JAX's default backend is
a GPU, all of them run on the GPUs, on meshes of as many ranks as there are.
JAX_MOE_EP_REQUIRE_GPUS=n makes it an error to find fewer than n.
"""

import os

import hypothesis
import jax
import pytest

# Before any backend starts. It does no harm beside a GPU.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("default", deadline=None, max_examples=30, print_blob=True)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    required = int(os.environ.get("JAX_MOE_EP_REQUIRE_GPUS", "0"))
    found = len(jax.devices()) if jax.default_backend() == "gpu" else 0
    if found < required:
        raise pytest.UsageError(
            f"JAX_MOE_EP_REQUIRE_GPUS={required}, but JAX's default backend "
            f"{jax.default_backend()!r} offers {found} GPUs"
        )


def pytest_report_header(config: pytest.Config) -> str:
    return f"jax {jax.__version__}, {len(jax.devices())} {jax.default_backend()} devices"
