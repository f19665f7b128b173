"""Processors: pure functions (logits [R, V], state) -> logits that reshape what a selector chooses from.

A forbidden token gets NEG_INF; the most probable one is never forbidden by a truncation. The model's own logits stay
beside the processed ones, so scores do not change. `PROCESSORS` maps a name (an option of `DecodeConfig`) to what makes
one of that option's value, in the order in which they are applied: first what forbids, so that what compares a token
with the best one knows which are left. A row's prefix: its prompt and what it has written.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.phrases import aligned
from mlm.decoding.ranking import first_max
from mlm.decoding.ranking import top_k as largest
from mlm.decoding.state import DEAD, NEG_INF, Processor, State, newest, recurrences, written
from mlm.registry import Registry
from mlm.types import EOS_ID

RANKS = 100  # steps between ranks that mirostat fits Zipf's law to


def repetition_penalty(penalty: float) -> Processor:
    """Tokens of the row's prefix: logit / penalty where it is positive, logit · penalty where it is not.

    Source: Keskar et al. 2019 (arXiv:1909.05858), the form for negative logits as in Hugging Face transformers.
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        seen = _mark(state.tokens, written(state), logits.shape[-1]) & (logits > NEG_INF)
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    return process


def no_repeat_ngram(n: int) -> Processor:
    """Forbids what would complete an n-gram of the row's prefix. Source: Paulus et al. 2017 (arXiv:1705.04304)."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        follows = recurrences(state, n - 1)[-1]
        return jnp.where(_mark(state.tokens, follows, logits.shape[-1]), NEG_INF, logits)

    return process


def bad_words(phrases: tuple[tuple[int, ...], ...]) -> Processor:
    """Forbids the last token of each phrase where the row's prefix ends in the tokens before it."""
    table = aligned(phrases, len(phrases), max(map(len, phrases)), right=True)[None]
    return lambda logits, state: _forbid(table, logits, state)


def avoid(on: bool) -> Processor:
    """As `bad_words`, but of each row its own: `given["avoid"]` [R, P, L], see `mlm.decoding.phrases`."""
    return lambda logits, state: _forbid(state.given["avoid"], logits, state)


