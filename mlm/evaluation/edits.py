"""Grammatical error correction judged by its edits, without a parser.

    source      She go to school .        edits of the reference   (1, 2, "goes")
    reference   She goes to school .
    prediction  She goes to a school .    edits of the prediction  (1, 2, "goes"), (3, 3, "a")

Edits come from a Levenshtein alignment of words and marks, neighbouring ones merged. The definitions of precision,
recall and F0.5 are ERRANT's (Bryant et al. 2017); its merging rules by part of speech are left out, so the numbers are
not comparable with published ERRANT scores.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

BETA = 0.5  # a wrong correction costs more than a missed one


class Correction(NamedTuple):
    """A text before and after correction."""

    source: str
    text: str


class Edit(NamedTuple):
    """Source words start … end - 1 become `words`."""

    start: int
    end: int
    words: tuple[str, ...]


def edit_scores(references: Sequence[tuple[str, str]], predictions: Sequence[str]) -> dict[str, float]:
    """Percentages over the whole corpus. references: (source, corrected source).

    P = 100 when nothing wrong was changed, R = 100 when nothing was missed; F = (1 + β²) P R / (β² P + R), β = 0.5.
    """
    true = false = missed = 0
    for (source, reference), prediction in zip(references, predictions, strict=True):
        wanted, made = edits(source, reference), edits(source, prediction)
        true += len(wanted & made)
        false += len(made - wanted)
        missed += len(wanted - made)
    precision = true / (true + false) if false else 1.0
    recall = true / (true + missed) if missed else 1.0
    both = BETA**2 * precision + recall
    f = (1 + BETA**2) * precision * recall / both if both else 0.0
    return {"f0.5": 100 * f, "precision": 100 * precision, "recall": 100 * recall}


def edits(source: str, target: str) -> set[Edit]:
    """The edits that turn one text into the other, neighbouring ones merged."""
    a, b = words(source), words(target)
    found: list[Edit] = []
    for i, j in _steps(a, b):
        start, end, replacement = i[0], i[1], tuple(b[slice(*j)])
        if found and found[-1].end == start:
            found[-1] = Edit(found[-1].start, end, (*found[-1].words, *replacement))
        else:
            found.append(Edit(start, end, replacement))
    return set(found)


def words(text: str) -> list[str]:
    """Words with their combining marks and inner apostrophes, and single other signs."""
    return re.findall(r"\w[\w\u0300-\u036f'’ʼ-]*|[^\w\s]", text)


def _steps(a: list[str], b: list[str]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The unequal steps of one cheapest alignment: (span of a, span of b), from the left. Substitution comes first."""
    cost = [list(range(len(b) + 1))]  # cost[i][j]: from the first i words of a to the first j of b
    for i, word in enumerate(a, 1):
        row, above = [i], cost[-1]
        for j, other in enumerate(b, 1):
            row.append(min(above[j - 1] + (word != other), above[j] + 1, row[-1] + 1))
        cost.append(row)
    steps = []
    i, j = len(a), len(b)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (a[i - 1] != b[j - 1]):
            if a[i - 1] != b[j - 1]:
                steps.append(((i - 1, i), (j - 1, j)))
            i, j = i - 1, j - 1
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            steps.append(((i - 1, i), (j, j)))
            i -= 1
        else:
            steps.append(((i, i), (j - 1, j)))
            j -= 1
    return steps[::-1]
