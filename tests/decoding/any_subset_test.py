"""Speculation in any order: the law of the model itself, in no more passes than blanks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from mlm.decoding import any_subset
from mlm.decoding.any_subset import Filler
from mlm.models.families import language_aware, llama_style, t5_style
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer

V, MASK = 4, 3
SOURCE, TEMPLATE = [2, 1], [2, MASK, MASK, 1, MASK, MASK]
BLANKS = [1, 2, 4, 5]
ROWS, TEMPERATURE = 16384, 1.4
TINY = Transformer(t5_style(vocab_size=V, d_model=8, d_ff=8, heads=2, head_dim=4, layers=(1, 1)))
WIDE = Transformer(t5_style(vocab_size=12, d_model=8, d_ff=8, heads=2, head_dim=4, layers=(1, 1)))


@pytest.fixture(scope="module")
def params():
    """Scaled up, so that the tokens of a row depend on each other."""
    return jax.tree.map(lambda x: 1.5 * x, TINY.init(jax.random.key(5)))


@pytest.fixture(scope="module")
def joint(params):
    """P of each of the V^4 fillings, rank by rank, from one pass over all of them."""
    every = np.array(list(itertools.product(range(V), repeat=4)), np.int32)
    rows = np.tile(np.array(TEMPLATE, np.int32), (len(every), 1))
    rows[:, BLANKS] = every
    ranks = np.tile(np.array([0, 1, 2, 0, 3, 4], np.int32), (len(every), 1))
    batch = {
        "encoder_input_tokens": np.tile(np.array(SOURCE, np.int32), (len(every), 1)),
        "encoder_segment_ids": np.ones((len(every), 2), np.int32),
        "decoder_input_tokens": rows,
        "decoder_segment_ids": np.ones_like(rows),
        "decoder_query_tokens": np.full_like(rows, MASK),
        "decoder_ranks": ranks,
        "decoder_reads": ranks,
    }
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    logits = jax.jit(lambda params, batch: TINY.logits(params, TINY(params, batch).hidden))(params, batch)
    logits = np.asarray(logits, np.float64)[:, BLANKS] / TEMPERATURE
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(np.take_along_axis(log_probs, every[..., None], axis=2).sum((1, 2)))


def counts_of(block, params, seed):
    fill = Filler(TINY, mask_token=MASK, block=block, temperature=TEMPERATURE, seed=seed, batch_size=ROWS)
    found = fill(params, [TEMPLATE] * ROWS, [SOURCE] * ROWS)
    assert fill.compilations == 1
    assert (found.tokens[:, [0, 3]] == [2, 1]).all()
    numbers = found.tokens[:, BLANKS] @ V ** np.arange(3, -1, -1)
    return np.bincount(numbers, minlength=V**4), found.passes


def test_the_law_is_that_of_drawing_rank_by_rank(params, joint):
    """Chi-square of the 256 fillings, those expected fewer than 5 times as one, against the joint and each other."""
    assert joint.sum() == pytest.approx(1.0)
    one_by_one, passes = counts_of(1, params, seed=1)
    assert (passes == 4).all()
    guessed, passes = counts_of(3, params, seed=2)
    # Two for a block that is kept whole, with the token behind it; else three or four.
    assert set(passes) == {2, 3, 4}
    rare = joint * ROWS < 5
    assert rare.sum() < 64

    def few(x):
        return np.append(x[~rare], x[rare].sum())

    for counts in (one_by_one, guessed):
        assert stats.chisquare(few(counts), few(joint) * ROWS).pvalue > 0.01
    table = np.stack([few(one_by_one), few(guessed)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 0.01


def test_the_law_tells_when_every_guess_is_kept(params, joint, monkeypatch):
    """Such a sampler has the right passes and the wrong law: the test above would see it."""
    monkeypatch.setattr(any_subset, "accepted", lambda p, q, guesses, chances: jnp.ones(guesses.shape, bool))
    counts, _ = counts_of(3, params, seed=2)
    some = joint * ROWS >= 5
    expected = np.append(joint[some], joint[~some].sum()) * ROWS
    assert stats.chisquare(np.append(counts[some], counts[~some].sum()), expected).pvalue < 1e-6


def test_rows_of_one_batch_do_not_know_each_other():
    params = jax.tree.map(lambda x: 2.0 * x, WIDE.init(jax.random.key(0)))
    fill = Filler(WIDE, mask_token=11, block=3)
    templates = [[11] * n + [5] + [11] * (7 - n) for n in range(6)] + [[4, 11, 6], [4, 5]]
    sources = [[n + 2, 1] for n in range(8)]
    found = fill(params, templates, sources)
    assert found.lengths.tolist() == [8] * 6 + [3, 2]
    for i, template in enumerate(templates):
        here = found.tokens[i, : len(template)]
        assert all(a in (b, 11) for a, b in zip(template, here, strict=True))
        assert not found.tokens[i, len(template) :].any()
        blanks = template.count(11)
        assert found.passes[i] <= blanks
        assert (found.passes[i] >= 2) == (blanks > 1)
    assert found.passes[6:].tolist() == [1, 0]
    alone = fill(params, templates[2:3], sources[2:3], ids=[2])
    np.testing.assert_array_equal(alone.tokens[0], found.tokens[2])
    assert alone.passes[0] == found.passes[2]


def test_nonsense_is_refused():
    for options, said in (
        ({"mask_token": 12}, "outside the model's vocabulary"),
        ({"mask_token": 11, "block": 0}, "block=0"),
        ({"mask_token": 11, "temperature": 0.0}, "temperature=0"),
    ):
        with pytest.raises(ValueError, match=said):
            Filler(WIDE, **options)
    fill = Filler(WIDE, mask_token=11)
    for templates, sources, said in (
        ([[11, 5]], None, "a model with an encoder"),
        ([[11, 5]], [[1], [1]], "2 sources for 1 templates"),
        ([[11, 12]], [[1]], "holds token 12"),
    ):
        with pytest.raises(ValueError, match=said):
            fill({}, templates, sources)


def test_a_decoder_alone_on_two_devices_and_for_a_language():
    """The same model on one device and on two, with a vector of its own for each of two languages."""
    sizes = {"vocab_size": 12, "d_model": 8, "d_ff": 8, "heads": 2, "kv_heads": 1, "layers": 1}
    config = llama_style(**sizes, rope=PositionSpec(kind="rope"))
    model = Transformer(language_aware(config, languages=2, offsets=("language",)))
    params = model.init(jax.random.key(0))
    params["offsets"]["language"] = jnp.stack([jnp.zeros(8), 400.0 * jax.random.normal(jax.random.key(1), (8,))])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    templates = [[11] * 7, [11, 5, 11], [4, 11, 11, 11], [11, 3]]
    one, two = (
        Filler(model, mask_token=11, block=3, rows=rows)(params, templates, languages=[0, 0, 1, 1])
        for rows in (None, NamedSharding(mesh, PartitionSpec("data")))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # A vector so long decides alone: each blank of the language holds the token that is nearest to it.
    nearest = jnp.argmax(model.logits(params, params["offsets"]["language"][None, 1:])[0, 0])
    assert one.tokens[2].tolist() == [4, *[int(nearest)] * 3, 0, 0, 0]
    assert len(set(one.tokens[0].tolist())) > 1