def _forbid(phrases: Int[Any, "#R P L"], logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
    """Forbids what completes one of the phrases, which are right-aligned; -1 stands for any token, or none."""
    begun = jnp.ones((logits.shape[0], phrases.shape[1]), bool) & (phrases[..., -1] >= 0)
    for back in range(1, phrases.shape[2]):
        wanted = phrases[..., -1 - back]
        begun = begun & ((wanted == -1) | (wanted == newest(state, back)[:, None]))
    return jnp.where(_mark(jnp.broadcast_to(phrases[..., -1], begun.shape), begun, logits.shape[-1]), NEG_INF, logits)


def min_length(length: int) -> Processor:
    """Forbids EOS until it would be token number `length` of its row, prompt and EOS counted."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        early = state.length + 1 < length
        return jnp.where(early[:, None] & (jnp.arange(logits.shape[-1])[None] == EOS_ID), NEG_INF, logits)

    return process


def language_mask(on: bool) -> Processor:
    """Forbids what is False in the row's `given["language_mask"]` [V]: tokens of other languages, into which zero-shot
    translation falls. Source of the problem: Zhang et al. 2020 (arXiv:2004.11867).
    """
    return lambda logits, state: jnp.where(state.given["language_mask"], logits, NEG_INF)


def language_bias(weight: float) -> Processor:
    """logits + weight · the row's `given["language_bias"]` [V]: how probable each token is in its language anyway."""
    return lambda logits, state: jnp.where(logits > NEG_INF, logits + weight * state.given["language_bias"], NEG_INF)


def contrastive(alpha: float, beta: float) -> Processor:
    """(1 + beta)·s - beta·s', where s' are the logits of whom the model is contrasted with (`Seen.others`), of tokens
    at least alpha times as probable as the best one; the others are forbidden.

    The choice is that of s - w·s' with w = beta / (1 + beta). Sources: Li et al. 2023 (arXiv:2210.15097), in the form
    of O'Brien & Lewis 2023 (arXiv:2309.09117); against another language: Sennrich et al. 2024 (arXiv:2309.07098).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        (other,) = _others(state)
        return jnp.where(_near_best(logits, alpha), (1 + beta) * logits - beta * other, NEG_INF)

    return process


def dola(alpha: float) -> Processor:
    """log p - log p', where p' is what the head makes of an earlier layer (`Seen.others`): of them the one that is
    farthest from p by Jensen-Shannon divergence; of tokens at least alpha times as probable as the best one.

    All over the tokens that are not forbidden. Source: Chuang et al. 2024 (arXiv:2309.03883).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        early = jnp.where(logits > NEG_INF, jnp.stack(_others(state)), NEG_INF)
        final, early = (jax.nn.log_softmax(x, axis=-1) for x in (logits, early))
        middle = jnp.logaddexp(final, early) - math.log(2)
        divergence = sum(jnp.sum(jnp.exp(p) * (p - middle), axis=-1) for p in (final, early)) / 2
        chosen = jax.vmap(lambda layers, number: layers[number], in_axes=(1, 0))(early, first_max(divergence.T))
        return jnp.where(_near_best(logits, alpha), final - chosen, NEG_INF)

    return process


def temperature(value: float) -> Processor:
    """logits / value: below 1 sharper, above 1 flatter."""
    return lambda logits, state: jnp.where(logits > NEG_INF, logits / value, NEG_INF)


def top_k(count: int) -> Processor:
    """Keeps the `count` most probable tokens, and those that tie with the last of them."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        threshold = largest(logits, count)[0][:, -1:]
        return jnp.where(logits >= threshold, logits, NEG_INF)

    return process


def top_p(mass: float) -> Processor:
    """Keeps the smallest set of most probable tokens that holds `mass`; the one that crosses it stays.

    Not idempotent: the next softmax renormalises what is kept. Source: Holtzman et al. 2019 (arXiv:1904.09751).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        probs = jax.nn.softmax(logits, axis=-1)
        return jnp.where(_first(_behind(probs), probs, mass), logits, NEG_INF)

    return process


def min_p(share: float) -> Processor:
    """Keeps tokens at least `share` times as probable as the best. Source: Nguyen et al. 2024 (arXiv:2407.01082)."""

    return lambda logits, state: jnp.where(_near_best(logits, share), logits, NEG_INF)


def epsilon(least: float) -> Processor:
    """Keeps tokens of at least this probability. Source: Hewitt et al. 2022 (arXiv:2210.15191)."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        return _at_least(jax.nn.log_softmax(logits, axis=-1), math.log(least), logits)

    return process


def eta(least: float) -> Processor:
    """Keeps tokens of a probability of at least min(e, sqrt(e)·exp(-H)), H the entropy in nats: fewer where the model
    is sure. Source: Hewitt et al. 2022 (arXiv:2210.15191).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        threshold = jnp.minimum(math.log(least), math.log(least) / 2 - _entropy(log_probs))
        return _at_least(log_probs, threshold, logits)

    return process


def typical(mass: float) -> Processor:
    """Keeps the smallest set of tokens that holds `mass`, those first whose surprise is nearest to the entropy, and the
    most probable token, which the paper may drop. Source: Meister et al. 2022 (arXiv:2202.00666).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        distance = jnp.abs(log_probs + _entropy(log_probs))
        best = logits == jnp.max(logits, axis=-1, keepdims=True)
        return jnp.where(_first(_bits(distance), jnp.exp(log_probs), mass) | best, logits, NEG_INF)

    return process


def mirostat(surprise: float) -> Processor:
    """Keeps the k most probable tokens, k such that a text's mean surprise comes to `surprise` bits a token.

    k = round((e·2^mu / (1 - V^-e))^(1/s)) + 1 with e = s - 1, where s is the exponent of Zipf's law over the first
    ranks. mu begins at twice the target and falls by every token's surprise less the target (learning rate 1), so it
    is a sum that the row's log-probability already holds. Source: Basu et al. 2020 (arXiv:2007.14966), version 1.
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        bits = -state.log_prob / math.log(2)
        mu = 2 * surprise - (bits - (state.length - state.start) * surprise)
        count = _zipf_count(_zipf_exponent(logits), mu, logits.shape[-1])
        kept = _first(_behind(jax.nn.softmax(logits, axis=-1)), jnp.ones_like(logits), count[:, None])
        return jnp.where(kept, logits, NEG_INF)

    return process


def _near_best(logits: Float[Array, "R V"], share: float) -> Bool[Array, "R V"]:
    """Tokens at least `share` times as probable as the best one."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(share)


def _others(state: State) -> tuple[Float[Array, "R V"], ...]:
    if not (state.seen and state.seen.others):
        raise ValueError("nothing to contrast the model with: this pass says nothing but the model's own logits")
    return state.seen.others


def _zipf_exponent(logits: Float[Array, "R V"]) -> Float[Array, "R"]:
    """Slope of log-probability over log rank by least squares through the steps between ranks."""
    best = largest(logits, RANKS + 1)[0]
    rank = np.arange(1.0, best.shape[-1])
    step = np.log((rank + 1) / rank).astype(np.float32)
    alive = best[:, 1:] > DEAD
    falls = jnp.where(alive, best[:, :-1] - best[:, 1:], 0.0)
    return jnp.sum(falls * step, axis=-1) / jnp.maximum(jnp.sum(alive * step**2, axis=-1), 1e-6)


def _zipf_count(s: Float[Array, "R"], mu: Float[Array, "R"], vocab: int) -> Float[Array, "R"]:
    """Tokens, a whole number from 1 to V, of which the last has about mu bits."""
    most = math.log(vocab)
    e = jnp.where(jnp.abs(s - 1) < 1e-4, 1e-4, s - 1)  # at s = 1 the quotient has the limit 1 / log V
    log_count = (jnp.log(e / -jnp.expm1(-e * most)) + mu * math.log(2)) / jnp.maximum(s, 1e-4)
    return jnp.minimum(jnp.round(jnp.exp(jnp.minimum(log_count, most))) + 1, vocab)


def _at_least(log_probs: Float[Array, "R V"], threshold: Any, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    best = jnp.max(log_probs, axis=-1, keepdims=True)
    return jnp.where(log_probs >= jnp.minimum(threshold, best), logits, NEG_INF)


def _entropy(log_probs: Float[Array, "R V"]) -> Float[Array, "R 1"]:
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1, keepdims=True)


def _first(key: Int[Array, "R V"], weight: Float[Array, "R V"], mass: Any) -> Bool[Array, "R V"]:
    """The tokens with the smallest keys that together weigh `mass`, ties with the last of them included.

    A token is one of them iff those with smaller keys weigh less than `mass`. 31 halvings of the range of keys, which
    are not negative, find the threshold exactly, without a sort.
    """

    def halve(_, bounds):  # invariant: keys up to `low` weigh less than mass; up to `high` they reach it, or are all
        low, high = bounds
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(key <= middle, weight, 0.0), axis=-1, keepdims=True) >= mass
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    start = (jnp.full((key.shape[0], 1), -1, jnp.int32), jnp.max(key, axis=-1, keepdims=True))
    return key <= jax.lax.fori_loop(0, 31, halve, start)[1]


def _behind(probs: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """A key for `_first`, smallest for the most probable."""
    return _bits(jnp.max(probs, axis=-1, keepdims=True)) - _bits(probs)


def _bits(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Of numbers that are not negative: their float32 bit patterns are ordered as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _mark(tokens: Int[Array, "R N"], flag: Bool[Array, "R N"], vocab: int) -> Bool[Array, "R V"]:
    """[r, v]: some flagged token of row r is v. A scatter inside each row, local to its shard."""
    here = jnp.where(flag, tokens, vocab)  # out of bounds: dropped
    return jax.vmap(lambda ids: jnp.zeros(vocab, bool).at[ids].set(True, mode="drop"))(here)


class Kind(NamedTuple):
    """How a processor is made of the values of its option and of further ones, and what it does, in a line."""

    make: Callable[..., Processor]
    summary: str
    further: tuple[str, ...] = ()  # options that mean something only where this one is switched on


PROCESSORS: Registry[Kind] = Registry(
    "logits processor",
    no_repeat_ngram=Kind(no_repeat_ngram, "no n-gram twice (Paulus et al. 2017)"),
    bad_words=Kind(bad_words, "phrases, as tuples of token ids, that must not be written"),
    avoid=Kind(avoid, "phrases, given of each example, that must not be written"),
    min_length=Kind(min_length, "no end before this token"),
    language_mask=Kind(
        language_mask,
        "no tokens that the language to be written does not have, against the off-target outputs of Zhang et al. 2020",
    ),
    contrast=Kind(
        lambda against, *values: contrastive(*values),
        "away from what a weaker model says, contrast='model' (Li et al. 2023, O'Brien & Lewis 2023), or the model "
        "itself when told another language, 'language' (Sennrich et al. 2024)",
        ("contrast_alpha", "contrast_beta"),
    ),
    dola_layers=Kind(
        lambda layers, alpha: dola(alpha),
        "away from what the model would say after so many of its decoder layers (Chuang et al. 2024)",
        ("contrast_alpha",),
    ),
    repetition_penalty=Kind(repetition_penalty, "tokens already there become less probable (Keskar et al. 2019)"),
    language_bias=Kind(language_bias, "towards tokens that are frequent in the language to be written, by this weight"),
    temperature=Kind(temperature, "below 1 sharper, above 1 flatter (Ackley et al. 1985)"),
    top_k=Kind(top_k, "the k most probable tokens (Fan et al. 2018)"),
    top_p=Kind(top_p, "the most probable tokens that hold this mass (Holtzman et al. 2019)"),
    min_p=Kind(min_p, "tokens at least this share of the best (Nguyen et al. 2024)"),
    epsilon=Kind(epsilon, "tokens of at least this probability (Hewitt et al. 2022)"),
    eta=Kind(eta, "the same with a threshold that falls as the entropy grows (Hewitt et al. 2022)"),
    typical=Kind(typical, "tokens as surprising as the average one that hold this mass (Meister et al. 2022)"),
    mirostat=Kind(mirostat, "as many of the best as keep the surprise at so many bits a token (Basu et al. 2020)"),
)
