"""Metrics of text for the `metric_fns` of a SeqIO task: (targets, predictions) or (targets, scores) -> values by name.

    metric_fns("bleu", "chrf++", language="ja")      # for a task that translates into Japanese

All are percentages, 100 the best, except `log_likelihood` (nats). A value whose name ends in `_signature` says how a
score was computed, in sacrebleu's terms, and belongs beside it in every report. Each function is safe for empty
predictions and does not depend on the order of the examples.
"""

import functools
import inspect
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlm.evaluation.edits import Correction, edit_scores
from mlm.registry import Registry

MetricFn = Callable[..., Mapping[str, float | str]]
Answers = Sequence[str] | Sequence[Sequence[str]]  # one right answer per example, or several


def by_language(*names: str) -> Callable[[str], list[MetricFn]]:
    """Language of the predictions -> `metric_fns` of it: for the tables of `tasks/`, many languages at once."""
    return lambda language: metric_fns(*names, language=language)


def metric_fns(*names: str, language: str = "") -> list[MetricFn]:
    """Metrics by name, those that treat languages differently told the language of the predictions.

    Raises KeyError with the nearest names for an unknown metric.
    """
    chosen = [METRICS[name] for name in names]
    return [
        functools.partial(fn, language=language) if "language" in inspect.signature(fn).parameters else fn
        for fn in chosen
    ]


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions that are exactly the target, for labels."""
    return {"accuracy": _percent(t.strip() == p.strip() for t, p in _pairs(targets, predictions))}


def exact_match(targets: Answers, predictions: Sequence[str], language: str = "") -> dict[str, float]:
    """Share of predictions equal to one of the answers after `normal_answer`. Source: SQuAD; MLQA for the languages."""
    normal = functools.partial(normal_answer, language=language)
    return {
        "exact_match": _percent(
            normal(p) in {normal(a) for a in _answers(answers)} for answers, p in _pairs(targets, predictions)
        )
    }


def token_f1(targets: Answers, predictions: Sequence[str], language: str = "") -> dict[str, float]:
    """Mean F1 of the bags of words of prediction and best answer, after `normal_answer`. Source: SQuAD, MLQA.

    Words are separated by spaces; in Chinese, Japanese, Thai and other scripts without them every character is a word.
    """

    def words(text: str) -> Counter[str]:
        text = normal_answer(text, language)
        return Counter(text.replace(" ", "") if _base(language) in UNSPACED else text.split())

    def f1(answer: Counter[str], prediction: Counter[str]) -> float:
        if not answer or not prediction:
            return float(answer == prediction)
        shared = sum((answer & prediction).values())
        return 2 * shared / (sum(answer.values()) + sum(prediction.values()))

    return {
        "token_f1": _percent(
            max(f1(words(answer), words(p)) for answer in _answers(answers))
            for answers, p in _pairs(targets, predictions)
        )
    }


def bleu(targets: Sequence[str], predictions: Sequence[str], language: str = "") -> dict[str, float | str]:
    """Corpus BLEU-4 by sacrebleu, exponential smoothing. Words: 13a, zh for Chinese, characters where none are marked.

    Source: Papineni et al. 2002; Post 2018 (arXiv:1804.08771).
    """
    from sacrebleu.metrics import BLEU

    return _sacrebleu("bleu", BLEU(tokenize=bleu_tokenizer(language)), targets, predictions)


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float | str]:
    """F2 over character n-grams of 1 to 6, spaces left out, by sacrebleu. Source: Popović 2015."""
    from sacrebleu.metrics import CHRF

    return _sacrebleu("chrf", CHRF(), targets, predictions)


def chrf_plus_plus(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float | str]:
    """chrF with word 1- and 2-grams among the n-grams. Source: Popović 2017."""
    from sacrebleu.metrics import CHRF

    return _sacrebleu("chrf++", CHRF(word_order=2), targets, predictions)


def correction_f05(targets: Sequence[Correction], predictions: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F0.5 of edits (see `mlm.evaluation.edits`); needs `postprocess_fn=with_source`."""
    return edit_scores([(t.source, t.text) for t in targets], predictions)


def with_source(text: str, example: dict, is_target: bool) -> Correction | str:
    """A task's `postprocess_fn`: the metric gets the uncorrected text, `inputs_pretokenized`, beside the target."""
    source = example["inputs_pretokenized"]
    return Correction(source.decode() if isinstance(source, bytes) else source, text) if is_target else text


def log_likelihood(targets: Sequence[str], scores: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean of log P(target | input), in nats per example."""
    return {"log_likelihood": float(np.mean(np.asarray(scores, np.float64)))}


METRICS: Registry[MetricFn] = Registry("metric")
METRICS["accuracy"] = accuracy
METRICS["exact_match"] = exact_match
METRICS["token_f1"] = token_f1
METRICS["bleu"] = bleu
METRICS["chrf"] = chrf
METRICS["chrf++"] = chrf_plus_plus
METRICS["correction_f05"] = correction_f05
METRICS["log_likelihood"] = log_likelihood

UNSPACED = frozenset(("zh", "ja", "th", "lo", "km", "my", "bo", "dz", "yue"))  # no spaces between words
ARTICLES = {  # dropped before answers are compared
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "vi": "của là cái chiếc những",
}


def normal_answer(text: str, language: str = "") -> str:
    """Lower case, without punctuation (Unicode P*) and articles, single spaces. Source: Lewis et al. 2019 (MLQA)."""
    text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    if _base(language) == "ar":
        text = re.sub(r"\bال", "", text)
    articles = ARTICLES.get(_base(language) or "en", "").split()
    return " ".join(word for word in text.split() if word not in articles)


def bleu_tokenizer(language: str) -> str:
    """Sacrebleu's name for how to find the words of a language."""
    return "zh" if _base(language) == "zh" else "char" if _base(language) in UNSPACED else "13a"


def _base(language: str) -> str:
    """The language without its variant: "zh-Hant" -> "zh"."""
    return re.split("[-_]", language)[0]


def _answers(answers: str | Sequence[str]) -> Sequence[str]:
    return [answers] if isinstance(answers, str) else answers


def _sacrebleu(name: str, metric, targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float | str]:
    pairs = _pairs(targets, predictions)
    score = metric.corpus_score([p for _, p in pairs], [[t for t, _ in pairs]]).score
    return {name: float(score), f"{name}_signature": metric.get_signature().format()}


def _pairs(targets: Sequence, predictions: Sequence) -> list[tuple]:
    if len(targets) != len(predictions) or not len(targets):
        raise ValueError(
            f"{len(targets)} targets and {len(predictions)} predictions: give as many, at least one of each"
        )
    return list(zip(targets, predictions, strict=True))


def _percent(values) -> float:
    return 100.0 * float(np.mean([float(v) for v in values]))
