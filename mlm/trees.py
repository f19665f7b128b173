"""Parameter paths: names, regex selection, masks, map-with-path. A path reads `encoder/layers/0/self/query`."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlm.types import PyTree


def path_name(path: Sequence) -> str:
    """The slash-separated name of a JAX key path: dict keys, attributes and indices alike."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: PyTree, is_leaf: Callable | None = None) -> Iterator[tuple[str, Any]]:
    """(path name, leaf) pairs in tree order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        yield path_name(path), leaf


def map_named(fn: Callable, tree: PyTree, *rest: PyTree, is_leaf: Callable | None = None) -> PyTree:
    """`jax.tree.map` whose function receives the path name first: fn(name, leaf, *other_leaves)."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: fn(path_name(p), *x), tree, *rest, is_leaf=is_leaf)


def mask(tree: PyTree, patterns: Sequence[str]) -> PyTree:
    """True where a leaf's whole path matches one of the regular expressions.

    Raises ValueError when a pattern matches no leaf: a mask that selects nothing is a typo.
    """
    names = [name for name, _ in named_leaves(tree)]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            shown = "\n  ".join(names[:50])
            raise ValueError(f"pattern {pattern!r} matches no parameter; the paths are\n  {shown}")
    return map_named(lambda name, _: any(re.fullmatch(p, name) for p in patterns), tree)


def count(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
