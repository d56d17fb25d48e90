"""README and docs: the example runs, and what they quote is what the code says."""

import pathlib
import re

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


@pytest.mark.parametrize("quote", code_blocks("docs/semantics.md"))
def test_semantics_quotes_the_reference(quote: str) -> None:
    assert quote in (ROOT / "jax_moe_ep/reference.py").read_text()


def test_reference_stays_short() -> None:
    assert len((ROOT / "jax_moe_ep/reference.py").read_text().splitlines()) <= 250
