"""Deterministic search against repetition: of the most probable tokens the one that the text so far suggests least.

Of the k most probable tokens the one with the largest

    (1 - alpha) · p(v) - alpha · penalty(v)        p: softmax of the processed logits

is written, so that alpha = 0 is greedy search; the methods differ in the penalty, a number from 0 (in contrastive
search -1) to 1. The text is what the decoder reads: its first input, the prompt and what is written, not the source of
an encoder. Scores are the model's log-probabilities.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.ranking import first_max, top_k
from mlm.decoding.selectors import by_score, emitted
from mlm.decoding.state import DEAD, NEG_INF, Choice, Decoded, Extend, NoGuesses, Seen, Start, State, recurrences
from mlm.models.tree import Tree


@dataclass(frozen=True)
class _Penalised:
    """What the methods share. alpha: weight of the penalty. candidates: k, tokens that are looked at."""

    alpha: float
    candidates: int = 5
    group = 1

    def init(self, start: Start):
        return jnp.zeros(start.ids.shape, jnp.float32), ()

    def best(
        self, processed: Float[Array, "R V"], token: Int[Array, "R k"], penalty: Float[Array, "R k"]
    ) -> Int[Array, "R"]:
        """The candidate to be written; a forbidden one never before another."""
        logit = jnp.take_along_axis(processed, token, axis=1)
        p = jnp.exp(logit - jax.nn.logsumexp(processed, axis=-1, keepdims=True))
        score = jnp.where(logit > DEAD, (1 - self.alpha) * p - self.alpha * penalty, NEG_INF)
        return jnp.take_along_axis(token, first_max(score)[:, None], axis=1)[:, 0]

    def finish(self, state: State) -> Decoded:
        return by_score(state, self.group)


class Siblings(NamedTuple):
    """What contrastive search carries."""

    states: Float[Array, "R T D"]  # of length 1
    token: Int[Array, "R k"]  # the candidates for the next place
    length: Int[Array, "R"]  # of the row whose next place that is; -1: there are none yet


@dataclass(frozen=True)
class ContrastiveSearch(_Penalised, NoGuesses):
    """penalty(v): the largest cosine between the decoder's state after v and any state before it.

    A pass feeds all candidates, side by side behind the newest token, takes one by what their states are, and finds the
    candidates for the next place in the logits of that one. The first pass takes nothing.
    Source: Su et al. 2022 (arXiv:2202.06417).
    """

    @property
    def tree(self) -> Tree:
        return Tree((-1, *[0] * self.candidates))

    def init(self, start: Start):
        states = _unit(_room(start))
        rows = states.shape[0]
        none = jnp.full((rows, self.candidates), -1, jnp.int32)
        return jnp.zeros(rows, jnp.float32), Siblings(states, none, jnp.full(rows, -1, jnp.int32))

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R k"], tuple[()]]:
        return state.search.token, ()

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        assert isinstance(state.seen, Seen)
        assert state.seen.below is not None
        states, token, length = state.search
        states = _with(states, state.length, _unit(state.seen.hidden))
        cosine = jnp.einsum("RkD,RTD->RkT", _unit(state.seen.below), states)
        earlier = jnp.arange(states.shape[1])[None] <= state.length[:, None]
        penalty = jnp.max(jnp.where(earlier[:, None], cosine, -1.0), axis=-1)
        fed = length == state.length
        following = Siblings(
            states,
            jnp.where(fed[:, None], token, top_k(processed, self.candidates)[1]),
            jnp.where(fed, length, state.length),
        )
        choice = emitted(state, logits, self.best(processed, jnp.maximum(token, 0), penalty))
        return choice._replace(search=following, waits=~fed)


@dataclass(frozen=True)
class FSD(_Penalised):
    """penalty(v): the largest cosine between the newest n - 1 states, as one vector, and those before an earlier v.

    0 where no v is earlier, and where the cosine is negative. Frustratingly simple decoding, in its form with vectors.
    Source: Yang et al. 2023 (arXiv:2310.14971).
    """

    n: int = 2

    def init(self, start: Start):
        return jnp.zeros(start.ids.shape, jnp.float32), _room(start)

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        assert isinstance(state.seen, Seen)
        states = _with(state.search, state.length, state.seen.hidden.astype(jnp.float32))
        token = top_k(processed, self.candidates)[1]
        penalty = self.penalty(token, states, state)
        return emitted(state, logits, self.best(processed, token, penalty))._replace(search=states)

    def penalty(self, token: Int[Array, "R k"], states: Float[Array, "R T D"], state: State) -> Float[Array, "R k"]:
        product = squares = newest = jnp.zeros(states.shape[:2], jnp.float32)
        square = jnp.sum(states**2, axis=-1)
        for back in range(self.n - 1):
            at = jnp.maximum(state.length - back, 0)[:, None]
            query = jnp.take_along_axis(states, at[..., None], axis=1)[:, 0]
            product = product + jnp.roll(jnp.einsum("RTD,RD->RT", states, query), back, axis=1)
            squares = squares + jnp.roll(square, back, axis=1)
            newest = newest + jnp.take_along_axis(square, at, axis=1)
        cosine = product * jax.lax.rsqrt(jnp.maximum(squares * newest, TINY))
        place = jnp.arange(states.shape[1])[None]  # of a state, and of the token written behind it
        known = (place >= self.n - 2) & (place < state.length[:, None])
        same = known[:, None] & (state.tokens[:, None] == token[..., None])
        return jnp.clip(jnp.max(jnp.where(same, cosine[:, None], 0.0), axis=-1), 0.0, 1.0)


@dataclass(frozen=True)
class DiscreteFSD(_Penalised):
    """penalty(v): how probable the n-grams of the text make v, longer ones first.

        sum over i = n - 1, ..., 0 of rest_i · share_i        share_i = smoothing · count / (total + 1), i > 0
                                                              share_0 = count / total

    total: earlier occurrences of the newest i tokens; count: those of them with v behind. rest is 1 at first and is
    multiplied by 1 - smoothing behind every order that has seen v. Frustratingly simple decoding, in its form with
    tokens. Source: Yang et al. 2023 (arXiv:2310.14971).
    """

    n: int = 3
    smoothing: float = 0.9

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        token = top_k(processed, self.candidates)[1]
        return emitted(state, logits, self.best(processed, token, self.penalty(token, state)))

    def penalty(self, token: Int[Array, "R k"], state: State) -> Float[Array, "R k"]:
        same = state.tokens[:, None] == token[..., None]
        penalty, rest = jnp.zeros(token.shape), jnp.ones(token.shape)
        for order, behind in reversed([*enumerate(recurrences(state, self.n - 1))]):
            total = jnp.sum(behind, axis=-1, keepdims=True)
            count = jnp.sum(behind[:, None] & same, axis=-1)
            share = self.smoothing * count / (total + 1) if order else count / jnp.maximum(total, 1)
            penalty = penalty + rest * share
            rest = jnp.where(count > 0, rest * (1 - self.smoothing), rest)
        return penalty


TINY = 1e-30  # keeps the cosine of a state of zeros finite


def _room(start: Start) -> Float[Array, "R T D"]:
    """States by place: 0 behind the first input, t behind the t-th token; those already read, and zeros."""
    states = start.seen().hidden.astype(jnp.float32)
    return jnp.pad(states, ((0, 0), (0, start.max_length - states.shape[1]), (0, 0)))


def _with(states: Float[Array, "R T D"], place: Int[Array, "R"], new: Float[Array, "R D"]) -> Float[Array, "R T D"]:
    """With one more state in its place; a row without that place is done, and stays."""
    return jax.vmap(lambda row, at, state: row.at[at].set(state, mode="drop"))(states, place, new)


def _unit(x: Float[Array, "*s D"]) -> Float[Array, "*s D"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), TINY))
