"""Noisy channel: a source that cannot be told from a result speaks against it."""

import numpy as np
import pytest

from mlm.evaluation.choosing.noisy_channel import Parts, Weights, channel_scores, tuned


def toy(count: int = 40) -> list[Parts]:
    """Sources x of 0 … 3, results y of 0 … 3 and 4, "I do not know". The right one is y = x.

    The direct model is biased to 4: p(4|x) = 0.5, p(x|x) = 0.3, else 1/15. Of 4 any source may come: p(x|4) = 1/4;
    p(x|y = x) = 0.9 and else 1/30.
    """
    direct = np.full((4, 5), 0.2 / 3)
    direct[:, 4], direct[range(4), range(4)] = 0.5, 0.3
    channel = np.full((4, 5), 1 / 30)
    channel[:, 4], channel[range(4), range(4)] = 0.25, 0.9
    lengths, fluent = np.full(5, 2), np.log(np.full(5, 0.2))
    return [Parts(np.log(direct[i % 4]), np.log(channel[i % 4]), fluent, lengths, 2) for i in range(count)]


def accuracy(taken: list[int]) -> float:
    return float(np.mean([y == i % 4 for i, y in enumerate(taken)]))


def test_formula_golden():
    """x of 3 tokens, y of 2: -6/2 + 0.5·(-3)/3 + 0.25·(-8)/2 + 0.1·2 = -4.3; of 4: -6/4 - 0.5 - 0.5 + 0.4 = -2.1."""
    parts = Parts(np.array([-6.0, -6.0]), np.array([-3.0, -3.0]), np.array([-8.0, -8.0]), np.array([2, 4]), 3)
    np.testing.assert_allclose(channel_scores(parts, Weights(0.5, 0.25, 0.1)), [-4.3, -2.1])


def test_without_weights_the_order_is_the_direct_models():
    for parts in toy(4):
        np.testing.assert_allclose(channel_scores(parts, Weights()), parts.direct / parts.lengths)


def test_the_channel_raises_the_accuracy_of_a_biased_model():
    examples = toy()
    assert accuracy([int(np.argmax(channel_scores(p, Weights()))) for p in examples]) == 0.0
    assert accuracy([int(np.argmax(channel_scores(p, Weights(channel=1.0)))) for p in examples]) == 1.0


def test_tuning_finds_such_weights_and_repeats_itself():
    examples = toy()
    weights, reached = tuned(examples, accuracy, trials=50)
    assert reached == 1.0
    assert weights.channel > 0
    assert tuned(examples, accuracy, trials=50) == (weights, reached)
    assert tuned(examples, accuracy, trials=50, seed=1)[0] != weights
    assert tuned(examples, accuracy, trials=1) == (Weights(), 0.0)


def test_tuning_is_never_worse_than_the_direct_model():
    """Where the direct model is right its own order stays: it comes first among equals."""
    examples = toy()
    best = [int(np.argmax(p.direct / p.lengths)) for p in examples]
    assert tuned(examples, lambda taken: float(taken == best))[0] == Weights()
    with pytest.raises(ValueError, match="0 examples"):
        tuned([], accuracy)
