"""Energy re-sampling: the moments asked for, nearer to human text, exact where all texts can be listed."""

import itertools

import numpy as np
import pytest

from mlm.evaluation.choosing import energy

ALL = list(itertools.product(range(3), repeat=4))  # every text over three tokens of length four
FEATURES = np.array([[energy.repetition(t, 2), energy.recent_repetition(t, 1)] for t in ALL])


def markov(stay: float) -> np.ndarray:
    """Probability of every text whose tokens repeat the one before with this probability."""
    steps = [[stay if a == b else (1 - stay) / 2 for a, b in itertools.pairwise(text)] for text in ALL]
    return np.prod(steps, axis=1) / 3


MODEL, HUMAN = markov(0.6), 0.5 * markov(0.2) + 0.5 * markov(0.4)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def test_statistics_golden():
    """a b a b c: bigrams ab ba ab bc, 3 of 4 distinct; trigrams all 3; of 5 tokens the second a and b come within 2."""
    text = ["a", "b", "a", "b", "c"]
    assert energy.repetition(text, 2) == 0.25
    assert energy.repetition(text, 3) == 0.0
    assert energy.recent_repetition(text, 2) == 0.4
    assert energy.recent_repetition(text, 1) == 0.0
    assert energy.diversity(text) == 0.75
    assert energy.repetition(["a"], 2) == 0.0
    assert energy.recent_repetition([], 8) == 0.0
    vectors = np.array([[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(energy.coherence(vectors, np.array([[1.0, 1.0], [1.0, 0.0]])), [0.5**0.5, 0.0])
    np.testing.assert_allclose(energy.exponential_entropy(np.log([0.25, 0.5]), np.array([2, 1])), [2.0, 2.0])
    with pytest.raises(ValueError, match="no statistic of texts named 'sr0'"):
        energy.check_features(["sr2", "sr0"])


def test_without_energy_every_sample_is_as_good():
    np.testing.assert_allclose(np.exp(energy.log_weights(FEATURES, np.zeros(2))), 1 / 81)


def test_the_exact_distribution_has_the_moments_and_is_nearer_to_humans():
    """The model, weighted by its own probabilities, is the whole population. Pythagoras: what KL(human || model) loses
    is KL(q || model).
    """
    wanted = HUMAN @ FEATURES
    mu = energy.fitted(FEATURES[None], wanted, np.log(MODEL)[None])
    q = np.exp(energy.log_weights(FEATURES, mu, np.log(MODEL)))
    np.testing.assert_allclose(q @ FEATURES, wanted, atol=1e-8)
    assert kl(HUMAN, q) < 0.5 * kl(HUMAN, MODEL)
    np.testing.assert_allclose(kl(HUMAN, MODEL) - kl(HUMAN, q), kl(q, MODEL), rtol=1e-6)


def test_newton_converges_in_a_few_steps(monkeypatch):
    monkeypatch.setattr(energy, "STEPS", 8)
    energy.fitted(FEATURES[None], HUMAN @ FEATURES, np.log(MODEL)[None])


def test_moments_of_held_out_samples_are_closer():
    rng = np.random.default_rng(0)
    wanted = HUMAN @ FEATURES
    mu = energy.fitted(FEATURES[rng.choice(81, (50, 25), p=MODEL)], wanted)
    drawn = FEATURES[rng.choice(81, (2000, 25), p=MODEL)]
    taken = np.array(
        [f[energy.resampled(energy.log_weights(f, mu), seed=0, example=i)[0]] for i, f in enumerate(drawn)]
    )
    before, after = (np.abs(moments - wanted) for moments in (drawn.mean((0, 1)), taken.mean(0)))
    assert (after < 0.3 * before).all()


def test_samples_at_a_temperature_are_corrected():
    """Drawn from q ∝ p^(1/τ), with base log p - log q: weighted means are the model's own."""
    sharper = MODEL**2 / (MODEL**2).sum()
    rng = np.random.default_rng(1)
    drawn = rng.choice(81, 20_000, p=sharper)
    base = np.log(MODEL[drawn]) - np.log(sharper[drawn])
    weights = np.exp(energy.log_weights(FEATURES[drawn], np.zeros(2), base))
    want, plain = MODEL @ FEATURES, FEATURES[drawn].mean(0)
    assert (np.abs(weights @ FEATURES[drawn] - want) < 0.1 * np.abs(plain - want)).all()


def test_a_draw_follows_its_weights_and_its_number():
    weights = np.log([0.5, 0.3, 0.2])
    first = [energy.resampled(weights, seed=3, example=i)[0] for i in range(4000)]
    np.testing.assert_allclose(np.bincount(first) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    again = energy.resampled(weights, seed=3, example=7)
    np.testing.assert_array_equal(again, energy.resampled(weights, seed=3, example=7))
    assert sorted(again.tolist()) == [0, 1, 2]


def test_moments_out_of_reach_are_refused():
    with pytest.raises(ValueError, match="no weights give these samples the means"):
        energy.fitted(FEATURES[None], np.array([0.9, -0.5]))
    constant = np.ones((1, 5, 1))
    with pytest.raises(ValueError, match=r"features \[0\] are the same in all samples"):
        energy.fitted(constant, np.array([1.0]))
