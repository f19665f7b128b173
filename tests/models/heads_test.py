"""Heads with fewer parameters than V D: what they compute, what they cannot, and what they cost."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import HeadSpec
from mlm.models.flops import training_flops
from mlm.models.presets import t5_style
from mlm.models.specs import EmbeddingSpec
from mlm.models.transformer import Transformer
from tests.models import rows
from tests.models.rows import logits_of

V, D = 13, 8
BASE = t5_style(vocab_size=V, d_model=D, d_ff=6, heads=2, head_dim=4, layers=(1, 1))
BATCH = partial(rows.batch_of, source_length=5, target_length=4)([([5, 6, 7, 1], [3, 4, 1]), ([8, 9, 2, 4, 1], [3, 1])])


def with_rank(config, table, **head):
    stacks = {n: dataclasses.replace(s, embedding=EmbeddingSpec(rank=table)) for n, s in config.stacks().items()}
    return dataclasses.replace(config, **stacks, head=HeadSpec(**head))


def test_a_full_rank_with_the_identity_is_the_tied_head():
    plain = Transformer(dataclasses.replace(BASE, head=HeadSpec(kind="tied")))
    factorised = Transformer(with_rank(BASE, D, kind="tied"))
    params = jax.jit(plain.init)(jax.random.key(0))
    got = logits_of(factorised, params | {"embedding_up": jnp.eye(D)}, BATCH)
    np.testing.assert_allclose(got, logits_of(plain, params, BATCH), rtol=1e-5, atol=1e-5)


def test_a_product_is_the_table_it_makes():
    """Input F[ids] P and output y P^T F^T are those of the table F P; a head of its own likewise."""
    model = Transformer(with_rank(BASE, 3, kind="linear", rank=2))
    params = jax.jit(model.init)(jax.random.key(0))
    whole = {name: value for name, value in params.items() if name not in ("embedding_up", "head_down")}
    whole["embedding"] = params["embedding"] @ params["embedding_up"]
    whole["head"] = params["head_down"] @ params["head"]
    want = logits_of(Transformer(BASE), whole, BATCH)
    np.testing.assert_allclose(logits_of(model, params, BATCH), want, rtol=1e-4, atol=1e-5)


def test_parameters_flops_and_first_values_of_a_factorised_table():
    """OFA's XLM-R, V = 400,000 and D = 768: 307.2 million numbers, at rank 100 (V + D) 100."""
    large = dataclasses.replace(with_rank(BASE, 100, kind="tied"), vocab_size=400_000, d_model=768)
    shapes = Transformer(large).shapes()
    assert shapes["embedding"].size + shapes["embedding_up"].size == 40_076_800
    # Head: 6 k (D + V) in place of 6 D V a target; input: 6 k D a token of either side.
    plain = dataclasses.replace(BASE, head=HeadSpec(kind="tied"))
    more = training_flops(with_rank(BASE, 3, kind="tied"), 2, 10, 7) - training_flops(plain, 2, 10, 7)
    assert more == 2 * 6 * (3 * (D + V) * 7 - D * V * 7 + 3 * D * (10 + 7))
    params = jax.jit(Transformer(dataclasses.replace(with_rank(BASE, 50, kind="tied"), vocab_size=500)).init)(
        jax.random.key(0)
    )
    np.testing.assert_allclose(jnp.std(params["embedding"] @ params["embedding_up"]), 1.0, rtol=0.1)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="choose one of them"):
        EmbeddingSpec(rank=3, fix_norm=True)
    with pytest.raises(ValueError, match=r"rank=3 belongs to kind='linear'.*EmbeddingSpec.rank"):
        HeadSpec(kind="tied", rank=3)
    ranked = dataclasses.replace(BASE.encoder, embedding=EmbeddingSpec(rank=3))
    with pytest.raises(ValueError, match=r"encoder.embedding.rank=3, decoder.embedding.rank=None"):
        dataclasses.replace(BASE, encoder=ranked)
