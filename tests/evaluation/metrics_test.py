"""Metrics: golden values worked out by hand, and what holds for every one of them."""

import inspect
import math
from functools import partial

import numpy as np
import pytest

from mlm.evaluation.edits import Correction, Edit, edit_scores, edits
from mlm.evaluation.metrics import METRICS, metric_fns, normal_answer, with_source

SENTENCES = ["The cat sat on the mat .", "A dog barked at the moon .", "Nobody was there to see it ."]
TEXT_METRICS = sorted(set(METRICS) - {"log_likelihood"})


def score(name: str, targets, predictions, **options) -> float:
    """The first number that a metric gives."""
    return next(v for v in METRICS[name](targets, predictions, **options).values() if not isinstance(v, str))


def as_targets(name: str, texts: list[str]) -> list:
    """Targets as the metric wants them: a correction knows the uncorrected text."""
    return [Correction("X " + t, t) for t in texts] if name == "correction_f05" else texts


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_perfect_prediction_has_a_hundred(name):
    assert score(name, as_targets(name, SENTENCES), SENTENCES) == pytest.approx(100.0)


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_the_order_of_examples_does_not_matter(name):
    predictions = ["The cat sat .", "A dog barked at the moon .", "Somebody saw it ."]
    targets, order = as_targets(name, SENTENCES), [2, 0, 1]
    shuffled = score(name, [targets[i] for i in order], [predictions[i] for i in order])
    assert shuffled == pytest.approx(score(name, targets, predictions))


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_predictions_are_safe_and_worse(name):
    value = score(name, as_targets(name, SENTENCES), ["", "", ""])
    assert math.isfinite(value)
    assert value < 50


@pytest.mark.parametrize("name", sorted(METRICS))
def test_seqio_recognises_the_arguments(name):
    """SeqIO tells the kinds of metrics apart by the names of the arguments without a default."""
    (fn,) = metric_fns(name, language="zh")
    required = [p.name for p in inspect.signature(fn).parameters.values() if p.default is inspect.Parameter.empty]
    assert tuple(required) == (("targets", "scores") if name == "log_likelihood" else ("targets", "predictions"))


def test_bleu_golden():
    """prediction "the cat sat on mat" (5 words), reference "the cat sat on the mat" (6).

    n-grams found: 5 of 5, 3 of 4, 2 of 3, 1 of 2; brevity exp(1 - 6/5). BLEU = 100 e^-0.2 (1 · 3/4 · 2/3 · 1/2)^(1/4).
    """
    want = 100 * math.exp(1 - 6 / 5) * (1 * 0.75 * (2 / 3) * 0.5) ** 0.25
    result = METRICS["bleu"](["the cat sat on the mat"], ["the cat sat on mat"])
    assert result["bleu"] == pytest.approx(want, abs=1e-6)
    assert "tok:13a" in result["bleu_signature"]
    assert "smooth:exp" in result["bleu_signature"]


def test_chrf_golden():
    """ "abcd" against "abce": 1-grams 3/4, 2-grams 2/3, 3-grams 1/2, 4-grams 0; longer ones do not exist.

    Precision = recall at each order, so F = their mean = (3/4 + 2/3 + 1/2 + 0) / 4.
    """
    assert score("chrf", ["abcd"], ["abce"]) == pytest.approx(100 * (0.75 + 2 / 3 + 0.5) / 4, abs=1e-4)


def test_chrf_plus_plus_counts_words_too():
    """Same letters, other words: "ab c" and "a bc" share every character 1-gram to 3-gram and no word."""
    assert score("chrf", ["ab c"], ["a bc"]) == pytest.approx(100.0)
    assert score("chrf++", ["ab c"], ["a bc"]) < 70
    assert "nw:2" in METRICS["chrf++"](["a"], ["a"])["chrf++_signature"]


@pytest.mark.parametrize(("language", "tokenizer"), [("zh-Hant", "zh"), ("ja", "char"), ("th", "char"), ("fr", "13a")])
def test_bleu_cuts_words_by_language(language, tokenizer):
    (bleu,) = metric_fns("bleu", language=language)
    assert f"tok:{tokenizer}" in bleu(["猫在垫子上坐着"], ["猫在垫子上"])["bleu_signature"]


def test_accuracy_golden():
    assert score("accuracy", ["yes", "no", "no", "yes"], ["yes", "yes", " no ", "YES"]) == 50.0


def test_exact_match_and_f1_take_the_best_answer():
    targets = [["the Eiffel Tower", "Eiffel tower in Paris"], ["1889"]]
    assert score("exact_match", targets, ["Eiffel tower!", "1888"]) == 50.0
    # "tower of Paris" shares {tower, paris} with the second answer: P = 2/3, R = 2/4, F1 = 4/7.
    assert score("token_f1", targets, ["tower of Paris", "1888"]) == pytest.approx(50 * 4 / 7)


def test_f1_of_chinese_is_by_character():
    """3 of 4 characters right on both sides."""
    assert score("token_f1", ["北京大学"], ["北京大楼"], language="zh") == pytest.approx(75.0)
    assert score("token_f1", ["北京大学"], ["北京大楼"]) == 0.0


@pytest.mark.parametrize(
    ("text", "language", "want"),
    [
        ("The  CAT's a hat!", "en", "cats hat"),
        ("Der Hund, die Katze", "de", "hund katze"),
        ("¿La casa?", "es", "casa"),
        ("الكتاب", "ar", "كتاب"),
        ("a z", "fr", "a z"),
    ],
)
def test_normal_answers(text, language, want):
    assert normal_answer(text, language) == want


def test_edits_are_merged_and_placed():
    assert edits("She go to school .", "She goes to a school .") == {Edit(1, 2, ("goes",)), Edit(3, 3, ("a",))}
    assert edits("a b c d", "a x y d") == {Edit(1, 3, ("x", "y"))}
    assert edits("a b c", "a c") == {Edit(1, 2, ())}
    assert edits("same text", "same text") == set()
    assert edits("", "new") == {Edit(0, 0, ("new",))}


def test_correction_golden():
    """Wanted 2 edits, made 2, one of them right: P = R = 1/2 = F. With one right edit alone: P = 1, R = 1/2,
    F0.5 = 1.25 · 1 · 0.5 / (0.25 · 1 + 0.5) = 5/6.
    """
    references = [("She go to school .", "She goes to a school .")]
    half = edit_scores(references, ["She goes to the school ."])
    assert half == pytest.approx({"f0.5": 50, "precision": 50, "recall": 50})
    assert edit_scores(references, ["She goes to school ."])["f0.5"] == pytest.approx(100 * 5 / 6)


def test_nothing_to_correct_and_nothing_changed_is_perfect():
    assert edit_scores([("Fine .", "Fine .")], ["Fine ."])["f0.5"] == 100.0


def test_the_source_travels_with_the_target():
    example = {"inputs_pretokenized": b"He go"}
    assert with_source("He goes", example=example, is_target=True) == Correction("He go", "He goes")
    assert with_source("He gone", example=example, is_target=False) == "He gone"


def test_log_likelihood_is_the_mean():
    assert METRICS["log_likelihood"](["a", "b"], np.array([-1.0, -3.0], np.float32)) == {"log_likelihood": -2.0}


def test_unknown_metrics_and_unequal_counts_are_refused():
    with pytest.raises(KeyError, match="did you mean 'bleu'"):
        metric_fns("blue")
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        partial(METRICS["bleu"], ["a", "b"])(["a"])
