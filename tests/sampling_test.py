"""Rates from counts: worked examples, and what must hold for any counts."""

from functools import partial

import numpy as np
import pytest

from mlm import sampling

COUNTS = [1000.0, 100.0, 10.0, 1.0]
RANDOM = [np.random.default_rng(seed).lognormal(5, 3, size=n) for seed, n in enumerate([1, 2, 7, 107])]
EVERY_POLICY = {
    "proportional": sampling.proportional,
    "temperature": sampling.temperature,
    "uniform": sampling.uniform,
    "unimax": partial(sampling.unimax, budget=1.0),
}


@pytest.mark.parametrize("counts", RANDOM, ids=len)
@pytest.mark.parametrize("name", sorted(sampling.POLICIES))
def test_every_policy_gives_rates_that_do_not_depend_on_the_order(name, counts):
    policy = EVERY_POLICY[name]
    order = np.random.default_rng(0).permutation(len(counts))
    rates = policy(counts)
    assert rates.shape == counts.shape
    assert (rates > 0).all()
    np.testing.assert_allclose(rates.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(policy(counts[order]), rates[order], rtol=1e-12)


@pytest.mark.parametrize(
    ("heat", "want"),
    [
        (1, (0.9001, 0.0900, 0.0090, 0.0009)),
        (10 / 3, (0.5324, 0.2668, 0.1337, 0.0670)),
        (5, (0.4385, 0.2767, 0.1746, 0.1102)),
    ],
)
def test_temperature_goldens(heat, want):  # c^(1/T) / Σ c^(1/T) by hand
    np.testing.assert_allclose(sampling.temperature(COUNTS, 1 / heat), want, atol=5e-5)


@pytest.mark.parametrize(
    ("alpha", "want"),
    [
        (1, (0.990001, 0.0099, 0.000099)),
        (0.7, (0.96025, 0.038228, 0.001522)),
        (0.5, (0.900901, 0.09009, 0.009009)),
        (0.3, (0.76087, 0.191122, 0.048008)),
    ],
)
def test_temperature_goldens_of_three_sizes(alpha, want):
    np.testing.assert_allclose(sampling.temperature([1e6, 1e4, 1e2], alpha), want, atol=5e-7)


def test_temperature_of_one_is_proportional_and_of_zero_uniform():
    np.testing.assert_allclose(sampling.temperature(COUNTS, 1), sampling.proportional(COUNTS))
    np.testing.assert_allclose(sampling.temperature(COUNTS, 0), sampling.uniform(COUNTS))


def test_the_cap_comes_before_the_power():
    want = np.array([50, 50, 10, 1]) ** 0.5
    np.testing.assert_allclose(sampling.temperature(COUNTS, 0.5, cap=50), want / want.sum())


@pytest.mark.parametrize(
    ("counts", "budget", "max_epochs", "want"),
    [
        # U = (289, 100, 10, 1): yo 1, sw 10 (133 left to share), fr 100 (194.5), en the rest
        (COUNTS, 400, 1, (0.7225, 0.25, 0.025, 0.0025)),
        # U = (172.5, 172.5, 50, 5)
        (COUNTS, 400, 5, (0.43125, 0.43125, 0.125, 0.0125)),
        # U = (1, 10, 49) and (5, 27.5, 27.5)
        ([1, 10, 100], 60, 1, (1 / 60, 10 / 60, 49 / 60)),
        ([1, 10, 100], 60, 5, (5 / 60, 27.5 / 60, 27.5 / 60)),
    ],
)
def test_unimax_goldens(counts, budget, max_epochs, want):
    np.testing.assert_allclose(sampling.unimax(counts, budget, max_epochs), want, rtol=1e-12)


@pytest.mark.parametrize("max_epochs", [0.5, 1, 4, 10])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("counts", RANDOM, ids=len)
def test_unimax_keeps_its_limit_and_shares_the_rest_equally(counts, share, max_epochs):
    budget = share * max_epochs * counts.sum()
    spent = sampling.unimax(counts, budget, max_epochs) * budget
    limit = max_epochs * counts
    assert (spent <= limit * (1 + 1e-9)).all()
    free = spent < limit * (1 - 1e-9)
    if free.any():
        np.testing.assert_allclose(spent[free], spent[free][0], rtol=1e-9)
        assert spent[free][0] >= spent.max() * (1 - 1e-9)  # nobody at the limit gets more than the equal share


def test_unimax_is_continuous_in_the_limit():
    grid = np.array([sampling.unimax(COUNTS, 400, n) for n in np.linspace(1, 6, 501)])
    assert np.abs(np.diff(grid, axis=0)).max() < 0.01


def test_unimax_refuses_a_budget_that_breaks_the_limit_or_says_so():
    with pytest.raises(ValueError, match=r"2 epochs of all languages are 2222.*raise max_epochs to 2\.7"):
        sampling.unimax(COUNTS, 3000, 2)
    with pytest.warns(UserWarning, match="cannot spend a budget of 3000"):
        rates = sampling.unimax(COUNTS, 3000, 2, short="warn")
    np.testing.assert_allclose(rates, sampling.proportional(COUNTS))


def test_explicit_rates_follow_the_names_and_refuse_typos():
    np.testing.assert_allclose(sampling.explicit(["a", "b", "c"], {"c": 2, "a": 1, "b": 1}), [0.25, 0.25, 0.5])
    with pytest.raises(KeyError, match="no member 'frr'; did you mean 'fr'"):
        sampling.explicit(["fr", "de"], {"frr": 1, "de": 1})
    with pytest.raises(KeyError, match="no weight for 'de'"):
        sampling.explicit(["fr", "de"], {"fr": 1})


STAGES = [(0.0, [1, 1, 0]), (0.25, [2, 1, 1]), (0.9, [0, 0, 1])]


@pytest.mark.parametrize(
    ("progress", "want"),
    [(0, (0.5, 0.5, 0)), (0.2499, (0.5, 0.5, 0)), (0.25, (0.5, 0.25, 0.25)), (0.9, (0, 0, 1)), (1, (0, 0, 1))],
)
def test_a_stage_begins_exactly_at_its_share_of_the_training(progress, want):
    np.testing.assert_allclose(sampling.stages(STAGES, progress), want)


def test_mean_rates_weigh_the_stages_with_their_lengths():
    steps = np.mean([sampling.stages(STAGES, (i + 0.5) / 1000) for i in range(1000)], axis=0)
    np.testing.assert_allclose(sampling.mean_rates(STAGES), steps, rtol=1e-9)


@pytest.mark.parametrize("starts", [[0.1], [], [0.0, 0.5, 0.5], [0.0, 1.0]])
def test_stages_with_gaps_are_refused(starts):
    with pytest.raises(ValueError, match="the first must begin at"):
        sampling.stages([(start, [1.0]) for start in starts], 0.3)


def test_expected_epochs_of_mt5s_sampling():
    # a budget of 400 at equal rates: 200 of 1000 and 200 of 10
    np.testing.assert_allclose(sampling.expected_epochs([0.5, 0.5], [1000, 10], 400), [0.2, 20])
    spent = sampling.expected_epochs(sampling.unimax(COUNTS, 400, 5), COUNTS, 400)
    assert spent.max() <= 5 + 1e-9


@pytest.mark.parametrize("bad", [[], [1, 0], [1, -1], [1, np.nan], np.ones((2, 2))])
def test_counts_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="count"):
        sampling.proportional(bad)
