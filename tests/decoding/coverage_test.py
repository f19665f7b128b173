"""Beam search with the coverage penalty, against the same rules in slow Python by the attention of whole passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.models.families import gemma_3, llama_style, rnnsearch, t5_style
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer
from tests.decoding.beam_test import reference, same

TAP = "decoder/cross_attention/probabilities"
PROMPTS = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]


@pytest.fixture(scope="module")
def covered(tiny):
    """(source, tokens) -> sum_s log min(sum_t attention[t, s], 1), of a pass over all tokens at once."""

    @jax.jit
    def weights(source, prefix):
        batch = {
            "encoder_input_tokens": source,
            "encoder_segment_ids": (source != 0).astype(jnp.int32),
            "decoder_input_tokens": jnp.pad(prefix, ((0, 0), (1, 0)))[:, :-1],
            "decoder_segment_ids": jnp.ones_like(prefix),
        }
        return tiny.model(tiny.params, batch, taps=[TAP]).taps[TAP][-1, 0].mean(0)

    def bonus(source, tokens):
        sources, prefixes = np.zeros((1, 8), np.int32), np.zeros((1, tiny.length), np.int32)
        sources[0, : len(source)], prefixes[0, : len(tokens)] = source, tokens
        attention = np.asarray(weights(sources, prefixes), np.float64)[: len(tokens), : len(source)]
        return np.log(np.minimum(attention.sum(0), 1.0)).sum()

    return bonus


@pytest.mark.parametrize(("weight", "alpha"), [(3.0, 0.6), (3.0, 0.0)])
def test_equals_the_rules_in_python(tiny, sources, covered, weight, alpha):
    """Ragged sources and prompts, whose tokens look at the source as well; the plain search finds other results."""
    rule = {"beams": 3, "alpha": alpha, "n_best": 3, "max_length": 7}
    out = tiny.decode(DecodeConfig(method="beam", coverage=weight, **rule), sources, prompts=PROMPTS)
    for i, source in enumerate(sources):
        counted = {"prompt": PROMPTS[i], "bonus": lambda tokens, source=source: weight * covered(source, tokens)}
        expected = reference(tiny, source, 3, alpha, 7, **counted)
        same(out, i, expected)
        assert expected == reference(tiny, source, 3, alpha, 7, early_stop=False, **counted)
    plain = tiny.decode(DecodeConfig(method="beam", **rule), sources, prompts=PROMPTS)
    assert (plain.tokens != out.tokens).any()


def test_a_row_does_not_depend_on_its_neighbours(tiny, sources):
    """Alone, a source has no padding beside it."""
    config = DecodeConfig(method="beam", coverage=1.0, max_length=7)
    together = tiny.decode(config, sources)
    for i in (1, 4):
        alone = tiny.decode(config, [sources[i]])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-5)


def test_eight_devices_find_what_one_finds(tiny, sources):
    config = DecodeConfig(method="beam", coverage=1.0, max_length=7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = Generator(tiny.model, config, rows=NamedSharding(mesh, PartitionSpec("data")))
    found = spread(jax.device_put(tiny.params, NamedSharding(mesh, PartitionSpec())), sources, prompts=PROMPTS)
    alone = tiny.decode(config, sources, prompts=PROMPTS)
    np.testing.assert_array_equal(found.tokens, alone.tokens)
    np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-4)


def test_an_ensemble_of_one_model_twice_is_that_model(tiny, sources):
    config = DecodeConfig(method="beam", coverage=1.0, max_length=7)
    twice = Generator(tiny.model, config, ensemble=[tiny.model])(tiny.params, sources, ensemble=[tiny.params])
    alone = tiny.decode(config, sources)
    np.testing.assert_array_equal(twice.tokens, alone.tokens)
    np.testing.assert_allclose(twice.scores, alone.scores, rtol=1e-4)


SIZES = {"d_model": 12, "d_ff": 10, "vocab_size": 19}
KINDS = {
    "t5": (t5_style(heads=3, head_dim=4, layers=(1, 3), **SIZES), TAP),
    "joint": (
        gemma_3(heads=2, kv_heads=1, head_dim=4, layers=7, window=3, factor=1.0, encoder=True, **SIZES),
        "decoder/joint_attention/probabilities",
    ),
    "recurrent": (
        rnnsearch(d_model=12, width=10, alignment=6, layers=2, vocab_size=19),
        "decoder/recurrent/probabilities",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_block_sees_the_source_as_the_whole_pass_does(kind):
    """By blocks of 2, 1 and 3 tokens, of rows with and without padding in their source."""
    config, tap = KINDS[kind]
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    source = jnp.array([[5, 6, 7, 1, 0], [8, 9, 10, 11, 1]])
    read = jnp.array([[0, 3, 4, 5, 6, 7], [0, 8, 9, 10, 11, 12]])
    batch = {
        "encoder_input_tokens": source,
        "encoder_segment_ids": (source > 0).astype(jnp.int32),
        "decoder_input_tokens": read,
        "decoder_segment_ids": jnp.ones_like(read),
    }
    whole = model(params, batch, taps=[tap]).taps[tap][-1][..., -source.shape[1] :].mean(1)
    cache = model.init_cache(params, model.encode(params, source), source > 0, 2, 6)
    blocks = []
    for start, width in ((0, 2), (2, 1), (3, 3)):
        said = model.block(params, read[:, start : start + width], cache, attention=True)
        blocks.append(said.attention)
        cache = {**said.cache, "length": cache["length"] + width}
    np.testing.assert_allclose(jnp.concatenate(blocks, axis=1), whole, rtol=1e-4, atol=1e-6)
    assert model.block(params, read[:, :1], cache).attention is None


def test_a_decoder_alone_has_nothing_to_cover():
    alone = Transformer(llama_style(heads=2, kv_heads=1, layers=2, rope=PositionSpec(kind="rope"), **SIZES))
    with pytest.raises(ValueError, match=r"coverage=0.2 is of a source, and a decoder alone reads none"):
        Generator(alone, DecodeConfig(method="beam", coverage=0.2))
