"""A decoder that writes in any order: who sees whom, where tokens stand, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.config import ModelConfig, StackConfig
from mlm.models.order import Order, check_any_order, doubled
from mlm.models.sight import Sight
from mlm.models.specs import (
    AttentionSpec,
    EmbeddingSpec,
    FFNSpec,
    LayerSpec,
    PositionSpec,
    RecurrentSpec,
    RouterSpec,
    SeqPESpec,
)
from mlm.models.transformer import Transformer

V, T, MASK = 17, 8, 16
KINDS = (
    PositionSpec(),
    PositionSpec(kind="alibi"),
    PositionSpec(kind="rope"),
    PositionSpec(
        kind="seqpe", seqpe=SeqPESpec(digits=2, width=4, heads=2, layers=1, trained=8, window=2, pivots=2, candidates=2)
    ),
)


def layer(position):
    return LayerSpec(
        sublayers=(AttentionSpec(source="joint", heads=2, head_dim=4, position=position), FFNSpec(d_ff=10))
    )


ENCODER = StackConfig(
    group=(LayerSpec(sublayers=(AttentionSpec(source="self", heads=2, head_dim=4), FFNSpec(d_ff=10))),),
    repeats=1,
    causal=False,
)
DECODER = StackConfig(
    group=tuple(map(layer, KINDS)), repeats=1, causal=True, embedding=EmbeddingSpec(positions="learned", length=T)
)
MODEL = Transformer(ModelConfig(vocab_size=V, d_model=12, encoder=ENCODER, decoder=DECODER))
# Tokens and their ranks: 0 is given, the others are written in that order.
FIRST, SECOND = ([4, 5, 6, 7, 8], [1, 0, 2, 3, 0]), ([9, 10, 11], [0, 4, 5])


@pytest.fixture(scope="module")
def params():
    """Scaled up, so that what is seen matters."""
    return jax.tree.map(lambda x: 2.0 * x, MODEL.init(jax.random.key(0)))


def row(*examples):
    """A row of packed (tokens, ranks), padded to T, each with a source of its own."""
    arrays = {name: np.zeros((1, T), np.int32) for name in ("input_tokens", "segment_ids", "ranks")}
    source = {name: np.zeros((1, 4), np.int32) for name in ("input_tokens", "segment_ids")}
    start = 0
    for number, (tokens, ranks) in enumerate(examples, 1):
        here = np.s_[0, start : start + len(tokens)]
        arrays["input_tokens"][here], arrays["segment_ids"][here], arrays["ranks"][here] = tokens, number, ranks
        source["input_tokens"][0, 2 * number - 2 : 2 * number] = tokens[0], 1
        source["segment_ids"][0, 2 * number - 2 : 2 * number] = number
        start += len(tokens)
    arrays |= {"query_tokens": np.full((1, T), MASK, np.int32), "reads": arrays["ranks"]}
    batch = {f"decoder_{name}": jnp.asarray(x) for name, x in arrays.items()}
    return batch | {f"encoder_{name}": jnp.asarray(x) for name, x in source.items()}


def test_mask_golden():
    """Ranks 1 0 2: the contents, then the queries, who are seen by none but themselves."""
    batch = {
        name: jnp.array([x])
        for name, x in {
            "decoder_input_tokens": [4, 5, 6],
            "decoder_query_tokens": [MASK] * 3,
            "decoder_segment_ids": [1, 1, 1],
            "decoder_ranks": [1, 0, 2],
            "decoder_reads": [1, 0, 2],
        }.items()
    }
    both, order = doubled(batch)
    assert both["decoder_input_tokens"].tolist() == [[4, 5, 6, MASK, MASK, MASK]]
    assert both["decoder_segment_ids"].tolist() == [[1] * 6]
    want = [[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]
    want = np.concatenate([want, np.concatenate([np.zeros((3, 3)), np.eye(3)])], axis=1)
    np.testing.assert_array_equal(Sight(shape=(6, 6), order=order).mask()[0, 0], want)


@pytest.mark.parametrize("kind", ["t5_bucket", "alibi"])
def test_biases_are_those_of_the_given_places_both_ways(kind):
    """Both streams stand where an encoder's tokens stand, in a row of any order."""
    spec = PositionSpec(kind=kind)
    table = jax.random.normal(jax.random.key(1), (2, spec.buckets))
    places = jnp.array([[3, 0, 2, 1]])
    order = Order(places, jnp.zeros_like(places), jnp.ones_like(places))
    mine = Sight(shape=(4, 4), order=order, position=spec, heads=2, table=table).bias()
    along = Sight(shape=(4, 4), causal=False, position=spec, heads=2, table=table).bias()
    np.testing.assert_array_equal(mine[0], along[0][:, places[0]][:, :, places[0]])


def test_gradients_reach_lower_ranks_alone(params):
    """What a prediction knows of each content, by the tables' rows: one for every position of both streams."""
    batch = row(FIRST, SECOND)
    own = dict(batch, decoder_input_tokens=jnp.arange(T)[None], decoder_query_tokens=T + jnp.arange(T)[None])
    encoded = MODEL.encode(params, batch["encoder_input_tokens"], batch["encoder_segment_ids"])
    rows = params["embedding"][jnp.concatenate([batch["decoder_input_tokens"][0], jnp.full(T + 1, MASK)])]

    def states(rows):
        return MODEL(dict(params, embedding=rows), own, encoded=encoded).hidden[0].sum(-1)

    seen = np.asarray(jnp.abs(jax.jit(jax.jacrev(states))(rows)).sum(-1) > 0)[:, :16]
    ranks, segments = np.asarray(batch["decoder_ranks"][0]), np.asarray(batch["decoder_segment_ids"][0])
    together = segments[:, None] == segments
    np.testing.assert_array_equal(seen[:, :T], together & (ranks < ranks[:, None]))
    np.testing.assert_array_equal(seen[:, T:], np.eye(T, dtype=bool))


def test_packed_equals_unpacked(params):
    run = jax.jit(lambda batch: MODEL(params, batch).hidden)
    together = run(row(FIRST, SECOND))
    for start, example in ((0, FIRST), (5, SECOND)):
        length = len(example[0])
        alone = run(row(example))[0, :length]
        np.testing.assert_allclose(together[0, start : start + length], alone, rtol=1e-4, atol=1e-4)


def test_parts_that_know_another_order_are_refused():
    attention = AttentionSpec(source="self", heads=2, head_dim=4)
    for spec, said in (
        (dataclasses.replace(attention, window=3), "window=3"),
        (RecurrentSpec(width=4), "width=4 reads left to right"),
        (FFNSpec(d_ff=4, router=RouterSpec(experts=2, capacity=1.0)), "capacity=1.0"),
    ):
        stack = StackConfig(group=(LayerSpec(sublayers=(attention, spec)),), repeats=1, causal=True)
        with pytest.raises(ValueError, match=said):
            check_any_order(stack)
    check_any_order(DECODER)
