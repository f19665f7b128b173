"""The shape of a block of guesses: which node follows which, known before anything is compiled."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Tree:
    """parents: of node 0, the root, -1; of every other node the number of an earlier one.

    Raises ValueError for another order.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        if self.parents[:1] != (-1,) or any(not 0 <= p < node for node, p in enumerate(self.parents) if node):
            raise ValueError(
                f"parents={self.parents} must begin with -1, the root's, and name an earlier node for every other one"
            )

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.parents)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, self.size - 1))

    @cached_property
    def depth(self) -> Int[np.ndarray, "Q"]:
        """Edges from the root."""
        depth = np.zeros(self.size, np.int32)
        for node in range(1, self.size):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @cached_property
    def ancestors(self) -> Bool[np.ndarray, "Q Q"]:
        """[q, p]: p lies on the path from the root to q, both included."""
        found = np.eye(self.size, dtype=bool)
        for node in range(1, self.size):
            found[node] |= found[self.parents[node]]
        return found

    @cached_property
    def children(self) -> Int[np.ndarray, "Q C"]:
        """Of every node, in order; -1 behind them."""
        below = [[n for n, parent in enumerate(self.parents) if parent == node] for node in range(self.size)]
        width = max(1, max(map(len, below)))
        return np.array([[*nodes, *[-1] * (width - len(nodes))] for nodes in below], np.int32)


def chain(guesses: int) -> Tree:
    """A root and so many guesses, each behind the one before."""
    return Tree(tuple(range(-1, guesses)))


def best_first(guesses: int, branches: int, share: float = 0.7) -> Tree:
    """The nodes that are most probably right, at most `branches` behind each, where the r-th best guess (r = 0, 1, …)
    is right with probability share·(1 - share)^r. Numbered by depth, ties to the better rank. Source: Spector & Ré 2023
    (arXiv:2308.04623), with one rate of acceptance in place of the draft's own probabilities, so that shapes are known.
    """
    chosen: list[tuple[int, ...]] = []  # a node is the ranks on its path
    frontier: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while len(chosen) <= guesses:
        frontier.sort(key=lambda entry: (round(entry[0], 12), entry[1]))
        value, path = frontier.pop(0)
        chosen.append(path)
        frontier += [(value * share * (1 - share) ** rank, (*path, rank)) for rank in range(branches)]
    chosen.sort(key=lambda path: (len(path), path))
    return Tree(tuple(-1 if not path else chosen.index(path[:-1]) for path in chosen))
