"""The transformer equals a NumPy reference, looks at nothing it must not, and runs every way to the same numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import HeadSpec
from mlm.models.families import t5_style
from mlm.models.positions import relative_bucket
from mlm.models.presets import preset
from mlm.models.transformer import Transformer
from tests.models import rows
from tests.models.rows import logits_of

SMALL = t5_style(vocab_size=19, d_model=12, d_ff=10, heads=3, head_dim=4, layers=(2, 2))
B, S, T = 2, 7, 6


@pytest.fixture(scope="module")
def params():
    return Transformer(SMALL).init(jax.random.key(0))


batch_of = partial(rows.batch_of, source_length=S, target_length=T)
ROWS = [([5, 6, 7, 8, 9, 10, 1], [3, 4, 5, 6, 7, 1]), ([11, 12, 13, 1], [14, 15, 1])]


def reference(params, batch):
    """T5 1.1 in NumPy loops over layers and heads, written from the paper's equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def attention(x, states, w, mask, bias):
        out = np.zeros_like(x)
        for h in range(3):
            q, k, v = x @ w["query"][:, h], states @ w["key"][:, h], states @ w["value"][:, h]
            scores = np.where(mask, q @ k.T + (0 if bias is None else bias[h]), -1e10)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            out += probs / probs.sum(-1, keepdims=True) @ v @ w["out"][h]
        return out

    def stack(p, x, segments, causal, memory=None, memory_segments=None):
        n = np.arange(len(x))
        bucket = relative_bucket(
            jnp.asarray(n[None] - n[:, None]), bidirectional=not causal, buckets=32, max_distance=128
        )
        bias = p["position"][:, np.asarray(bucket)]
        mask = (segments[:, None] == segments[None]) & (segments[None] > 0) & (~causal | (n[None] <= n[:, None]))
        for i in range(2):
            layer = jax.tree.map(lambda w, i=i: w[i], p["layers"]["0"])
            a = layer["self_attention"]
            h = norm(x, a["norm"]["scale"])
            x = x + attention(h, h, a, mask, bias)
            if memory is not None:
                a = layer["cross_attention"]
                cross = (segments[:, None] == memory_segments[None]) & (memory_segments[None] > 0)
                x = x + attention(norm(x, a["norm"]["scale"]), memory, a, cross, None)
            f = layer["ffn"]
            h = norm(x, f["norm"]["scale"])
            g = h @ f["gate"]
            gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
            x = x + (gelu * (h @ f["up"])) @ f["down"]
        return norm(x, p["final_norm"]["scale"])

    rows = []
    for row in range(len(batch["encoder_input_tokens"])):
        get = {k: np.asarray(v[row]) for k, v in batch.items()}
        seg_e, seg_d = get["encoder_segment_ids"], get["decoder_segment_ids"]
        memory = stack(p["encoder"], p["embedding"][get["encoder_input_tokens"]], seg_e, np.bool_(False))
        x = p["embedding"][get["decoder_input_tokens"]]
        rows.append(stack(p["decoder"], x, seg_d, np.bool_(True), memory, seg_e) @ p["head"])
    return np.stack(rows)


def test_logits_equal_the_numpy_reference(params):
    batch = batch_of(ROWS)
    got, want = logits_of(Transformer(SMALL), params, batch), reference(params, batch)
    real = np.asarray(batch["decoder_segment_ids"]) > 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "full"}, {"remat": "minimal"}, {"remat": "dots"}])
