"""The content of a checkpoint: a nested dict of arrays under plain names, and a sum per array that proves it intact.

A state is stored under its path names (`params/encoder/...`, `opt_state/0/mu/...`), so that a checkpoint can be read
without the classes that made it.

The sum of an array is Σ (2·i + 1)·word_i modulo 2^32, word_i being its i-th element's bits in row-major order. It does
not depend on how the array is split over devices, and any single changed element changes it (the weights are odd).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm.checkpoints.errors import CheckpointError
from mlm.trees import named_leaves
from mlm.types import PyTree

Leaves = dict[str, Any]  # path name -> array, or what describes one


def by_name(state: PyTree) -> Leaves:
    """Path name -> leaf. Raises CheckpointError for two leaves of one name and for leaves that are no arrays."""
    flat: Leaves = {}
    leaf: Any
    for name, leaf in named_leaves(state):
        if name in flat:
            raise CheckpointError(f"two arrays of the state share the path {name!r}: rename one of them")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(f"{name} is a {type(leaf).__name__}: a state holds arrays; put the rest in `extra`")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise CheckpointError(f"{name} is of type {leaf.dtype}: store jax.random.key_data of it")
        flat[name] = leaf
    return flat


def nest(flat: dict[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def describe(flat: Leaves) -> dict[str, list]:
    """Path name -> [shape, dtype], as JSON values."""
    return {name: [list(leaf.shape), np.dtype(leaf.dtype).name] for name, leaf in flat.items()}


def differences(saved: dict[str, list], wanted: dict[str, list], limit: int = 8) -> list[str]:
    """What keeps a saved state from being restored as `wanted`, one line per array; empty when nothing does."""
    lines = [f"{n}: wanted, but not in the checkpoint" for n in wanted if n not in saved]
    lines += [f"{n}: in the checkpoint, but not wanted" for n in saved if n not in wanted]
    lines += [
        f"{n}: saved as {saved[n][1]}{saved[n][0]}, wanted as {wanted[n][1]}{wanted[n][0]}"
        for n in wanted
        if n in saved and [list(saved[n][0]), saved[n][1]] != [list(wanted[n][0]), wanted[n][1]]
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more"]


def sums(flat: Leaves) -> Leaves:
    """Path name -> uint32 sum. JAX arrays are summed where they are, without waiting for the result."""
    result: Leaves = {n: _weighted_sum(np, x) for n, x in flat.items() if not isinstance(x, jax.Array)}
    groups: dict[frozenset, dict[str, jax.Array]] = {}
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array):
            groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
    for group in groups.values():
        result.update(_sum_all(group))
    return result


@jax.jit
def _sum_all(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _weighted_sum(jnp, leaf) for name, leaf in flat.items()}


def block_sum(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """What a block of an array of `shape`, its first element at `start`, adds to the sum of the array, modulo 2^32."""
    return int(_weighted_sum(np, block, start, shape))


def _weighted_sum(xp, array, start=None, shape=None):
    """Σ (2·i + 1)·word_i modulo 2^32, with NumPy or JAX; of a block at `start` of an array of `shape`, i being that
    array's.
    """
    words = _words(xp, array)
    whole = words.shape if shape is None else (*shape, *words.shape[len(shape) :])
    index = xp.zeros((), xp.uint32)
    for axis, size in enumerate(words.shape):
        stride = math.prod(whole[axis + 1 :]) % 2**32
        first = 0 if start is None or axis >= len(start) else start[axis]
        place = (xp.arange(size, dtype=xp.uint32) + xp.uint32(first)) * xp.uint32(stride)
        index = index + place.reshape((1,) * axis + (size,) + (1,) * (words.ndim - axis - 1))
    return xp.sum(words * (index * xp.uint32(2) + xp.uint32(1)), dtype=xp.uint32)


def _words(xp, array):
    """The bits of each element as one uint32, or as several along a new last axis."""
    if array.dtype == bool:
        return array.astype(xp.uint32)
    unsigned = {1: xp.uint8, 2: xp.uint16}.get(array.dtype.itemsize, xp.uint32)
    if xp is np:
        parts = max(1, array.dtype.itemsize // 4)
        bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
        return bits.astype(np.uint32).reshape(array.shape + ((parts,) if parts > 1 else ()))
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def abstract(described: dict[str, list], sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types as saved, placed with one sharding."""
    make = partial(jax.ShapeDtypeStruct, sharding=sharding)
    return {name: make(tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype, *_) in described.items()}
