"""Proposers: what is guessed ahead, so that one pass of the model confirms several tokens. Lossless, all of them.

`PROPOSERS` maps a name (`DecodeConfig.proposer`) to what makes one from the inputs of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlm.decoding.state import Extend, Proposer, State, Step, newest, shifted
from mlm.models.tree import Tree, chain
from mlm.registry import Registry
from mlm.types import PyTree

MATCHED = 3  # tokens at most by which a row finds its place in the source


class Inputs(NamedTuple):
    """What a proposer may read, a row for each decoding row. draft: a smaller model's step and its empty cache."""

    sources: Int[Array, "R S"]
    lengths: Int[Array, "R"]
    draft: tuple[Step, PyTree] | None = None


class NoGuesses:
    """One token a pass."""

    tree = chain(0)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"]) -> PyTree:
        return ()

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R 0"], PyTree]:
        return jnp.zeros((state.length.size, 0), jnp.int32), ()

    def observe(self, own: PyTree, grown: Int[Array, "R"]) -> PyTree:
        return own


NO_GUESSES = NoGuesses()


@dataclass(frozen=True)
class InputCopy(NoGuesses):
    """The source from where the row stands in it, for tasks that change little of their input.

    Before anything is written that is its beginning. Later it is behind the last n tokens written, n = 1, 2, 3, with
    the first n for which they occur just once in the source; where they do not occur, or three still occur more than
    once, nothing is guessed. Source: Sun et al. 2021 (arXiv:2106.04970), input-guided aggressive decoding.
    """

    sources: Int[Array, "R S"]
    lengths: Int[Array, "R"]
    width: int = 8

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        place = jnp.where(state.length == state.start, 0, self._place(state))
        at = place[:, None] + jnp.arange(self.width)
        known = (place >= 0)[:, None] & (at < self.lengths[:, None])
        tokens = jnp.take_along_axis(self.sources, jnp.clip(at, 0, self.sources.shape[1] - 1), axis=1)
        return jnp.where(known, tokens, -1), ()

    def _place(self, state: State) -> Int[Array, "R"]:
        """Index behind the tokens written last; -1: not known."""
        place = jnp.full(state.length.shape, -1)
        open_ = jnp.ones(state.length.shape, bool)
        positions = jnp.arange(self.sources.shape[1])[None]
        ends = positions < self.lengths[:, None]  # where the written tokens may end in the source
        for n in range(1, MATCHED + 1):
            ends = ends & (shifted(self.sources, n - 1) == newest(state, n)[:, None])
            count = jnp.sum(ends, axis=1)
            found = jnp.max(jnp.where(ends, positions + 1, -1), axis=1)
            place = jnp.where(open_ & (count == 1), found, place)
            open_ = open_ & (count > 1)
        return place


@dataclass(frozen=True)
class DraftModel(NoGuesses):
    """What a smaller model of the same vocabulary would write, by the same search and with the same noise.

    Of its `width` guesses the expected number of tokens a pass is (1 - a^(W+1)) / (1 - a), a the share of positions
    where both choose the same. Sources: Leviathan et al. 2023 (arXiv:2211.17192); shared noise: Daliri et al. 2025.
    """

    step: Step
    cache: PyTree  # empty; slots for width + 1 tokens beyond the longest row
    width: int = 4

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"]) -> PyTree:
        cache = self.cache if read is None else self.step(read, self.cache)[1]
        return {**cache, "length": cache["length"] + length}

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        first = state.proposal["length"]

        def guess(carry: tuple[State, PyTree], _: None) -> tuple[tuple[State, PyTree], Array]:
            state, cache = carry
            active = ~state.done
            read, cache = self.step(state.pending[:, None], cache)
            state = extend(state, read.logits[:, 0], active)
            return (state, {**cache, "length": cache["length"] + 1}), jnp.where(active, state.pending, -1)

        # One step more than guesses: the last guess, too, must be in the draft's cache should it be right.
        alone = state._replace(cache=None, proposal=())
        (_, cache), guesses = jax.lax.scan(guess, (alone, state.proposal), None, length=self.width + 1)
        return guesses[:-1].T, {**cache, "length": first}

    def observe(self, own: PyTree, grown: Int[Array, "R"]) -> PyTree:
        return {**own, "length": own["length"] + grown}


class Kind(NamedTuple):
    """How a proposer is made of a batch's inputs and the number of guesses, and what it does, in a line."""

    make: Callable[[Inputs, int], Proposer]
    summary: str


def _draft_model(inputs: Inputs, width: int) -> DraftModel:
    assert inputs.draft is not None
    step, cache = inputs.draft
    return DraftModel(step, cache, width)


PROPOSERS: Registry[Kind] = Registry(
    "proposer",
    none=Kind(lambda inputs, width: NO_GUESSES, "one token a pass"),
    input_copy=Kind(
        lambda inputs, width: InputCopy(inputs.sources, inputs.lengths, width),
        "the source from where the row stands in it (Sun et al. 2021)",
    ),
    draft_model=Kind(
        _draft_model,
        "what a smaller model would write (Leviathan et al. 2023)",
    ),
)
