"""README, docs and docstrings: the examples run, and what they quote is what the code says."""

import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def code_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_readme_example_runs() -> None:
    """tanh as the only expert: out[t] = sum over k of w[t, k] * tanh(x[t])."""
    (example,) = code_blocks("README.md")
    names: dict = {}
    exec(example, names)
    random = np.random.default_rng(0)
    x = random.standard_normal((16, 4)).astype(np.float32)
    ids = random.integers(0, 8, (16, 2))
    weights = random.random((16, 2)).astype(np.float32)
    out = names["layer"](jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights))
    expected = weights.sum(1, keepdims=True) * np.tanh(x)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-6)


# Those of every module of the package, and how many run: memory's is shown only.
EXAMPLES = {"arena": 2, "maps": 7, "ops": 7, "permutation": 13, "routing": 3, "tokens": 8}


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name: str) -> None:
    if name == "tokens" and len(jax.devices()) < 2:
        pytest.skip("these are for two devices")
    module = importlib.import_module(f"jax_moe_ep.{name}")
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (results.failed, results.attempted) == (0, EXAMPLES[name])


def test_no_examples_elsewhere() -> None:
    files = (ROOT / "jax_moe_ep").rglob("*.py")
    assert {file.stem for file in files if ">>>" in file.read_text()} == EXAMPLES.keys()


@pytest.mark.parametrize("quote", code_blocks("docs/semantics.md"))
def test_semantics_quotes_the_reference(quote: str) -> None:
    assert quote in (ROOT / "jax_moe_ep/reference.py").read_text()


def test_reference_stays_short() -> None:
    assert len((ROOT / "jax_moe_ep/reference.py").read_text().splitlines()) <= 250
