"""Text to text: one division by the global weight, and every token counted for its own language."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.objectives import OBJECTIVES, text_to_text

D, V, L = 8, 11, 5
# Two packed rows: languages 2 then 3, and language 3 then padding. Sources may be in another language (1: English).
BATCH = {
    "encoder_segment_ids": [[1, 1, 1, 2], [1, 1, 0, 0]],
    "encoder_language_ids": [[1, 1, 1, 3], [1, 1, 0, 0]],
    "decoder_target_tokens": [[4, 5, 1, 6, 1], [7, 1, 0, 0, 0]],
    "decoder_segment_ids": [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
    "decoder_positions": [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]],
    "decoder_language_ids": [[2, 2, 2, 3, 3], [3, 3, 0, 0, 0]],
    "decoder_loss_weights": [[1.0, 1.0, 1.0, 1.0, 0.5], [1.0, 1.0, 0.0, 0.0, 0.0]],
}


def arrays():
    batch = {name: jnp.asarray(x, jnp.float32 if "weights" in name else jnp.int32) for name, x in BATCH.items()}
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    return hidden, jnp.asarray(rng.normal(size=(D, V)), jnp.float32), batch


def nll_and_log_z(hidden, kernel, batch):
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    label = np.take_along_axis(logits, np.asarray(batch["decoder_target_tokens"])[..., None], -1)[..., 0]
    return log_z - label, log_z, logits.argmax(-1) == np.asarray(batch["decoder_target_tokens"])


def test_sums_and_weights_against_numpy():
    hidden, kernel, batch = arrays()
    loss = text_to_text(hidden, kernel, batch, num_languages=L, z_loss=0.01)
    nll, log_z, correct = nll_and_log_z(hidden, kernel, batch)
    weights = np.asarray(BATCH["decoder_loss_weights"])
    languages = np.asarray(BATCH["decoder_language_ids"])
    want = {
        "nll": ((nll * weights).sum(), 6.5),
        "z_loss": ((0.01 * log_z**2 * weights).sum(), 6.5),
        "accuracy": ((correct * weights).sum(), 6.5),
        "padding": (3, 10),
        "language_nll": ([(nll * weights)[languages == i].sum() for i in range(L)], [0, 0, 3, 3.5, 0]),
        "language_target_tokens": ([0, 0, 3, 3.5, 0],) * 2,
        "language_source_tokens": ([0, 5, 0, 1, 0],) * 2,  # padding, language 0, is not counted
        "language_examples": ([0, 0, 1, 2, 0],) * 2,
    }
    assert set(loss.metrics) == set(want)
    for name, pair in want.items():
        for got, expected in zip(loss.metrics[name], pair, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    assert float(loss.weight) == 6.5
    assert float(loss.sum) == pytest.approx(float(loss.metrics["nll"][0] + loss.metrics["z_loss"][0]), rel=1e-5)


def test_smoothing_moves_the_loss_and_not_the_reported_nll():
    hidden, kernel, batch = arrays()
    plain = text_to_text(hidden, kernel, batch, num_languages=L)
    smoothed = text_to_text(hidden, kernel, batch, num_languages=L, label_smoothing=0.2)
    np.testing.assert_allclose(plain.metrics["nll"], smoothed.metrics["nll"], rtol=1e-6)
    assert float(plain.sum) != float(smoothed.sum)


def test_parts_of_a_batch_add_up_to_the_whole():
    """Rows apart, as microbatches are: sums, weights, metrics and gradients add; nothing is divided on the way."""
    hidden, kernel, batch = arrays()

    def graded(rows):
        part = {name: x[rows] for name, x in batch.items()}
        loss = lambda k: (lambda out: (out.sum, out))(text_to_text(hidden[rows], k, part, num_languages=L))  # noqa: E731
        return jax.grad(loss, has_aux=True)(kernel)

    whole = graded(slice(None))
    parts = jax.tree.map(jnp.add, graded(slice(0, 1)), graded(slice(1, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


def test_targets_without_weight_have_no_gradient():
    hidden, kernel, batch = arrays()
    gradient = jax.grad(lambda h: text_to_text(h, kernel, batch, num_languages=L).sum)(hidden)
    assert (np.abs(gradient).sum(-1) > 0).tolist() == (np.asarray(BATCH["decoder_loss_weights"]) > 0).tolist()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_row_objective_returns_a_loss(name):
    hidden, kernel, batch = arrays()
    loss = jax.jit(lambda h, k, b: OBJECTIVES[name](h, k, b, num_languages=L))(hidden, kernel, batch)
    assert loss.sum.shape == loss.weight.shape == ()
    assert all(a.shape == b.shape for a, b in loss.metrics.values())


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(KeyError, match="did you mean 'text_to_text'"):
        OBJECTIVES["text_to_txt"]
