"""Masks for any order: shares of the targets by step, ranks along the row, loss on masked tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.objectives.any_order import AnyOrder

B, T, MASK = 256, 64, 99
TARGETS = np.arange(B * T, dtype=np.int32).reshape(B, T) % 90
WEIGHTS = np.broadcast_to(np.arange(T) < 60, (B, T)).astype(np.float32)
BATCH = {"decoder_target_tokens": jnp.asarray(TARGETS), "decoder_loss_weights": jnp.asarray(WEIGHTS)}


@pytest.mark.parametrize(
    ("step", "low", "high"),
    [(0, 0.15, 0.15), (50, 0.5, 0.57), (100, 0.85, 0.99), (2**31 - 1, 0.85, 0.99)],  # 50: (0.15 + 0.85) / 2, …
)
def test_rates_rise_with_the_steps(step, low, high):
    """Of 60 targets a row of rate r has 60 r masked, give or take 60^1/2 / 2 at most."""
    got = AnyOrder(mask_token=MASK, warmup=100).masked(BATCH, jax.random.key(1), step)
    share = np.asarray(got["decoder_loss_weights"]).sum(1) / 60
    assert share.mean() == pytest.approx((low + high) / 2, abs=0.015)
    spread = np.sqrt((high - low) ** 2 / 12 + np.mean([low * (1 - low), high * (1 - high)]) / 60)
    assert share.std() == pytest.approx(spread, rel=0.2)


def test_a_batch_for_any_order():
    got = AnyOrder(mask_token=MASK).masked(BATCH, jax.random.key(1), 5000)
    masked = np.asarray(got["decoder_loss_weights"]) == 1.0
    assert not masked[:, 60:].any()
    np.testing.assert_array_equal(got["decoder_input_tokens"], TARGETS)
    np.testing.assert_array_equal(got["decoder_query_tokens"], np.full_like(TARGETS, MASK))
    for row, ranks in zip(masked, np.asarray(got["decoder_ranks"]), strict=True):
        assert ranks[row].tolist() == list(range(1, row.sum() + 1))
        assert not ranks[~row].any()
    np.testing.assert_array_equal(got["decoder_reads"], got["decoder_ranks"])


def test_nonsense_is_refused():
    for options, said in (
        ({"mask_token": -1}, "mask_token=-1"),
        ({"mask_token": 1, "low": 0.9, "high": 0.8}, "low=0.9 and high=0.8"),
        ({"mask_token": 1, "warmup": 0}, "warmup=0"),
    ):
        with pytest.raises(ValueError, match=said):
            AnyOrder(**options)
