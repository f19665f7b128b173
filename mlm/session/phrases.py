"""Phrases given as texts, or as tokens: what a result must hold, may not hold, or ends behind."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm.data.preprocessors import clean_line
from mlm.decoding.buckets import Ints
from mlm.decoding.phrases import avoided, check_allowed, check_phrases, constraints
from mlm.session.language_control import by_language
from mlm.session.records import Source
from mlm.session.session import Session

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


def given_phrases(
    vocabulary: Any, phrases: Sequence[Sequence[Phrase]] | None, avoid: Sequence[Sequence[Phrase]] | None
) -> dict[str, np.ndarray]:
    """What a generator is `given`, of each text the phrases that its result must hold, and those that it may not."""
    told = {}
    if phrases is not None:
        told |= constraints([[tokens_of(vocabulary, phrase) for phrase in own] for own in phrases])
    if avoid is not None:
        told |= avoided([spellings(vocabulary, "avoid", own) for own in avoid])
    return told


def held(session: Session, phrases: Sequence[Phrase], source: Source, **options: Any) -> list[list[int]]:
    """The phrases as tokens. options: as `Session.ask` takes them. Raises ValueError for an empty phrase, and where no
    result of the source can hold all.
    """
    asked = session.ask([source], **options)
    tokens = [tokens_of(session.vocabulary, phrase) for phrase in phrases]
    config = asked.generator.config
    check_phrases(tokens, config.max_length - asked.skips[0], config)
    if config.language_mask:
        check_allowed(tokens, by_language(session, config, asked.languages)["language_mask"][0])
    return tokens
