"""Guesses by the model's own Chimera heads: no second model, and one small layer for each guess."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from mlm.decoding.state import Extend, NoGuesses, Seen, State
from mlm.models.transformer import Transformer
from mlm.models.tree import Tree, chain
from mlm.types import PAD_ID, Params, PyTree


@dataclass(frozen=True)
class ChimeraHeads(NoGuesses):
    """What the model's heads (`models.chimera`) guess, one after another, each behind the guesses of those before it,
    by the same search and with the same noise.

    They look at the states that the model's passes leave behind. So nothing is guessed before there is one: in the
    first pass of a row without a prompt. Source: Zeng et al. 2024 (arXiv:2402.15758), a chain of guesses for their
    tree.
    """

    model: Transformer
    params: Params
    cache: PyTree  # of its heads, empty; slots for the guesses beyond the longest row
    width: int = 3

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    @property
    def _heads(self) -> Any:
        return self.model.chimera(self.params)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        return self.cache if seen is None else self._heads.read(seen.hidden, length, self.cache)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        own, heads, guesses = state.proposal, self._heads, []
        alone, begun = state._replace(cache=None, proposal=()), state.length > 0
        for number in range(1, self.width + 1):
            active = begun & ~alone.done
            # What the decoder reads is shifted right by one, and the first place stands for those before it.
            read = jnp.pad(alone.tokens, ((0, 0), (1, 0)), constant_values=PAD_ID)
            places = jnp.maximum(alone.length[:, None] - jnp.array([2, 1, 0]), 0)
            rows = self.model.decoder_rows(self.params, jnp.take_along_axis(read, places, axis=1))
            logits = self.model.logits(self.params, heads.ahead(rows, number, own))[:, 0]
            alone = extend(alone, logits, active)
            guesses.append(jnp.where(active, alone.pending, -1))
        return jnp.stack(guesses, axis=1), own

    def observe(self, own: PyTree, grown: Int[Array, "R"], path: Int[Array, "R N"], seen: Seen) -> PyTree:
        return self._heads.read(seen.hidden, grown, own)
