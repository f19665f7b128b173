"""A tree of guesses in one pass says at every node what the chain of its ancestors says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.tree import Tree, chain
from tests.models.members_test import made

#        0
#     1     2
#    3 4    5
#    6
TREE = Tree((-1, 0, 0, 1, 1, 2, 3))


def test_depths_ancestors_and_children():
    assert TREE.depth.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert np.flatnonzero(TREE.ancestors[6]).tolist() == [0, 1, 3, 6]
    assert TREE.children.tolist() == [[1, 2], [3, 4], [5, -1], [6, -1], *[[-1, -1]] * 3]
    assert not TREE.is_chain
    assert chain(3) == Tree((-1, 0, 1, 2))
    assert chain(3).is_chain
    assert chain(0).children.tolist() == [[-1]]


@pytest.mark.parametrize("parents", [(), (0, 0), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_another_order_is_refused(parents):
    with pytest.raises(ValueError, match="name an earlier node"):
        Tree(parents)


def opened(model, params, slots):
    """An empty cache of two rows, behind two sources where there is an encoder."""
    if model.config.encoder is None:
        return model.init_cache(params, None, None, 2, slots)
    sources = jnp.array([[5, 6, 7, 8, 1], [9, 1, 0, 0, 0]])
    return model.init_cache(params, model.encode(params, sources), sources > 0, 2, slots)


# t5: buckets; deep: ALiBi; llama: rotation; t5gemma2: windows narrower than the tree is deep, joint attention; moe.
@pytest.mark.parametrize("name", ["t5", "deep", "llama", "t5gemma2", "moe"])
def test_a_node_sees_the_past_and_its_ancestors(name):
    model, params = made(name)
    step = jax.jit(model.step, static_argnames="tree")
    read = jnp.array([[0, 3, 4, 5, 6], [0, 7, 8, 0, 0]])
    length = jnp.array([5, 3])
    _, _, cache = step(params, read, opened(model, params, 16))
    cache = {**cache, "length": length}
    nodes = jnp.array([[4, 5, 9, 10, 11, 12, 13], [8, 9, 9, 3, 4, 5, 6]])
    at_once, hidden, grown = step(params, nodes, cache, tree=TREE)
    for node in range(TREE.size):
        path = np.flatnonzero(TREE.ancestors[node])
        wanted, states, _ = step(params, nodes[:, path], cache)
        np.testing.assert_allclose(at_once[:, node], wanted[:, -1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(hidden[:, node], states[:, -1], rtol=1e-4, atol=1e-4)
    if name == "t5":  # the slots of a path, put in its order, are those that the chain writes
        path = jnp.array([0, 1, 3, 6])
        _, _, chained = step(params, nodes[:, path], cache)
        for row, start in enumerate(length):
            of_tree, of_chain = (x["self"][0]["self_attention"]["key"][row, :, start:] for x in (grown, chained))
            np.testing.assert_allclose(of_tree[:, path], of_chain[:, :4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rnnsearch", "seqpe"])
def test_what_depends_on_the_slot_before_takes_no_trees(name):
    model, params = made(name)
    with pytest.raises(ValueError, match="takes chains of guesses only"):
        model.step(params, jnp.zeros((2, 7), jnp.int32), opened(model, params, 16), tree=TREE)
