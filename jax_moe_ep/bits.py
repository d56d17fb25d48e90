"""Moving values as bits: platforms without a float type compute in a wider one, and the way there
and back would change some bits of NaN."""

import jax.numpy as jnp


def bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """An unsigned integer of a float type's width; other types as they are."""
    is_float = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits % 8 == 0
    return jnp.dtype(f"uint{8 * dtype.itemsize}") if is_float else dtype
