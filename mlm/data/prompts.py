"""Few-shot prompts: k examples before a query, in one text that a model goes on from or answers.

    pool = Pool([Example("the cat", "le chat"), Example("the dog", "le chien"), ...])
    shots = pool.choose("retrieved", "the dogs", 2)             # the nearest stands last, beside the query
    USUAL_FORM.fit(shots, "the dogs", budget=64, count=length)  # "the cat = le chat ; the dog = le chien ; the dogs ="

Where a prompt is longer than its budget, the example furthest from the query is dropped, and so on; none is ever cut.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mlm.registry import Registry

SOURCE, TARGET = "{source}", "{target}"
Count = Callable[[str], int]  # text -> tokens
Translate = Callable[[Sequence[str], str], Sequence[str]]  # texts, code of their language -> translations


class Example(NamedTuple):
    """What is asked, and its answer."""

    source: str
    target: str


@dataclass(frozen=True)
class Format:
    """example: how an example is written, with {source} and then {target} once each. separator: between examples.
    query: how the query is written, with {source}; None: as an example up to its target, spaces at the end dropped.

    The default is GPT-2's for translation (Radford et al. 2019), on one line, as spaces of any kind are read as one.
    Raises ValueError for a place that is missing or stands twice.
    """

    example: str = "{source} = {target}"
    separator: str = " ; "
    query: str | None = None

    def __post_init__(self):
        counts = self.example.count(SOURCE), self.example.count(TARGET)
        if counts != (1, 1) or self.example.index(SOURCE) > self.example.index(TARGET):
            raise ValueError(
                f"example={self.example!r} must hold {SOURCE} and behind it {TARGET}, once each, as "
                f"'{SOURCE} = {TARGET}'"
            )
        if self.asked.count(SOURCE) != 1 or TARGET in self.asked:
            raise ValueError(f"query={self.query!r} must hold {SOURCE} once and no {TARGET}, as '{SOURCE} ='")

    @property
    def asked(self) -> str:
        """How the query is written."""
        return self.example[: self.example.index(TARGET)].rstrip() if self.query is None else self.query

    def text(self, shots: Iterable[Example], query: str) -> str:
        """Examples in their order, then the query."""
        # Text that is put in is never searched for places: an example may well speak of {target}.
        before, rest = self.example.split(SOURCE)
        between, after = rest.split(TARGET)
        written = [f"{before}{shot.source}{between}{shot.target}{after}" for shot in shots]
        return self.separator.join([*written, query.join(self.asked.split(SOURCE))])

    def fit(self, shots: Sequence[Example], query: str, budget: int, count: Count) -> str:
        """The prompt of as many of the last shots as `budget` tokens hold. Raises ValueError where the query alone is
        longer.
        """
        for dropped in range(len(shots) + 1):
            text = self.text(shots[dropped:], query)
            if (tokens := count(text)) <= budget:
                return text
        raise ValueError(
            f"the query alone takes {tokens} tokens, more than the {budget} that there are: {query[:60]!r}; shorten it"
        )


USUAL_FORM = Format()


class Pool:
    """Examples to choose from, for many queries. Raises ValueError for a pool without any."""

    def __init__(self, examples: Iterable[Example]):
        self.examples = tuple(examples)
        if not self.examples:
            raise ValueError("there is no example to choose from; give at least one")
        self._places: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            self._places.setdefault(_spaced(example.source), []).append(index)

    def choose(self, choice: str, query: str, shots: int, *, seed: int = 0, query_id: int = 0) -> list[Example]:
        """Examples in the order in which they are to stand before the query. choice: of CHOICES.

        One whose source is the query itself is never among them: it would give the answer away. seed and query_id
        decide what "random" draws. Raises UnknownName for another choice, ValueError for more shots than examples.
        """
        pick = CHOICES[choice]
        if not 0 <= shots <= len(self.examples):
            raise ValueError(f"shots={shots} must be between 0 and the {len(self.examples)} examples there are")
        others = np.delete(np.arange(len(self.examples)), self._places.get(_spaced(query), []))
        chosen = pick(self, others, query, min(shots, len(others)), (seed, query_id))
        return [self.examples[i] for i in chosen]

    @cached_property
    def nearness(self) -> "Nearness":
        """Of queries to the sources."""
        return Nearness([example.source for example in self.examples])


Pick = Callable[[Pool, np.ndarray, str, int, tuple[int, int]], np.ndarray]


def _fixed(pool: Pool, others: np.ndarray, query: str, shots: int, key: tuple[int, int]) -> np.ndarray:
    return others[:shots]


def _retrieved(pool: Pool, others: np.ndarray, query: str, shots: int, key: tuple[int, int]) -> np.ndarray:
    order = np.argsort(-pool.nearness(query)[others], kind="stable")  # of equals the first
    return others[order[:shots]][::-1]


def _random(pool: Pool, others: np.ndarray, query: str, shots: int, key: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(key).choice(others, shots, replace=False)


CHOICES: Registry[Pick] = Registry("choice of shots", fixed=_fixed, retrieved=_retrieved, random=_random)


class Nearness:
    """Cosine of tf-idf vectors of character n-grams, 2 to 4 letters, of case-folded text between single spaces.

    Weight of n-gram g in text d of N: tf(g, d) · (1 + ln((1 + N) / (1 + df(g)))). Needs no words, so that it serves
    every script. A text without a known n-gram has cosine 0 with all.
    """

    def __init__(self, texts: Sequence[str], sizes: Sequence[int] = (2, 3, 4)):
        self._sizes, self._count = tuple(sizes), len(texts)
        counts = [self._grams(text) for text in texts]
        holders: dict[str, list[int]] = {}
        for index, found in enumerate(counts):
            for gram in found:
                holders.setdefault(gram, []).append(index)
        squares = np.zeros(len(texts))
        weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._idf = {gram: 1 + np.log((1 + len(texts)) / (1 + len(who))) for gram, who in holders.items()}
        for gram, who in holders.items():
            indices = np.array(who)
            values = np.array([counts[i][gram] for i in who]) * self._idf[gram]
            weights[gram] = indices, values
            squares[indices] += values**2
        lengths = np.sqrt(np.maximum(squares, 1e-30))
        self._weights = {gram: (who, values / lengths[who]) for gram, (who, values) in weights.items()}

    def __call__(self, query: str) -> np.ndarray:
        """float64 [texts]."""
        found = self._grams(query)
        rare = 1 + np.log(1 + self._count)  # of an n-gram that no text holds
        asked = {gram: count * self._idf.get(gram, rare) for gram, count in found.items()}
        scores = np.zeros(self._count)
        for gram in sorted(asked):
            if gram in self._weights:
                who, values = self._weights[gram]
                scores[who] += asked[gram] * values
        return scores / max(np.sqrt(sum(value**2 for value in asked.values())), 1e-15)

    def _grams(self, text: str) -> Counter[str]:
        text = f" {_spaced(text.casefold())} "
        return Counter(text[i : i + size] for size in self._sizes for i in range(len(text) - size + 1))


def synthesised(texts: Mapping[str, Sequence[str]], translate: Translate, *, backwards: bool = False) -> list[Example]:
    """Examples without labelled data: sentences of many languages, each beside the model's own translation of it.

    texts: code of a language -> sentences in it. translate: all into one language, as a session does it. The
    languages take turns, so that the first k examples are of as many languages as can be; a sentence whose translation
    is empty is left out. backwards: the translation is the source and the sentence the target, which is back-translated
    text for prompts into the sentence's language. Source: linguistically diverse prompts, Nguyen et al. 2023
    (arXiv:2306.11372).
    Raises ValueError where a translation is missing, or none has any text.
    """
    columns = []
    for code, sentences in texts.items():
        translations = list(translate(sentences, code))
        if len(translations) != len(sentences):
            raise ValueError(
                f"{code}: {len(translations)} translations of {len(sentences)} sentences; one each is needed"
            )
        pairs = zip(sentences, translations, strict=True)
        columns.append([Example(t, s) if backwards else Example(s, t) for s, t in pairs if t.strip()])
    found = [example for turn in itertools.zip_longest(*columns) for example in turn if example is not None]
    if not found:
        raise ValueError(f"no translation of {sum(map(len, texts.values()))} sentences has any text")
    return found


def _spaced(text: str) -> str:
    """Single spaces between words."""
    return " ".join(text.split())
