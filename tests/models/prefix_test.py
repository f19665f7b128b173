"""Prefix language models: a decoder alone whose prefix is read both ways, on every path and from a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import ModelConfig, StackConfig
from mlm.models.sight import Sight
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec, PositionSpec
from mlm.models.transformer import Transformer
from tests.models.rows import logits_of

V, T = 23, 12
# Buckets in every other layer, ALiBi and a window in the others.
KINDS = (PositionSpec(), None), (PositionSpec(kind="alibi"), 4)
CONFIG = ModelConfig(
    vocab_size=V,
    d_model=12,
    encoder=None,
    decoder=StackConfig(
        group=tuple(
            LayerSpec(
                sublayers=(
                    AttentionSpec(source="self", heads=2, head_dim=4, position=position, window=window),
                    FFNSpec(d_ff=10),
                )
            )
            for position, window in KINDS
        ),
        repeats=2,
        causal=True,
    ),
)
FIRST, SECOND = ([4, 5, 6, 7, 8, 9, 10], 4), ([11, 12, 13, 14, 15], 2)  # tokens, and how many are the prefix


@pytest.fixture(scope="module", params=["plain", "blockwise"])
def model(request):
    return Transformer(
        dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, attention=request.param))
    )


@pytest.fixture(scope="module")
def params():
    return Transformer(CONFIG).init(jax.random.key(0))


def row(*examples):
    """A row of packed (tokens, length of the prefix), padded to T."""
    row = {name: np.zeros((1, T), np.int32) for name in ("input_tokens", "segment_ids", "causal_attention")}
    start = 0
    for number, (tokens, prefix) in enumerate(examples, 1):
        row["input_tokens"][0, start : start + len(tokens)] = tokens
        row["segment_ids"][0, start : start + len(tokens)] = number
        row["causal_attention"][0, start : start + prefix] = 1
        start += len(tokens)
    return {f"decoder_{name}": jnp.asarray(x) for name, x in row.items()}


def test_mask_golden():
    """A prefix of three in a row of five; then with a window of two, which reaches one token both ways within it."""
    flags = jnp.array([[True] * 3 + [False] * 2])
    sight = Sight(shape=(5, 5), causal=True, prefix=(flags, flags))
    want = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert sight.mask()[0, 0].astype(int).tolist() == want
    want = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert dataclasses.replace(sight, window=2).mask()[0, 0].astype(int).tolist() == want


def test_packed_equals_unpacked(model, params):
    together = logits_of(model, params, row(FIRST, SECOND))
    for start, example in ((0, FIRST), (7, SECOND)):
        length = len(example[0])
        alone = logits_of(model, params, row(example))[0, :length]
        np.testing.assert_allclose(together[0, start : start + length], alone, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_whole_prefix_and_no_later_future(model, params):
    batch = row(FIRST, SECOND)
    own = dict(batch, decoder_input_tokens=jnp.arange(T)[None])

    def influence(rows, t):
        return jnp.sum(model(dict(params, embedding=rows), own).hidden[0, t])

    rows = params["embedding"][batch["decoder_input_tokens"][0]]
    seen = {
        t: np.asarray(jnp.abs(jax.jit(jax.grad(influence), static_argnums=1)(rows, t)).sum(-1) > 0) for t in (0, 5, 8)
    }
    assert seen[0].tolist() == [True] * 4 + [False] * 8  # in the first prefix: all of it
    assert seen[5].tolist() == [True] * 6 + [False] * 6  # behind it: what came before
    assert seen[8].tolist() == [False] * 7 + [True] * 2 + [False] * 3  # the second example


def test_without_the_feature_a_decoder_is_causal_and_with_a_prefix_of_nothing_too(model, params):
    batch = row(FIRST)
    nothing = dict(batch, decoder_causal_attention=jnp.zeros((1, T), jnp.int32))
    plain = {name: x for name, x in batch.items() if name != "decoder_causal_attention"}
    want = logits_of(model, params, plain)[0, :7]
    np.testing.assert_allclose(logits_of(model, params, nothing)[0, :7], want, rtol=1e-6, atol=1e-6)
    assert not np.allclose(logits_of(model, params, batch)[0, :7], want, atol=1e-3)


def test_a_prefix_read_as_one_block_and_steps_after_it_equal_the_whole(model, params):
    """Two rows whose prefixes differ in length: the shorter block is filled with tokens that are not committed."""
    whole = [logits_of(model, params, row(example))[0] for example in (FIRST, SECOND)]
    prefixes = jnp.array([4, 2])
    tokens = jnp.array([FIRST[0][:5], [*SECOND[0][:2], 0, 0, 0]])
    flags = jnp.arange(5) < prefixes[:, None]
    ready = model.unrolled(params)
    logits, _, cache = model.step(ready, tokens, model.init_cache(ready, None, None, 2, T), flags)
    for i, prefix in enumerate((5, 2)):  # the first row's fifth token is no part of the prefix, and causal
        np.testing.assert_allclose(logits[i, :prefix], whole[i][:prefix], rtol=1e-4, atol=1e-5)
    cache = {**cache, "length": prefixes}
    for t in range(3):
        now = jnp.array([[FIRST[0][4 + t]], [SECOND[0][2 + t]]])
        logits, _, cache = model.step(ready, now, cache)
        cache = {**cache, "length": cache["length"] + 1}
        for i, prefix in enumerate((4, 2)):
            np.testing.assert_allclose(logits[i, 0], whole[i][prefix + t], rtol=1e-4, atol=1e-5)
