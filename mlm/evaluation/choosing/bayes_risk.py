"""Minimum Bayes risk: the text of the highest expected utility, the model's own samples standing for the truth.

    y* = argmax_h Σ_r w_r u(h, r)

Where a model spreads its probability over many good texts, the most probable one may be a poor outlier that nothing
resembles; the consensus is not. Sources: Kumar & Byrne 2004; with samples, Eikema & Aziz 2020 (arXiv:2005.10283).
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

# (hypotheses, references) -> utility of each hypothesis where that reference is the truth
Utility = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "H R"]]


def expected_utilities(
    hypotheses: Sequence[str],
    references: Sequence[str],
    utility: Utility,
    weights: Float[np.ndarray, "R"] | None = None,
) -> Float[np.ndarray, "H"]:
    """Σ_r w_r u(h, r) of every hypothesis, in the utility's units. weights: default 1/R. Equal texts are compared once.

    Raises ValueError without references.
    """
    ours, place = distinct(hypotheses)
    theirs, weights = merged(references, weights)
    return (utility(ours, theirs) @ weights)[place]


def distinct(texts: Sequence[str]) -> tuple[list[str], Int[np.ndarray, "n"]]:
    """The different texts as they first come, and which of them each text is."""
    numbers: dict[str, int] = {}
    place = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return list(numbers), place


def merged(
    references: Sequence[str], weights: Float[np.ndarray, "R"] | None = None
) -> tuple[list[str], Float[np.ndarray, "r"]]:
    """The different references, each with the weights of its copies. weights: default 1/R."""
    if not references:
        raise ValueError("no references: expected utility is over at least one")
    weights = np.full(len(references), 1.0 / len(references)) if weights is None else weights
    texts, place = distinct(references)
    return texts, np.bincount(place, weights, minlength=len(texts))


def some(count: int, size: int, *, seed: int, example: int) -> Int[np.ndarray, "R"]:
    """Indices of `size` of `count` references, all where that many do not exist: sampled utility, H·R comparisons for
    H². The draw depends on the seed and the example's number alone.
    """
    if size >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, example]).choice(count, size, replace=False))
