"""From records of text to examples, for the `preprocessors=` of a SeqIO task.

    plain text   [partial(tokens, key="text"), partial(denoise, plan="span_corruption", language="fr", task=7)]
    pairs        [partial(translation, source="english", target="other", languages=("en", "fr"), task=8)]

An example is {"inputs": int32 [n], "targets": int32 [m], "language": int32, "task": int32}: trimmed to the task's
lengths, the end of sequence as its last token. Text-to-text examples also carry their texts, as `inputs_pretokenized`,
`targets_pretokenized`.

A `map` costs milliseconds to build and a mixture has hundreds of pipelines: a preprocessor does its work in one map,
and heavy work is a graph that all tasks share. Maps run in the thread that reads the task; SeqIO prefetches every task
in a thread of its own. Random numbers are functions of (seed of the dataset, place of the example in the stream, task):
the same seed gives the same noise, and the next epoch gives other noise.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from mlm.data.languages import language, language_id
from mlm.data.plans import PLANS, Plan
from mlm.data.tensorflow import seqio, tensorflow_text, tf
from mlm.data.vocabulary import Vocabulary
from mlm.registry import Registry
from mlm.types import EOS_ID

Dataset: TypeAlias = tf.data.Dataset
Features: TypeAlias = Mapping[str, seqio.Feature]
Lengths: TypeAlias = Mapping[str, int] | None

# --- Plain text
# ---------------------------------------------------------------------------------------------------------


def tokens(dataset: Dataset, output_features: Features, *, key: str = "text", eos: bool = False) -> Dataset:
    """{key: text, …} -> int32 [n], one document each, cleaned; empty documents are dropped.

    eos: end each document with </s> before documents are joined (causal language models; span corruption does without).
    """
    encode = _encoder(_vocabulary(output_features, "targets"))

    def read(record: dict) -> tf.Tensor:
        ids = encode(record[key])
        return tf.concat([ids, [EOS_ID]], 0) if eos else ids

    return dataset.map(read).filter(lambda ids: tf.size(ids) > eos)


def random_chunk(dataset: Dataset, *, length: int = 65_536) -> Dataset:
    """At most `length` tokens of each document, from a random place: no document outweighs the others."""

    def chunk(ids: tf.Tensor, seed: Sequence[tf.Tensor]) -> tf.Tensor:
        spare = tf.maximum(tf.size(ids) - length, 0)
        start = tf.random.stateless_uniform([], _pair(seed), 0, spare + 1, tf.int32)
        return ids[start : start + length]

    return seqio.map_over_dataset(chunk, num_seeds=1, num_parallel_calls=None)(dataset)


def denoise(
    dataset: Dataset,
    sequence_length: Lengths,
    output_features: Features,
    *,
    plan: str | Callable[..., Plan] = "span_corruption",
    language: str | None = None,
    task: int | None = None,
    **options,
) -> Dataset:
    """Documents int32 [n], joined and cut into pieces, noised by a plan -> examples.

    Pieces are made inside one task, so no piece mixes languages; only the very last one may be short. plan: a name of
    PLANS, or a function like those; options: its own (density, mean_span, …). language, task: ids to add, None to add
    none.
    Raises KeyError for an unknown plan or language, ValueError when the plan does not fit the lengths or the
    vocabulary.
    """
    vocabulary = _vocabulary(output_features, "targets")
    make = PLANS[plan] if isinstance(plan, str) else plan
    chosen = make(vocabulary, *_lengths(sequence_length), **options)
    corrupt = _corrupt(chosen, vocabulary)
    ids = _ids(language, task)

    def one(piece: tf.Tensor, seed: Sequence[tf.Tensor]) -> dict:
        inputs, targets = corrupt(piece, _pair(seed, task))
        return {"inputs": inputs, "targets": targets, **ids()}

    pieces = dataset.rebatch(chosen.length)
    return seqio.map_over_dataset(one, num_seeds=1, num_parallel_calls=None)(pieces)


# --- Text to text
# -------------------------------------------------------------------------------------------------------


def text_to_text(
    dataset: Dataset,
    sequence_length: Lengths,
    output_features: Features,
    *,
    inputs: str,
    targets: str,
    prefix: str = "",
    inputs_tokens: Sequence[str] = (),
    targets_tokens: Sequence[str] = (),
    language: str | None = None,
    task: int | None = None,
) -> Dataset:
    """{inputs: text, targets: text, …} -> examples: correction, copying, any task. An empty side drops the record.

    inputs, targets: keys of the record; the same key for both makes the model copy. prefix: text before the inputs
    ("correct: "). inputs_tokens, targets_tokens: special tokens that come first, by name ("<2fr>", "[S]"). What is too
    long is cut at its end; special tokens and </s> stay.
    Raises KeyError for a token that the vocabulary does not have.
    """
    vocabularies = {side: _vocabulary(output_features, side) for side in ("inputs", "targets")}
    first = {"inputs": tuple(map(vocabularies["inputs"].special, inputs_tokens))}
    first["targets"] = tuple(map(vocabularies["targets"].special, targets_tokens))
    lengths = dict(zip(("inputs", "targets"), _lengths(sequence_length), strict=True))
    encode = {side: _text_to_row(vocabularies[side], first[side], lengths[side]) for side in lengths}
    ids = _ids(language, task)

    def read(record: dict) -> dict:
        source, target = clean(record[inputs]), clean(record[targets])
        example = {"inputs_pretokenized": prefix + source if prefix else source, "targets_pretokenized": target}
        example |= {side: encode[side](example[f"{side}_pretokenized"]) for side in lengths}
        return {**example, **ids()} | {"filled": (tf.strings.length(source) > 0) & (tf.strings.length(target) > 0)}

    filled = dataset.map(read).filter(lambda example: example["filled"])
    return filled.map(lambda example: {name: x for name, x in example.items() if name != "filled"})


def translation(
    dataset: Dataset,
    sequence_length: Lengths,
    output_features: Features,
    *,
    source: str,
    target: str,
    languages: tuple[str, str],
    token: str = "source",
    task: int | None = None,
) -> Dataset:
    """{source: text, target: text, …} -> examples whose language is the target's.

    languages: codes of (source, target). token says who tells the model which language to write (TOKENS): "source" puts
    `<2target>` before the inputs, "target" makes it the first target, which decoding then forces, "both" puts
    `<2source>` before the inputs and `<2target>` first in the targets, "none" leaves it to the text. Sources: Johnson
    et al. 2017; NLLB Team 2022 for "both".
    """
    places = TOKENS[token]
    vocabulary = _vocabulary(output_features, "targets")
    names = {name: f"<2{language(code).code}>" for name, code in zip(("source", "target"), languages, strict=True)}
    for name in {n for n in places if n}:
        vocabulary.language_token(languages[name == "target"])  # an error that names the language
    first = [(names[place],) if place else () for place in places]
    return text_to_text(
        dataset, sequence_length, output_features, inputs=source, targets=target, inputs_tokens=first[0],
        targets_tokens=first[1], language=languages[1], task=task,
    )  # fmt: skip


# Which language token comes first in (inputs, targets).
TOKENS: Registry[tuple[str, str]] = Registry(
    "place of the language token",
    source=("target", ""),
    target=("", "target"),
    both=("source", "target"),
    none=("", ""),
)

# --- Text itself
# --------------------------------------------------------------------------------------------------------

# Every space and control character of Unicode, and the byte order mark; joiners (U+200C, U+200D) are letters in many
# scripts.
_SPACES_TF = r"[\s\p{Z}\p{Cc}\x{FEFF}]+"
_SPACES = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff]+")


def clean(text: tf.Tensor) -> tf.Tensor:
    """Texts in Unicode NFC, each run of spaces, line ends and control characters one space, none at the ends. Any
    shape.
    """
    return tf.strings.strip(tf.strings.regex_replace(tensorflow_text.normalize_utf8(text, "NFC"), _SPACES_TF, " "))


def clean_line(text: str) -> str:
    """`clean` for one Python string."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def clean_text(dataset: Dataset, *, keys: Sequence[str]) -> Dataset:
    """Records with the texts under `keys` cleaned; a record with an empty one is dropped. The others above clean for
    themselves.
    """
    cleaned = dataset.map(lambda record: record | {key: clean(record[key]) for key in keys})
    return cleaned.filter(lambda record: tf.reduce_all([tf.strings.length(record[key]) > 0 for key in keys]))


