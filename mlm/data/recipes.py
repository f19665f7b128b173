"""Recipes: how records become examples, as one TensorFlow graph that all tasks of a kind share.

A task made from a recipe has one SeqIO preprocessor, `Units(recipe, language, …)`. Used by SeqIO it is an ordinary preprocessor;
used by the batch pipeline, hundreds of such tasks run through one traced graph, with the language and the target's language token
passed in as numbers. This is what keeps a mixture of hundreds of tasks quick to start: SeqIO traces every preprocessor of every
task, 60 ms a task, and fills a shuffle buffer for each.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from mlm.data.languages import language_id
from mlm.data.noise import Denoise, Spans, full_text, hidden_with_sentinels, sentinels
from mlm.data.vocabulary import Vocabulary
from mlm.types import EOS_ID

THREADS = 2  # of the shared graphs; the order of their results does not depend on it


class Lengths(NamedTuple):
    """The longest example, in tokens with the end of sequence."""

    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """records: how many records make a unit; columns: their string features.

    examples(unit, seed, vocabulary, lengths) is graph code: unit holds each column as strings [records] and each constant as an
    int32 scalar; seed is int64 [2] for stateless random ops; returns ragged int32 tensors `inputs` and `targets` [examples, tokens].
    constants(units, vocabulary) gives the numbers that differ between tasks, such as language tokens.
    """

    name: str
    records: int
    columns: tuple[str, ...]
    examples: Callable[..., dict[str, tf.RaggedTensor]]
    constants: Callable[["Units", Vocabulary], dict[str, int]] = lambda units, vocabulary: {}


@dataclasses.dataclass(frozen=True)
class Units:
    """The one preprocessor of a task made from a recipe.

    language: of the targets; inputs_language: of the inputs. columns: which column of the source is which column of the recipe,
    ((recipe's, source's), …). task: the number that SeqIO examples carry.
    """

    recipe: Recipe
    language: str
    inputs_language: str
    columns: tuple[tuple[str, str], ...]
    task: int = 0
    sequence_length: Mapping[str, int] | None = dataclasses.field(default=None, compare=False)  # SeqIO fills in
    output_features: Mapping[str, seqio.Feature] | None = dataclasses.field(default=None, compare=False)  # these two

    @functools.cached_property
    def language_ids(self) -> tuple[int, int]:
        """Ids of the languages of targets and inputs."""
        return language_id(self.language), language_id(self.inputs_language)

    def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        vocabulary = self.output_features["targets"].vocabulary
        lengths = lengths_of(self.sequence_length)
        constants = {name: tf.constant(value) for name, value in self.recipe.constants(self, vocabulary).items()}
        language, inputs_language = self.language_ids

        @seqio.map_over_dataset(num_seeds=1)
        def process(unit, seed):
            examples = self.recipe.examples({**unit, **constants}, tf.cast(seed, tf.int64), vocabulary, lengths)
            count = examples["targets"].nrows()
            ids = {"language": language, "inputs_language": inputs_language, "task": self.task}
            examples |= {name: tf.fill([count], tf.constant(value, tf.int32)) for name, value in ids.items()}
            if self.recipe.records == 1:
                for name in self.recipe.columns:
                    examples[f"{name}_pretokenized"] = tf.repeat(unit[name], count)
            # Ragged tensors inside a dataset make TensorFlow print pages of type warnings; their parts do not.
            for name in ("inputs", "targets"):
                examples[name], examples[f"{name}_splits"] = examples[name].values, examples[name].row_splits
            return examples

        def separate(examples):
            splits = {name: examples.pop(f"{name}_splits") for name in ("inputs", "targets")}
            count = tf.cast(tf.shape(splits["targets"])[0] - 1, tf.int64)

            def take(i):
                cuts = {name: slice(splits[name][i], splits[name][i + 1]) for name in splits}
                return {name: value[cuts.get(name, i)] for name, value in examples.items()}

            return tf.data.Dataset.range(count).map(take)

        columns = dataset.map(lambda record: {name: record[column] for name, column in self.columns})
        return process(columns.batch(self.recipe.records)).flat_map(separate)


def lengths_of(sequence_length) -> Lengths:
    """SeqIO's sequence lengths. Raises ValueError when one is missing."""
    if not sequence_length or not {"inputs", "targets"} <= set(sequence_length):
        raise ValueError(
            f"sequence_length={sequence_length}: give the longest example in tokens, "
            "e.g. {'inputs': 512, 'targets': 114}; examples are cut to fit it"
        )
    return Lengths(sequence_length["inputs"], sequence_length["targets"])


def with_vocabulary(task: seqio.Task, vocabulary: Vocabulary) -> seqio.Task:
    """The task with another vocabulary for its inputs and targets, e.g. for SeqIO's `get_dataset` and `Evaluator`."""
    features = {
        name: dataclasses.replace(f, vocabulary=vocabulary) if name in ("inputs", "targets") else f
        for name, f in task.output_features.items()
    }
    return task.replace(output_features=features)


Tokens = tuple[np.ndarray, np.ndarray]  # inputs, targets
Process = Callable[[Sequence[Units], Sequence[dict[str, list[bytes]]], Sequence[tuple[int, int]]], list[list[Tokens]]]


