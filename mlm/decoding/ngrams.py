"""What follows two tokens: counted in a text beforehand, and in what a row holds so far."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from mlm.decoding.ranking import top_k
from mlm.types import PAD_ID

SEEN = 0.04  # what an occurrence in the row adds to a successor's probability in the table


class Trigrams(NamedTuple):
    """The best successors of two tokens, by the hash of the two. A collision costs a wrong guess and nothing more."""

    tokens: Int[Array, "H n"]  # -1: none
    shares: Float[Array, "H n"]  # P(token | the two)


def trigram_table(sequences: Iterable[Sequence[int]], buckets: int = 2**16, width: int = 12) -> Trigrams:
    """Counts of token triples -> the `width` most probable successors of each pair, ties to the lower id.

    Of pairs that share a bucket the one that occurs more often keeps it. Two padding ids stand before every sequence,
    so that its first token follows a pair, too. Source: Liu et al. 2024 (arXiv:2407.12021).
    """
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for sequence in sequences:
        padded = [PAD_ID, PAD_ID, *map(int, sequence)]
        for a, b, c in zip(padded, padded[1:], padded[2:], strict=False):
            counts[a, b][c] += 1
    tokens = np.full((buckets, width), -1, np.int32)
    shares = np.zeros((buckets, width), np.float32)
    rarest_first = sorted(counts.items(), key=lambda entry: entry[1].total())
    pairs = np.array([pair for pair, _ in rarest_first], np.uint32).reshape(-1, 2)
    for at, (_, following) in zip(_hash(pairs[:, 0], pairs[:, 1], buckets), rarest_first, strict=True):
        best = sorted(following.items(), key=lambda entry: (-entry[1], entry[0]))[:width]
        tokens[at], shares[at] = -1, 0.0
        tokens[at, : len(best)] = [token for token, _ in best]
        shares[at, : len(best)] = [count / following.total() for _, count in best]
    return Trigrams(jnp.asarray(tokens), jnp.asarray(shares))


def successors(
    table: Trigrams | None,
    text: Int[Array, "R N"],
    first: Int[Array, "R"],
    second: Int[Array, "R"],
    count: int,
) -> Int[Array, "R n"]:
    """The `count` best tokens behind two, best first; -1: no more are known.

    score(c) = P(c | first, second) in the table + SEEN · (occurrences of first, second, c in the text), at most 3.
    text: ids of the row, -1 where nothing stands.
    """
    here = (text[:, :-2] == first[:, None]) & (text[:, 1:-1] == second[:, None]) & (text[:, 2:] >= 0)
    tokens = jnp.where(here, text[:, 2:], -1)
    weights = jnp.where(tokens >= 0, SEEN, 0.0)
    if table is not None:
        at = _hash(first.astype(jnp.uint32), second.astype(jnp.uint32), table.tokens.shape[0])
        tokens = jnp.concatenate([table.tokens[at], tokens], axis=1)
        weights = jnp.concatenate([table.shares[at], weights], axis=1)
    same = tokens[:, :, None] == tokens[:, None, :]
    score = jnp.minimum(jnp.sum(jnp.where(same, weights[:, None, :], 0.0), axis=-1), 3.0)
    again = jnp.any(same & (jnp.arange(tokens.shape[1])[:, None] > jnp.arange(tokens.shape[1])), axis=-1)
    best, place = top_k(jnp.where(again | (tokens < 0), -1.0, score), count)
    found = jnp.where(best > 0, jnp.take_along_axis(tokens, place, axis=1), -1)
    return jnp.pad(found, ((0, 0), (0, count - found.shape[1])), constant_values=-1)


def _hash(first: UInt[Any, "n"], second: UInt[Any, "n"], buckets: int) -> UInt[Any, "n"]:
    return ((first * np.uint32(2654435761) ^ second * np.uint32(2246822519)) >> np.uint32(7)) % np.uint32(buckets)
