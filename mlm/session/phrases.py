"""Phrases given as texts, or as tokens: what a result must hold, may not hold, or ends behind."""

from collections.abc import Sequence
from typing import Any

from mlm.data.preprocessors import clean_line
from mlm.decoding.buckets import Ints

Phrase = str | Ints  # a text, or its tokens
LETTER = "◌"  # no vocabulary has a piece in which it is joined to what follows


def tokens_of(vocabulary: Any, phrase: Phrase) -> list[int]:
    """A phrase as tokens, spelled as at the beginning of a word. Raises ValueError for an empty text."""
    if not isinstance(phrase, str):
        return list(phrase)
    if not (tokens := vocabulary.encode(clean_line(phrase))):
        raise ValueError(f"the phrase {phrase!r} is empty: leave it out")
    return [int(token) for token in tokens]


def spellings(vocabulary: Any, name: str, phrases: Sequence[Phrase]) -> tuple[tuple[int, ...], ...]:
    """All phrases as tokens; a text both as at the beginning of a word and as behind other letters: "▁.", ".".

    Raises ValueError for an empty text, or a single one in the place of several; name: who wants them.
    """
    if isinstance(phrases, str):
        raise ValueError(f"{name}={phrases!r} must be a list of phrases: {name}=[{phrases!r}]")
    before = list(vocabulary.encode(LETTER))
    found: dict[tuple[int, ...], None] = {}  # a set that keeps its order
    for phrase in phrases:
        found[tuple(tokens_of(vocabulary, phrase))] = None
        if isinstance(phrase, str):
            behind = [int(token) for token in vocabulary.encode(LETTER + clean_line(phrase))]
            if behind[: len(before)] == before:
                found[tuple(behind[len(before) :])] = None
    return tuple(found)
