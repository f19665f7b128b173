"""Exact, ties and all."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.ranking import cut, first_max, top_k


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


def test_a_vocabulary_in_pieces_is_ranked_where_it_lies():
    """Two rows' devices, four pieces of 1,024 tokens: the same ranks, and nothing longer than 4 N is gathered."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 900, (4, 4096)), jnp.float32)

    def in_pieces(x):
        with cut(4):
            return top_k(x, 8)

    compiled = jax.jit(in_pieces).lower(jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))).compile()
    values, index = compiled(jax.device_put(x, NamedSharding(mesh, P("data", "tensor"))))
    expected_values, expected = jax.lax.top_k(x, 8)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(index, expected)
    assert longest_message(compiled) == 4 * 8


def longest_message(compiled) -> int:
    """The last axis of the largest array [R, n] that one device sends to another; 1 for [R]."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce"
    shapes = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{kinds})\(", compiled.as_text())
    return max(int(shape.split(",")[1]) if "," in shape else 1 for shape in shapes)


def test_forbidden_values_rank_last():
    x = jnp.full((1, 300), -1.0e7).at[0, 250].set(-3.0)
    assert int(top_k(x, 2)[1][0, 0]) == 250
    assert int(first_max(x)[0]) == 250