def add_ids(dataset: Dataset, *, language: str, task: int) -> Dataset:
    """Examples with the ids of their language and task, int32, for pipelines of other preprocessors."""
    ids = _ids(language, task)
    return dataset.map(lambda example: example | ids())


# --- Shared graphs and checks
# -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _encoder(vocabulary: Vocabulary) -> Callable:
    # text [] -> int32 [n], cleaned
    signature = [tf.TensorSpec([], tf.string)]
    return tf.function(lambda text: vocabulary.encode_tf(clean(text)), signature, autograph=False)


@functools.lru_cache(maxsize=1024)
def _text_to_row(vocabulary: Vocabulary, first: tuple[int, ...], length: int) -> Callable:
    # text [] -> int32 [n]: `first`, the text cut to fit, </s>
    room = length - len(first) - 1
    if room < 1:
        raise ValueError(
            f"a length of {length} tokens has no room for text beside {len(first)} special tokens and </s>"
        )

    def encode(text: tf.Tensor) -> tf.Tensor:
        return tf.concat([tf.constant(first, tf.int32), vocabulary.encode_tf(text)[:room], [EOS_ID]], 0)

    return encode


@functools.lru_cache(maxsize=256)
def _corrupt(plan: Plan, vocabulary: Vocabulary) -> Callable:
    # piece int32 [n], seed int64 [2] -> inputs, targets
    def corrupt(piece: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        inputs, targets = plan.examples(tf.RaggedTensor.from_tensor(piece[None]), seed, vocabulary)
        return inputs.values, targets.values

    return tf.function(corrupt, [tf.TensorSpec([None], tf.int32), tf.TensorSpec([2], tf.int64)], autograph=False)


def _pair(seed: Sequence[tf.Tensor], task: int | None = None) -> tf.Tensor:
    # All tasks of a mixture get the same seed from SeqIO: the task's id keeps their noise apart.
    return tf.stack([tf.cast(seed[0], tf.int64), tf.cast(seed[1], tf.int64) + 1_000_003 * (task or 0)])


def _ids(code: str | None, task: int | None) -> Callable[[], dict[str, tf.Tensor]]:
    ids = {"language": None if code is None else language_id(code), "task": task}
    return lambda: {name: tf.constant(number, tf.int32) for name, number in ids.items() if number is not None}


def _vocabulary(output_features: Features, name: str) -> Vocabulary:
    if name not in output_features:
        raise KeyError(
            f"the task has no feature {name!r}, only {sorted(output_features)}; it needs 'inputs' and 'targets'"
        )
    return output_features[name].vocabulary


def _lengths(sequence_length: Lengths) -> tuple[int, int]:
    missing = {"inputs", "targets"} - set(sequence_length or {})
    if missing:
        raise ValueError(
            f"sequence_length={sequence_length} lacks {sorted(missing)}: how long may an example be, in tokens?"
        )
    return sequence_length["inputs"], sequence_length["targets"]  # type: ignore[index]
