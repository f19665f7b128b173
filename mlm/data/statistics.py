"""How much text a mixture has, what a budget makes of it, and what a task's examples look like.

Sizes are counted once and kept in $XDG_CACHE_HOME/mlm/statistics.json, under a hash of the text itself (and of the
vocabulary): a changed corpus is counted anew, and a damaged file too.
"""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm.data.batching import Example
from mlm.data.languages import LANGUAGES
from mlm.data.readers import fetch, is_unit_task, make_reader
from mlm.data.recipes import Denoising, Lengths
from mlm.data.registration import default_vocabulary, get, mixture_rates, owner
from mlm.data.sources import Counts, TableSource
from mlm.data.tensorflow import seqio
from mlm.data.vocabulary import ByteVocabulary, Vocabulary

LENGTHS = Lengths(512, 114)  # of T5's pretraining

# Sizes.


def task_counts(name: str, split: str = "train", vocabulary: Vocabulary | None = None) -> Counts:
    """Records, characters, bytes and tokens of a task's text, all columns it reads together; a field is 0 where it is
    not known.

    Tokens without special ones, by `vocabulary`; None: not counted. Published datasets report what their table says.
    """
    task = get(name)
    if not (is_unit_task(task) and isinstance(task.source, TableSource)):
        return getattr(task.source, "counts", {}).get(split, Counts())
    table = task.source.table(split)
    columns = [table[column] for _, column in task.preprocessors[0].columns]
    parts = [_column_counts(column, vocabulary) for column in columns]
    return Counts(
        len(columns[0]),
        sum(part.characters for part in parts),
        sum(part.bytes for part in parts),
        sum(part.tokens for part in parts),
    )


def pass_tokens(name: str, vocabulary: Vocabulary, split: str = "train") -> dict[int, int]:
    """Language id -> tokens of one pass over a mixture's text, each column counted for the language it is in.

    Text that several tasks read counts for each of them. Published datasets count as their table says; languages of
    unknown size are left out.
    """
    found: dict[int, int] = {}
    for task_name in mixture_rates(name):
        task = get(task_name)
        if not is_unit_task(task):
            continue
        units = task.preprocessors[0]
        target, source = units.language_ids
        if isinstance(task.source, TableSource):
            table = task.source.table(split)
            sizes = [
                (source if side == "inputs" else target, _column_counts(table[column], vocabulary).tokens)
                for side, column in units.columns
            ]
        else:
            sizes = [(target, task_counts(task_name, split).tokens)]
        for language, tokens in sizes:
            if tokens:
                found[language] = found.get(language, 0) + tokens
    _cache().save()
    return found


def _column_counts(texts: Sequence[bytes], vocabulary: Vocabulary | None) -> Counts:
    cache = _cache()
    key = _hash(texts)
    if key not in cache.sizes:
        cache.add(key, [len(texts), sum(len(t.decode()) for t in texts), sum(map(len, texts))])
    tokens = 0
    if vocabulary is not None:
        key_tokens = f"{key}:{vocabulary.digest[:16]}"
        if key_tokens not in cache.sizes:
            cache.add(key_tokens, [_count_tokens(texts, vocabulary)])
        (tokens,) = cache.sizes[key_tokens]
    examples, characters, size = cache.sizes[key]
    return Counts(examples, characters, size, tokens)


def _count_tokens(texts: Sequence[bytes], vocabulary: Vocabulary) -> int:
    if isinstance(vocabulary, ByteVocabulary):
        return sum(map(len, texts))
    return sum(map(len, vocabulary.tokenizer.EncodeAsIds([t.decode() for t in texts])))


