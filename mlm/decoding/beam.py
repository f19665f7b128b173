"""Beam search with the GNMT brevity penalty and the rules of T5X.

Every step takes the 2K best of the K·V continuations, so that K survive even when K of them end. Ended ones compete
for K places in the finished set by

    score = log P(y | x) / ((5 + |y|) / 6)^alpha        (|y|: tokens, prompt and EOS included)

and the search of an example ends when the worst of K finished scores beats what the best live hypothesis could still
reach, its log-probability over the penalty at the limit. Without any finished hypothesis the live ones are returned,
scored by their log-probability. Unlike T5X the best comes first, and each example stops by itself (with the same
result: a hypothesis that could still enter the finished set keeps the search open).

Source: Wu et al. 2016 (arXiv:1609.08144), section 7; T5X, `decoding.beam_search`. Diverse beam search is several such
searches side by side: Vijayakumar et al. 2018 (arXiv:1610.02424).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.ranking import top_k
from mlm.decoding.state import DEAD, NEG_INF, Choice, Decoded, Start, State, by_example, ends


class Finished(NamedTuple):
    """The K best ended hypotheses of each example, best first; an empty place scores NEG_INF."""

    tokens: Int[Array, "B K T"]
    scores: Float[Array, "B K"]
    lengths: Int[Array, "B K"]


class Candidates(NamedTuple):
    """The 2K best continuations of each example, best first by `rank`."""

    token: Int[Array, "B N"]
    parent: Int[Array, "B N"]  # the beam that each continues
    log_prob: Float[Array, "B N"]  # nats, of the whole hypothesis
    rank: Float[Array, "B N"]


@dataclass(frozen=True)
class Beam:
    """`group` beams per example, `n_best` of them returned.

    Scores are the model's log-probabilities; a processor may forbid tokens (logits at NEG_INF), not reshape the rest.
    """

    group: int = 4
    alpha: float = 0.6
    n_best: int = 1

    def init(self, start: Start):
        batch, beams = start.ids.size, self.group
        # One beam lives at first, or the group would hold the same hypothesis K times.
        log_prob = jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEG_INF), batch)
        return log_prob, Finished(
            tokens=jnp.zeros((batch, beams, start.max_length), jnp.int32),
            scores=jnp.full((batch, beams), NEG_INF),
            lengths=jnp.zeros((batch, beams), jnp.int32),
        )

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        return self.grow(*self.found(logits, processed, state), state.search, state)

    def finish(self, state: State) -> Decoded:
        tokens, scores, lengths = (x[:, : self.n_best] for x in self.results(state.search, state))
        return Decoded(tokens, scores, lengths, by_example(state.passes, self.group))

    def found(
        self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State
    ) -> tuple[Candidates, Bool[Array, "B N"], Int[Array, "B K"]]:
        """(the best continuations, which of them end here, places of those that live on)."""
        token, log_prob = continuations(logits, processed, state, 2 * self.group)
        token, log_prob = (x.reshape(-1, self.group, x.shape[-1]) for x in (token, log_prob))
        candidates = best_of(token, log_prob, log_prob, self.group)
        ended = ended_by(candidates, state)
        return candidates, ended, survivors(candidates, ended, self.group)

    def grow(
        self,
        candidates: Candidates,
        ended: Bool[Array, "B N"],
        order: Int[Array, "B K"],
        finished: Finished,
        state: State,
        bonus: Float[Array, "B N"] | float = 0.0,
        ceiling: float = 0.0,
    ) -> Choice:
        """Ended candidates compete for the finished set, those that `order` names live on.

        bonus: added to the score of a candidate that ends. ceiling: the most that it may come to for any text.
        """
        beams = self.group
        done, limit, length = (_first(x, beams) for x in (state.done, state.limit, state.length))

        token, parent, log_prob, _ = candidates
        live_log_prob = take(log_prob + NEG_INF * ended, order)
        tokens = take(state.tokens.reshape(*done.shape, beams, -1), parent)
        tokens = jnp.where(jnp.arange(tokens.shape[-1])[None, None] == length[:, None, None], token[..., None], tokens)
        scores = jnp.where(ended & (log_prob > DEAD), self.penalised(log_prob, length[:, None] + 1) + bonus, NEG_INF)
        new = self._merged(finished, Finished(tokens, scores, jnp.broadcast_to(length[:, None] + 1, token.shape)))
        finished = jax.tree.map(lambda new, old: jnp.where(_like(done, new), old, new), new, finished)

        reachable = self.penalised(jnp.max(live_log_prob, axis=1), limit) + ceiling
        worst = finished.scores[:, -1]
        stop = (worst > DEAD) & (worst > reachable)
        return Choice(
            token=take(token, order).reshape(-1),
            log_prob=live_log_prob.reshape(-1),
            ended=jnp.repeat(stop, beams),
            search=finished,
            parent=jnp.where(done[:, None], jnp.arange(beams)[None], take(parent, order)),
        )

    def results(self, finished: Finished, state: State) -> Finished:
        """The finished hypotheses, or the live ones of an example that has none; 0 and NEG_INF in an empty place."""
        live = Finished(
            *(x.reshape(-1, self.group, *x.shape[1:]) for x in (state.tokens, state.log_prob, state.length))
        )
        none_finished = finished.scores[:, 0] <= DEAD
        best = jax.tree.map(lambda a, b: jnp.where(_like(none_finished, a), a, b), live, finished)
        empty = best.scores <= DEAD
        return Finished(
            jnp.where(empty[..., None], 0, best.tokens),
            jnp.where(empty, NEG_INF, best.scores),
            jnp.where(empty, 0, best.lengths),
        )

    def penalised(self, log_prob: Float[Array, "*s"], length: Int[Array, "*#s"]) -> Float[Array, "*s"]:
        """log P / ((5 + |y|) / 6)^alpha."""
        return log_prob / ((5.0 + length) / 6.0) ** self.alpha

    def _merged(self, old: Finished, new: Finished) -> Finished:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
        _, order = top_k(both.scores, self.group)
        return jax.tree.map(lambda x: take(x, order), both)


class Searches(NamedTuple):
    """What diverse beam search carries: for each of B·G small searches its finished set and the ranks of its beams."""

    finished: Finished
    rank: Float[Array, "BG K"]  # nats: log-probabilities less all penalties so far


@dataclass(frozen=True)
class DiverseBeam:
    """`group` beams in `groups` equal parts, each a beam search that avoids what earlier parts just chose.

    At every position the parts choose in order. A hypothesis that a part continues by token v ranks by

        sum over positions of log P(v) - diversity · (live beams of earlier parts that chose v at that position)

    (Hamming diversity), which decides who lives; finished sets, their early stop and the order of the results go by the
    log-probability with its brevity penalty, as in `Beam`. An example ends when all its parts would. Parts may return
    the same hypothesis. Source: Vijayakumar et al. 2018 (arXiv:1610.02424).
    """

    group: int = 4
    groups: int = 2
    diversity: float = 0.5
    alpha: float = 0.6
    n_best: int = 1

    @property
    def part(self) -> Beam:
        """The search of one part; its examples are the B·G parts of all examples, its rows those of the loop."""
        return Beam(self.group // self.groups, self.alpha)

    def init(self, start: Start):
        log_prob, finished = self.part.init(start._replace(ids=jnp.repeat(start.ids, self.groups)))
        return log_prob, Searches(finished, log_prob.reshape(-1, self.part.group))

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        beams = self.part.group
        # A part needs 2K candidates and at most all tokens of earlier parts are ahead of them before the penalty.
        token, log_prob = continuations(logits, processed, state, self.group + beams)
        rank = log_prob - (state.log_prob - state.search.rank.reshape(-1))[:, None]
        token, log_prob, rank = (x.reshape(-1, self.groups, beams, x.shape[-1]) for x in (token, log_prob, rank))
        chosen = jnp.full((token.shape[0], 0), -1)
        parts = []
        for part in range(self.groups):
            here = token[:, part]
            count = jnp.sum(here[..., None] == chosen[:, None, None], axis=-1)
            candidates = best_of(here, log_prob[:, part], rank[:, part] - self.diversity * count, beams)
            ended = ended_by(candidates, state, part * beams)
            order = survivors(candidates, ended, beams)
            chosen = jnp.concatenate([chosen, take(candidates.token, order)], axis=1)
            parts.append((candidates, ended, order, take(candidates.rank, order)))
        candidates, ended, order, rank = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, x[0].shape[1]), *parts)
        choice = self.part.grow(candidates, ended, order, state.search.finished, state)
        return choice._replace(
            ended=jnp.repeat(jnp.all(choice.ended.reshape(-1, self.group), axis=1), self.group),
            search=Searches(choice.search, rank),
        )

    def finish(self, state: State) -> Decoded:
        results = self.part.results(state.search.finished, state)
        results = jax.tree.map(lambda x: x.reshape(-1, self.group, *x.shape[2:]), results)
        _, order = top_k(results.scores, self.n_best)
        tokens, scores, lengths = (take(x, order) for x in results)
        return Decoded(tokens, scores, lengths, by_example(state.passes, self.group))


def continuations(logits: Array, processed: Array, state: State, count: int) -> tuple[Array, Array]:
    """The best `count` tokens of every row, each with the log-probability of the hypothesis it makes, [R, N].

    The best continuations of a group are among the best of its beams, so nothing of size K·V is built or sorted.
    """
    value, token = top_k(processed, count)
    return token, extended(value, logits, state)


def extended(value: Float[Array, "R N"], logits: Float[Array, "R V"], state: State) -> Float[Array, "R N"]:
    """Log-probability of each row with one token more, whose logit is `value`."""
    return value - jax.nn.logsumexp(logits, axis=-1)[:, None] + state.log_prob[:, None]


def best_of(token: Array, log_prob: Array, rank: Array, beams: int) -> Candidates:
    """The 2K best by rank out of N continuations of each of K beams, [B, K, N]."""
    ranks, index = top_k(rank.reshape(rank.shape[0], -1), 2 * beams)
    token, log_prob = (take(x.reshape(x.shape[0], -1), index) for x in (token, log_prob))
    return Candidates(token, index // rank.shape[-1], log_prob, ranks)


def ended_by(candidates: Candidates, state: State, first: int = 0) -> Bool[Array, "B N"]:
    """Which candidates end here. first: the row of an example that their beam 0 is."""
    if state.closing.shape[0] == 1:
        return ends(state, candidates.token)
    closing = state.closing.reshape(candidates.token.shape[0], -1, state.closing.shape[-1])
    closing = take(closing, first + candidates.parent)
    return jnp.any(candidates.token[..., None] == closing, axis=-1)


def survivors(candidates: Candidates, ended: Bool[Array, "B N"], beams: int) -> Int[Array, "B K"]:
    """Places of the K best candidates that have not ended."""
    return top_k(candidates.rank + NEG_INF * ended, beams)[1]


def _first(x: Array, beams: int) -> Array:
    """[R] -> [B]: the value that all beams of an example share."""
    return x.reshape(-1, beams)[:, 0]


def take(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]]: a gather inside each example, local to its shard."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _like(flag: Array, x: Array) -> Array:
    return flag.reshape(-1, *(1,) * (x.ndim - 1))
