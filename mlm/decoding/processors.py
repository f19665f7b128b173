"""Processors: pure functions (logits [R, V], state) -> logits that reshape what a selector chooses from.

A forbidden token gets NEG_INF; the most probable one is never forbidden by a truncation. The model's own logits stay
beside the processed ones, so scores do not change. `PROCESSORS` maps a name (an option of `DecodeConfig`) to a factory
that takes that option's value, in the order in which they are applied.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlm.decoding.ranking import top_k as largest
from mlm.decoding.state import NEG_INF, Processor, State
from mlm.registry import Registry
from mlm.types import EOS_ID


def min_length(length: int) -> Processor:
    """Forbids EOS until it would be token number `length` of its row, prompt and EOS counted."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        early = state.length + 1 < length
        return jnp.where(early[:, None] & (jnp.arange(logits.shape[-1])[None] == EOS_ID), NEG_INF, logits)

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

    A token stays iff the tokens more probable than it hold less than `mass`. Probabilities are not negative, so their
    float32 bit patterns are ordered as they are: 31 halvings of that integer range find the threshold exactly, without
    a sort. Not idempotent: the next softmax renormalises what is kept. Source: Holtzman et al. 2019 (arXiv:1904.09751).
    """

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        probs = jax.nn.softmax(logits, axis=-1)

        def halve(_, bounds):  # invariant: mass above `low` reaches the target or low = -1; mass above `high` does not
            low, high = bounds
            middle = low + (high - low) // 2
            above = jnp.sum(jnp.where(_bits(probs) > middle, probs, 0.0), axis=-1, keepdims=True)
            return jnp.where(above < mass, low, middle), jnp.where(above < mass, middle, high)

        rows = (logits.shape[0], 1)
        top = _bits(jnp.max(probs, axis=-1, keepdims=True))  # nothing lies above it
        _, threshold = jax.lax.fori_loop(0, 31, halve, (jnp.full(rows, -1, jnp.int32), top))
        return jnp.where(_bits(probs) >= threshold, logits, NEG_INF)

    return process


def min_p(share: float) -> Processor:
    """Keeps tokens at least `share` times as probable as the best. Source: Nguyen et al. 2024 (arXiv:2407.01082)."""

    def process(logits: Float[Array, "R V"], state: State) -> Float[Array, "R V"]:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + math.log(share)
        return jnp.where(logits >= threshold, logits, NEG_INF)

    return process


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


PROCESSORS: Registry = Registry(
    "logits processor", min_length=min_length, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
)