def _hash(texts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(text + b"\n")
    return digest.hexdigest()


class _Cache:
    """A dict that lives in a small JSON file. Written at once or not at all; other processes' entries are kept."""

    def __init__(self, path: Path):
        self.path = path
        self.sizes: dict[str, list[int]] = self._load()
        self._new: dict[str, list[int]] = {}

    def add(self, key: str, sizes: list[int]) -> None:
        self.sizes[key] = self._new[key] = sizes

    def save(self) -> None:
        if not self._new:
            return
        self.sizes = {**self._load(), **self._new}
        self._new = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self.sizes, file)
            os.replace(file.name, self.path)
        except OSError:
            pass  # a read-only home costs time, not correctness

    def _load(self) -> dict[str, list[int]]:
        try:
            return {str(k): [int(x) for x in v] for k, v in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


def _cache() -> _Cache:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return _open_cache(Path(home) / "mlm" / "statistics.json")


@functools.cache
def _open_cache(path: Path) -> _Cache:
    return _Cache(path)


# Mixtures.


class MixtureRow(NamedTuple):
    """One language (or task) of a mixture. rate: share of the examples drawn. The rest is expected at the budget."""

    name: str  # language code, or task
    title: str  # the language's English name
    script: str
    tasks: int
    examples: int
    characters: int
    tokens: int
    rate: float
    expected_tokens: float  # of text, read during the run
    epochs: float  # how often each token of the text is read; nan where the number of tokens is not known


def mixture_table(
    name: str,
    budget: float,
    vocabulary: Vocabulary | None = None,
    lengths: Lengths = LENGTHS,
    split: str = "train",
    by_task: bool = False,
) -> list[MixtureRow]:
    """What `budget` tokens of text make of a mixture, for each language, largest rate first.

    A task's share of the tokens is its rate times the text tokens of its examples: a whole piece for denoising, the
    mean pair for translation. vocabulary: None counts bytes. by_task: a row for each task instead.
    """
    vocabulary = vocabulary or default_vocabulary()
    rates = mixture_rates(name)
    counts = {task: task_counts(task, split, vocabulary) for task in rates}
    _cache().save()
    weights = {
        task: rate * _tokens_per_example(task, counts[task], vocabulary, lengths) for task, rate in rates.items()
    }
    total = sum(weights.values()) or 1.0
    groups: dict[str, list[str]] = {}
    for task in rates:
        groups.setdefault(task if by_task else owner(get(task)), []).append(task)
    codes = {record.code: record for record in LANGUAGES}
    rows = []
    for group, tasks in groups.items():
        record = codes.get(owner(get(tasks[0])))
        tokens = sum(counts[task].tokens for task in tasks)
        expected = budget * sum(weights[task] for task in tasks) / total
        rows.append(
            MixtureRow(
                group,
                record.name if record else "",
                record.script if record else "",
                len(tasks),
                sum(counts[task].examples for task in tasks),
                sum(counts[task].characters for task in tasks),
                tokens,
                sum(rates[task] for task in tasks),
                expected,
                expected / tokens if tokens else float("nan"),
            )
        )
    return sorted(rows, key=lambda row: (-row.rate, row.name))


def _tokens_per_example(name: str, counts: Counts, vocabulary: Vocabulary, lengths: Lengths) -> float:
    task = get(name)
    if is_unit_task(task) and isinstance(task.preprocessors[0].recipe.examples, Denoising):
        rule = task.preprocessors[0].recipe.examples
        piece = rule.fit(vocabulary, lengths).length
        return float(min(piece, counts.tokens) if counts.tokens else piece)
    if counts.examples and counts.tokens:
        return min(counts.tokens / counts.examples, sum(lengths))
    return float(sum(lengths))


# Tasks.


class TaskView(NamedTuple):
    """What a task gives. shown: (inputs, targets) as text, special tokens readable. lengths in tokens, end of sequence
    counted.
    """

    name: str
    examples: list[Example]
    shown: list[tuple[str, str]]
    inputs_percentiles: dict[int, int]  # 5, 25, 50, 75, 95, 100 -> tokens
    targets_percentiles: dict[int, int]
    per_second: float  # examples, on this machine, after the first ones
    counts: Counts


def inspect_task(
    name: str,
    split: str = "train",
    vocabulary: Vocabulary | None = None,
    lengths: Lengths = LENGTHS,
    show: int = 5,
    sample: int = 200,
    seed: int = 0,
) -> TaskView:
    """The first examples of a task as training would see them, and figures from `sample` of them."""
    vocabulary = vocabulary or default_vocabulary()
    task = get(name)
    if not isinstance(task, seqio.Task):
        raise ValueError(f"{name!r} is a mixture; its tasks: {', '.join(sorted(mixture_rates(name))[:10])}, …")
    reader = make_reader(task, 1, split, 0, 1, seed, lengths, vocabulary)
    fetch([reader], [show], vocabulary, lengths)  # traces the graph
    examples = [reader.pop() for _ in range(len(reader.ready))]
    start = time.perf_counter()
    fetch([reader], [sample], vocabulary, lengths)
    made = len(reader.ready)
    seconds = time.perf_counter() - start
    examples += [reader.pop() for _ in range(made)]
    counts = task_counts(name, split, vocabulary)
    _cache().save()
    return TaskView(
        name,
        examples,
        [(vocabulary.decode(e.inputs.tolist()), vocabulary.decode(e.targets.tolist())) for e in examples[:show]],
        _percentiles([len(e.inputs) for e in examples]),
        _percentiles([len(e.targets) for e in examples]),
        made / seconds,
        counts,
    )


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    points = (5, 25, 50, 75, 95, 100)
    return dict(zip(points, np.percentile(lengths, points, method="nearest").astype(int).tolist(), strict=True))
