"""Masked blocks against a plain loop, and what the loss of a batch makes of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.transformer import Transformer
from mlm.objectives.mask_block import masked
from mlm.training.step import evaluation_step
from mlm.training.trainer import TrainConfig, _masking, make_loss
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of

MASK = 63
PACKED = jax.tree.map(jnp.asarray, rows_of([examples(3, seed=seed) for seed in range(4)], source=24, target=16))
OPTIONS = {"objective": "mask_block", "block": 4, "mask_token": MASK, "z_loss": 0.0}


def reference(batch, cuts, block):
    """The batch with a block behind the cut of each row, token by token."""
    out = {name: np.array(x) for name, x in batch.items()}
    out["decoder_causal_attention"] = np.zeros_like(batch["decoder_input_tokens"])
    out["decoder_loss_weights"] = np.zeros_like(batch["decoder_loss_weights"])
    for row, cut in enumerate(cuts):
        for t in range(cut, min(cut + block, batch["decoder_input_tokens"].shape[1])):
            if batch["decoder_segment_ids"][row, t] == batch["decoder_segment_ids"][row, cut]:
                out["decoder_loss_weights"][row, t] = batch["decoder_loss_weights"][row, t]
            for name in ("decoder_segment_ids", "decoder_language_ids", "decoder_task_ids"):
                out[name][row, t] = batch[name][row, cut]
            out["decoder_positions"][row, t] = batch["decoder_positions"][row, cut] + t - cut
            if t > cut:
                out["decoder_input_tokens"][row, t] = MASK
                out["decoder_causal_attention"][row, t] = 1
    return out


@pytest.mark.parametrize("block", [1, 4, 30])
def test_blocks_are_those_of_a_plain_loop(block):
    """Wherever the cut fell: the first position that still counts."""
    for seed in range(3):
        got = jax.device_get(jax.jit(masked, static_argnums=(2, 3))(PACKED, jax.random.key(seed), block, MASK))
        cuts = got["decoder_loss_weights"].argmax(1)
        assert (PACKED["decoder_loss_weights"][np.arange(4), cuts] == 1).all()
        want = reference(PACKED, cuts, block)
        assert got.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_every_target_is_as_often_the_first_of_a_block():
    """2000 draws for 5 targets, EOS included: 400 each, standard deviation 18; padding never."""
    batch = jax.tree.map(jnp.asarray, rows_of([[([5, 6], [7, 8, 9, 10, 1], 1)]], target=9))
    cuts = jax.vmap(lambda key: masked(batch, key, 2, MASK)["decoder_loss_weights"][0].argmax())(
        jax.random.split(jax.random.key(0), 2000)
    )
    counts = np.bincount(cuts, minlength=9)
    assert (np.abs(counts[:5] - 400) < 4 * 18).all()
    assert counts[5:].sum() == 0


def test_a_loss_is_that_of_the_masked_batch():
    """An evaluation draws the same cuts every time. What the decoder would read of the hidden targets has no part."""
    model = Transformer(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))
    train = TrainConfig(steps=1, **OPTIONS)
    loss_of = make_loss(model, train, LANGUAGES)
    evaluate = jax.jit(partial(evaluation_step, loss_fn=loss_of, prepare=_masking(model, train)))
    got, shown = evaluate(params, PACKED), masked(PACKED, jax.random.key(0), 4, MASK)
    want = jax.jit(loss_of)(params, shown, None)
    np.testing.assert_allclose(got["loss"][0], want.sum, rtol=1e-5)
    assert float(got["loss"][1]) == float(shown["decoder_loss_weights"].sum())
    other = jnp.where(shown["decoder_causal_attention"] > 0, 9, PACKED["decoder_input_tokens"])
    assert (other != PACKED["decoder_input_tokens"]).any()
    unseen = evaluate(params, {**PACKED, "decoder_input_tokens": other})
    np.testing.assert_allclose(unseen["loss"][0], got["loss"][0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mask_block"}, "needs both"),
        ({"objective": "mask_block", "block": 4}, "needs both"),
        ({"block": 4, "mask_token": 3}, "must leave both out"),
        ({"objective": "mask_block", "block": 0, "mask_token": 3}, "block=0 must be at least 1"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **options)


def test_a_mask_outside_the_vocabulary_and_a_second_prefix_are_refused():
    with pytest.raises(ValueError, match="mask_token=64 is outside the model's vocabulary of 64"):
        _masking(Transformer(MODEL), TrainConfig(steps=1, **OPTIONS | {"mask_token": 64}))
    with pytest.raises(ValueError, match="a prefix of its own"):
        masked({**PACKED, "decoder_causal_attention": PACKED["decoder_segment_ids"]}, jax.random.key(0), 4, MASK)
