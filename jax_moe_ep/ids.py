"""Expert ids as arrays of JAX's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def as_ids(ids: Int[Array, "..."], dtype: Any = None) -> Int[Array, "..."]:
    """The ids in another integer type, by default their own, and -1, no expert, for those that it
    does not hold. Without x64 JAX holds int64 of NumPy's as int32: cut off, some would be experts.
    """
    wanted = jax.dtypes.canonicalize_dtype(ids.dtype if dtype is None else dtype)
    if not np.can_cast(ids.dtype, wanted):
        limits = jnp.iinfo(wanted)
        # In the ids' own type, NumPy's too.
        ids = jnp.where((ids >= limits.min) & (ids <= limits.max), ids, -1)
    return jnp.asarray(ids, wanted)
