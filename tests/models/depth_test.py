"""What keeps deep stacks and small data in hand: initial weights that shrink with depth, input rows of one length."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import HeadSpec
from mlm.models.families import t5_style, t5gemma
from mlm.models.layers import Pass
from mlm.models.specs import EmbeddingSpec, ResidualSpec
from mlm.models.transformer import Transformer
from tests.models import rows
from tests.models.rows import logits_of

batch_of = partial(rows.batch_of, source_length=5, target_length=4)
BATCH = batch_of([([5, 6, 7, 1], [3, 4, 1]), ([8, 9, 2, 4, 1], [3, 1])])


def encoder_of(config, rest=0, **residual):
    """The encoder alone, with other residuals."""
    changed = dataclasses.replace(config.encoder.residual, **residual)
    return dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, residual=changed, rest=rest), decoder=None
    )


def fresh(config):
    return jax.jit(Transformer(config).init)(jax.random.key(0))


def test_matrices_of_layer_l_are_those_without_over_a_power_of_l():
    """Two layers a group, one left over: depths 1 to 5. Norms keep their zeros."""
    base = t5gemma(d_model=8, d_ff=6, heads=2, kv_heads=1, head_dim=4, layers=4, vocab_size=11)
    plain, deep = (fresh(encoder_of(base, rest=1, depth_exponent=e))["encoder"] for e in (0.0, 0.25))
    for place in (0, 1):
        want = (np.array([1.0, 3.0]) + place) ** -0.25
        for part, matrix in (("self_attention", "query"), ("self_attention", "out"), ("ffn", "gate"), ("ffn", "down")):
            a, b = (tree["layers"][str(place)][part] for tree in (plain, deep))
            factors = want.reshape(2, *(1,) * (a[matrix].ndim - 1))
            np.testing.assert_allclose(b[matrix], a[matrix] * factors, rtol=1e-5, atol=1e-8)
            np.testing.assert_array_equal(a["norm"]["scale"], b["norm"]["scale"])
    np.testing.assert_allclose(deep["rest"]["0"]["ffn"]["up"], plain["rest"]["0"]["ffn"]["up"] * 5**-0.25, rtol=1e-5)


def test_the_variance_of_a_matrix_falls_as_its_depth_grows():
    """DS-Init's amplitude l^-1/2 is a variance of 1/l: of D^-1/2 squared over l."""
    base = t5_style(vocab_size=9, d_model=64, d_ff=64, heads=4, head_dim=16, layers=(9, 1))
    up = fresh(encoder_of(base, depth_exponent=0.5))["encoder"]["layers"]["0"]["ffn"]["up"]
    np.testing.assert_allclose(64 * np.var(up, axis=(1, 2)), 1 / np.arange(1, 10), rtol=0.1)


def test_64_layers_after_norm_stay_finite_and_remember_what_entered():
    """A post-norm sublayer of unit output leaves 2^-1/2 of its input: of 128 nothing is left. Outputs that shrink with
    depth, by two or three matrices of l^-1/2 each, leave most of it.
    """
    base = t5_style(vocab_size=11, d_model=32, d_ff=32, heads=2, head_dim=16, layers=(64, 1))
    plain, deep = (encoder_of(base, order="post", depth_exponent=e) for e in (0.0, 0.5))
    model = Transformer(plain)
    entered = BATCH["encoder_input_tokens"]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden = model(params, BATCH).hidden
        rows = params["embedding"][entered]
        cosine = jnp.sum(hidden * rows, -1) / jnp.linalg.norm(hidden, axis=-1) / jnp.linalg.norm(rows, axis=-1)
        return -jnp.mean(jax.nn.log_softmax(model.logits(params, hidden))[..., 3]), jnp.mean(cosine)

    (value, kept), grads = loss(fresh(deep))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    (_, lost), _ = loss(fresh(plain))
    assert kept > 0.5, kept
    assert abs(lost) < 0.2, lost


def test_rows_of_one_length_whatever_the_table():
    """A table ten times as large gives the same logits, by input and by tied head; a row enters with length 3."""
    embedding = EmbeddingSpec(fix_norm=True, multiply=3.0)
    base = t5_style(vocab_size=11, d_model=8, d_ff=6, heads=2, head_dim=4, layers=(1, 1))
    stacks = {n: dataclasses.replace(s, embedding=embedding) for n, s in base.stacks().items()}
    model = Transformer(dataclasses.replace(base, **stacks, head=HeadSpec(kind="tied")))
    params = fresh(model.config)
    larger = params | {"embedding": 10.0 * params["embedding"]}
    want = logits_of(model, params, BATCH)
    np.testing.assert_allclose(logits_of(model, larger, BATCH), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(model.head(params, jnp.ones((1, 1, 8)))[1], axis=0), 1.0, rtol=1e-5)
    rows, at = params["embedding"][jnp.arange(4)[None]], jnp.arange(4)[None]
    entered = model._stacks["decoder"].enter(params["decoder"], rows, at, Pass(real=at >= 0))
    np.testing.assert_allclose(jnp.linalg.norm(entered, axis=-1), 3.0, rtol=1e-5)


@pytest.mark.parametrize("exponent", [-0.5, 1.5])
def test_an_exponent_out_of_range_is_refused(exponent):
    with pytest.raises(ValueError, match=f"depth_exponent={exponent} must be in .0, 1.; DS-Init has 0.5"):
        ResidualSpec(depth_exponent=exponent)
