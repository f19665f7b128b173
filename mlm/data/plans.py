"""Plans: an objective on plain text, fitted to the lengths of a task: which noise, on pieces of how many tokens.

    PLANS["span_corruption"](vocabulary, 512, 114, density=0.15, mean_span=3.0) -> Plan(rule, length=568, …)

A plan is refused when it is made, before any text is read: targets that would be cut, too few sentinels, lengths too
short.
"""

from collections.abc import Callable
from typing import NamedTuple

from mlm.data import noise
from mlm.data.rows import cut, frame
from mlm.data.templates import PLAIN, Frame
from mlm.data.tensorflow import tf
from mlm.data.vocabulary import Vocabulary
from mlm.registry import Registry


class Plan(NamedTuple):
    """rule: the noise. length: tokens of a piece. prefix: special token before the inputs, or "". eos: each document
    ends with </s>.
    """

    rule: noise.Denoise
    length: int
    inputs_length: int
    targets_length: int
    prefix: str = ""
    eos: bool = False

    def pieces(self, documents: tf.RaggedTensor) -> tf.RaggedTensor:
        """Documents of one language [documents, tokens], joined end to end and cut into pieces of `length` tokens."""
        if self.eos:
            documents = frame(documents, None)
        return cut(documents.flat_values, self.length)

    def examples(
        self, pieces: tf.RaggedTensor, seed: tf.Tensor, vocabulary: Vocabulary, around: Frame = PLAIN
    ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """pieces int32 [pieces, tokens], seed int64 [2] -> (inputs, targets) of each piece, targets ending in </s>.

        around: what stands around the inputs and before the targets; what of it is more than an </s> comes on top of
        the plan's lengths.
        """
        inputs, targets = self.rule.graph(vocabulary)(pieces, seed)
        more = len(around.before) + len(around.after) - 1
        first = [*around.before, *([vocabulary.special(self.prefix)] if self.prefix else [])]
        return (
            frame(inputs, self.inputs_length + more, first, around.after),
            frame(targets, self.targets_length + len(around.prompt), around.prompt),
        )


def span_corruption(
    vocabulary: Vocabulary,
    inputs_length: int,
    targets_length: int,
    *,
    density: int | float = 0.15,
    mean_span: int | float = 3.0,
    random_roll: bool = False,
    prefix: str = "",
) -> Plan:
    """T5's span corruption; mT5: the defaults, ByT5: mean_span 20. Pieces are as long as the inputs allow
    (`raw_length`).

    prefix: a special token before the inputs (UL2's mode).
    Raises ValueError when the targets do not fit, or the vocabulary has fewer sentinels than there are spans.
    """
    if prefix:
        vocabulary.special(prefix)
    mask = noise.Spans(density, mean_span, random_roll)
    length, needed = raw_length(inputs_length - bool(prefix) - random_roll, density, mean_span)
    needed += random_roll
    if needed > targets_length:
        raise ValueError(
            f"span corruption with inputs of {inputs_length} tokens, density {density} and mean span {mean_span} has "
            f"targets of {needed} tokens, the task's hold {targets_length}; raise targets_length to {needed}, or lower "
            "inputs_length"
        )
    spans, known = mask.spans(length), len(vocabulary.sentinel_ids)
    if spans > known:
        enough = -(-round(length * density) // max(known - random_roll, 1))
        raise ValueError(
            f"span corruption of pieces of {length} tokens, density {density} and mean span {mean_span} needs {spans} "
            f"sentinels, {vocabulary.where} has {known}; raise mean_span to {enough}, lower inputs_length, or train "
            "the vocabulary with more sentinels"
        )
    rule = noise.Denoise(mask, noise.sentinels, noise.hidden_with_sentinels)
    return Plan(rule, length, inputs_length, targets_length, prefix)


def prefix_lm(
    vocabulary: Vocabulary,
    inputs_length: int,
    targets_length: int,
    *,
    density: int | float = 0.5,
    fixed: bool = False,
    prefix: str = "",
) -> Plan:
    """The beginning of a piece is given, the rest is to be said; the place of the cut is random (`noise.Suffix`)."""
    if prefix:
        vocabulary.special(prefix)
    mask = noise.Suffix(density, fixed)

    def fits(n: int) -> bool:
        least = mask.shortest_prefix(n)
        most = least if fixed else n - 1
        return most + bool(prefix) + 1 <= inputs_length and n - least + 1 <= targets_length

    length = max((n for n in range(2, inputs_length + targets_length) if fits(n)), default=0)
    _check_length(length, inputs_length, targets_length)
    return Plan(noise.Denoise(mask, noise.drop, noise.hidden), length, inputs_length, targets_length, prefix)


def causal_lm(vocabulary: Vocabulary, inputs_length: int, targets_length: int) -> Plan:
    """The whole piece is the targets, documents end with </s>. The inputs are </s> alone: an encoder-decoder learns its
    decoder's language model, and a decoder without encoder ignores them.
    """
    _check_length(targets_length - 1, inputs_length, targets_length)
    rule = noise.Denoise(noise.Everything(), noise.drop, noise.full_text)
    return Plan(rule, targets_length - 1, inputs_length, targets_length, eos=True)


def text_infilling(
    vocabulary: Vocabulary,
    inputs_length: int,
    targets_length: int,
    *,
    density: int | float = 0.3,
    mean_span: int | float = 3.0,
    permute_sentences: bool = True,
) -> Plan:
    """BART: words behind one <mask> a span, sentences shuffled, the whole text to be said. mBART: density 0.35,
    mean_span 3.5.
    """
    length = min(inputs_length, targets_length) - 1
    _check_length(length, inputs_length, targets_length)
    vocabulary.special("<mask>")  # refuses a vocabulary without it
    mask = noise.PoissonWords(density, mean_span)
    rule = noise.Denoise(mask, noise.mask_token, noise.full_text, permute_sentences)
    return Plan(rule, length, inputs_length, targets_length)


PLANS: Registry[Callable[..., Plan]] = Registry(
    "text objective",
    span_corruption=span_corruption,
    prefix_lm=prefix_lm,
    causal_lm=causal_lm,
    text_infilling=text_infilling,
)


def raw_length(inputs_length: int, density: int | float = 0.15, mean_span: int | float = 3.0) -> tuple[int, int]:
    """(tokens a piece may have, tokens its targets then have) for T5 spans whose inputs shall fit `inputs_length`, </s>
    counted.

    The largest n with kept + spans + 1 ≤ inputs_length, where hidden = round(n · density), spans = round(hidden /
    mean_span), kept = n − hidden; targets = hidden + spans + 1. With density 0.5, targets longer than the inputs lose
    one token. Source: T5's released code.

    >>> raw_length(512), raw_length(1024)
    ((568, 114), (1137, 229))
    """

    def lengths(n: int) -> tuple[int, int]:
        hidden = round(n * density)
        spans = round(hidden / mean_span)
        return n - hidden + spans + 1, hidden + spans + 1

    if lengths(2)[0] > inputs_length:
        raise ValueError(
            f"inputs_length={inputs_length} is too short for span corruption, {lengths(2)[0]} is the least"
        )
    n = inputs_length
    while lengths(n)[0] > inputs_length:
        n -= 1
    while lengths(n + 1)[0] <= inputs_length:
        n += 1
    targets = lengths(n)[1]
    return (n - 1, targets - 1) if density == 0.5 and targets > inputs_length else (n, targets)


def _check_length(length: int, inputs_length: int, targets_length: int) -> None:
    if length < 2:
        raise ValueError(
            f"inputs of {inputs_length} and targets of {targets_length} tokens leave pieces of {max(length, 0)}; an "
            "objective on text needs 2 tokens at least, so make both lengths larger"
        )
