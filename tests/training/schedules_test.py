"""Learning rates: goldens worked by hand, and one contract for every entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.training.schedules import SCHEDULES, make_schedule

OPTIONS = {
    "constant": {"learning_rate": 0.5, "warmup_steps": 4},
    "inverse_sqrt": {"learning_rate": 1.0, "warmup_steps": 100},
    "inverse_sqrt_warmup": {"learning_rate": 0.5, "warmup_steps": 100},
    "cosine": {"learning_rate": 1.0, "total_steps": 110, "warmup_steps": 10, "final_fraction": 0.1},
    "linear": {"learning_rate": 1.0, "total_steps": 110, "warmup_steps": 10},
    "warmup_stable_decay": {"learning_rate": 2.0, "total_steps": 100, "decay_steps": 20, "warmup_steps": 10},
}
# Warm-up is (step + 1) / warmup_steps of the peak: step warmup_steps - 1 is the first at the peak.
GOLDEN = {
    "constant": {0: 0.125, 1: 0.25, 3: 0.5, 10**6: 0.5},
    # 1 / sqrt(max(step, 100)): flat at 0.1, then 1/20 at step 400
    "inverse_sqrt": {0: 0.1, 100: 0.1, 400: 0.05, 10_000: 0.01},
    # 0.5 / 100 first; the peak at 99 and 100; half of it at four times the warm-up
    "inverse_sqrt_warmup": {0: 0.005, 49: 0.25, 99: 0.5, 100: 0.5, 400: 0.25},
    # half way between 10 and 110 the cosine is 0: 0.1 + 0.9 / 2 = 0.55; at a quarter 0.1 + 0.9 (1 + .7071) / 2 = 0.8682
    "cosine": {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.8682, 60: 0.55, 110: 0.1, 10**6: 0.1},
    "linear": {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.5, 110: 0.0, 10**6: 0.0},
    # flat until 80, then 2 (100 - step) / 20
    "warmup_stable_decay": {0: 0.2, 9: 2.0, 80: 2.0, 90: 1.0, 95: 0.5, 100: 0.0, 10**6: 0.0},
}


def test_every_entry_has_a_golden():
    assert set(OPTIONS) == set(GOLDEN) == set(SCHEDULES)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_golden(name):
    schedule = make_schedule(name, **OPTIONS[name])
    for step, rate in GOLDEN[name].items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-4), step


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_finite_positive_and_the_same_inside_jit(name):
    schedule = make_schedule(name, **OPTIONS[name])
    steps = jnp.arange(130)
    eager = np.array([schedule(int(s)) for s in steps[::10]])
    jitted = np.asarray(jax.jit(jax.vmap(schedule))(steps))
    np.testing.assert_allclose(jitted[::10], eager, rtol=1e-5, atol=1e-7)
    assert np.isfinite(jitted).all()
    assert (jitted >= 0).all()
    assert jitted[0] > 0  # the first update is no waste


def test_t5_recipe():
    """mT5: 1 / sqrt(max(step, 10^4)) is 0.01 for the first 10,000 steps and 0.001 after a million."""
    schedule = make_schedule("inverse_sqrt")
    assert float(schedule(0)) == pytest.approx(0.01)
    assert float(schedule(1_000_000)) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("cosin", {}, KeyError, "did you mean 'cosine'"),
        (
            "linear",
            {"learning_rate": 1.0, "total_steps": 5, "warmup_steps": 6},
            ValueError,
            "total_steps=5 is less than",
        ),
        (
            "warmup_stable_decay",
            {"learning_rate": 1.0, "total_steps": 10, "decay_steps": 6, "warmup_steps": 5},
            ValueError,
            "less than the 11 steps of its phases",
        ),
        ("inverse_sqrt", {"warmup_steps": 0}, ValueError, "warmup_steps=0 must be at least 1"),
        ("constant", {"rate": 1.0}, TypeError, "rate"),
    ],
)
def test_errors_name_the_rule(name, options, error, message):
    with pytest.raises(error, match=message):
        make_schedule(name, **options)
