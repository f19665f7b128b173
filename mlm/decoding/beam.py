"""Beam search with the GNMT brevity penalty and the rules of T5X.

Every step takes the 2K best of the K·V continuations, so that K survive even when K of them end. Ended ones compete
for K places in the finished set by

    score = log P(y | x) / ((5 + |y|) / 6)^alpha        (|y|: tokens, prompt and EOS included)

and the search of an example ends when the worst of K finished scores beats what the best live hypothesis could still
reach, its log-probability over the penalty at the limit. Without any finished hypothesis the live ones are returned,
scored by their log-probability. Unlike T5X the best comes first, and each example stops by itself (with the same
result: a hypothesis that could still enter the finished set keeps the search open).

Source: Wu et al. 2016 (arXiv:1609.08144), section 7; T5X, `decoding.beam_search`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.ranking import top_k
from mlm.decoding.state import DEAD, NEG_INF, Choice, Decoded, State
from mlm.types import EOS_ID


class Finished(NamedTuple):
    """The K best ended hypotheses of each example, best first; an empty place scores NEG_INF."""

    tokens: Int[Array, "B K T"]
    scores: Float[Array, "B K"]
    lengths: Int[Array, "B K"]


@dataclass(frozen=True)
class Beam:
    """`group` beams per example, `n_best` of them returned.

    Scores are the model's log-probabilities; a processor may forbid tokens (logits at NEG_INF), not reshape the rest.
    """

    group: int = 4
    alpha: float = 0.6
    n_best: int = 1

    def init(self, ids: Int[Array, "B"], max_length: int):
        batch, beams = ids.size, self.group
        # One beam lives at first, or the group would hold the same hypothesis K times.
        log_prob = jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEG_INF), batch)
        return log_prob, Finished(
            tokens=jnp.zeros((batch, beams, max_length), jnp.int32),
            scores=jnp.full((batch, beams), NEG_INF),
            lengths=jnp.zeros((batch, beams), jnp.int32),
        )

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        beams = self.group
        done, limit, length = (_first(x, beams) for x in (state.done, state.limit, state.length))

        token, parent, log_prob = self._candidates(logits, processed, state)
        ended = token == EOS_ID
        live_log_prob, order = top_k(log_prob + NEG_INF * ended, beams)
        tokens = _take(state.tokens.reshape(*done.shape, beams, -1), parent)
        tokens = jnp.where(jnp.arange(tokens.shape[-1])[None, None] == length[:, None, None], token[..., None], tokens)
        scores = jnp.where(ended & (log_prob > DEAD), log_prob / self._penalty(length + 1)[:, None], NEG_INF)
        finished = self._best(
            state.search, Finished(tokens, scores, jnp.broadcast_to(length[:, None] + 1, token.shape))
        )
        finished = jax.tree.map(lambda new, old: jnp.where(_like(done, new), old, new), finished, state.search)

        reachable = live_log_prob[:, 0] / self._penalty(limit)
        worst = finished.scores[:, -1]
        stop = (worst > DEAD) & (worst > reachable)
        return Choice(
            token=_take(token, order).reshape(-1),
            log_prob=live_log_prob.reshape(-1),
            ended=jnp.repeat(stop, beams),
            search=finished,
            parent=jnp.where(done[:, None], jnp.arange(beams)[None], _take(parent, order)),
        )

    def finish(self, state: State) -> Decoded:
        live = Finished(
            *(x.reshape(-1, self.group, *x.shape[1:]) for x in (state.tokens, state.log_prob, state.length))
        )
        none_finished = state.search.scores[:, 0] <= DEAD
        best = jax.tree.map(lambda a, b: jnp.where(_like(none_finished, a), a, b), live, state.search)
        empty = best.scores <= DEAD
        return Decoded(
            jnp.where(empty[..., None], 0, best.tokens)[:, : self.n_best],
            jnp.where(empty, NEG_INF, best.scores)[:, : self.n_best],
            jnp.where(empty, 0, best.lengths)[:, : self.n_best],
            state.passes,
        )

    def _candidates(self, logits: Array, processed: Array, state: State) -> tuple[Array, Array, Array]:
        """Token, parent beam and log-probability of the 2K best continuations, each [B, 2K], best first.

        The best 2K of a group are among the best 2K of its beams, so nothing of size K·V is built or sorted.
        """
        beams, wide = self.group, min(2 * self.group, logits.shape[-1])
        value, token = top_k(processed, wide)
        value = value - jax.nn.logsumexp(logits, axis=-1)[:, None] + state.log_prob[:, None]
        log_prob, index = top_k(value.reshape(-1, beams * wide), 2 * beams)
        return _take(token.reshape(-1, beams * wide), index), index // wide, log_prob

    def _best(self, old: Finished, new: Finished) -> Finished:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
        _, order = top_k(both.scores, self.group)
        return jax.tree.map(lambda x: _take(x, order), both)

    def _penalty(self, length: Array) -> Array:
        return ((5.0 + length) / 6.0) ** self.alpha


def _first(x: Array, beams: int) -> Array:
    """[R] -> [B]: the value that all beams of an example share."""
    return x.reshape(-1, beams)[:, 0]


def _take(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]]: a gather inside each example, local to its shard."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _like(flag: Array, x: Array) -> Array:
    return flag.reshape(-1, *(1,) * (x.ndim - 1))