def test_scan_and_remat_do_not_change_loss_or_gradients(params, change):
    def loss(params, config):
        return jnp.mean(jnp.square(logits_of(Transformer(config), params, batch_of(ROWS))))

    def stacks(**change):
        return dataclasses.replace(
            SMALL,
            encoder=dataclasses.replace(SMALL.encoder, **change),
            decoder=dataclasses.replace(SMALL.decoder, **change),
        )

    want = jax.value_and_grad(loss)(params, SMALL)
    got = jax.value_and_grad(loss)(params, stacks(**change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_every_remat_policy_computes_more_again_than_the_one_before(params, attention):
    """FLOPs of a gradient: a policy that keeps nothing of what it promises would cost as much as "full"."""

    def flops(remat):
        stacks = {n: dataclasses.replace(s, remat=remat, attention=attention) for n, s in SMALL.stacks().items()}
        model = Transformer(dataclasses.replace(SMALL, **stacks))
        gradient = jax.grad(lambda params: jnp.sum(model(params, batch_of(ROWS)).hidden))
        return jax.jit(gradient).lower(params).compile().cost_analysis()["flops"]

    none, minimal, full = map(flops, ("none", "minimal", "full"))
    assert none < minimal < full


def test_packed_rows_equal_unpacked_ones(params):
    """Two examples in one row, segments 1 and 2, give each the logits it has alone."""
    model = Transformer(SMALL)
    first, second = ([5, 6, 1], [3, 4, 1]), ([11, 12, 13, 1], [14, 15, 1])
    alone = logits_of(model, params, batch_of([first, second]))
    packed = {
        "encoder_input_tokens": jnp.array([first[0] + second[0]]),
        "encoder_segment_ids": jnp.array([[1, 1, 1, 2, 2, 2, 2]]),
        "decoder_input_tokens": jnp.array([[0, 3, 4, 0, 14, 15]]),
        "decoder_segment_ids": jnp.array([[1, 1, 1, 2, 2, 2]]),
    }
    together = logits_of(model, params, packed)
    np.testing.assert_allclose(together[0, :3], alone[0, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[0, 3:], alone[1, :3], rtol=1e-5, atol=1e-5)


def test_decoder_sees_only_the_past_and_the_whole_source(params):
    """By gradient: the logits at t depend on no decoder input after t, and on every source token."""
    model, batch = Transformer(SMALL), batch_of(ROWS[:1])
    t = 2

    def influence(one_hot_source, one_hot_target):
        # Tokens as rows of the table, so that gradients with respect to positions exist.
        soft = dict(params, embedding=jnp.concatenate([one_hot_source, one_hot_target]) @ params["embedding"])
        moved = dict(
            batch,
            encoder_input_tokens=jnp.arange(S)[None],
            decoder_input_tokens=S + jnp.arange(T)[None],
        )
        return model.logits(params, model(soft, moved).hidden)[0, t].sum()

    hot = jax.nn.one_hot(batch["encoder_input_tokens"][0], 19), jax.nn.one_hot(batch["decoder_input_tokens"][0], 19)
    source, target = jax.grad(influence, argnums=(0, 1))(*hot)
    assert (target[t + 1 :] == 0).all()
    assert (jnp.abs(target[: t + 1]).sum(-1) > 0).all()
    assert (jnp.abs(source).sum(-1) > 0).all()


def test_padding_changes_nothing(params):
    """Token ids under padding, and more of it, leave real positions alone."""
    model, batch = Transformer(SMALL), batch_of(ROWS)
    noisy = dict(
        batch, encoder_input_tokens=jnp.where(batch["encoder_segment_ids"] == 0, 9, batch["encoder_input_tokens"])
    )
    got, want = logits_of(model, params, noisy), logits_of(model, params, batch)
    np.testing.assert_allclose(got[1, :3], want[1, :3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [[1] * T, [4, 2], [2, 1, 1, 2]])
def test_cached_blocks_equal_the_full_forward(params, blocks):
    model, batch = Transformer(SMALL), batch_of(ROWS[:1] * 2)
    encoded = model.encode(params, batch["encoder_input_tokens"], batch["encoder_segment_ids"])
    cache = model.init_cache(params, encoded, batch["encoder_segment_ids"] > 0, rows=2, length=T + 3)
    got, at = [], 0
    for size in blocks:
        logits, _, cache = model.step(params, batch["decoder_input_tokens"][:, at : at + size], cache)
        cache = dict(cache, length=cache["length"] + size)
        got.append(logits)
        at += size
    want = logits_of(model, params, batch)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-5, atol=1e-5)


def test_a_block_not_committed_is_forgotten(params):
    model, batch = Transformer(SMALL), batch_of(ROWS[:1])
    encoded = model.encode(params, batch["encoder_input_tokens"])
    cache = model.init_cache(params, encoded, batch["encoder_input_tokens"] > 0, rows=1, length=8)
    _, _, cache = model.step(params, jnp.array([[0]]), cache)
    cache = dict(cache, length=cache["length"] + 1)
    _, _, dirty = model.step(params, jnp.array([[7, 8, 9]]), cache)  # a rejected draft
    want, _, _ = model.step(params, jnp.array([[3]]), cache)
    got, _, _ = model.step(params, jnp.array([[3]]), dirty)
    np.testing.assert_array_equal(got, want)


def test_beams_share_the_cross_keys_of_their_source(params):
    model, batch = Transformer(SMALL), batch_of(ROWS)
    encoded = model.encode(params, batch["encoder_input_tokens"])
    mask = batch["encoder_input_tokens"] > 0
    cache = model.init_cache(params, encoded, mask, rows=6, length=4)
    assert cache["cross"][0]["cross_attention"]["key"].shape[0] == B
    logits, _, _ = model.step(params, jnp.zeros((6, 1), jnp.int32), cache)
    single, _, _ = model.step(params, jnp.zeros((B, 1), jnp.int32), model.init_cache(params, encoded, mask, B, 4))
    np.testing.assert_allclose(logits.reshape(B, 3, 19), np.repeat(single, 3, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"rows=3 must be a multiple of the 2 sources"):
        model.init_cache(params, encoded, mask, rows=3, length=4)


def test_dropout_needs_a_key_and_keeps_the_expectation():
    config = preset("tiny", dropout=0.5, vocab_size=19)
    model = Transformer(config)
    params, batch = model.init(jax.random.key(1)), batch_of(ROWS)
    plain = Transformer(preset("tiny", vocab_size=19))(params, batch).hidden
    np.testing.assert_array_equal(model(params, batch).hidden, plain)
    one, two = (model(params, batch, jax.random.key(k)).hidden for k in (1, 2))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, model(params, batch, jax.random.key(1)).hidden)


def test_tied_head_is_the_scaled_input_table():
    config = dataclasses.replace(SMALL, head=HeadSpec(kind="tied", multiply=12**-0.5))
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    assert "head" not in params
    np.testing.assert_allclose(
        model.head(params, jnp.ones((1, 1, 12)))[1], params["embedding"].T / np.sqrt(12), rtol=1e-6
    )
    assert 0.3 < float(jnp.std(logits_of(model, params, batch_of(ROWS)))) < 3.0


def test_bfloat16_compute_keeps_float32_masters_and_close_logits(params):
    model = Transformer(dataclasses.replace(SMALL, dtype="bfloat16"))
    logits = logits_of(model, params, batch_of(ROWS))
    assert logits.dtype == jnp.float32
    assert model(params, batch_of(ROWS)).hidden.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(logits, logits_of(Transformer(SMALL), params, batch_of(ROWS)), atol=0.1)


def test_initial_weights_have_t5_scales():
    model = Transformer(preset("tiny", vocab_size=1000))
    params = model.init(jax.random.key(0))
    a = params["decoder"]["layers"]["0"]["self_attention"]
    for got, want in [
        (params["embedding"], 1.0),
        (params["head"], 128**-0.5),
        (a["query"], (128 * 32) ** -0.5),
        (a["key"], 128**-0.5),
        (a["out"], (4 * 32) ** -0.5),
        (params["encoder"]["layers"]["0"]["ffn"]["down"], 256**-0.5),
    ]:
        np.testing.assert_allclose(jnp.std(got), want, rtol=0.03)
