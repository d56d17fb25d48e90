"""The devices of the tests and how hypothesis runs.

On a machine without a GPU the tests run on 8 virtual CPU devices. Where JAX's default backend is
a GPU, all of them run on the GPUs, those for any number of ranks on as many of 2, 4 or 8 as there
are. JAX_MOE_EP_REQUIRE_GPUS=n makes it an error to find fewer than n.

Under tests/launch.py this is one of several processes with one device each, a GPU if there are
any. All of them run the same tests in the same order, on meshes of all devices.
"""

import os
import pathlib

import hypothesis
import jax
import pytest
from processes import COORDINATOR, join

# Before any backend starts. CPU devices do no harm beside GPUs, nor choosing a GPU without any.
if COORDINATOR is None:
    jax.config.update("jax_num_cpu_devices", 8)
else:
    jax.config.update("jax_num_cpu_devices", 1)
    join()

hypothesis.settings.register_profile("default", deadline=None, max_examples=30, print_blob=True)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None
)
# Every process must draw the same examples.
is_fixed = os.environ.get("CI") or COORDINATOR
hypothesis.settings.load_profile("ci" if is_fixed else "default")


def pytest_configure(config: pytest.Config) -> None:
    required = int(os.environ.get("JAX_MOE_EP_REQUIRE_GPUS", "0"))
    found = len(jax.devices()) if jax.default_backend() == "gpu" else 0
    if found < required:
        raise pytest.UsageError(
            f"JAX_MOE_EP_REQUIRE_GPUS={required}, but JAX's default backend "
            f"{jax.default_backend()!r} offers {found} GPUs"
        )


def pytest_report_header(config: pytest.Config) -> str:
    where = f"in {jax.process_count()} processes" if COORDINATOR else "in one process"
    return f"jax {jax.__version__}, {len(jax.devices())} {jax.default_backend()} devices {where}"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The kernels, for the host."""
    from emulation import make_library  # it uses JAX, which the lines above must come before

    return make_library(tmp_path_factory.mktemp("kernels"))
