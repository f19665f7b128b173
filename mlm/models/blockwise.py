"""Attention in memory that grows with T + S, not with T x S: a block of queries at a time meets a block of keys.

Forward, a running softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021); backward, every block is computed again from
the logarithm of its normaliser (FlashAttention: Dao et al. 2022). Masks and biases, too, are drawn block by block, and
the gradient of a bias goes into its table within the block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from mlm.models.attention import MASKED, Keys, logits_of, mean_values
from mlm.models.layers import dropout
from mlm.models.sight import Sight

BLOCK = 256  # queries and keys, at most
SAVED = "attention"  # the name under which a rematerialised layer keeps what the backward pass starts from


@dataclass(frozen=True)
class _Plan:
    """What is known before a run. pieces: of each, its sight without arrays, the (queries, keys) of a block, and the
    pairs of first indices that meet.
    """

    softcap: float | None
    scale: float | None
    pieces: tuple[tuple[Sight, tuple[int, int], tuple[tuple[int, int], ...]], ...]


def attend_blockwise(
    query: Float[Array, "R H T K"],
    seen: Sequence[Keys],
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    block: int | None = None,
) -> Float[Array, "R H T K"]:
    """`attention.attend` of pieces whose sights are not drawn. A query that sees no key at all gives 0.

    Blocks that order or window keep apart are not visited. block: queries and keys of one, at most (None: `BLOCK`).
    """
    length, block = query.shape[2], block or BLOCK
    across = _block_size(length, block)
    queries = -(-length // across) * across
    known, arrays, moving = [], [], []
    for piece in seen:
        sight, keys = piece.sight, piece.key.shape[2]
        assert isinstance(sight, Sight)
        down = _block_size(keys, block)
        ends = -(-keys // down) * down
        meetings = _meetings(sight, across, down)
        sight = sight if (queries, ends) == (length, keys) else sight.padded(queries, ends)
        known.append((sight.bare(), (across, down), meetings))
        arrays.append(sight.arrays())
        moving.append((_lengthened(piece.key, ends), _lengthened(piece.value, ends), sight.table))
    learned = isinstance(scale, jax.Array)
    plan = _Plan(softcap, None if learned else scale, tuple(known))
    kept = _kept(query, [piece.key.shape[2] for piece in seen], [key.shape[2] for key, *_ in moving], rate, dropout_key)
    inputs = _lengthened(query, queries), tuple(moving), scale if learned else None
    return _attend(plan, inputs, tuple(zip(arrays, kept, strict=True)))[:, :, :length]


def _block_size(length: int, most: int) -> int:
    """The smallest multiple of 8 of which no more cover the length than of `most`."""
    count = -(-length // most)
    return -(-length // count // 8) * 8


def _meetings(sight: Sight, across: int, down: int) -> tuple[tuple[int, int], ...]:
    """First indices of the (queries, keys) blocks in which some query may see some key, queries in order."""
    (length, keys), (behind, ahead) = sight.shape, sight.reach()
    where = [(i, j) for i in range(0, length, across) for j in range(0, keys, down)]
    if not isinstance(sight.start, int):  # unknown before the run
        return tuple(where)
    nearest = [(j - (sight.start + i + across - 1), j + down - 1 - (sight.start + i)) for i, j in where]
    return tuple(
        pair
        for pair, (least, most) in zip(where, nearest, strict=True)
        if (ahead is None or least <= ahead) and (behind is None or most >= -behind)
    )


def _lengthened(x: Float[Array, "B H T K"], length: int) -> Float[Array, "B H L K"]:
    return x if x.shape[2] == length else jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _kept(
    query: Float[Array, "R H T K"], lengths: list[int], padded: list[int], rate: float, key: Array | None
) -> list[Float[Array, "R H 1 S"] | None]:
    """By what dropout multiplies the probabilities of every piece's keys: one draw for all queries, as in `attend`."""
    if key is None or rate == 0.0:
        return [None] * len(lengths)
    factors = dropout(jnp.ones((*query.shape[:2], 1, sum(lengths)), jnp.float32), rate, key, broadcast=(2,))
    parts = jnp.split(factors, np.cumsum(lengths)[:-1], axis=-1)
    return [
        jnp.pad(part, [(0, 0)] * 3 + [(0, size - part.shape[-1])]) for part, size in zip(parts, padded, strict=True)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, moving: Any, fixed: Any) -> Float[Array, "R H T K"]:
    return _forward(plan, moving, fixed)[0]


