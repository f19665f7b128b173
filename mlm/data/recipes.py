"""Recipes: how records become examples, as one TensorFlow graph that all tasks of a kind share.

A task made from a recipe has one SeqIO preprocessor, `Units(recipe, language, …)`. Used by SeqIO it is an ordinary
preprocessor; used by the batch pipeline, hundreds of such tasks run through one traced graph, with the language and the
target's language token passed in as numbers. This is what keeps a mixture of hundreds of tasks quick to start: SeqIO
traces every preprocessor of every task, 60 ms a task, and fills a shuffle buffer for each.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlm.data.languages import language_id
from mlm.data.plans import PLANS
from mlm.data.preprocessors import clean
from mlm.data.rows import frame
from mlm.data.templates import FROM, PLACES, PLAIN, TO, Frame, Template
from mlm.data.tensorflow import seqio, tf
from mlm.data.vocabulary import Vocabulary
from mlm.types import PAD_ID

UNTOLD = Template()  # the text and its end, no language
THREADS = 2  # of the shared graphs; the order of their results does not depend on it


class Lengths(NamedTuple):
    """The longest example, in tokens with the end of sequence."""

    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """records: how many records make a unit; columns: their string features.

    examples(unit, seed, vocabulary, lengths, around) is graph code: unit holds each column as strings [records]; seed
    is int64 [2] for stateless random ops; around is what the template makes of the task's languages; returns ragged
    int32 tensors `inputs` and `targets` [examples, tokens]. template: that of a run takes its place (`in_template`).
    """

    name: str
    records: int
    columns: tuple[str, ...]
    examples: Callable[..., dict[str, tf.RaggedTensor]]
    template: Template = UNTOLD


@dataclasses.dataclass(frozen=True)
class Units:
    """The one preprocessor of a task made from a recipe.

    language: of the targets; inputs_language: of the inputs. columns: which column of the source is which column of the
    recipe, ((recipe's, source's), …). task: the number that SeqIO examples carry.
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

    def tokens(self, vocabulary: Vocabulary) -> dict[str, int]:
        """Ids of the language tokens that the template asks for: what differs between tasks of one recipe.

        Raises KeyError for a language that the vocabulary has no token for.
        """
        codes = {FROM: self.inputs_language, TO: self.language}
        return {name: vocabulary.language_token(codes[name]) for name in self.recipe.template.asks_for}

    def around(self, vocabulary: Vocabulary) -> Frame:
        """What stands around inputs and before targets. Raises KeyError as `tokens` does."""
        return self.recipe.template.ids(vocabulary, self.tokens(vocabulary))

    def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        assert self.output_features is not None, "SeqIO gives a task's features to its preprocessors"
        vocabulary = self.output_features["targets"].vocabulary
        lengths = lengths_of(self.sequence_length)
        around = self.around(vocabulary)
        language, inputs_language = self.language_ids

        @seqio.map_over_dataset(num_seeds=1)
        def process(unit, seed):
            examples = self.recipe.examples(unit, tf.cast(seed, tf.int64), vocabulary, lengths, around)
            count = examples["targets"].nrows()
            ids = {"language": language, "inputs_language": inputs_language, "task": self.task}
            ids["start"] = around.start or PAD_ID
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
    """The recipe as a function of many units at once: (their tasks' preprocessors, records by column, seeds) ->
    examples of each.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = THREADS
    options.experimental_optimization.apply_default_optimizations = False

    @tf.function(reduce_retracing=True)
    def graph(records, splits, tokens, seeds):
        def one(i):
            unit = {name: strings[splits[i] : splits[i + 1]] for name, strings in records.items()}
            around = recipe.template.ids(vocabulary, {name: values[i] for name, values in tokens.items()})
            return recipe.examples(unit, seeds[i], vocabulary, lengths, around)

        count = tf.shape(seeds, tf.int64)[0]
        dataset = tf.data.Dataset.range(count).map(one, num_parallel_calls=THREADS, deterministic=True)
        return dataset.ragged_batch(count).with_options(options).get_single_element()

    @functools.cache
    def tokens(units: Units) -> dict[str, int]:
        return units.tokens(vocabulary)

    def process(tasks, units, seeds):
        splits = np.cumsum([0, *(len(unit[recipe.columns[0]]) for unit in units)])
        records = {name: tf.constant([r for u in units for r in u[name]], tf.string) for name in recipe.columns}
        numbers = [tokens(task) for task in tasks]
        values = {name: tf.constant([n[name] for n in numbers], tf.int32) for name in numbers[0]}
        result = graph(records, tf.constant(splits), values, tf.constant(seeds, tf.int64))
        inputs, targets = _split(result["inputs"]), _split(result["targets"])
        examples = list(zip(inputs, targets, strict=True))
        ends = np.cumsum(result["targets"].row_lengths().numpy())
        return [examples[a:b] for a, b in itertools.pairwise([0, *ends])]

    return process


def _split(ragged: tf.RaggedTensor) -> list[np.ndarray]:
    """Tokens of each example of [units, examples, tokens]."""
    ends = ragged.values.row_splits.numpy().tolist()
    flat = ragged.flat_values.numpy()
    return [flat[a:b] for a, b in itertools.pairwise(ends)]


# Recipes.


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Text of one language, joined and cut into the pieces of a plan (mlm.data.plans), each piece hidden in part.

    options: the plan's own, ((name, value), …).
    """

    plan: str
    options: tuple[tuple[str, object], ...] = ()

    def fit(self, vocabulary: Vocabulary, lengths: Lengths, around: Frame = PLAIN):
        """The plan for what these lengths leave beside the tokens around. Raises ValueError when its targets do not
        fit.
        """
        inputs = lengths.inputs - (len(around.before) + len(around.after) - 1)
        return PLANS[self.plan](vocabulary, inputs, lengths.targets - len(around.prompt), **dict(self.options))

    def __call__(
        self, unit, seed, vocabulary: Vocabulary, lengths: Lengths, around: Frame
    ) -> dict[str, tf.RaggedTensor]:
        plan = self.fit(vocabulary, lengths, around)
        texts = clean(unit["text"])
        if not plan.eos:  # nothing marks the end of a document, so that a space must
            texts = tf.strings.reduce_join(texts, separator=" ")[None]
        spec = tf.RaggedTensorSpec([None], tf.int32, row_splits_dtype=tf.int64)
        documents = tf.map_fn(lambda text: encode(text, vocabulary), texts, fn_output_signature=spec)
        inputs, targets = plan.examples(plan.pieces(documents), seed, vocabulary, around)
        return {"inputs": inputs, "targets": targets}


