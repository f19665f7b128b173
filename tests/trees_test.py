"""Parameter paths: what they are called, and what a pattern selects."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from mlm import trees


class Pair(NamedTuple):
    kernel: object
    bias: object


def tree():
    layer = {"mlp": Pair(np.zeros((2, 3)), np.zeros(3))}
    return {"encoder": {"layers": [layer], "norm": np.zeros(4)}, "head": np.zeros(())}


NAMES = ["encoder/layers/0/mlp/kernel", "encoder/layers/0/mlp/bias", "encoder/norm", "head"]


def test_names_join_keys_indices_and_attributes():
    assert [name for name, _ in trees.named_leaves(tree())] == NAMES


def test_named_leaves_come_in_tree_order():
    assert [leaf.shape for _, leaf in trees.named_leaves(tree())] == [(2, 3), (3,), (4,), ()]


def test_map_named_gives_the_name_first_and_keeps_the_structure():
    one, two = tree(), tree()
    got = trees.map_named(lambda name, a, b: (name, a.shape == b.shape), one, two)
    assert jax.tree.structure(one) == jax.tree.structure(got, is_leaf=lambda x: type(x) is tuple)
    assert got["encoder"]["layers"][0]["mlp"].bias == ("encoder/layers/0/mlp/bias", True)


def test_mask_matches_whole_paths():
    got = trees.mask(tree(), [r"encoder/layers/.*/kernel", "head"])
    assert [value for _, value in trees.named_leaves(got)] == [True, False, False, True]
    # "encoder/norm" does not select "encoder/norm_extra": the whole path has to match.
    extra = {"norm": np.zeros(1), "norm_extra": np.zeros(1)}
    assert trees.mask(extra, ["norm"]) == {"norm": True, "norm_extra": False}


def test_a_pattern_that_selects_nothing_is_an_error_with_the_paths():
    with pytest.raises(ValueError, match=r"pattern 'encoder/nrm' matches no parameter(.|\n)*encoder/norm"):
        trees.mask(tree(), ["head", "encoder/nrm"])


def test_no_pattern_selects_nothing():
    assert not any(value for _, value in trees.named_leaves(trees.mask(tree(), [])))


def test_count_counts_scalars_of_arrays_and_of_shapes():
    # 2*3 + 3 + 4 + 1
    assert trees.count(tree()) == 14
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree())
    assert trees.count(shapes) == 14
    assert trees.count({}) == 0
