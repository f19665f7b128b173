"""Noise: which tokens are hidden, what the encoder sees instead, what the decoder must say. Graph code without loops or
state.

An objective on plain text is three choices, and a new one is one new function in one of three tables:

    mask      pieces, seed -> a code per token: KEEP, START or INSIDE of a hidden span, INSERT (kept, an empty span
    before it) inputs    pieces, codes -> encoder tokens: each span as a sentinel of its own, as <mask>, or dropped
    targets   pieces, codes -> decoder tokens: hidden spans between sentinels, hidden tokens alone, or the whole text

    objective             mask          inputs      targets
    T5 span corruption    Spans         sentinels   hidden_with_sentinels
    prefix LM             Suffix        drop        hidden
    causal LM             Everything    drop        full_text
    BART text infilling   PoissonWords  mask_token  full_text

`pieces` is a ragged int32 tensor [pieces, tokens]: many pieces of text are noised by one run of the graph. Codes are
flat, one per token of `pieces.values`. Masks are frozen dataclasses and the rest module functions, so equal objectives
are equal keys and all tasks that share one share one traced graph (`Denoise.graph`). A seed is a pair of integers; the
same pair gives the same noise.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from mlm.data.rows import Rows, from_lengths, in_rows, select
from mlm.data.tensorflow import tf
from mlm.data.vocabulary import Vocabulary
from mlm.registry import Registry

KEEP, START, INSIDE, INSERT = 0, 1, 2, 3


@dataclass(frozen=True)
class Spans:
    """T5's spans: round(length · density) tokens in round(hidden / mean_span) spans, cut at random, spread at random.

    The first token is never hidden, the last always is; random_roll turns the mask by a random offset and removes that
    bias (a span turned over the end counts as two). Rounding is half to even. A piece of one token stays as it is.
    Source: Raffel et al. 2020, section 3.1.4, and the code released with it.
    """

    density: int | float = 0.15
    mean_span: int | float = 3.0
    random_roll: bool = False

    def __post_init__(self):
        if not (0 < self.density < 1 and self.mean_span >= 1):
            raise ValueError(
                f"density={self.density} must lie in (0, 1), mean_span={self.mean_span} be 1 token or more"
            )

    def spans(self, length: int) -> int:
        """Most hidden spans of a piece of `length` tokens."""
        return max(round(round(length * self.density) / self.mean_span), 1) + self.random_roll

    def __call__(self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
        seeds = tf.random.experimental.stateless_split(seed, 3)
        rows = Rows(pieces)
        hidden = tf.clip_by_value(_round(rows.lengths, self.density), 1, tf.maximum(rows.lengths - 1, 1))
        hidden = tf.where(rows.lengths < 2, 0, hidden)
        spans = tf.maximum(_round(hidden, divisor=self.mean_span), 1)
        spans = tf.clip_by_value(spans, 1, tf.maximum(rows.lengths - hidden, 1))  # a kept token stands before each
        kept_lengths = random_partition(rows.lengths - hidden, spans, seeds[0])
        lengths = tf.reshape(tf.stack([kept_lengths, random_partition(hidden, spans, seeds[1])], axis=1), [-1])
        mask = tf.repeat(tf.range(tf.size(lengths)) % 2 == 1, lengths)
        if self.random_roll:
            length = tf.cast(rows.lengths, tf.float64)
            shift = tf.cast(tf.random.stateless_uniform([rows.count], seeds[2], dtype=tf.float64) * length, tf.int32)
            turned = tf.math.floormod(rows.place - rows.spread(shift), rows.spread(rows.lengths))
            mask = tf.gather(mask, rows.spread(rows.starts) + turned)
        return span_codes(mask, rows)


@dataclass(frozen=True)
class Suffix:
    """One hidden span, from a random place to the end (prefix LM).

    Tokens kept: uniform from n_min to length − 1, n_min = max(1, round((1 − 2 · density) (length − 1))); with density
    0.5 anything from 1 on. fixed: always round((1 − density) · length) instead (UL2's S-denoiser with density 0.25).
    """

    density: int | float = 0.5
    fixed: bool = False

    def shortest_prefix(self, length: int) -> int:
        """Fewest tokens kept of a piece of `length` tokens."""
        share = (1 - self.density) * length if self.fixed else (1 - 2 * self.density) * (length - 1)
        return min(length - 1, max(1, round(share)))

    def __call__(self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
        rows = Rows(pieces)
        share = _round(rows.lengths, 1 - self.density) if self.fixed else _round(rows.lengths - 1, 1 - 2 * self.density)
        kept = tf.minimum(rows.lengths - 1, tf.maximum(1, share))
        if not self.fixed:
            choices = tf.cast(tf.maximum(rows.lengths - kept, 1), tf.float64)
            kept += tf.cast(tf.random.stateless_uniform([rows.count], seed, dtype=tf.float64) * choices, tf.int32)
        return span_codes(rows.place >= rows.spread(kept), rows)


@dataclass(frozen=True)
class Everything:
    """One span over the whole piece."""

    def __call__(self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
        rows = Rows(pieces)
        return span_codes(rows.place >= 0, rows)


@dataclass(frozen=True)
class PoissonWords:
    """Whole words, ceil(words · density) of them, in spans of Poisson(mean_span) words; a span of no word is an
    insertion.

    Span lengths are drawn until the budget is reached, the last is cut to fit. Spans lie anywhere and may touch but
    never overlap, so the budget is met exactly (the code released with BART lets spans overlap and then hides fewer
    words). A word begins at a piece with ▁; the first token begins one too. Source: Lewis et al. 2020, section 2.2.
    """

    density: int | float = 0.3
    mean_span: int | float = 3.0

    def __call__(self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary) -> tf.Tensor:
        seeds = tf.random.experimental.stateless_split(seed, 3)
        rows = Rows(pieces)
        first_of_word = tf.gather(vocabulary.tf_word_starts, pieces.values) | (rows.place == 0)
        word = tf.cumsum(tf.cast(first_of_word, tf.int32)) - 1  # per token, counted through all pieces
        words = rows.sum(first_of_word)
        budget = tf.cast(tf.math.ceil(tf.cast(words, tf.float64) * self.density - 1e-9), tf.int32)

        draws = from_lengths(2 * budget + 16)  # always enough: their sum is 7 · budget on average
        drawn = tf.random.stateless_poisson([draws.size], seeds[0], tf.constant(self.mean_span), tf.int32)
        left = draws.spread(budget) - draws.cumsum(drawn) + drawn
        drawn = tf.where(left > 0, tf.minimum(drawn, left), 0)
        lengths = tf.boolean_mask(drawn, drawn > 0)  # of the spans, in words
        spans, insertions = draws.sum(drawn > 0), draws.sum((drawn == 0) & (left > 0))

        # Lay the spans between the kept words in random order: an item is one kept word or one span.
        items = from_lengths(words - draws.sum(drawn) + spans)
        is_span = items.random_ranks(seeds[1]) < items.spread(spans)
        span = tf.maximum(tf.cumsum(tf.cast(is_span, tf.int32)) - 1, 0)
        item_lengths = tf.where(is_span, tf.gather(tf.concat([lengths, [1]], 0), span), 1)
        item = tf.repeat(tf.range(items.size), item_lengths)  # per word
        hidden = tf.gather(tf.gather(is_span, item), word)  # per token
        first_of_item = tf.concat([[True], item[1:] != item[:-1]], 0)[: tf.size(item)]
        start = hidden & first_of_word & tf.gather(first_of_item, word)
        gap = first_of_word & ~hidden
        insert = gap & (rows.random_ranks(seeds[2], last=~gap) < rows.spread(insertions))
        return tf.where(start, START, tf.where(hidden, INSIDE, tf.where(insert, INSERT, KEEP)))


MASKS: Registry[Callable] = Registry(
    "noise mask", spans=Spans, suffix=Suffix, everything=Everything, poisson_words=PoissonWords
)


def sentinels(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """Each hidden span becomes the next sentinel: <extra_id_0>, <extra_id_1>, … Spans that touch are one."""
    return _spans_to_sentinels(pieces, is_hidden(codes), vocabulary)


def mask_token(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """Each hidden span becomes one <mask>; an insertion puts one <mask> before its token."""
    mask = vocabulary.special("<mask>")
    repeats = tf.gather(tf.constant([1, 1, 0, 2]), codes)  # of KEEP, START, INSIDE, INSERT
    copies = tf.repeat(tf.where(codes == START, mask, pieces.values), repeats)
    inserted = tf.repeat(codes == INSERT, repeats)
    # Of the two copies of a token with INSERT the first, at an even count, is the mask.
    first = tf.cumsum(tf.cast(inserted, tf.int32)) % 2 == 1
    values = tf.where(inserted & first, mask, copies)
    return in_rows(values, Rows(pieces).sum(repeats))


def drop(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """Hidden tokens disappear."""
    return select(pieces, pieces.values, ~is_hidden(codes))


INPUTS: Registry[Callable] = Registry("noise input", sentinels=sentinels, mask_token=mask_token, drop=drop)


def hidden_with_sentinels(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """The hidden tokens; each *kept* span becomes the next sentinel, so that targets begin with <extra_id_0>."""
    return _spans_to_sentinels(pieces, ~is_hidden(codes), vocabulary)


def hidden(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """The hidden tokens alone."""
    return select(pieces, pieces.values, is_hidden(codes))


def full_text(pieces: tf.RaggedTensor, codes: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """All tokens, as before the noise."""
    return pieces


TARGETS: Registry[Callable] = Registry(
    "noise target", hidden_with_sentinels=hidden_with_sentinels, hidden=hidden, full_text=full_text
)


@dataclass(frozen=True)
class Denoise:
    """One denoising objective: mask × inputs × targets, and whether the inputs' sentences are shuffled first.

    permute_sentences goes with `full_text`: the inputs' sentences come in random order, the targets keep theirs.
    """

    mask: Callable
    inputs: Callable
    targets: Callable
    permute_sentences: bool = False

    def __post_init__(self):
        if self.permute_sentences and self.targets is not full_text:
            raise ValueError(f"permute_sentences needs the whole text as targets, not {self.targets.__name__}")

    def __call__(
        self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary
    ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """pieces int32 [pieces, tokens], seed int [2] -> (inputs, targets) of each piece, without end of sequence."""
        seeds = tf.random.experimental.stateless_split(seed, 2)
        source = shuffle_sentences(pieces, seeds[1], vocabulary) if self.permute_sentences else pieces
        codes = self.mask(source, seeds[0], vocabulary)
        return self.inputs(source, codes, vocabulary), self.targets(pieces, codes, vocabulary)

    def graph(self, vocabulary: Vocabulary) -> Callable:
        """The same as one graph, traced once a process however many tasks use it; seed int64 [2]."""
        return _graph(self, vocabulary)


@functools.lru_cache(maxsize=256)
def _graph(rule: Denoise, vocabulary: Vocabulary) -> Callable:
    signature = [tf.RaggedTensorSpec([None, None], tf.int32), tf.TensorSpec([2], tf.int64)]
    return tf.function(lambda pieces, seed: rule(pieces, seed, vocabulary), signature, autograph=False)


def shuffle_sentences(pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    """The sentences of each piece in random order. A sentence ends at a token whose last character ends sentences."""
    rows = Rows(pieces)
    ends = tf.gather(vocabulary.tf_sentence_ends, pieces.values)
    begins = (rows.place == 0) | tf.concat([[True], ends[:-1]], 0)[: rows.size]
    sentence = tf.cumsum(tf.cast(begins, tf.int32)) - 1
    keys = tf.random.stateless_uniform([tf.reduce_sum(tf.cast(begins, tf.int32))], seed, dtype=tf.float64)
    order = tf.argsort(tf.gather(keys, sentence) + tf.cast(rows.row, tf.float64), stable=True)
    return pieces.with_values(tf.gather(pieces.values, order))


def is_hidden(codes: tf.Tensor) -> tf.Tensor:
    """bool per token: START or INSIDE of a hidden span."""
    return (codes == START) | (codes == INSIDE)


def span_codes(mask: tf.Tensor, rows: Rows) -> tf.Tensor:
    """bool per token, True = hidden -> codes; neighbours in a piece are one span."""
    after_hidden = tf.concat([[False], mask[:-1]], 0)[: rows.size] & (rows.place > 0)
    return tf.where(mask & after_hidden, INSIDE, tf.where(mask, START, KEEP))


def random_partition(totals: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """totals[r] items cut into parts[r] non-empty parts, each way equally likely: all parts' lengths, int32
    [sum(parts)].

    parts[r] is 1 … totals[r], and 1 where totals[r] is 0: then the part's length is 0.
    """
    items = from_lengths(totals)
    starts_part = items.random_ranks(seed, first=items.place == 0) < items.spread(parts)
    empty_before = items.spread(tf.cumsum(tf.cast(totals == 0, tf.int32)))
    part = tf.cumsum(tf.cast(starts_part, tf.int32)) - 1 + empty_before
    return tf.math.unsorted_segment_sum(tf.ones_like(part), part, tf.reduce_sum(parts))


def _round(lengths: tf.Tensor, factor: int | float = 1, divisor: int | float = 1) -> tf.Tensor:
    # Python's round(length * factor / divisor) to the last bit: float64, half to even.
    exact = tf.cast(lengths, tf.float64)
    return tf.cast(tf.round(exact * factor / divisor), tf.int32)


def _spans_to_sentinels(pieces: tf.RaggedTensor, mask: tf.Tensor, vocabulary: Vocabulary) -> tf.RaggedTensor:
    rows = Rows(pieces)
    codes = span_codes(mask, rows)
    sentinel = vocabulary.sentinel_ids[0] + 1 - rows.cumsum(codes == START)  # the first counts 1
    return select(pieces, tf.where(codes == START, sentinel, pieces.values), codes != INSIDE)
