"""The largest logits of every row, exactly, ties to the lower index.

Written from reductions, gathers and short sorts, which work inside the shard that holds a row: XLA replicates the
operand of its own top-k over the mesh. On a CPU its argmax is a scalar loop; two plain reductions are
several times faster.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_pieces: ContextVar[int] = ContextVar("pieces of the vocabulary", default=1)


def first_max(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """Index of the largest value of each row."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, x.shape[-1] - 1), axis=-1)


def top_k(x: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    """(values, indices) of the min(count, V) largest of each row, largest first.

    The k largest values lie in the k blocks with the largest maxima, so two short sorts replace one of the whole row.
    """
    rows, size = x.shape
    count = min(count, size)
    width = max(1, math.isqrt(size // count))
    blocks = -(-size // width)
    if blocks <= 2 * count:
        return _sorted(x, count)
    if size % _pieces.get() == 0 and _pieces.get() > 1:
        return _of_pieces(x.reshape(rows, _pieces.get(), -1), count)
    table = jnp.pad(x, ((0, 0), (0, blocks * width - size)), constant_values=-jnp.inf).reshape(rows, blocks, width)
    chosen = jnp.sort(_sorted(jnp.max(table, axis=-1), count)[1], axis=-1)  # in order, so that ties stay in order
    within = jax.vmap(lambda row, block: row[block])(table, chosen).reshape(rows, count * width)
    values, at = _sorted(within, count)
    return values, jnp.take_along_axis(chosen, at // width, axis=-1) * width + at % width


@contextmanager
def cut(pieces: int) -> Iterator[None]:
    """While a program is traced: the vocabulary lies in so many equal pieces on as many devices, each of which is to
    rank its own, so that devices tell each other of N tokens a row and not of V.
    """
    token = _pieces.set(pieces)
    try:
        yield
    finally:
        _pieces.reset(token)


def _of_pieces(x: Float[Array, "R P v"], count: int) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    with cut(1):
        values, index = jax.vmap(lambda piece: top_k(piece, count), in_axes=1, out_axes=1)(x)
    index = index + (jnp.arange(x.shape[1]) * x.shape[2])[None, :, None]
    best, at = _sorted(values.reshape(x.shape[0], -1), count)
    return best, jnp.take_along_axis(index.reshape(x.shape[0], -1), at, axis=-1)


def _sorted(x: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    values, index = jax.lax.sort((-x, index), dimension=1, is_stable=True, num_keys=1)
    return -values[:, :count], index[:, :count]
