"""Which keys the queries of a pass see, and under what bias: said once, drawn whole or block by block.

A `Sight` holds nothing of size T x S. What a path of attention works on, all of it or one block, it draws from here.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.models.order import Order
from mlm.models.positions import alibi_bias, from_diagonals, relative_bias
from mlm.models.specs import NO_POSITION, PositionSpec
from mlm.models.tree import Tree

Reach = tuple[int | None, int | None]


@dataclass(frozen=True)
class Drawn:
    """A sight as arrays. mask: True where a query sees a key; bias: added to the logits, in nats."""

    mask: Bool[Array, "#R #H #T #S"]
    bias: Float[Array, "#R H T S"] | None = None

    def drawn(self) -> "Drawn":
        return self


@dataclass(frozen=True, kw_only=True)
class Sight:
    """T queries, whose first stands at index `start` of the row (or cache slot), before S keys from index `first_key`.

    causal None: no order holds between the two (another stack's keys). window: see `AttentionSpec`. segments: of
    queries and keys; a query sees its own example only, and nobody sees segment 0, padding (None: all are one
    example). prefix: queries and keys that see each other whatever the order, within the window. table: the biases
    of t5_bucket. tree: of the queries, whose keys stand from slot `start` on: a query sees the keys before and its own
    ancestors, at the distance of their depths. ring: the S keys are the newest of a row, each at its index modulo S.
    order: by ranks, of tokens whose places are given; causal is then None.
    """

    shape: tuple[int, int]
    start: int | Int[Array, ""] | Int[Array, "R"] = 0
    first_key: int | Int[Array, ""] = 0
    causal: bool | None = None
    window: int | None = None
    segments: tuple[Int[Array, "#R T"], Int[Array, "#R S"]] | None = None
    prefix: tuple[Bool[Array, "R T"], Bool[Array, "R S"]] | None = None
    position: PositionSpec = NO_POSITION
    heads: int = 0
    table: Float[Array, "H buckets"] | None = None
    tree: Tree | None = None
    ring: bool = False
    order: Order | None = None

    def drawn(self) -> Drawn:
        return Drawn(self.mask(), self.bias())

    def mask(self) -> Bool[Array, "_ 1 T S"]:
        mask = jnp.ones((1, *self.shape), bool)
        if self.causal is not None:
            mask = self._ordered()
        if self.segments is not None:
            mask = mask & segment_mask(*self.segments)
        if self.tree is not None:
            mask = mask & self._ancestry(self.tree)
        if self.ring:
            mask = mask & (self.keys() >= 0)[:, None]
        if self.order is not None:
            mask = mask & self.order.mask()
        return mask[:, None]

    def on_ring(self, slots: int) -> "Sight":
        """The same queries before the ring that holds the newest keys of their rows."""
        sight = replace(self, shape=(self.shape[0], slots), ring=True)
        if self.prefix is None:
            return sight
        place = sight.keys() - jnp.asarray(self.start)[:, None]
        queries = self.prefix[0]
        flags = jnp.take_along_axis(queries, jnp.clip(place, 0, self.shape[0] - 1), axis=1)
        return replace(sight, prefix=(queries, flags & (place >= 0)))

    def _ancestry(self, tree: Tree) -> Bool[Array, "R T S"]:
        node = self.keys() - jnp.asarray(self.start)[:, None]
        related = jnp.asarray(tree.ancestors)[:, jnp.clip(node, 0, tree.size - 1)]
        return (node < 0)[:, None] | (jnp.moveaxis(related, 0, 1) & (node < tree.size)[:, None])

    def _ordered(self) -> Bool[Array, "_ T S"]:
        mask = order_mask(*self._indices(), reach(causal=bool(self.causal), window=self.window))
        mask = mask[None] if mask.ndim == 2 else mask
        if self.prefix is None:
            return mask
        near = order_mask(*self._indices(), reach(causal=bool(self.causal), window=self.window, prefix=True))
        queries, keys = self.prefix
        return mask | (near & queries[:, :, None] & keys[:, None, :])

    def bias(self) -> Float[Array, "_ H T S"] | None:
        """Of the distance alone, so one query's row of T + S - 1 keys holds every entry."""
        queries, keys = self._indices()
        if self.tree is not None or self.ring or self.order is not None:  # where nothing runs along diagonals
            return self._between(queries, keys)
        row = self._between(queries[..., -1:], keys[0] + jnp.arange(sum(self.shape) - 1))
        if row is None:
            return None
        bias = from_diagonals(row[..., 0, :], self.shape[0])
        return bias[None] if bias.ndim == 3 else bias

    def _between(self, queries: Int[Array, "*R T"], keys: Int[Array, "*_ S"]) -> Float[Array, "*R H T S"] | None:
        if self.position.kind == "t5_bucket":
            assert self.table is not None
            return relative_bias(self.table, queries, keys, causal=bool(self.causal), spec=self.position)
        if self.position.kind == "alibi":
            return alibi_bias(self.heads, queries, keys)
        return None

    def _indices(self) -> tuple[Int[Array, "*R T"], Int[Array, "*_ S"]]:
        """Places of queries and keys."""
        if self.order is not None:
            return self.order.positions, self.order.positions
        start, keys = jnp.asarray(self.start)[..., None], self.keys()
        if self.tree is None:
            return start + jnp.arange(self.shape[0]), keys
        node = jnp.clip(keys - start, 0, self.tree.size - 1)
        return start + self.tree.depth, jnp.where(keys < start, keys, start + jnp.asarray(self.tree.depth)[node])

    def keys(self) -> Int[Array, "*_ S"]:
        """Index of every key in its row; of a ring, that of the last one written to its slot by the block's end."""
        slots = jnp.arange(self.shape[1])
        if not self.ring:
            return self.first_key + slots
        newest = jnp.asarray(self.start)[:, None] + self.shape[0] - 1
        return newest - (newest - slots) % self.shape[1]

    def reach(self) -> Reach:
        """How far order lets a query see behind and ahead of itself, for all that is known before a run."""
        if self.causal is None:
            return None, None
        return reach(causal=self.causal, window=self.window, prefix=self.prefix is not None)

    def arrays(self) -> dict[str, Any]:
        """The fields that hold arrays, but for the table, which alone has a gradient."""
        fields = {"start": self.start, "segments": self.segments, "prefix": self.prefix}
        return {name: value for name, value in fields.items() if not isinstance(value, int | None)}

    def bare(self) -> "Sight":
        """What stays without `arrays` and the table: known before a run, and hashable."""
        return replace(
            self, start=self.start if isinstance(self.start, int) else 0, segments=None, prefix=None, table=None
        )

    def padded(self, queries: int, keys: int) -> "Sight":
        """Of more queries and keys, the new ones in segment 0."""
        more = [(0, 0), (0, queries - self.shape[0])], [(0, 0), (0, keys - self.shape[1])]
        segments = self.segments or tuple(jnp.ones((1, length), jnp.int32) for length in self.shape)
        return replace(
            self,
            shape=(queries, keys),
            segments=tuple(map(jnp.pad, segments, more)),
            prefix=None if self.prefix is None else tuple(map(jnp.pad, self.prefix, more)),
        )

    def block(self, at: Int[Array, "2"], shape: tuple[int, int]) -> "Sight":
        """The sight of shape[0] queries from the at[0]-th on, before shape[1] keys from the at[1]-th on."""

        def cut(pair):
            if pair is None:
                return None
            return tuple(jax.lax.dynamic_slice_in_dim(x, i, size, axis=1) for x, i, size in zip(pair, at, shape))

        return replace(
            self,
            shape=shape,
            start=self.start + at[0],
            first_key=self.first_key + at[1],
            segments=cut(self.segments),
            prefix=cut(self.prefix),
        )


def reach(*, causal: bool, window: int | None, prefix: bool = False) -> Reach:
    """How many tokens a query sees behind and ahead of itself (None: all).

    causal: window - 1 and 0, and as many ahead as behind within a prefix. Otherwise a window w reaches (w-1)//2 back
    and w//2 ahead (T5Gemma 2).
    """
    if causal:
        behind = window - 1 if window else None
        return behind, (behind if prefix else 0)
    return ((window - 1) // 2, window // 2) if window else (None, None)


def order_mask(queries: Int[Array, "*R T"], keys: Int[Array, "*_ S"], reach: Reach) -> Bool[Array, "*R T S"]:
    """True where a key stands within reach of a query, by their indices in the row.

    Examples of a packed row are contiguous, so indices decide within each.
    """
    ahead = keys[..., None, :] - queries[..., None]
    mask = jnp.ones(ahead.shape, bool)
    behind_most, ahead_most = reach
    if ahead_most is not None:
        mask = ahead <= ahead_most
    if behind_most is not None:
        mask = mask & (-ahead <= behind_most)
    return mask


def segment_mask(queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]) -> Bool[Array, "_ T S"]:
    """True where query and key belong to the same example (segment 0, padding, belongs to none)."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
