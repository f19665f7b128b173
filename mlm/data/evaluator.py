"""SeqIO's Evaluator on the tasks of a run: its vocabulary, its lengths, and a quiet screen.

What the model does comes in as functions on token lists, so that nothing here knows a model. Predictions are decoded,
post-processed and handed to the task's own metric functions by SeqIO, as for every other SeqIO model.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlm.data.batching import Example, Packer
from mlm.data.once import SEED, examples_once
from mlm.data.readers import in_template
from mlm.data.recipes import Lengths, with_vocabulary
from mlm.data.registration import get, mixture_rates
from mlm.data.templates import Template
from mlm.data.tensorflow import seqio, tf
from mlm.data.vocabulary import Vocabulary

TokenLists = Sequence[np.ndarray]
Predict = Callable[[TokenLists, TokenLists], np.ndarray]  # sources, forced beginnings -> tokens [examples, length]
Score = Callable[[TokenLists, TokenLists], np.ndarray]  # sources, targets -> log P(target | source) [examples], nats


@dataclass(frozen=True)
class Outcome:
    """metrics: by name. predictions: decoded text of each example; empty when no metric needs any."""

    metrics: dict[str, float | str]
    predictions: list[str]


def task_names(name: str, split: str) -> list[str]:
    """The tasks of a mixture (or the task itself) that have the split, sorted.

    Raises KeyError with the nearest names for an unknown name, ValueError when no task has the split.
    """
    names = sorted(mixture_rates(name))
    found = [n for n in names if split in get(n).splits]
    if not found:
        known = sorted({s for n in names for s in get(n).splits})
        raise ValueError(f"no task of {name!r} has a split {split!r}; splits: {', '.join(known)}")
    return found


def read_examples(
    names: Sequence[str],
    vocabulary: Vocabulary,
    lengths: Lengths,
    split: str,
    num_examples: int | None = None,
    template: Template | None = None,
) -> Iterator[tuple[str, list[Example]]]:
    """(task, its examples): the same at every evaluation. num_examples: the first ones of each task; None: all.
    template: of a run that has its own.

    Raises ValueError for a task whose split holds no example.
    """
    for name, examples in examples_once(names, split, vocabulary, lengths, limit=num_examples, template=template):
        if not examples:
            raise ValueError(f"task {name!r} has no example in its {split} split")
        yield name, examples


def compute_metrics(
    name: str,
    vocabulary: Vocabulary,
    lengths: Lengths,
    *,
    predict: Predict,
    score: Score,
    split: str = "validation",
    num_examples: int | None = None,
    template: Template | None = None,
) -> Outcome:
    """The metrics of one task; none, and nothing decoded, for a task without metric functions. template: of a run that
    has its own.
    """
    task = with_vocabulary(in_template(get(name), template), vocabulary)
    if not task.metric_fns and not task.metric_objs:
        return Outcome({}, [])
    with _quiet(), _registered(task) as registered:
        evaluator = seqio.Evaluator(
            registered,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=split,
            seed=SEED,
            sequence_length=lengths._asdict(),
            num_examples=num_examples,
            async_compute_metrics=False,
        )
        kinds = seqio.metrics.ModelOutputType
        future, outputs = evaluator.evaluate(
            compute_metrics=True,
            predict_fn=lambda dataset: _predict(dataset, predict, vocabulary),
            score_fn=lambda dataset: _score(dataset, score),
        )
        tokens = outputs[registered].get(kinds.PREDICTION, [])
        return Outcome(
            {key: _plain(value) for key, value in future.result()[registered].items()},
            [vocabulary.decode(list(map(int, ids))) for ids in tokens],
        )


def predicts(name: str) -> bool:
    """Whether the task has metrics of decoded text."""
    return bool(get(name).predict_metric_fns)


def forced_beginning(targets: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The language token that a task's targets begin with, if they do: it tells the model which language to write, so
    the prediction begins with it too. Empty for all other targets.
    """
    opens = len(targets) and int(targets[0]) in vocabulary.language_tokens.values()
    return targets[: 1 if opens else 0]


def packed_batches(examples: Iterable[Example], lengths: Lengths, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The examples in rows, several to a row; every batch has `rows` rows, the last one filled up with padding."""
    packer = Packer(lengths.inputs, lengths.targets)
    for example in examples:
        packer.add(example)
        if len(packer.ready) >= rows:
            yield packer.take(rows)
    packer.flush()
    while packer.ready:
        batch = packer.take(rows)
        spare = rows - len(batch["decoder_target_tokens"])
        yield {name: np.pad(values, ((0, spare), (0, 0))) for name, values in batch.items()}


def _predict(dataset: tf.data.Dataset, predict: Predict, vocabulary: Vocabulary) -> list[tuple[int, np.ndarray]]:
    """Predictions without their forced beginnings, which the target's text does not have either."""
    indices, sources, targets = _read(dataset)
    prompts = [forced_beginning(target, vocabulary) for target in targets]
    tokens = predict(sources, prompts)
    skip = [len(prompt) for prompt in prompts]
    rows = [np.pad(row[n:], (0, n)) for row, n in zip(tokens, skip, strict=True)]
    return list(zip(indices, rows, strict=True))


def _score(dataset: tf.data.Dataset, score: Score) -> list[tuple[int, float]]:
    indices, sources, targets = _read(dataset)
    return list(zip(indices, map(float, score(sources, targets)), strict=True))


def _read(dataset: tf.data.Dataset) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Index, inputs and targets of each example, without padding."""
    indices, sources, targets = [], [], []
    for index, example in dataset.as_numpy_iterator():
        indices.append(int(index))
        sources.append(_unpadded(example["encoder_input_tokens"]))
        targets.append(_unpadded(example["decoder_target_tokens"]))
    return indices, sources, targets


def _unpadded(tokens: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(tokens)
    return tokens[: used[-1] + 1 if used.size else 0]


def _plain(value: Any) -> float | str:
    value = getattr(value, "value", value)  # a seqio.metrics.Scalar
    return value if isinstance(value, str) else float(value)


@contextmanager
def _registered(task: seqio.Task) -> Iterator[str]:
    """SeqIO's Evaluator finds tasks by name only, and measures every output feature, which must not be a scalar."""
    name = f"{task.name}.evaluated"
    features: Mapping[str, seqio.Feature] = {n: task.output_features[n] for n in ("inputs", "targets")}
    seqio.TaskRegistry.add_provider(name, task.replace(name=name, output_features=features))
    try:
        yield name
    finally:
        seqio.TaskRegistry.remove(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """SeqIO reports every step of an evaluation as a warning."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