@functools.lru_cache(maxsize=64)
def compile_recipe(recipe: Recipe, vocabulary: Vocabulary, lengths: Lengths) -> Process:
    """The recipe as a function of many units at once: (their tasks' preprocessors, records by column, seeds) -> examples of each."""
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = THREADS
    options.experimental_optimization.apply_default_optimizations = False

    @tf.function(reduce_retracing=True)
    def graph(records, splits, constants, seeds):
        def one(i):
            unit = {name: strings[splits[i] : splits[i + 1]] for name, strings in records.items()}
            unit |= {name: values[i] for name, values in constants.items()}
            return recipe.examples(unit, seeds[i], vocabulary, lengths)

        count = tf.shape(seeds, tf.int64)[0]
        dataset = tf.data.Dataset.range(count).map(one, num_parallel_calls=THREADS, deterministic=True)
        return dataset.ragged_batch(count).with_options(options).get_single_element()

    @functools.cache
    def constants(units: Units) -> dict[str, int]:
        return recipe.constants(units, vocabulary)

    def process(tasks, units, seeds):
        splits = np.cumsum([0, *(len(unit[recipe.columns[0]]) for unit in units)])
        records = {name: tf.constant([r for u in units for r in u[name]], tf.string) for name in recipe.columns}
        numbers = [constants(task) for task in tasks]
        values = {name: tf.constant([n[name] for n in numbers], tf.int32) for name in numbers[0]}
        result = graph(records, tf.constant(splits), values, tf.constant(seeds, tf.int64))
        inputs, targets = _split(result["inputs"]), _split(result["targets"])
        examples = list(zip(inputs, targets, strict=True))
        ends = np.cumsum(result["targets"].row_lengths().numpy())
        return [examples[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    return process


def _split(ragged: tf.RaggedTensor) -> list[np.ndarray]:
    """Tokens of each example of [units, examples, tokens]."""
    ends = ragged.values.row_splits.numpy().tolist()
    flat = ragged.flat_values.numpy()
    return [flat[a:b] for a, b in zip(ends, ends[1:], strict=False)]


# Recipes.


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Text of one language, joined with spaces, cut into pieces of `piece_length` tokens, each piece hidden in part by `noise`."""

    noise: Denoise

    def __call__(self, unit, seed, vocabulary: Vocabulary, lengths: Lengths) -> dict[str, tf.RaggedTensor]:
        length = piece_length(self.noise, lengths)
        tokens = tf.cast(vocabulary.encode_tf(tf.strings.reduce_join(unit["text"], separator=" ")), tf.int32)
        size = tf.size(tokens, tf.int64)
        splits = tf.concat([tf.range(0, size, length), [size]], 0)
        pieces = tf.RaggedTensor.from_row_splits(tokens, splits)
        inputs, targets = self.noise.graph(vocabulary)(pieces, seed)
        return {"inputs": finish(inputs, lengths.inputs), "targets": finish(targets, lengths.targets)}


@functools.cache
def piece_length(noise: Denoise, lengths: Lengths) -> int:
    """Tokens of text that fill `lengths` after the noise: for T5's spans 512 -> 568 and 114 targets, 1024 -> 1137 and 229."""
    if not isinstance(noise.mask, Spans):
        whole_text = lengths.targets if noise.targets is full_text else lengths.inputs
        return max(1, min(lengths.inputs, whole_text) - 2)  # room for the end of sequence and a prefix or an insertion

    def fits(length: int) -> bool:
        hidden = min(max(round(length * noise.mask.density), 1), length - 1)
        spans = noise.mask.spans(length)
        return length - hidden + spans < lengths.inputs and hidden + spans < lengths.targets

    length = 2
    while fits(length + 1):
        length += 1
    return length


def translate_tagged(unit, seed, vocabulary, lengths):
    """The source with the target's language token in front; the target as it is."""
    del seed
    source = tf.concat([[unit["language_token"]], encode(unit["inputs"], vocabulary)], 0)
    return single(source, encode(unit["targets"], vocabulary), lengths)


def rewrite(unit, seed, vocabulary, lengths):
    """The inputs as they are, the targets as they are."""
    del seed
    return single(encode(unit["inputs"], vocabulary), encode(unit["targets"], vocabulary), lengths)


def encode(records: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
    """Tokens of the one record of a unit."""
    return tf.cast(vocabulary.encode_tf(records[0]), tf.int32)


def single(inputs: tf.Tensor, targets: tf.Tensor, lengths: Lengths) -> dict[str, tf.RaggedTensor]:
    """The one example of a unit."""
    inputs, targets = (tf.RaggedTensor.from_row_lengths(x, [tf.size(x, tf.int64)]) for x in (inputs, targets))
    return {"inputs": finish(inputs, lengths.inputs), "targets": finish(targets, lengths.targets)}


def finish(tokens: tf.RaggedTensor, length: int) -> tf.RaggedTensor:
    """Each example cut to `length`, the end of sequence being its last token."""
    end = tf.RaggedTensor.from_uniform_row_length(tf.fill([tokens.nrows()], EOS_ID), tf.constant(1, tf.int64))
    return tf.concat([tokens.with_row_splits_dtype(tf.int64)[:, : length - 1], end], 1)


def target_language_token(units: Units, vocabulary: Vocabulary) -> dict[str, int]:
    return {"language_token": vocabulary.language_token(units.language)}


def denoising(name: str, noise: Denoise, records: int = 32) -> Recipe:
    """A recipe that joins `records` records of one language and hides parts of the text."""
    return Recipe(name, records, ("text",), Denoising(noise))


SPAN_CORRUPTION = denoising("span_corruption", Denoise(Spans(), sentinels, hidden_with_sentinels))
TRANSLATION = Recipe("translation", 1, ("inputs", "targets"), translate_tagged, target_language_token)
REWRITING = Recipe("rewriting", 1, ("inputs", "targets"), rewrite)
