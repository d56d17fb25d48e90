"""Ids that JAX cannot hold: without x64 it cuts int64 of NumPy's off, and some would be experts."""

import jax
import numpy as np
import pytest

import jax_moe_ep as ep
from jax_moe_ep.ids import as_ids

FAR = 2**32 + 1  # the expert 1, cut off
IDS = np.array([[FAR, 2], [0, -FAR]])
EXPERTS = [1, 0, 1, 0]  # how often each is named
LOCAL = ep.EpConfig(4, ())


@pytest.mark.parametrize("is_wide", [False, True])
def test_ids_beyond_int32_are_no_experts(is_wide):
    weights = np.ones((2, 2), np.float32)
    with jax.enable_x64(is_wide):
        assert ep.plan(IDS, LOCAL).group_counts.tolist() == EXPERTS
        assert ep.permute(np.ones((2, 4)), IDS, 4)[1].group_counts.tolist() == EXPERTS
        assert ep.topk_to_dense(IDS, weights, 4)[1].sum(0).tolist() == EXPERTS
        assert ep.expert_counts(IDS, 4).tolist() == EXPERTS
        masked = ep.mask_routing(IDS, weights, np.array([True, True]))[0]
        assert masked.dtype == (np.int64 if is_wide else np.int32)
        assert ep.plan(masked, LOCAL).group_counts.tolist() == EXPERTS


@pytest.mark.parametrize("is_wide", [False, True])
def test_chunk_sizes_beyond_int32_end_with_the_rows(is_wide):
    """The first takes all four rows, whatever is left of its size in 32 bits."""
    with jax.enable_x64(is_wide):
        sizes = np.array([FAR, 2])
        rows, sorted_sizes = ep.sort_chunks(np.arange(16).reshape(4, 4), sizes, np.array([1, 0]))
        assert sorted_sizes.tolist() == [0, 4]
        assert rows[:, 0].tolist() == [0, 4, 8, 12]


def test_ids_keep_what_their_type_holds():
    ids = np.array([-1, 0, 2**31 - 1, -(2**31)])
    assert as_ids(ids).tolist() == ids.tolist()
    assert as_ids(np.array([2**31, -(2**31) - 1])).tolist() == [-1, -1]
    with jax.enable_x64(True):
        assert as_ids(np.array([2**31])).tolist() == [2**31]
        assert as_ids(np.array([2**31]), np.int32).tolist() == [-1]
