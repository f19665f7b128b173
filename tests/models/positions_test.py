"""Goldens of T5's relative buckets (32 buckets, max distance 128), ALiBi, rotation and sinusoids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.positions import (
    alibi_bias,
    alibi_slopes,
    relative_bias,
    relative_bucket,
    rope_turns,
    rotate,
    segment_positions,
    sinusoids,
)
from mlm.models.specs import PositionSpec

ROPE = PositionSpec(kind="rope")

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


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    # 12 heads: those of 8, then every second one of 16: 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5.
    np.testing.assert_allclose(alibi_slopes(12)[8:], [0.7071, 0.3536, 0.1768, 0.0884], atol=1e-4)
    at = jnp.arange(5)
    np.testing.assert_allclose(alibi_bias(2, at, at)[1, 4], [-4 / 256, -3 / 256, -2 / 256, -1 / 256, 0])


def test_rotation_golden():
    # K = 4, base 1e4, position 3: angles 3 and 0.03; (1, 3) and (2, 4) are the pairs.
    # 1 cos 3 - 3 sin 3 = -1.4134; 2 cos .03 - 4 sin .03 = 1.8791; 3 cos 3 + 1 sin 3 = -2.8289; 4.0582.
    x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    got = rotate(x, jnp.array([[3]]), ROPE)[0, 0, 0]
    np.testing.assert_allclose(got, [-1.4134, 1.8791, -2.8289, 4.0582], atol=1e-4)
    stretched = dataclasses.replace(ROPE, factor=8.0)
    np.testing.assert_allclose(rotate(x, jnp.array([[24]]), stretched)[0, 0, 0], got, rtol=1e-6)


def test_a_trained_context_stretches_slow_turns_only():
    # K = 8, base 1e4: w = 1, .1, .01, .001. In 1,000 tokens they turn 159, 15.9, 1.59 and .159 times: the first two
    # keep their speed, the last is slowed by 4, the third keeps s = (1.5915 - 1) / 3 = .1972 of it: .1972 * .01 +
    # .8028 * .0025 = .003979.
    spec = PositionSpec(kind="rope", factor=4.0, context=1000)
    np.testing.assert_allclose(rope_turns(spec, 8), [1.0, 0.1, 0.003979, 0.00025], rtol=1e-4)


def test_rotated_products_know_only_distances():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    product = [
        float((rotate(q, jnp.array([[i]]), ROPE) * rotate(k, jnp.array([[j]]), ROPE)).sum())
        for i, j in ((5, 2), (105, 102), (2, 5))
    ]
    assert product[0] == pytest.approx(product[1], rel=1e-4)
    assert product[0] != pytest.approx(product[2], rel=1e-2)


def test_sinusoids_are_sines_then_cosines():
    # Width 4: frequencies 1 and 1e-4; position 2.
    want = [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)]
    np.testing.assert_allclose(sinusoids(jnp.array([[2]]), 4)[0, 0], want, rtol=1e-6)


def test_positions_start_anew_in_every_example():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 4, 5, 5]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1]]