def _forward(plan, moving, fixed):
    """(values, what the backward pass needs), by the largest logit m and l = sum_s exp(z_s - m) of the keys so far."""
    query, _, scale = moving
    highest = jnp.full(query.shape[:3], MASKED, jnp.float32)
    carry = highest, jnp.zeros_like(highest), jnp.zeros(query.shape, jnp.float32)

    def visit(_, q, k, v, table, sight, kept, at, carry):
        m, total, mean = (_cut(x, at[0], q.shape[2]) for x in carry)
        z = _logits(plan, sight)(q, k, table, scale)
        new = jnp.maximum(m, jnp.max(z, axis=-1))
        p, shrink = _exp(z, new), jnp.exp(m - new)
        values = mean_values(q, _dropped(p, kept), v, jnp.dtype(jnp.float32))
        block = new, total * shrink + jnp.sum(p, axis=-1), mean * shrink[..., None] + values
        return tuple(_put(x, part, at[0]) for x, part in zip(carry, block, strict=True))

    highest, total, mean = _over_blocks(plan, moving, fixed, visit, carry)
    total = jnp.where(total == 0.0, 1.0, total)  # where nothing was seen
    out = checkpoint_name((mean / total[..., None]).astype(query.dtype), SAVED)
    normaliser = checkpoint_name(highest + jnp.log(total), SAVED)
    return out, (moving, fixed, out, normaliser)


def _backward(plan, saved, g):
    """dz = p (dp - sum_s p dp) with probabilities p and dp = g v; sum_s p dp is g out."""
    moving, fixed, out, normaliser = saved
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def visit(index, q, k, v, table, sight, kept, at, sums):
        mine, norm, expected = (_cut(x, at[0], q.shape[2]) for x in (g, normaliser, delta))
        z, to_inputs = jax.vjp(_logits(plan, sight), q, k, table, moving[2])
        p = _exp(z, norm)
        _, to_values = jax.vjp(partial(mean_values, q), _dropped(p, kept), v)
        dp, dv = to_values(mine)
        dq, dk, dtable, dscale = to_inputs(p * (_dropped(dp, kept) - expected[..., None]))
        queries, pieces, scale = sums
        keys, values, tables = pieces[index]
        piece = _added(keys, dk, at[1]), _added(values, dv, at[1]), jax.tree.map(jnp.add, tables, dtable)
        pieces = (*pieces[:index], piece, *pieces[index + 1 :])
        return _added(queries, dq, at[0]), pieces, jax.tree.map(jnp.add, scale, dscale)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), moving)
    sums = _over_blocks(plan, moving, fixed, visit, zeros)
    return jax.tree.map(lambda total, x: total.astype(x.dtype), sums, moving), None


_attend.defvjp(_forward, _backward)


def _over_blocks(plan: _Plan, moving: Any, fixed: Any, visit: Callable, carry: Any) -> Any:
    """The carry after visit(piece's number, its arrays in the block, the block's first indices, carry) of every block.

    A while loop: policies of rematerialisation look into a scan, and would keep all that they find in the blocks.
    """
    for index, piece in enumerate(zip(plan.pieces, moving[1], fixed, strict=True)):
        carry = _over_piece(piece, moving[0], partial(visit, index), carry)
    return carry


def _over_piece(piece: Any, query: Float[Array, "R H T K"], visit: Callable, carry: Any) -> Any:
    (bare, shape, meetings), (key, value, table), (arrays, kept) = piece
    sight, where = replace(bare, **arrays), jnp.asarray(meetings, jnp.int32)

    def body(state):
        step, carry = state
        at = where[step]
        q, k, v = _cut(query, at[0], shape[0]), _cut(key, at[1], shape[1]), _cut(value, at[1], shape[1])
        here = None if kept is None else _cut(kept, at[1], shape[1], axis=3)
        return step + 1, visit(q, k, v, table, sight.block(at, shape), here, at, carry)

    return jax.lax.while_loop(lambda state: state[0] < len(meetings), body, (jnp.int32(0), carry))[1]


def _logits(plan: _Plan, sight: Sight) -> Callable:
    """Logits of a block as a function of what has a gradient; `MASKED` where a key is not seen."""

    def logits(q, k, table, scale):
        piece = Keys(k, k, replace(sight, table=table))
        return logits_of(q, piece, plan.scale if scale is None else scale, plan.softcap)

    return logits


def _exp(logits: Float[Array, "R H T S"], less: Float[Array, "R H T"]) -> Float[Array, "R H T S"]:
    """exp(logits - less), and 0 where a key is not seen: a query that sees none in any block has no larger logit."""
    return jnp.where(logits == MASKED, 0.0, jnp.exp(logits - less[..., None]))


def _dropped(x: Float[Array, "R H T S"], kept: Float[Array, "R H 1 S"] | None) -> Float[Array, "R H T S"]:
    return x if kept is None else x * kept


def _cut(x: Array, start: Array, size: int, axis: int = 2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: Array, block: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, 2)


def _added(x: Array, block: Array, start: Array) -> Array:
    return _put(x, _cut(x, start, block.shape[2]) + block, start)
