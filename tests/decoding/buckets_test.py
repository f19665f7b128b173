"""Few shapes, little padding."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.buckets import batches, bucket, check_tokens, fill, pad, shards


def test_buckets_fit_pad_little_and_are_few():
    sizes = range(1, 1025)
    assert all(bucket(n) >= n for n in sizes)
    assert all(bucket(n) <= 1.5 * n for n in sizes if n > 8)
    assert len({bucket(n) for n in sizes}) == 15  # 8 and two per doubling
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]


def test_padding_rows_hold_one_eos():
    np.testing.assert_array_equal(pad([[5, 6, 1], [7]], 3, 4), [[5, 6, 1, 0], [7, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(fill([3, 1], 3, 9), [3, 1, 9])


def test_batches_cover_everything_longest_first():
    lengths = [3, 9, 4, 9, 1]
    groups = batches(lengths, 2)
    assert [list(g) for g in groups] == [[1, 3], [2, 0], [4]]


def test_shards_count_the_pieces_of_the_first_axis():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = [P("data"), P(("data", "tensor")), P(), P(None, "data"), P("tensor")]
    assert [shards(NamedSharding(mesh, spec)) for spec in specs] == [4, 8, 1, 1, 2]
    assert shards(None) == 1


def test_bad_tokens_are_named():
    with pytest.raises(ValueError, match="source 1 is empty"):
        check_tokens("source", [[4], []], 10)
    with pytest.raises(ValueError, match="target 0 holds token 10, outside the model's vocabulary of 10"):
        check_tokens("target", [[4, 10]], 10)
    with pytest.raises(ValueError, match="token -1"):
        check_tokens("target", [[-1]], 10)