def pair(unit, seed, vocabulary: Vocabulary, lengths: Lengths, around: Frame) -> dict[str, tf.RaggedTensor]:
    """The one example of a unit, as the template has it; none when a side is empty."""
    texts = [clean(unit[side][0]) for side in ("inputs", "targets")]
    count = tf.cast(tf.reduce_all([tf.strings.length(text) > 0 for text in texts]), tf.int64)
    rows = [encode(text, vocabulary) for text in texts]
    inputs, targets = (tf.RaggedTensor.from_row_lengths(row, [tf.size(row, tf.int64)]) for row in rows)
    return {
        "inputs": frame(inputs, lengths.inputs, around.before, around.after)[:count],
        "targets": frame(targets, lengths.targets, around.prompt)[:count],
    }


def encode(text: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
    """Tokens of one text."""
    return tf.cast(vocabulary.encode_tf(text), tf.int32)


def denoising(plan: str = "span_corruption", records: int = 32, **options) -> Recipe:
    """A recipe of the plan's name: joins `records` records of one language, hides parts of the text.

    >>> denoising("span_corruption", mean_span=20.0)      # ByT5's
    """
    PLANS[plan]  # raises KeyError with the nearest names
    return Recipe(plan, records, ("text",), Denoising(plan, tuple(sorted(options.items()))))


SPAN_CORRUPTION = denoising()
PAIR = ("inputs", "targets")
TRANSLATION = Recipe("translation", 1, PAIR, pair, PLACES["source"])
FORCED_TRANSLATION = Recipe("forced_translation", 1, PAIR, pair, PLACES["target"])
DOUBLY_TAGGED_TRANSLATION = Recipe("doubly_tagged_translation", 1, PAIR, pair, PLACES["both"])
REWRITING = Recipe("rewriting", 1, PAIR, pair)
