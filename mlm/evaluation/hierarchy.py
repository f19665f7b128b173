"""One decision out of probabilities over the leaves of a tree of labels: the best one for each metric, and heuristics.

    news ─┬─ sport ─┬─ football       leaf probabilities, e.g. softmax of session.score([(text, label), …]), over
          │         └─ tennis         LabelTree.of({"sport": "news", "football": "sport", …}).leaf_names
          └─ politics

The truth is a leaf. What is predicted is a node, which stands for itself and all above it, or a set of nodes. Where the
leaves are told apart badly, a good decision stops above them. Source: Plaud et al. 2025 (arXiv:2506.01552).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mlm.registry import Registry

Probabilities = Float[np.ndarray, "L"]  # of the leaves, in the order of `LabelTree.leaves`; they sum to 1
Nodes = Int[np.ndarray, "_"]  # a set of nodes, in order


@dataclass(frozen=True)
class LabelTree:
    """N nodes by number, L of them leaves. parents: -1 for the root, which is node 0; else a smaller number.

    Raises ValueError where that is no tree.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]

    def __post_init__(self):
        if len(self.names) != len(self.parents) or not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"{len(self.names)} names and {len(self.parents)} parents: one each, no name twice")
        for node, parent in enumerate(self.parents):
            if not (parent == -1 if node == 0 else 0 <= parent < node):
                raise ValueError(f"node {node} has the parent {parent}: node 0 has -1, every other an earlier node")

    @classmethod
    def of(cls, parents: Mapping[str, str]) -> "LabelTree":
        """From child -> parent; the root is the one parent that is nobody's child. Raises ValueError for any other."""
        roots = sorted({*parents.values()} - {*parents})
        if len(roots) != 1:
            raise ValueError(f"a tree has one root, a parent without a parent of its own; found {roots}")
        names, number = list(roots), {roots[0]: -1}
        for name in names:  # grows while it is read
            here = [child for child, parent in parents.items() if parent == name]
            number.update(dict.fromkeys(here, names.index(name)))
            names += here
        if len(names) <= len(parents):
            raise ValueError(f"{sorted({*parents} - {*names})} lie on a circle and not below {roots[0]!r}")
        return cls(tuple(names), tuple(number[name] for name in names))

    @cached_property
    def leaves(self) -> Int[np.ndarray, "L"]:
        return np.setdiff1d(np.arange(len(self.names)), self.parents)

    @property
    def leaf_names(self) -> list[str]:
        return [self.names[leaf] for leaf in self.leaves]

    @cached_property
    def depths(self) -> Int[np.ndarray, "N"]:
        """Steps from the root."""
        depths = np.zeros(len(self.names), np.int64)
        for node, parent in enumerate(self.parents[1:], 1):
            depths[node] = depths[parent] + 1
        return depths

    @cached_property
    def above(self) -> Bool[np.ndarray, "N N"]:
        """above[a, n]: a is n, or an ancestor of it."""
        above = np.eye(len(self.names), dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            above[:, node] |= above[:, parent]
        return above

    @property
    def holds(self) -> Bool[np.ndarray, "N L"]:
        """holds[n, l]: leaf l lies below n, or is it."""
        return self.above[:, self.leaves]

    def probabilities(self, leaf: Probabilities) -> Float[np.ndarray, "N"]:
        """Of every node: the sum over the leaves below it. Raises ValueError for anything but a distribution."""
        if leaf.shape != self.leaves.shape or (leaf < 0).any() or abs(leaf.sum() - 1) > 1e-4:
            raise ValueError(
                f"{leaf.size} leaf probabilities that sum to {leaf.sum():.6g} for {self.leaves.size} leaves: give one "
                "each, not negative, that sum to 1"
            )
        return self.holds @ leaf

    def with_ancestors(self, node: int) -> Nodes:
        return np.flatnonzero(self.above[:, node])


# The best decision for a metric.


def best_set(tree: LabelTree, leaf: Probabilities, beta: float = 1.0) -> Nodes:
    """The set of nodes of the highest expected hF_β, root included.

    hF_β(h, l) = (1 + β²) |h ∩ A(l)| / (|h| + β² |A(l)|) with A(l) leaf l and all above it. In any set of k nodes one
    adds Δ_k(n) = Σ over leaves l below it of p(l) (1 + β²) / (k + β² |A(l)|), so that the k largest make the best set
    of this size, and hold the ancestors of their nodes. Leaves of one depth are summed first: N² · depth operations.
    """
    tree.probabilities(leaf)
    events, place = np.unique(tree.depths[tree.leaves] + 1, return_inverse=True)  # |A(l)|
    by_depth = tree.holds @ (leaf[:, None] * (place[:, None] == np.arange(len(events))))
    sizes = np.arange(1, len(tree.names) + 1)[:, None]
    gains = ((1 + beta**2) / (sizes + beta**2 * events)) @ by_depth.T  # sizes, nodes
    order = np.argsort(-gains, axis=1, kind="stable")  # ties: ancestors first
    values = np.cumsum(np.take_along_axis(gains, order, 1), 1).diagonal()
    best = int(np.argmax(values))
    return np.sort(order[best, : best + 1])


class Edges(NamedTuple):
    """By how much the cost of a leaf can change from a node's parent to the node; the root's entries mean nothing."""

    most_gained: Float[np.ndarray, "N"]  # leaves below the node: parent's cost less its own
    least_gained: Float[np.ndarray, "N"]
    most_lost: Float[np.ndarray, "N"]  # other leaves: its own cost less the parent's
    least_lost: Float[np.ndarray, "N"]


def edges(tree: LabelTree, costs: Float[np.ndarray, "N L"]) -> Edges:
    """For `best_node`, once for all examples."""
    gain = costs[np.maximum(tree.parents, 0)] - costs
    inside, some = tree.holds, (~tree.holds).any(1)
    most = np.where(inside, gain, -np.inf).max(1)
    least = np.where(inside, gain, np.inf).min(1)
    most_lost = np.where(some, np.where(inside, -np.inf, -gain).max(1), 0.0)
    least_lost = np.where(some, np.where(inside, np.inf, -gain).min(1), 0.0)
    return Edges(most, least, most_lost, least_lost)


def candidates(tree: LabelTree, leaf: Probabilities, bounds: Edges) -> Nodes:
    """Nodes that can have the lowest expected cost: what is left out costs more than its parent, or than its child.

    A child n costs more than its parent if p(n) M < (1 - p(n)) m̄, and less if p(n) m > (1 - p(n)) M̄, where m … M is
    gained below it and m̄ … M̄ lost elsewhere: thresholds q_min and q_max on p(n), for costs that fall towards the truth.
    """
    node, parents = tree.probabilities(leaf), np.asarray(tree.parents)
    kept = np.ones(len(node), bool)
    child = np.arange(1, len(node))
    inside, outside = node[1:], 1 - node[1:]
    kept[child[inside * bounds.most_gained[1:] < outside * bounds.least_lost[1:]]] = False
    kept[parents[child[inside * bounds.least_gained[1:] > outside * bounds.most_lost[1:]]]] = False
    return np.flatnonzero(kept)


def best_node(
    tree: LabelTree, leaf: Probabilities, costs: Float[np.ndarray, "N L"] | None = None, bounds: Edges | None = None
) -> int:
    """argmin_n Σ_l costs[n, l] p(l), the first of equals. costs: default `tree_distances`. bounds: of `edges`, to look
    at fewer nodes.
    """
    costs = tree_distances(tree) if costs is None else costs
    tree.probabilities(leaf)
    nodes = np.arange(len(tree.names)) if bounds is None else candidates(tree, leaf, bounds)
    return int(nodes[np.argmin(costs[nodes] @ leaf)])


def tree_distances(tree: LabelTree) -> Float[np.ndarray, "N L"]:
    """Steps between every node and every leaf."""
    return (tree.depths[:, None] + tree.depths[tree.leaves] - 2.0 * _common(tree)).astype(np.float64)


def wu_palmer(tree: LabelTree) -> Float[np.ndarray, "N L"]:
    """1 - 2 d(common ancestor) / (d(node) + d(leaf)), depths counted from 1. Source: Wu & Palmer 1994."""
    return 1.0 - 2.0 * (_common(tree) + 1) / (tree.depths[:, None] + tree.depths[tree.leaves] + 2.0)


def _common(tree: LabelTree) -> Int[np.ndarray, "N L"]:
    """Depth of the deepest common ancestor: they share it, its ancestors, and nothing else."""
    return tree.above.T.astype(np.int64) @ tree.above[:, tree.leaves].astype(np.int64) - 1


def hamming(tree: LabelTree, leaf: Probabilities) -> Nodes:
    """The set of the lowest expected count of wrong nodes: all of p(n) > 1/2."""
    return np.flatnonzero(tree.probabilities(leaf) > 0.5)


# Heuristics, to compare with.


def top_down(tree: LabelTree, leaf: Probabilities) -> int:
    """From the root always to the most probable child."""
    node, here = tree.probabilities(leaf), 0
    while (children := np.flatnonzero(np.asarray(tree.parents) == here)).size:
        here = int(children[np.argmax(node[children])])
    return here


def best_leaf(tree: LabelTree, leaf: Probabilities) -> int:
    """The most probable leaf."""
    tree.probabilities(leaf)
    return int(tree.leaves[np.argmax(leaf)])


def confident(tree: LabelTree, leaf: Probabilities, threshold: float = 0.5, prior: Probabilities | None = None) -> int:
    """The most informative node of p(n) ≥ threshold. Source: Valmadre 2022."""
    return _most(information(tree, prior), tree.probabilities(leaf) >= min(threshold, 1.0 - 1e-6))


def plurality(tree: LabelTree, leaf: Probabilities, prior: Probabilities | None = None) -> int:
    """The most informative node that is more probable than every other that excludes it."""
    node = tree.probabilities(leaf)
    rivals = np.where(tree.above | tree.above.T, -np.inf, node).max(1)
    return _most(information(tree, prior), node > rivals)


def expected_information(tree: LabelTree, leaf: Probabilities, prior: Probabilities | None = None) -> int:
    """argmax p(n) · information(n). Source: Deng et al. 2012."""
    return _most(tree.probabilities(leaf) * information(tree, prior))


def informative(
    tree: LabelTree, leaf: Probabilities, threshold: float = 1.0, prior: Probabilities | None = None
) -> int:
    """The most probable node of at least so much information, in nats; where none has it, the most informative."""
    held = information(tree, prior)
    return _most(tree.probabilities(leaf), held >= min(threshold, float(held.max())))


def leaf_and_parent(tree: LabelTree, leaf: Probabilities) -> int:
    """argmax over leaves of p(leaf) p(its parent). Source: HiE, Jain et al. 2023."""
    over = tree.probabilities(leaf)[np.maximum(np.asarray(tree.parents)[tree.leaves], 0)]
    return int(tree.leaves[np.argmax(leaf * over)])


def safest_leaf(tree: LabelTree, leaf: Probabilities, costs: Float[np.ndarray, "N L"] | None = None) -> int:
    """The leaf of the lowest expected cost (default: tree distance). Source: CRM, Karthik et al. 2021."""
    tree.probabilities(leaf)
    costs = tree_distances(tree) if costs is None else costs
    return int(tree.leaves[np.argmin(costs[tree.leaves] @ leaf)])


def information(tree: LabelTree, prior: Probabilities | None = None) -> Float[np.ndarray, "N"]:
    """-log prior(n) of every node, nats. prior: of the leaves, each above 0; default uniform."""
    count = tree.leaves.size
    return -np.log(tree.probabilities(np.full(count, 1.0 / count) if prior is None else prior))


def _most(value: Float[np.ndarray, "N"], allowed: Bool[np.ndarray, "N"] | None = None) -> int:
    """The allowed node of the highest value; of equals the last, which is deepest: rounding aside, a chain of single
    children holds the same leaves.
    """
    value = np.round(value if allowed is None else np.where(allowed, value, -np.inf), 12)
    return int(len(value) - 1 - np.argmax(value[::-1]))


class Rule(NamedTuple):
    """decide(tree, leaf probabilities, **options) -> a node or a set of nodes; what it does, in a line."""

    decide: Callable[..., int | Nodes]
    options: Mapping[str, Any]
    summary: str


RULES: Registry[Rule] = Registry(
    "rule for labelled trees",
    best_set=Rule(best_set, {"beta": 1.0}, "the set of labels of the highest expected hF (Plaud et al. 2025)"),
    best_node=Rule(best_node, {"costs": None}, "the label of the lowest expected cost (Plaud et al. 2025)"),
    hamming=Rule(hamming, {}, "all labels more probable than not: the fewest wrong ones (Plaud et al. 2025)"),
    top_down=Rule(top_down, {}, "from the root always to the most probable child (Silla & Freitas 2011)"),
    best_leaf=Rule(best_leaf, {}, "the most probable leaf, whatever the tree"),
    confident=Rule(
        confident,
        {"threshold": 0.5, "prior": None},
        "the most informative label that is probable enough (Valmadre 2022)",
    ),
    plurality=Rule(
        plurality,
        {"prior": None},
        "the most informative label that beats all that exclude it (Valmadre 2022)",
    ),
    expected_information=Rule(
        expected_information,
        {"prior": None},
        "the label of the highest probability times information (Deng et al. 2012)",
    ),
    informative=Rule(
        informative,
        {"threshold": 1.0, "prior": None},
        "the most probable label that says enough (Valmadre 2022)",
    ),
    leaf_and_parent=Rule(
        leaf_and_parent, {}, "the leaf of the highest probability times its parent's (HiE, Jain et al. 2023)"
    ),
    safest_leaf=Rule(safest_leaf, {"costs": None}, "the leaf of the lowest expected cost (CRM, Karthik et al. 2021)"),
)
