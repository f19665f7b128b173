"""What a model shows of its inside: attention weights by name, the same numbers on every path, free where not asked."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.families import gemma_3, sparse, t5_style
from mlm.models.positions import relative_bucket
from mlm.models.specs import RouterSpec
from mlm.models.transformer import Transformer

V, HEADS, S, T = 19, 3, 8, 6
T5 = t5_style(vocab_size=V, d_model=12, d_ff=10, heads=HEADS, head_dim=4, layers=(2, 3))
# Joint attention in groups of six layers and two more.
JOINT = gemma_3(
    d_model=8, d_ff=8, heads=2, kv_heads=1, head_dim=4, layers=8, window=3, factor=1.0, encoder=True, vocab_size=V
)
BATCH = {  # two examples and padding in a row, one alone
    "encoder_input_tokens": jnp.array([[5, 6, 7, 1, 8, 9, 1, 0], [11, 12, 13, 14, 15, 16, 17, 1]]),
    "encoder_segment_ids": jnp.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8]),
    "decoder_input_tokens": jnp.array([[0, 3, 4, 0, 9, 0], [0, 5, 6, 7, 8, 9]]),
    "decoder_segment_ids": jnp.array([[1, 1, 1, 2, 2, 0], [1] * 6]),
}
NAMES = ("encoder/self_attention", "decoder/self_attention", "decoder/cross_attention")


@cache
def shown(attention):
    """(parameters, the probabilities of all attention) of T5 on a path."""
    config = on(T5, attention)
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    asked = [f"{name}/probabilities" for name in NAMES]
    return params, jax.jit(lambda params: model(params, BATCH, taps=asked).taps)(params)


def on(config, attention):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(s, attention=attention) for name, s in config.stacks().items()}
    )


def allowed(name):
    """Who sees whom, [B, 1, T, M], by the segments and the decoder's order."""
    queries = np.asarray(BATCH[f"{name.split('/')[0]}_segment_ids"])
    keys = np.asarray(BATCH["encoder_segment_ids"]) if "cross" in name else queries
    mask = (queries[:, :, None] == keys[:, None]) & (keys[:, None] > 0)
    if name == "decoder/self_attention":
        mask &= np.tril(np.ones((T, T), bool))
    return mask[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_one_and_other_examples_get_nothing(name):
    weights = np.asarray(shown("plain")[1][f"{name}/probabilities"])
    side = name.split("/")[0]
    lengths = {"encoder": S, "decoder": T}
    keys = S if "cross" in name else lengths[side]
    assert weights.shape == (T5.stacks()[side].layers, 2, HEADS, lengths[side], keys)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    real = np.asarray(BATCH[f"{side}_segment_ids"]) > 0
    seen = np.broadcast_to(allowed(name), weights.shape[1:])
    for layer in weights:
        assert (layer[~seen & real[:, None, :, None]] == 0).all()
        assert (layer[seen] > 0).all()


def test_the_first_layer_s_weights_are_numpy_s_softmax():
    params, taps = shown("plain")
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
    own = jax.tree.map(lambda x: x[0], p["layers"]["0"]["self_attention"])
    x = np.asarray(params["embedding"], np.float64)[np.asarray(BATCH["decoder_input_tokens"])]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * own["norm"]["scale"]
    n = jnp.arange(T)
    bucket = relative_bucket(n[None] - n[:, None], bidirectional=False, buckets=32, max_distance=128)
    logits = np.einsum("btd,dhk,bse,ehk->bhts", x, own["query"], x, own["key"]) + p["position"][:, np.asarray(bucket)]
    weights = np.exp(logits) * allowed("decoder/self_attention")
    real = np.asarray(BATCH["decoder_segment_ids"])[:, None, :] > 0
    got = np.moveaxis(np.asarray(taps["decoder/self_attention/probabilities"][0]), 1, 2)
    weights = np.moveaxis(weights, 1, 2)[real[:, 0]]
    np.testing.assert_allclose(got[real[:, 0]], weights / weights.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_a_path_that_holds_no_weights_steps_aside_where_they_are_asked_for():
    """The same weights, and only of the sublayer that is asked: the others keep to their path."""
    plain, blocks = shown("plain")[1], shown("blockwise")[1]
    for name, want in plain.items():
        np.testing.assert_allclose(blocks[name], want, rtol=1e-4, atol=1e-6)
    model, params = Transformer(on(T5, "blockwise")), shown("plain")[0]
    run = jax.jit(lambda params, taps: model(params, BATCH, taps=taps), static_argnums=1)
    names = tuple(f"{name}/probabilities" for name in NAMES[:1])
    np.testing.assert_allclose(run(params, names).hidden, run(params, ()).hidden, rtol=1e-4, atol=1e-5)
    texts = [run.lower(params, asked).as_text().count("stablehlo.while") for asked in (names, ())]
    assert 0 < texts[0] < texts[1]


def test_joint_attention_shows_own_keys_then_the_source_s():
    model = Transformer(JOINT)
    assert "decoder/joint_attention/probabilities" in model.tap_names()
    params = model.init(jax.random.key(0))
    name = "decoder/joint_attention/probabilities"
    weights = jax.jit(lambda params: model(params, BATCH, taps=[name]).taps[name])(params)
    assert weights.shape == (8, 2, 2, T, T + S)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    real = np.broadcast_to((BATCH["decoder_segment_ids"] > 0)[:, None], weights.shape[:4])
    cross = np.broadcast_to(allowed("decoder/cross_attention"), (*weights.shape[:4], S))
    np.testing.assert_array_equal(np.asarray(weights[..., T:])[real] > 0, cross[real])


def test_what_is_not_asked_for_costs_nothing():
    """No layer's weights outlive it: the compiled pass has no array of all layers'."""
    model, name = Transformer(T5), "decoder/self_attention/probabilities"

    def compiled(taps):
        return jax.jit(lambda params: model(params, BATCH, taps=taps)).lower(shown("plain")[0]).compile().as_text()

    assert [f"f32[3,2,{HEADS},{T},{T}]" in compiled(taps) for taps in ([name], [])] == [True, False]


def test_names_are_those_of_the_sublayers():
    model = Transformer(sparse(T5, RouterSpec(experts=2), every=2))
    assert model.tap_names() == (
        "encoder/hidden",
        "encoder/self_attention/probabilities",
        "encoder/ffn/activations",
        "encoder/moe/probabilities",
        "decoder/hidden",
        "decoder/self_attention/probabilities",
        "decoder/cross_attention/probabilities",
        "decoder/ffn/activations",
        "decoder/moe/probabilities",
    )
    with pytest.raises(KeyError, match="did you mean 'encoder/self_attention/probabilities'"):
        model({}, BATCH, taps=["encoder/self_atention/probabilities"])
