"""Phrases that each text must hold or must avoid, as the arrays that `Generator` is given: checked before compiling."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from mlm.decoding.buckets import Ints, TokenLists, bucket, check_tokens
from mlm.types import EOS_ID

if TYPE_CHECKING:
    from mlm.decoding.config import DecodeConfig

METHOD = "constrained_beam"


def constraints(phrases: Sequence[TokenLists]) -> dict[str, np.ndarray]:
    """What method="constrained_beam" is `given`: of each example the phrases, as token ids, that its text must hold.

    {"phrases": int32 [N, P, L]}, -1 beyond a phrase and behind the last; P and L of few sizes, so that little compiles.
    Raises ValueError for an empty phrase, or one with EOS, which ends a text.
    """
    return {"phrases": _table(phrases, right=False)}


def avoided(phrases: Sequence[TokenLists]) -> dict[str, np.ndarray]:
    """What avoid=True is `given`: of each example the phrases that its text may not hold. Raises as `constraints`."""
    return {"avoid": _table(phrases, right=True)}


def aligned(phrases: TokenLists, rows: int, width: int, *, right: bool) -> Int[np.ndarray, "P L"]:
    """One phrase a row, -1 before or behind it."""
    table = np.full((rows, width), -1, np.int32)
    for row, phrase in zip(table, phrases, strict=False):
        start = width - len(phrase) if right else 0
        row[start : start + len(phrase)] = phrase
    return table


def check_phrases(phrases: TokenLists, room: int, config: "DecodeConfig", avoid: TokenLists = ()) -> None:
    """Raises ValueError where a text of `room` tokens at most cannot hold them all, or other rules forbid one."""
    tokens = sum(map(len, phrases))
    if tokens + 1 > room:
        raise ValueError(
            f"its phrases have {tokens} tokens, which with EOS make {tokens + 1}, and its text may have {room}: give "
            "fewer or shorter ones, or raise max_length"
        )
    for rule, others in (("avoid", avoid), ("bad_words", config.bad_words), ("stop", config.stop)):
        for phrase in phrases:
            for other in others:
                # A text may end with a stop sequence, and so with a phrase that ends with one.
                if _holds(phrase[:-1] if rule == "stop" else phrase, other):
                    raise ValueError(
                        f"its phrase {list(phrase)} holds {list(other)}, which {rule} rules out: drop one of the two"
                    )


def check_given(config: "DecodeConfig", given: Mapping[str, np.ndarray], rooms: Ints, vocab_size: int) -> None:
    """Raises ValueError for phrases that are missing, read by nobody, out of the vocabulary or impossible to hold.

    rooms: tokens that each text may have, prompts not counted.
    """
    for name, wanted, how in (
        ("phrases", config.method == METHOD, f"method={METHOD!r} and given=constraints(…)"),
        ("avoid", config.avoid, "avoid=True and given=avoided(…)"),
    ):
        if wanted != (name in given):
            raise ValueError(f"{how} belong together: give both, or neither")
        for index, table in enumerate(given.get(name, ())):
            check_tokens(f"{name} of source {index}: phrase", lists(table), vocab_size)
    for index, table in enumerate(given.get("phrases", ())):
        avoid = lists(given["avoid"][index]) if config.avoid else []
        try:
            check_phrases(lists(table), int(rooms[index]), config, avoid)
            if "language_mask" in given:
                check_allowed(lists(table), given["language_mask"][index])
        except ValueError as error:
            raise ValueError(f"source {index}: {error}") from None


def check_allowed(phrases: TokenLists, allowed: np.ndarray) -> None:
    """Raises ValueError for phrases that hold a token which the mask of their language forbids."""
    if ruled_out := [int(token) for phrase in phrases for token in phrase if not allowed[token]]:
        raise ValueError(f"its phrases hold tokens {ruled_out}, which language_mask rules out: drop one of the two")


def stop_size(tokens: Ints, stop: TokenLists) -> int:
    """Tokens of the longest stop sequence that what was written ends with; 0 where it ends with none."""
    tokens = list(tokens)
    return max((len(phrase) for phrase in stop if tokens[-len(phrase) :] == list(phrase)), default=0)


def lists(table: Int[np.ndarray, "P L"]) -> list[list[int]]:
    """The phrases of one example."""
    return [row[row >= 0].tolist() for row in table if (row >= 0).any()]


def _table(phrases: Sequence[TokenLists], right: bool) -> Int[np.ndarray, "N P L"]:
    for index, own in enumerate(phrases):
        for number, phrase in enumerate(own):
            if not len(phrase) or EOS_ID in phrase or min(phrase) < 0:
                raise ValueError(
                    f"source {index}: phrase {number} is {list(phrase)}; a phrase is one token id or more, each at "
                    f"least 0 and none of them EOS ({EOS_ID}): leave it out"
                )
    rows = bucket(max(map(len, phrases), default=1), 2)
    width = bucket(max((len(phrase) for own in phrases for phrase in own), default=1), 4)
    return np.array([aligned(own, rows, width, right=right) for own in phrases], np.int32).reshape(-1, rows, width)


def _holds(phrase: Ints, other: Ints) -> bool:
    size = len(other)
    return any(list(phrase[i : i + size]) == list(other) for i in range(len(phrase) - size + 1))
