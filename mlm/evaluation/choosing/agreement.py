"""Self-consistency: many ways of reasoning, one answer. Source: Wang et al. 2023 (arXiv:2203.11171)."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float


def votes(answers: Sequence[Hashable | None]) -> Float[np.ndarray, "n"]:
    """Share of all n results that end in the answer of each; 0 for those without an answer (None).

    Where results stand best first, the first one with most votes is also the best of those that tie.
    """
    count = Counter(answer for answer in answers if answer is not None)
    return np.array([count[answer] / len(answers) if answer is not None else 0.0 for answer in answers])


def last_match(pattern: str) -> Callable[[str], str | None]:
    """Text -> the last match of a regular expression, or what its first group holds of it; None without a match.

    >>> last_match(r"answer is (\\d+)")("So the answer is 12.")
    '12'
    """
    found = re.compile(pattern)

    def answer(text: str) -> str | None:
        match = None
        for match in found.finditer(text):  # noqa: B007
            pass
        return None if match is None else match[1 if found.groups else 0]

    return answer
