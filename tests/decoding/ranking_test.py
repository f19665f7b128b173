"""Exact, ties and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.ranking import first_max, top_k


@pytest.mark.parametrize("size", [1, 5, 12, 100, 1021])
@pytest.mark.parametrize("count", [1, 2, 8, 40])
@pytest.mark.parametrize("levels", [2, 60, 1_000_000])  # almost all tie, some, almost none
def test_equals_the_library(size, count, levels):
    x = jnp.asarray(np.random.default_rng(size + count).integers(0, levels, (3, size)), jnp.float32)
    values, index = top_k(x, count)
    expected_values, expected = jax.lax.top_k(x, min(count, size))
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(first_max(x), jnp.argmax(x, axis=-1))


def test_forbidden_values_rank_last():
    x = jnp.full((1, 300), -1.0e7).at[0, 250].set(-3.0)
    assert int(top_k(x, 2)[1][0, 0]) == 250
    assert int(first_max(x)[0]) == 250
