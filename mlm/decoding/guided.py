"""Beam search that ranks by likelihood and by what a function says a beginning is worth.

Source: Josifoski et al. 2022 (arXiv:2210.07228), value-guided beam search, after He et al. 2017 (NeurIPS).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.beam import Beam, Searches, best_of, continuations, ended_by, survivors, take
from mlm.decoding.state import DEAD, NEG_INF, Choice, Decoded, Seen, Start, State

# (tokens [N, T], prompt and the candidate included and 0 beyond; length [N]; hidden [N, D]) -> what each is worth [N].
# hidden is the decoder's state that the candidate's last token was predicted from. Traced once, inside the loop; what
# it closes over (a learned head's weights, a table of the wanted tokens) becomes part of the compiled program.
Value = Callable[[Int[Array, "N T"], Int[Array, "N"], Float[Array, "N D"]], Float[Array, "N"]]


@dataclass(frozen=True)
class ValueGuidedBeam:
    """`group` beams, of each its `valued` most probable tokens with a value.

    A beginning ranks by w·log P + (1 - w)·value, a text that ends by w·log P / ((5 + |y|) / 6)^alpha + (1 - w)·value.
    Nothing bounds what a value may still come to, so below w = 1 the search goes on to the limit.
    """

    beam: Beam
    value: Value
    weight: float
    valued: int

    @property
    def group(self) -> int:
        return self.beam.group

    def init(self, start: Start):
        log_prob, finished = self.beam.init(start)
        return log_prob, Searches(finished, log_prob.reshape(-1, self.group))

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        token, log_prob = continuations(logits, processed, state, self.valued)
        value = self._values(state, token)
        rank = jnp.where(log_prob > DEAD, self.weight * log_prob + (1 - self.weight) * value, NEG_INF)
        token, log_prob, rank = (x.reshape(-1, self.group, x.shape[1]) for x in (token, log_prob, rank))
        candidates = best_of(token, log_prob, rank, self.group)
        ended = ended_by(candidates, state)
        order = survivors(candidates, ended, self.group)
        length = state.length.reshape(-1, self.group)[:, :1]
        # Less what grow adds by itself, the whole log-probability over its penalty.
        spared = (1 - self.weight) * self.beam.penalised(candidates.log_prob, length + 1)
        bonus = candidates.rank - self.weight * candidates.log_prob - spared
        ceiling = 0.0 if self.weight == 1 else math.inf
        choice = self.beam.grow(candidates, ended, order, state.search.finished, state, bonus, ceiling)
        done = state.done.reshape(-1, self.group)[:, :1]
        rank = jnp.where(done, state.search.rank, take(candidates.rank + NEG_INF * ended, order))
        return choice._replace(search=Searches(choice.search, rank))

    def finish(self, state: State) -> Decoded:
        return self.beam.finish(state._replace(search=state.search.finished, log_prob=state.search.rank.reshape(-1)))

    def _values(self, state: State, token: Int[Array, "R N"]) -> Float[Array, "R N"]:
        assert isinstance(state.seen, Seen)
        here = jnp.arange(state.tokens.shape[1]) == state.length[:, None, None]
        tokens = jnp.where(here, token[..., None], state.tokens[:, None])
        length, hidden = (jnp.repeat(x, token.shape[1], axis=0) for x in (state.length + 1, state.seen.hidden))
        return self.value(tokens.reshape(-1, tokens.shape[-1]), length, hidden).reshape(token.shape)
