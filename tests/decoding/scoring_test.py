"""Scores equal the token-by-token reference and what decoding itself reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.scoring import Scorer, packed
from mlm.models.families import llama_style, sparse, t5_style
from mlm.models.specs import PositionSpec, RouterSpec
from mlm.models.transformer import Transformer

TARGETS = [[4, 1], [7, 8, 9, 1], [5], [3, 3, 3, 3, 1], [1], [2, 10, 1], [11, 1], [6, 5, 4, 3, 2, 1]]


@pytest.mark.parametrize("chunk", [1, 16, 24, 512])
def test_equals_one_token_at_a_time(tiny, sources, chunk):
    scores = Scorer(tiny.model, chunk=chunk)(tiny.params, sources, TARGETS)
    for i, (source, target) in enumerate(zip(sources, TARGETS, strict=True)):
        expected = [tiny.log_probs(source, target[:t])[token] for t, token in enumerate(target)]
        np.testing.assert_allclose(scores.tokens[i, : len(target)], expected, atol=1e-5)
        np.testing.assert_allclose(scores.totals[i], sum(expected), atol=1e-5)
        assert not scores.tokens[i, len(target) :].any()
    np.testing.assert_array_equal(scores.lengths, [len(t) for t in TARGETS])


def test_a_temperature_is_of_the_logits(tiny, sources):
    scores = Scorer(tiny.model, temperature=2.0)(tiny.params, sources[:2], TARGETS[:2])
    for total, source, target in zip(scores.totals, sources, TARGETS, strict=False):
        halved = [tiny.log_probs(source, target[:t]) / 2 for t in range(len(target))]
        want = sum(log_probs[token] - np.log(np.exp(log_probs).sum()) for log_probs, token in zip(halved, target))
        np.testing.assert_allclose(total, want, atol=1e-5)


def test_batches_devices_and_neighbours_change_nothing(tiny, sources):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = Scorer(tiny.model)(tiny.params, sources, TARGETS)
    parts = Scorer(tiny.model, batch_size=3)(tiny.params, sources, TARGETS)
    spread = Scorer(tiny.model, rows=NamedSharding(mesh, P("data")))(tiny.params, sources, TARGETS)
    np.testing.assert_allclose(whole.tokens, parts.tokens, atol=1e-5)
    np.testing.assert_allclose(whole.tokens, spread.tokens, atol=1e-5)


def test_decoding_reports_the_scores_of_what_it_returns(tiny, sources):
    out = tiny.decode(DecodeConfig(method="sample", top_k=4, max_length=8), sources)
    targets = [t[0, : n[0]] for t, n in zip(out.tokens, out.lengths, strict=True)]
    np.testing.assert_allclose(Scorer(tiny.model)(tiny.params, sources, targets).totals, out.scores[:, 0], atol=1e-4)


def test_examples_share_rows_and_a_decoder_alone_reads_the_source_first(tiny, sources):
    """The targets' 24 tokens fill three rows of eight."""
    rows = packed(sources, TARGETS, (16, 8))
    assert sorted(piece.index for pieces in rows for piece in pieces) == list(range(8))
    assert len(rows) == 3
    config = llama_style(
        d_model=16, d_ff=16, heads=2, kv_heads=2, layers=1, vocab_size=12, rope=PositionSpec(kind="rope")
    )
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    found = Scorer(model)(params, sources, TARGETS)
    for i, (source, target) in enumerate(zip(sources, TARGETS, strict=True)):
        text = jnp.array([[0, *source, *target]])
        batch = {"decoder_input_tokens": text[:, :-1], "decoder_segment_ids": jnp.ones_like(text[:, 1:])}
        log_probs = jax.nn.log_softmax(model.logits(params, model(params, batch).hidden))[0]
        want = [log_probs[len(source) + t, token] for t, token in enumerate(target)]
        np.testing.assert_allclose(found.tokens[i, : len(target)], want, atol=1e-5)


def test_experts_with_a_capacity_see_one_example_a_row(sources):
    dense = t5_style(vocab_size=12, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 1))
    model = Transformer(sparse(dense, RouterSpec(experts=2, capacity=0.5, min_capacity=1), every=1))
    params = model.init(jax.random.key(0))
    together = Scorer(model)(params, sources, TARGETS)
    for i in (0, 6):
        width = Scorer(model)(params, [sources[i], sources[5]], [TARGETS[i], TARGETS[7]])  # rows of the same widths
        np.testing.assert_allclose(width.totals[0], together.totals[i], atol=1e-5)


def test_shapes_are_reused(tiny):
    scorer = Scorer(tiny.model, batch_size=2)
    for length in (3, 4, 8):  # two examples a row twice, then one in each of four
        scorer(tiny.params, [[5] * length] * 4, [[6] * length] * 4)
    assert scorer.compilations == 1


def test_bad_input_is_refused(tiny):
    scorer = Scorer(tiny.model)
    with pytest.raises(ValueError, match="2 sources but 1 targets"):
        scorer(tiny.params, [[4], [5]], [[4]])
    with pytest.raises(ValueError, match="target 0 is empty"):
        scorer(tiny.params, [[4]], [[]])
