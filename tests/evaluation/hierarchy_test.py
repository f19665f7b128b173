"""Decisions in a tree of labels: the best ones equal a search through all there are."""

import numpy as np
import pytest

from mlm.evaluation.hierarchy import (
    RULES,
    LabelTree,
    best_node,
    best_set,
    candidates,
    confident,
    edges,
    expected_information,
    hamming,
    informative,
    leaf_and_parent,
    plurality,
    safest_leaf,
    top_down,
    tree_distances,
    wu_palmer,
)

NEWS = LabelTree.of(
    {
        "sport": "news",
        "politics": "news",
        "football": "sport",
        "tennis": "sport",
        "home": "politics",
        "world": "politics",
    }
)


def random_tree(rng: np.random.Generator, nodes: int) -> LabelTree:
    parents = (-1, *(int(rng.integers(0, node)) for node in range(1, nodes)))
    return LabelTree(tuple(f"n{i}" for i in range(nodes)), parents)


def subsets(nodes: int) -> np.ndarray:
    """bool [2^N, N]: every set of nodes."""
    return (np.arange(2**nodes)[:, None] >> np.arange(nodes)) & 1 == 1


def cases(count: int, nodes: int):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tree = random_tree(rng, nodes)
        yield tree, rng.dirichlet(np.full(tree.leaves.size, rng.choice([0.3, 1.0, 5.0])))


def expected_f(tree: LabelTree, leaf: np.ndarray, sets: np.ndarray, beta: float) -> np.ndarray:
    event = tree.holds  # A(l), a column each
    shared, sizes = sets.astype(int) @ event, sets.sum(1)[:, None]
    return (1 + beta**2) * shared / (sizes + beta**2 * event.sum(0)) @ leaf


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_best_set_is_the_best_of_all_sets(beta):
    for tree, leaf in cases(40, 9):
        values = expected_f(tree, leaf, subsets(9), beta)
        found = best_set(tree, leaf, beta)
        chosen = np.isin(np.arange(9), found)
        np.testing.assert_allclose(expected_f(tree, leaf, chosen[None], beta), values.max(), rtol=1e-12)
        assert {tree.parents[n] for n in found} - {-1} <= set(found)  # with all their ancestors


@pytest.mark.parametrize(
    "costs", [tree_distances, wu_palmer, lambda tree: np.random.default_rng(0).random((9, tree.leaves.size))]
)
def test_pruning_changes_no_node(costs):
    """Nor does it for costs without any order; for those that have one it leaves most nodes out."""
    looked_at = []
    for tree, leaf in cases(60, 9):
        table = costs(tree)
        bounds = edges(tree, table)
        assert best_node(tree, leaf, table, bounds) == best_node(tree, leaf, table)
        looked_at.append(candidates(tree, leaf, bounds).size)
    if costs is tree_distances:
        assert np.mean(looked_at) < 2  # of 9


def test_distances_golden():
    """news 0, sport 1, politics 2, football 3, tennis 4, home 5, world 6."""
    assert tree_distances(NEWS)[[0, 1, 2, 3], 0].tolist() == [2, 1, 3, 0]
    assert tree_distances(NEWS)[3].tolist() == [0, 2, 4, 4]
    # football and football: 1 - 2·3/6; and tennis: 1 - 2·2/6; and home: 1 - 2·1/6; sport and football: 1 - 2·2/5.
    np.testing.assert_allclose(wu_palmer(NEWS)[3], [0, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(wu_palmer(NEWS)[1, 0], 1 / 5)


def test_an_underdetermined_answer_stops_above_the_leaves():
    """m leaves of equal probability below one parent at depth 1, hF_1. {root, parent} scores 2·2/(2 + 3) = 0.8, one
    leaf more 1/m · 1 + (1 - 1/m) · 4/6 = 2/3 + 1/(3m): above 0.8 for m = 2 alone, where both leaves are better still:
    2·3/(4 + 3) = 0.857.
    """
    for m in (2, 3, 4, 5):
        parents = {"parent": "root", "other": "root", **{f"leaf{i}": "parent" for i in range(m)}}
        tree = LabelTree.of(parents)
        leaf = np.array([float(name != "other") / m for name in tree.leaf_names])
        names = [tree.names[n] for n in best_set(tree, leaf)]
        assert names == ["root", "parent", *(["leaf0", "leaf1"] if m == 2 else [])]
        assert RULES["best_leaf"].decide(tree, leaf) in tree.leaves


def test_hamming_is_the_fewest_wrong_nodes():
    for tree, leaf in cases(20, 8):
        sets = subsets(8)
        wrong = (sets[:, :, None] != tree.holds[None]).sum(1) @ leaf
        chosen = np.isin(np.arange(8), hamming(tree, leaf))
        np.testing.assert_allclose((chosen[:, None] != tree.holds).sum(0) @ leaf, wrong.min(), rtol=1e-12)


def test_heuristics_golden():
    """football 0.30, tennis 0.25, home 0.40, world 0.05: sport 0.55, politics 0.45; information log 4 of leaves, log 2
    above them, 0 of the root.
    """
    leaf = np.array([0.30, 0.25, 0.40, 0.05])
    name = NEWS.names

    assert name[top_down(NEWS, leaf)] == "football"
    assert name[RULES["best_leaf"].decide(NEWS, leaf)] == "home"
    assert name[confident(NEWS, leaf, threshold=0.5)] == "sport"
    assert name[confident(NEWS, leaf, threshold=0.6)] == "news"
    assert name[confident(NEWS, leaf, threshold=0.3)] == "home"  # or football: both are 0.3 and as informative
    assert name[plurality(NEWS, leaf)] == "sport"  # home loses to it
    assert name[expected_information(NEWS, leaf)] == "home"  # 0.4 log 4 beats 0.55 log 2
    assert name[informative(NEWS, leaf, threshold=0.5)] == "sport"
    assert name[informative(NEWS, leaf, threshold=1.0)] == "home"
    assert name[leaf_and_parent(NEWS, leaf)] == "home"  # 0.4 · 0.45 beats 0.3 · 0.55
    # football: 2·0.25 + 4·0.45 = 2.3; home: 2·0.05 + 4·0.55 = 2.3 as well; a little more on tennis decides.
    assert name[safest_leaf(NEWS, np.array([0.31, 0.25, 0.39, 0.05]))] == "football"
    # A label that is rare beforehand says more: the root apart, tennis is the only one above log 8.
    assert name[informative(NEWS, leaf, threshold=3.0, prior=np.array([0.5, 0.04, 0.26, 0.2]))] == "tennis"


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_sure_of_what_is_sure(name):
    for tree, _ in cases(10, 8):
        for number, node in enumerate(tree.leaves):
            found = RULES[name].decide(tree, np.eye(tree.leaves.size)[number])
            assert np.array_equal(found, tree.with_ancestors(int(node))) if np.ndim(found) else found == node


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelTree(("a", "b"), (-1,)), "2 names and 1 parents"),
        (lambda: LabelTree(("a", "b"), (-1, 1)), "node 1 has the parent 1"),
        (lambda: LabelTree.of({"b": "a", "d": "c"}), r"found \['a', 'c'\]"),
        (lambda: LabelTree.of({"b": "a", "c": "d", "d": "c"}), "lie on a circle"),
        (lambda: best_set(NEWS, np.array([0.5, 0.5, 0.5, 0.5])), "sum to 2 for 4 leaves"),
    ],
)
def test_what_is_no_tree_or_distribution_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
