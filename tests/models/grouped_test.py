"""The grouped product equals a loop over groups, in value and gradient, whatever the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.grouped import blocked_matmul, by_group, grouped_matmul, permute

D, F = 6, 5
CASES = {
    "even": ([20, 20, 20], 60),
    "skewed": ([0, 97, 1, 0, 2], 100),
    "rows beyond the groups": ([3, 0, 70], 90),
    "one row": ([0, 1], 1),
    "no row at all": ([0, 0], 5),
}


def loop(x, weights, sizes):
    y, start = np.zeros((len(x), weights.shape[2]), np.float32), 0
    for matrix, size in zip(weights, sizes, strict=True):
        y[start : start + size] = x[start : start + size] @ matrix
        start += size
    return y


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_and_ragged_dot_in_gradient(case):
    sizes, rows = CASES[case]
    draw = np.random.default_rng(0)
    x, weights = draw.normal(size=(rows, D)).astype("f"), draw.normal(size=(len(sizes), D, F)).astype("f")
    weigh, want = draw.normal(size=(rows, F)).astype("f"), loop(x, weights, sizes)
    x, weights, sizes = jnp.asarray(x), jnp.asarray(weights), jnp.asarray(sizes)
    np.testing.assert_allclose(grouped_matmul(x, weights, sizes), want, rtol=1e-5, atol=1e-5)

    def gradients(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w, sizes) * weigh), (0, 1)))(x, weights)

    for got, want in zip(gradients(blocked_matmul), gradients(jax.lax.ragged_dot), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_weight_gradients_in_float32():
    """A sum of 4,096 numbers, rounded once: off by at most 2^-9 of itself, where sums in bfloat16 drift by percents."""
    x = jax.random.uniform(jax.random.key(0), (4096, 1)).astype(jnp.bfloat16)
    weights, sizes = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([4096])
    gradient = jax.grad(lambda w: jnp.sum(blocked_matmul(x, w, sizes).astype(jnp.float32)))(weights)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(gradient[0, 0, 0]), np.asarray(x, np.float64).sum(), rtol=2**-9)


def test_sorting_and_back():
    groups = jnp.array([2, 0, 3, 0, 1, 2])  # 3: of no group
    order, inverse, sizes = by_group(groups, 3)
    np.testing.assert_array_equal(groups[order], [0, 0, 1, 2, 2, 3])
    np.testing.assert_array_equal(order, [1, 3, 4, 0, 5, 2])  # stable
    np.testing.assert_array_equal(sizes, [2, 1, 2])
    x = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(permute(permute(x, order, inverse), inverse, order), x)
    weigh = jnp.arange(12.0).reshape(6, 2) ** 2
    got = jax.grad(lambda x: jnp.sum(permute(x, order, inverse) * weigh))(x)
    np.testing.assert_array_equal(got, jax.grad(lambda x: jnp.sum(x[order] * weigh))(x))
