"""Goldens of T5's relative buckets, worked from the formula with 32 buckets and max distance 128."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import PositionSpec
from mlm.models.positions import relative_bias, relative_bucket

# Bidirectional: 16 buckets a side, 8 exact; rel = -12: 8 + floor(ln(12/8)/ln(16) * 8) = 8 + floor(1.17) = 9.
BIDIRECTIONAL = {
    0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -31: 11, -32: 12, -63: 13, -64: 14, -127: 15, -1000: 15,
    1: 17, 7: 23, 8: 24, 15: 25, 16: 26, 128: 31,
}  # fmt: skip
# Causal: 32 buckets, 16 exact; rel = -64: 16 + floor(ln(64/16 + eps)/ln(8) * 16) = 16 + floor(10.67) = 26.
CAUSAL = {-1: 1, -8: 8, -15: 15, -16: 16, -31: 21, -32: 21, -63: 26, -64: 26, -127: 31, 1: 0, 50: 0}


@pytest.mark.parametrize(("bidirectional", "golden"), [(True, BIDIRECTIONAL), (False, CAUSAL)])
def test_buckets_equal_t5(bidirectional, golden):
    relative = jnp.array(list(golden))
    got = relative_bucket(relative, bidirectional=bidirectional, buckets=32, max_distance=128)
    assert dict(zip(golden, got.tolist(), strict=True)) == golden


def test_bias_of_one_query_is_a_row_of_the_whole():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)
    at = jnp.arange(20)
    whole = relative_bias(table, at, at, causal=True, spec=PositionSpec())
    row = relative_bias(table, jnp.array([[13]]), at, causal=True, spec=PositionSpec())
    assert whole.shape == (2, 20, 20)
    np.testing.assert_array_equal(row[0, :, 0], whole[:, 13])
