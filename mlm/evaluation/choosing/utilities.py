"""How alike two texts are, for all pairs of two lists at once; in per cent, 100 the best.

chrF is counted here, once per text and order, as arrays: n² calls of a library would count every text n times, and the
mean of many references has no text. It equals sacrebleu's sentence chrF. Every other utility is a metric's value of one
sentence.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from mlm.evaluation.choosing.bayes_risk import Utility, distinct, merged
from mlm.evaluation.metrics import bleu_tokenizer, metric_fns

ORDERS = range(1, 7)  # characters of an n-gram
BETA = 2.0  # recall counts twice

Counts = list[Float[np.ndarray, "_ _"]]  # by order: texts × n-grams, how often each is there


def utility(name: str, language: str = "") -> Utility:
    """A metric out of `METRICS`, of single sentences. language: of the texts.

    Raises KeyError with the nearest names for an unknown metric, ValueError for one that does not compare two texts.
    """
    if name == "chrf":
        return chrf_table
    if name == "bleu":
        return _table(_sentence_bleu(language))
    (metric,) = metric_fns(name, language=language)

    def value(hypothesis: str, reference: str) -> float:
        found = next(iter(metric([reference], [hypothesis]).values()))
        assert not isinstance(found, str)
        return float(found)

    try:
        value("a", "a")
    except Exception as error:
        raise ValueError(f"the metric {name!r} does not compare one text with another: {error!r}") from error
    return _table(value)


def chrf_table(hypotheses: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, "H R"]:
    """chrF of every pair: F2 of the mean precision and recall of character n-grams of 1 to 6, spaces left out.

    An order that one of the two has no n-grams of counts for nothing. Source: Popović 2015.
    """
    ours, theirs = _split(ngrams([*hypotheses, *references]), len(hypotheses))
    return _chrf(ours, theirs)


def aggregated_chrf(
    hypotheses: Sequence[str], references: Sequence[str], weights: Float[np.ndarray, "R"] | None = None
) -> Float[np.ndarray, "H"]:
    """chrF against the mean n-gram counts of all references: one comparison for each hypothesis in place of R.

    Equal to the expected chrF where the references are equal; elsewhere close to it, and never less in mean precision,
    as min(c, ·) is concave. Sources: DeNero et al. 2009; Vamvas & Sennrich 2024 (arXiv:2402.04251).
    """
    texts, place = distinct(hypotheses)
    given, weights = merged(references, weights)
    ours, theirs = _split(ngrams([*texts, *given]), len(texts))
    return _chrf(ours, [weights[None] @ counts for counts in theirs])[place, 0]


def ngrams(texts: Sequence[str]) -> Counts:
    """Counts of the character n-grams of each text, spaces left out; the columns of an order are its n-grams."""
    joined = ["".join(text.split()) for text in texts]
    tables = []
    for order in ORDERS:
        columns: dict[str, int] = {}
        found = [Counter(text[i : i + order] for i in range(len(text) - order + 1)) for text in joined]
        for counter in found:
            for gram in counter:
                columns.setdefault(gram, len(columns))
        table = np.zeros((len(texts), len(columns)))
        for row, counter in zip(table, found, strict=True):
            row[[columns[gram] for gram in counter]] = list(counter.values())
        tables.append(table)
    return tables


def _split(counts: Counts, first: int) -> tuple[Counts, Counts]:
    return [table[:first] for table in counts], [table[first:] for table in counts]


def _chrf(ours: Counts, theirs: Counts) -> Float[np.ndarray, "H R"]:
    shape = (len(ours[0]), len(theirs[0]))
    precision, recall, orders = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for hypotheses, references in zip(ours, theirs, strict=True):
        matches = np.zeros(shape)
        for row, counts in zip(matches, hypotheses, strict=True):
            held = np.flatnonzero(counts)
            row[:] = np.minimum(references[:, held], counts[held]).sum(1)
        made, wanted = hypotheses.sum(1)[:, None], references.sum(1)[None]
        both = (made > 0) & (wanted > 0)
        precision += np.divide(matches, made, out=np.zeros(shape), where=both)
        recall += np.divide(matches, wanted, out=np.zeros(shape), where=both)
        orders += both
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    below = BETA**2 * precision + recall
    return 100 * np.divide((1 + BETA**2) * precision * recall, below, out=np.zeros(shape), where=below > 0)


def _table(value: Callable[[str, str], float]) -> Utility:
    def table(hypotheses: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, "H R"]:
        return np.array([[value(h, r) for r in references] for h in hypotheses]).reshape(len(hypotheses), -1)

    return table


def _sentence_bleu(language: str) -> Callable[[str, str], float]:
    """BLEU of one sentence over the orders that it is long enough for; corpus BLEU is 0 below four words."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=bleu_tokenizer(language), effective_order=True)
    return lambda hypothesis, reference: float(metric.sentence_score(hypothesis, [reference]).score)
