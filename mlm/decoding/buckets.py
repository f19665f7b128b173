"""Few array shapes for many inputs: every new shape costs a compilation, every rounding costs padding."""

import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import NamedSharding

from mlm.types import EOS_ID, PAD_ID

Ints = Sequence[int] | np.ndarray
TokenLists = Sequence[Ints] | np.ndarray  # one sequence of tokens per example, of any lengths


def bucket(size: int, smallest: int = 8) -> int:
    """The next of smallest·{1, 1.5, 2, 3, 4, 6, 8, …}: at most a third of it is padding.

    >>> [bucket(n) for n in (1, 9, 13, 25, 100)]
    [8, 12, 16, 32, 128]
    """
    power = smallest
    while size > power:
        power *= 2
    middle = power * 3 // 4
    return middle if power > smallest and size <= middle and power % 4 == 0 else power


def pad(sequences: TokenLists, rows: int, width: int) -> np.ndarray:
    """int32 [rows, width]: one sequence per row, then PAD; a row that only fills up holds a lone EOS."""
    padded = np.full((rows, width), PAD_ID, np.int32)
    padded[len(sequences) :, 0] = EOS_ID
    for row, sequence in zip(padded, sequences, strict=False):
        row[: len(sequence)] = sequence
    return padded


def fill(values: Ints, rows: int, default: int) -> np.ndarray:
    """int32 [rows]: the values, then `default`."""
    return np.concatenate([np.asarray(values, np.int32), np.full(rows - len(values), default, np.int32)])


def shards(rows: NamedSharding | None) -> int:
    """Pieces into which a sharding cuts the first axis of an array; the number of rows must be a multiple of it."""
    if rows is None or not rows.spec or rows.spec[0] is None:
        return 1
    names = rows.spec[0] if isinstance(rows.spec[0], tuple) else (rows.spec[0],)
    return math.prod(rows.mesh.shape[name] for name in names)


def batches(lengths: Ints, batch_size: int) -> list[np.ndarray]:
    """Indices in groups of at most `batch_size`, similar lengths together, longest first (so memory fails at once)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def target_languages(languages: Ints | None, sources: int, known: int | None) -> np.ndarray | None:
    """Ids of the languages to be written, for a model that keeps something for each of `known` languages; None for
    every other model, which does not ask.

    Raises ValueError where such a model is not told, or is told an id that it does not have.
    """
    if known is None:
        return None
    if languages is None:
        raise ValueError(
            "this model is language-aware: say which language each source is to become, by languages=[ids], or in a "
            'session by to="fr"'
        )
    if len(languages) != sources:
        raise ValueError(f"{len(languages)} languages for {sources} sources: give one per source")
    ids = np.asarray(languages, np.int32)
    if ids.size and not (ids.min() >= 0 and ids.max() < known):
        raise ValueError(f"languages={ids.tolist()} must be ids of the model's {known}, from 0 to {known - 1}")
    return ids


def check_tokens(kind: str, sequences: TokenLists, vocab_size: int) -> None:
    """Raises ValueError for an empty sequence and for ids that the model has no row for."""
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"{kind} {index} is empty; it needs at least one token (EOS)")
        low, high = min(sequence), max(sequence)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{kind} {index} holds token {low if low < 0 else high}, outside the model's vocabulary of "
                f"{vocab_size}; was it made with another vocabulary?"
            )
