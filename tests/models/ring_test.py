"""A windowed layer keeps its newest keys in a ring, and says what it says with all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import ModelConfig, StackConfig
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec, PositionSpec, SeqPESpec
from mlm.models.transformer import Transformer
from mlm.models.tree import Tree
from tests.models.members_test import made

BLOCK = 4
ROW = [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


def opened(model, params, block):
    if model.config.encoder is None:
        return model.init_cache(params, None, None, 2, 20, block=block)
    sources = jnp.array([[5, 6, 7, 8, 1], [9, 1, 0, 0, 0]])
    return model.init_cache(params, model.encode(params, sources), sources > 0, 2, 20, block=block)


def sizes(cache):
    return {leaf.shape[2] for leaf in jax.tree.leaves(cache["self"])}


# t5gemma2 attends jointly, five windowed layers before a whole one; gemma_3 is a decoder alone.
@pytest.mark.parametrize("name", ["t5gemma2", pytest.param("gemma_3", marks=pytest.mark.slow)])
def test_a_ring_goes_round_and_back(name):
    """Blocks of up to four are read, some of their tokens counted, the others replaced; the last block is a tree."""
    model, params = made(name)
    step = jax.jit(model.step, static_argnames="tree")
    whole, ring = opened(model, params, None), opened(model, params, BLOCK)
    assert sizes(whole) == {20}
    assert sizes(ring) == {20, 3 + BLOCK - 1}
    tokens = jnp.array([ROW, ROW[::-1]])
    read = jnp.array([0, 0])
    moves = [([4, 2], None), ([1, 4], None), ([3, 3], None), ([4, 4], None), ([2, 1], Tree((-1, 0, 0, 1)))]
    for counted, tree in moves:
        block = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (BLOCK,)))(tokens, read)
        (want, _, whole), (got, _, ring) = (step(params, block, cache, tree=tree) for cache in (whole, ring))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        read = read + jnp.array(counted)
        whole, ring = ({**cache, "length": read} for cache in (whole, ring))
    assert read.max() > 2 * (3 + BLOCK - 1)


@pytest.mark.parametrize("kind", ["alibi", "t5_bucket", "seqpe"])
def test_layers_with_and_without_a_window_share_positions(kind):
    """What they add to the logits is not shared, as they see other keys. A block that is too long is refused."""
    reader = SeqPESpec(digits=2, width=32, heads=2, layers=1, trained=32) if kind == "seqpe" else None
    position = PositionSpec(kind=kind, seqpe=reader) if reader else PositionSpec(kind=kind)
    attention = [AttentionSpec(source="self", heads=2, head_dim=4, window=w, position=position) for w in (3, None, 5)]
    layers = tuple(LayerSpec(sublayers=(spec, FFNSpec(d_ff=8))) for spec in attention)
    decoder = StackConfig(group=layers, repeats=1, causal=True)
    model = Transformer(ModelConfig(vocab_size=23, d_model=8, encoder=None, decoder=decoder))
    params = model.init(jax.random.key(0))
    step = jax.jit(model.step)
    whole, ring = opened(model, params, None), opened(model, params, 2)
    assert sizes(ring) == {4, 6, 20}
    tokens = jnp.array([ROW, ROW[::-1]])
    for at in range(0, 14, 2):
        (want, _, whole), (got, _, ring) = (step(params, tokens[:, at : at + 2], cache) for cache in (whole, ring))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        whole, ring = ({**cache, "length": cache["length"] + 2} for cache in (whole, ring))
    with pytest.raises(ValueError, match=r"a block of 3 tokens.* takes blocks of 2; .*init_cache\(block=3\)"):
        step(params, tokens[:, :3], ring)
