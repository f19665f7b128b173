"""Beam search for texts that hold given phrases, whose beams are shared out by how much of them is written.

A hypothesis knows how many tokens of each phrase it has written, at most one of them in part. A bank is the sum; at
every position the K beams are shared out over the banks, so that those with few tokens of phrases, which are more
probable for now, never crowd out those with many, and only what holds all phrases may end. The number of passes does
not depend on the phrases.

Source: Post & Vilar 2018 (arXiv:1804.06609), with the candidates and banks of its authors' Sockeye. Unlike there a
token that breaks a phrase off may itself begin one ("a a b" holds "a b"), and a hypothesis that holds all phrases may
always end, however probable that is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.beam import Beam, Candidates, Finished, best_of, continuations, ended_by, extended, take
from mlm.decoding.ranking import top_k
from mlm.decoding.state import DEAD, NEG_INF, Choice, Decoded, Start, State, by_example, ends
from mlm.types import EOS_ID

# Letters: P phrases of an example, L tokens of the longest (-1 beyond a phrase and behind the last), M candidates.


class Constrained(NamedTuple):
    """What the search carries."""

    finished: Finished
    progress: Int[Array, "B K P"]  # tokens of each phrase that each beam has written; only one in part


@dataclass(frozen=True)
class ConstrainedBeam:
    """The search of `beam` for texts that hold `given["phrases"]`, [B, P, L]; with no phrases its results.

    A text that has room for its phrases and EOS holds them all; only where other rules forbid that, what is returned is
    unended and holds most of them.
    """

    beam: Beam

    @property
    def group(self) -> int:
        return self.beam.group

    def init(self, start: Start):
        log_prob, finished = self.beam.init(start)
        batch, phrases, _ = start.given["phrases"].shape
        return log_prob, Constrained(finished, jnp.zeros((batch, self.group, phrases), jnp.int32))

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        beams, (finished, progress) = self.group, state.search
        phrases = state.given["phrases"].reshape(-1, beams, *state.given["phrases"].shape[1:])[:, 0]
        sizes = jnp.sum(phrases >= 0, axis=-1)
        total = jnp.sum(sizes, axis=1)
        candidates = self._candidates(logits, processed, state, phrases, progress)

        after = progressed(phrases[:, None], take(progress, candidates.parent), candidates.token)
        bank = jnp.sum(after, axis=-1)
        ended = ended_by(candidates, state)
        alive = _first_of_its_kind(candidates) & (~ended | (bank == total[:, None]))
        kept = alive & ~ended & _kept(bank, candidates.log_prob, alive & ~ended, total, phrases.shape[1:], beams)
        log_prob = jnp.where(kept | (alive & ended), candidates.log_prob, NEG_INF)
        _, order = top_k(jnp.where(kept, log_prob, NEG_INF), beams)
        choice = self.beam.grow(candidates._replace(log_prob=log_prob), ended, order, finished, state)
        done = state.done.reshape(-1, beams)[:, :1, None]
        progress = jnp.where(done, progress, take(after, order))
        return choice._replace(search=Constrained(choice.search, progress))

    def _candidates(
        self, logits: Array, processed: Array, state: State, phrases: Int[Array, "B P L"], progress: Int[Array, "B K P"]
    ) -> Candidates:
        """M = 2K + K(2 + P): the 2K best of all; of every beam its best, its end, and what goes on with a phrase."""
        beams, rows = self.group, logits.shape[0]
        following, allowed = (x.reshape(rows, -1) for x in continuing(phrases[:, None], progress))
        unmet = jnp.any(following >= 0, axis=1, keepdims=True)
        closing = ends(state, jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape))
        token, log_prob = continuations(logits, jnp.where(unmet & closing, NEG_INF, processed), state, 2 * beams)
        wide_token, wide_log_prob = (x.reshape(-1, beams, x.shape[1]) for x in (token, log_prob))
        wide = best_of(wide_token, wide_log_prob, wide_log_prob, beams)

        # Without phrases the 2K best are all, as in Beam; with them a beam that holds all may always end.
        asked = jnp.repeat(jnp.any(phrases >= 0, axis=(1, 2)), beams)[:, None]
        more = jnp.concatenate([token[:, :1], jnp.full((rows, 1), EOS_ID), jnp.maximum(following, 0)], axis=1)
        may = jnp.concatenate([asked, asked & ~unmet, allowed], axis=1)
        more_log_prob = extended(jnp.take_along_axis(processed, more, axis=1), logits, state)
        more_log_prob = jnp.where(may, more_log_prob, NEG_INF)
        parent = jnp.broadcast_to(jnp.arange(beams)[None, :, None], (rows // beams, beams, more.shape[1]))

        def joined(of_group: Array, of_beams: Array) -> Array:
            return jnp.concatenate([of_group, of_beams.reshape(of_group.shape[0], -1)], axis=1)

        every = joined(wide.log_prob, more_log_prob)
        return Candidates(joined(wide.token, more), joined(wide.parent, parent), every, every)

    def finish(self, state: State) -> Decoded:
        # Without a finished text: of the live ones those that hold most.
        held = jnp.sum(state.search.progress, axis=-1).reshape(-1)
        held = jnp.where(state.log_prob > DEAD, held, -1)
        most = jnp.repeat(jnp.max(held.reshape(-1, self.group), axis=1), self.group)
        live = state._replace(log_prob=jnp.where(held == most, state.log_prob, NEG_INF))
        results = self.beam.results(state.search.finished, live)
        _, order = top_k(results.scores, self.beam.n_best)
        tokens, scores, lengths = (take(x, order) for x in results)
        return Decoded(tokens, scores, lengths, by_example(state.passes, self.group))


def continuing(
    phrases: Int[Array, "*#s P L"], progress: Int[Array, "*s P"]
) -> tuple[Int[Array, "*s P"], Bool[Array, "*s P"]]:
    """(the token that follows in each phrase, -1 where it is complete; whether it may come now).

    The rest of a phrase that is begun must come; otherwise any that is not, by its first token.
    """
    size = phrases.shape[-1]
    at = jnp.minimum(progress, size - 1)[..., None]
    token = jnp.take_along_axis(jnp.broadcast_to(phrases, (*progress.shape, size)), at, axis=-1)[..., 0]
    token = jnp.where(progress < size, token, -1)
    open_ = (progress > 0) & (token >= 0)
    return token, jnp.where(jnp.any(open_, axis=-1, keepdims=True), open_, token >= 0)


def progressed(
    phrases: Int[Array, "*#s P L"], progress: Int[Array, "*s P"], token: Int[Array, "*s"]
) -> Int[Array, "*s P"]:
    """Tokens of each phrase that are written after one more. A phrase that it breaks off starts anew."""
    following, _ = continuing(phrases, progress)
    open_ = (progress > 0) & (following >= 0)
    hit = open_ & (following == token[..., None])
    right = jnp.any(hit, axis=-1, keepdims=True)
    progress = jnp.where(open_ & ~right, 0, progress)
    begins = (progress == 0) & (phrases[..., 0] == token[..., None])
    first = begins & (jnp.cumsum(begins, axis=-1) == 1)
    return jnp.where(right, progress + hit, progress + first)


def shares(count: Int[Array, "B C"], total: Int[Array, "B"], beams: int) -> Int[Array, "B C"]:
    """Beams for each bank, of which there are total + 1, by how many candidates each has.

    Equal parts, what is left over to the fullest bank; then from the fullest down, what a bank cannot fill goes to the
    next, and from the last to the fullest.
    """
    bank = jnp.arange(count.shape[1])[None]
    fullest = bank == total[:, None]
    share = jnp.where(bank <= total[:, None], beams // (total[:, None] + 1), 0)
    share = share + jnp.where(fullest, beams % (total[:, None] + 1), 0)
    # What spills from bank i on is a queue's waiting time: s_i = max(0, s_(i+1) + share_i - count_i).
    walk = jnp.cumsum((share - count)[:, ::-1], axis=1)[:, ::-1]
    spill = walk - jnp.minimum(0, jax.lax.cummin(walk, axis=1, reverse=True))
    arrived = jnp.pad(spill[:, 1:], ((0, 0), (0, 1)))
    return share + arrived - spill + jnp.where(fullest, spill[:, :1], 0)


def _kept(
    bank: Int[Array, "B M"],
    log_prob: Float[Array, "B M"],
    alive: Bool[Array, "B M"],
    total: Int[Array, "B"],
    most: tuple[int, ...],
    beams: int,
) -> Bool[Array, "B M"]:
    """The best candidates of each bank, as many as it has beams."""
    banks = jnp.arange(most[0] * most[1] + 1)
    count = jnp.sum(alive[..., None] & (bank[..., None] == banks), axis=1)
    earlier = jnp.tril(jnp.ones((bank.shape[1],) * 2, bool), -1)
    this, other = log_prob[:, :, None], log_prob[:, None, :]
    better = alive[:, None] & (bank[:, :, None] == bank[:, None]) & ((other > this) | ((other == this) & earlier))
    return jnp.sum(better, axis=-1) < take(shares(count, total, beams), bank)


def _first_of_its_kind(candidates: Candidates) -> Bool[Array, "B M"]:
    """Which candidates are possible, and not the same as an earlier one."""
    token, parent, log_prob, _ = candidates
    possible = log_prob > DEAD
    same = (token[:, :, None] == token[:, None]) & (parent[:, :, None] == parent[:, None])
    earlier = jnp.tril(jnp.ones((token.shape[1],) * 2, bool), -1)
    return possible & ~jnp.any(same & earlier & possible[:, None], axis=-1)
