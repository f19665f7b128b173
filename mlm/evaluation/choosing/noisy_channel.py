"""Noisy-channel reranking: a good result explains its source and reads well of itself.

    log p(y|x) / |y|  +  l₁ log p(x|y) / |x|  +  l₂ log p(y) / |y|  +  l₃ |y|

A direct model may write what fits every source; from such a text the source cannot be told. Sources: Yee et al. 2019
(arXiv:1908.05731); Tran et al. 2021 (WMT21, arXiv:2108.03265).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Parts(NamedTuple):
    """What is known of the n results of one source; log-probabilities in nats."""

    direct: Float[np.ndarray, "n"]  # log p(y|x)
    channel: Float[np.ndarray, "n"]  # log p(x|y)
    language_model: Float[np.ndarray, "n"]  # log p(y)
    lengths: Int[np.ndarray, "n"]  # |y|, tokens
    source_length: int  # |x|, tokens


class Weights(NamedTuple):
    """l₁, l₂ and l₃; all 0 rank by the direct model alone."""

    channel: float = 0.0
    language_model: float = 0.0
    length: float = 0.0


HIGHEST = Weights(2.0, 2.0, 0.2)  # what is tried


def channel_scores(parts: Parts, weights: Weights) -> Float[np.ndarray, "n"]:
    """The formula above for every result, in nats a token."""
    return (
        parts.direct / parts.lengths
        + weights.channel * parts.channel / parts.source_length
        + weights.language_model * parts.language_model / parts.lengths
        + weights.length * parts.lengths
    )


def tuned(
    examples: Sequence[Parts],
    score: Callable[[list[int]], float],
    *,
    highest: Weights = HIGHEST,
    trials: int = 200,
    seed: int = 0,
) -> tuple[Weights, float]:
    """(weights, score) of the best of random weights below `highest`, the earliest of equals; the direct model's own
    order is the first trial, so that none is worse on these examples.

    score: which result is taken of each example -> a metric over all, the higher the better.
    Raises ValueError without examples or trials.
    """
    if not examples or trials < 1:
        raise ValueError(f"{len(examples)} examples and trials={trials}: tuning takes at least one of each")
    draws = np.random.default_rng(seed).uniform(0.0, highest, (trials - 1, len(highest)))
    known: dict[tuple[int, ...], float] = {}  # many weights take the same results
    best, reached = Weights(), -np.inf
    for weights in [Weights(), *(Weights(*map(float, draw)) for draw in draws)]:
        taken = [int(np.argmax(channel_scores(parts, weights))) for parts in examples]
        found = known.setdefault(tuple(taken), np.nan)
        if np.isnan(found):
            found = known[tuple(taken)] = score(taken)
        if found > reached:
            best, reached = weights, found
    return best, reached
