"""What the layers of one pass look at and from where, and the slots of a cache that it writes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.models.sight import Drawn, Sight
from mlm.models.specs import AttentionSpec, PositionSpec
from mlm.types import PyTree, SourceHidden

NO_RINGS: Mapping[int, int] = MappingProxyType({})
Attend = Callable[..., Float[Array, "R H T K"]]  # takes what `attention.attend` takes, and gives the same numbers


class View:
    """One pass over whole sequences, or over a cached block of Q positions, for every kind of sublayer of a stack.

    own: how the stack's states see each other, but for what a kind of attention adds. positions: places inside the
    example. memory: the encoder's states, of a whole pass alone. attend: the path of attention. spelled: biases of
    positions that were read as digits.

    Where the path reads arrays, `draws`, masks and biases are drawn here, once and outside of the loop over layers;
    only a layer's own table has to wait for its layer.
    """

    def __init__(
        self,
        own: Sight,
        positions: Int[Array, "_ T"],
        memory: SourceHidden | None,
        memory_sight: Sight | None,
        specs: list[AttentionSpec],
        table: Float[Array, "H buckets"] | None,
        attend: Attend,
        draws: bool,
        spelled: Float[Array, "_ H T M"] | None = None,
        rings: Mapping[int, int] = NO_RINGS,
    ):
        self.own, self.positions, self.memory, self.attend = own, positions, memory, attend
        self._table, self._draws, self._rings = table, draws, rings
        self._masks, self._biases = {}, {}
        self._memory_sight: Sight | Drawn | None = memory_sight
        if not draws:
            return
        if memory_sight is not None:
            self._memory_sight = memory_sight.drawn()
        for spec in specs:
            if not spec.reads_itself:
                continue
            if spec.window not in self._masks:
                self._masks[spec.window] = self._sight(spec, table).mask()
            if spec.position.table() != "layer" and self._shared(spec) not in self._biases:
                seqpe = spec.position.kind == "seqpe"
                bias = self._on_ring(spec, spelled) if seqpe else self._sight(spec, table).bias()
                self._biases[self._shared(spec)] = bias

    def sight(self, spec: AttentionSpec, table: Float[Array, "H buckets"] | None = None) -> Sight | Drawn:
        """How queries see the keys of their own stack. table: the layer's own, where it has one."""
        sight = self._sight(spec, self._table if table is None else table)
        if not self._draws:
            return sight
        return Drawn(
            self._masks[spec.window],
            self._biases[self._shared(spec)] if table is None else sight.bias(),
        )

    def memory_sight(self) -> Sight | Drawn:
        """How queries see the keys of the encoder."""
        assert self._memory_sight is not None
        return self._memory_sight

    def written(self, slots: PyTree, block: PyTree, ring: bool = False) -> PyTree:
        """The slots [R, G, M, K] with the block [R, G, Q, K] in those from its first position on, for every array of a
        tree. ring: they go round.
        """
        start = self.positions[:, 0]
        if ring:
            return jax.tree.map(lambda own, new: written_round(own, new, start), slots, block)
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
        return jax.tree.map(lambda own, new: write(own, new, start), slots, block)

    def _sight(self, spec: AttentionSpec, table: Float[Array, "H buckets"] | None) -> Sight:
        sight = replace(self.own, window=spec.window, position=spec.position, heads=spec.heads, table=table)
        ring = self._ring(spec)
        return sight if ring is None else sight.on_ring(ring)

    def _ring(self, spec: AttentionSpec) -> int | None:
        return None if spec.window is None else self._rings.get(spec.window)

    def _shared(self, spec: AttentionSpec) -> tuple[PositionSpec, int, int | None]:
        """What layers must have in common to share a bias; keys on a ring are others than those of the whole row."""
        return spec.position, spec.heads, self._ring(spec)

    def _on_ring(self, spec: AttentionSpec, bias: Float[Array, "_ H T M"] | None) -> Float[Array, "_ H T S"] | None:
        """Of the biases to all slots those to the keys that the ring holds."""
        ring = self._ring(spec)
        if bias is None or ring is None:
            return bias
        keys = jnp.maximum(self.own.on_ring(ring).keys(), 0)  # those that are not there yet are masked anyway
        return jnp.take_along_axis(bias, keys[:, None, None, :], axis=3)


def slots_of(flags: Bool[Array, "R Q"], start: Int[Array, "R"], slots: int) -> Bool[Array, "R M"]:
    """Which slots of a cache hold the flagged positions of a block that is stored from `start` on."""
    none = jnp.zeros(slots, bool)
    return jax.vmap(lambda row, at: jax.lax.dynamic_update_slice(none, row, (at,)))(flags, start)


def written_round(slots: Float[Array, "R G M K"], block: Float[Array, "R G Q K"], start: Int[Array, "R"]) -> Array:
    """The slots with the block in those from `start` on, modulo their number."""
    places = (start[:, None] + jnp.arange(block.shape[2])) % slots.shape[2]
    return jax.vmap(lambda row, new, at: row.at[:, at].set(new))(slots, block, places)
