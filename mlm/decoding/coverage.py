"""Beam search that prefers results whose making looked at the whole source."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlm.decoding.beam import Beam, Finished, take
from mlm.decoding.state import Choice, Decoded, Seen, Start, State

TINY = 1e-30  # of attention; what is looked at less costs no more, and never infinity


class Covered(NamedTuple):
    """What the search carries."""

    finished: Finished
    attention: Float[Array, "B K S"]  # of each beam, summed over what it has written; the source's padding: 1 or more


@dataclass(frozen=True)
class CoveredBeam:
    """A beam search whose ended hypotheses score

        log P(y | x) / ((5 + |y|) / 6)^alpha + weight · sum_s log min(sum_t attention[t, s], 1)

    attention[t, s]: weight of source token s while token t is chosen, mean of the heads in the last decoder layer that
    reads the source; tokens of the prompt count. Who lives on is decided by log P alone. As no coverage adds anything,
    what a live hypothesis may reach stays bounded as it was; what has ended scores less, and the search may go on
    longer. Source: Wu et al. 2016 (arXiv:1609.08144), section 7.
    """

    beam: Beam
    weight: float

    @property
    def group(self) -> int:
        return self.beam.group

    def init(self, start: Start):
        log_prob, finished = self.beam.init(start)
        attention = _of(start.seen())
        told = jnp.arange(attention.shape[1])[None] < start.lengths[:, None]
        return log_prob, Covered(finished, self._grouped(jnp.sum(attention * told[..., None], axis=1)))

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        assert isinstance(state.seen, Seen)
        attention = state.search.attention + self._grouped(_of(state.seen))
        coverage = self.weight * jnp.sum(jnp.log(jnp.clip(attention, TINY, 1.0)), axis=-1)
        candidates, ended, order = self.beam.found(logits, processed, state)
        bonus = take(coverage, candidates.parent)
        choice = self.beam.grow(candidates, ended, order, state.search.finished, state, bonus)
        assert choice.parent is not None
        return choice._replace(search=Covered(choice.search, take(attention, choice.parent)))

    def finish(self, state: State) -> Decoded:
        return self.beam.finish(state._replace(search=state.search.finished))

    def _grouped(self, attention: Float[Array, "R S"]) -> Float[Array, "B K S"]:
        return attention.reshape(-1, self.group, attention.shape[-1])


def _of(seen: Seen) -> Float[Array, "R *P S"]:
    assert seen.attention is not None  # a `Generator` asks for it where `DecodeConfig.coverage` does
    return seen.attention
