"""Minimum Bayes risk: the consensus, not the mode, and the same numbers by every way to compute them."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from mlm.evaluation.choosing.bayes_risk import expected_utilities, some
from mlm.evaluation.choosing.utilities import aggregated_chrf, chrf_table, ngrams, utility

WORDS = ["the", "cat", "a", "dog", "sat", "ran", "on", "mat", "roof", "under", "кіт", "猫"]
TEXTS = ["", "a", "ab ab", "The cat sat on the mat.", "The cat ran on the mat .", "Кіт на даху", "x" * 9]


def texts(seed: int, count: int, length: int = 9) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(count)]


def test_chrf_is_sacrebleus():
    metric = CHRF()
    want = [[metric.sentence_score(h, [r]).score for r in TEXTS] for h in TEXTS]
    np.testing.assert_allclose(chrf_table(TEXTS, TEXTS), want, atol=1e-9)


def test_bleu_is_sacrebleus_sentence_bleu():
    metric = BLEU(tokenize="13a", effective_order=True)
    want = [[metric.sentence_score(h, [r]).score for r in TEXTS] for h in TEXTS]
    np.testing.assert_allclose(utility("bleu")(TEXTS, TEXTS), want)
    assert utility("bleu", "ja")(["猫が好き"], ["猫が嫌い"])[0, 0] > utility("bleu")(["猫が好き"], ["猫が嫌い"])[0, 0]


def test_with_exact_match_it_is_the_mode_of_the_sample():
    drawn = ["b", "a", "c", "a", "b", "a"]
    for references in (drawn, drawn[:3] + drawn[3:]):
        found = expected_utilities(drawn, references, utility("accuracy"))
        np.testing.assert_allclose(found, [100 * drawn.count(t) / 6 for t in drawn])
        assert drawn[int(np.argmax(found))] == "a"


def test_the_mode_of_a_spread_distribution_is_an_outlier():
    """The most probable text has 0.3 and nothing resembles it; the others, 0.7 in all, say nearly the same."""
    likely = [
        "no",
        *(f"she came home {when}" for when in ("early", "late", "again", "today", "first", "then", "alone")),
    ]
    probabilities = np.array([0.3, *[0.1] * 7])
    found = expected_utilities(likely, likely, chrf_table, probabilities)
    assert int(np.argmax(probabilities)) == 0
    assert int(np.argmax(found)) != 0
    assert found[0] == pytest.approx(100 * 0.3, abs=5)


def test_its_choice_has_more_expected_utility_than_a_sample():
    """Against other samples of the same distribution than those it chose by."""
    better = []
    for seed in range(8):
        pool = texts(seed, 6)
        rng = np.random.default_rng(seed)
        drawn, fresh = ([pool[i] for i in rng.choice(6, 16, p=rng.dirichlet(np.ones(6)))] for _ in range(2))
        by_drawn = expected_utilities(drawn, drawn, chrf_table)
        truth = expected_utilities(drawn, fresh, chrf_table)
        better.append(truth[np.argmax(by_drawn)] - truth.mean())
    assert np.mean(better) > 0


def test_weights_are_as_good_as_copies():
    pool = texts(0, 3)
    copies = [pool[0]] * 3 + [pool[1]] + [pool[2]] * 2
    weights = np.array([3, 1, 2]) / 6
    for way in (lambda h, r, w=None: expected_utilities(h, r, chrf_table, w), aggregated_chrf):
        np.testing.assert_allclose(way(pool, copies), way(pool, pool, weights), rtol=1e-12)
        np.testing.assert_allclose(way(copies, pool)[[0, 3, 4]], way(pool, pool), rtol=1e-12)


def test_all_weight_on_one_reference_is_that_reference():
    pool, alone = texts(5, 4), np.array([0.0, 0.0, 1.0, 0.0])
    want = chrf_table(pool, pool)[:, 2]
    np.testing.assert_allclose(expected_utilities(pool, pool, chrf_table, alone), want)
    np.testing.assert_allclose(aggregated_chrf(pool, pool, alone), want)


def test_of_equal_references_the_mean_is_exact():
    hypotheses, reference = texts(1, 5), texts(2, 1)
    want = chrf_table(hypotheses, reference)[:, 0]
    np.testing.assert_allclose(aggregated_chrf(hypotheses, reference * 4), want, rtol=1e-12)


def test_aggregated_precision_is_never_less():
    """Matches with the mean counts are at least the mean of the matches, order by order."""
    drawn = texts(3, 12)
    for table in ngrams(drawn):
        exact = np.minimum(table[:, None], table[None]).sum(-1).mean(1)
        together = np.minimum(table, table.mean(0)).sum(-1)
        assert (together >= exact - 1e-9).all()


def test_aggregation_finds_nearly_the_same_texts():
    """Rank correlation with the exact utilities, over sets of samples that share a core."""
    correlations = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        core = texts(seed, 1, 14)[0].split()
        drawn = [" ".join(w if rng.random() < keep else rng.choice(WORDS) for w in core) for keep in rng.random(20)]
        exact, fast = expected_utilities(drawn, drawn, chrf_table), aggregated_chrf(drawn, drawn)
        correlations.append(np.corrcoef(exact.argsort().argsort(), fast.argsort().argsort())[0, 1])
    assert np.mean(correlations) > 0.95


def test_sampled_references_are_the_examples_own():
    first = some(64, 8, seed=1, example=5)
    assert first.size == len(set(first.tolist())) == 8
    np.testing.assert_array_equal(first, some(64, 8, seed=1, example=5))
    assert not np.array_equal(first, some(64, 8, seed=1, example=6))
    assert not np.array_equal(first, some(64, 8, seed=2, example=5))
    np.testing.assert_array_equal(some(4, 9, seed=0, example=0), np.arange(4))


def test_sampled_utility_is_unbiased():
    """Over many draws of the references the mean is the exact utility."""
    drawn = texts(4, 10, 4)
    table = chrf_table(drawn, drawn)
    means = np.mean([table[:, some(10, 3, seed=0, example=i)].mean(1) for i in range(3000)], axis=0)
    np.testing.assert_allclose(means, table.mean(1), rtol=0.03)


@pytest.mark.parametrize("name", ["log_likelihood", "correction_f05"])
def test_a_metric_that_compares_no_texts_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' does not compare one text with another"):
        utility(name)


def test_unknown_utilities_and_missing_references_are_named():
    with pytest.raises(KeyError, match="did you mean 'chrf"):
        utility("chrff")
    with pytest.raises(ValueError, match="no references"):
        expected_utilities(["a"], [], chrf_table)
