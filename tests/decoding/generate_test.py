"""Shapes are reused, order is kept, bad input is refused before anything compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.models.families import llama_style
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer


def test_a_mixed_workload_compiles_once_per_bucket(tiny):
    generator = Generator(tiny.model, DecodeConfig(max_length=4), batch_size=4)
    for length in (1, 5, 8, 3):
        generator(tiny.params, [[5] * length] * 4)
    assert generator.compilations == 1
    generator(tiny.params, [[5] * 9] * 4)
    assert generator.compilations == 2  # sources of 12
    generator(tiny.params, [[5] * 12] * 11)  # 4 + 4 + 3 rows
    assert generator.compilations == 3
    for length in (1, 2):
        generator(tiny.params, [[5]] * 4, prompts=[[7] * length] * 4)
    assert generator.compilations == 5  # prompts of 1, of 2
    generator(tiny.params, [[5]] * 4, prompts=[[]] * 4)
    assert generator.compilations == 5


def test_batches_come_back_in_order(tiny, sources, config):
    whole = tiny.decode(config, sources)
    parts = Generator(tiny.model, config, batch_size=3)(tiny.params, sources)
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_array_equal(whole.lengths, parts.lengths)
    np.testing.assert_allclose(whole.scores, parts.scores, rtol=1e-5)


def test_source_padding_changes_nothing(tiny):
    """Token 0 inside a source is a token like any other; padding is what lies beyond the length."""
    generator = Generator(tiny.model, DecodeConfig(max_length=6))
    long = generator(tiny.params, [[5, 0, 6, 0], [7] * 30])
    short = generator(tiny.params, [[5, 0, 6, 0]])
    np.testing.assert_array_equal(long.tokens[0], short.tokens[0])
    np.testing.assert_allclose(long.scores[0], short.scores[0], rtol=1e-5)


def test_nothing_in_nothing_out(tiny):
    assert tiny.decode(DecodeConfig(max_length=6), []).tokens.shape == (0, 1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": [[3], []]}, "source 1 is empty"),
        ({"sources": [[3], [12]]}, "outside the model's vocabulary of 12"),
        ({"prompts": [[3], [4] * 6]}, "source 1: a prompt of 6 tokens leaves no room under the limit of 6"),
        ({"prompts": [[3], [4, 5]], "limits": [6, 2]}, "source 1: a prompt of 2 tokens leaves no room"),
        ({"prompts": [[3], [99]]}, "prompt 1 holds token 99"),
        ({"limits": [6, 0]}, "under the limit of 0"),
        ({"limits": [6]}, "1 limits for 2 sources"),
        ({"ids": [6, 7, 8]}, "3 ids for 2 sources"),
    ],
)
def test_bad_input_is_refused_before_compiling(tiny, options, message):
    generator = Generator(tiny.model, DecodeConfig(max_length=6))
    with pytest.raises(ValueError, match=message):
        generator(tiny.params, **{"sources": [[3], [4]], **options})
    assert generator.compilations == 0


def test_a_decoder_alone_goes_on_from_its_sources():
    """Every result begins with its source and continues as whole passes do; ragged, and the same with guesses."""
    config = llama_style(
        vocab_size=12, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=2, rope=PositionSpec(kind="rope")
    )
    model = Transformer(config)
    params = model.init(jax.random.key(2))
    logits = jax.jit(
        lambda tokens: model.logits(
            params,
            model(params, {"decoder_input_tokens": tokens, "decoder_segment_ids": jnp.ones_like(tokens)}).hidden,
        )
    )
    sources = [[5, 6, 7], [9], [3, 4, 3, 8, 2]]
    found = Generator(model, DecodeConfig(max_length=9))(params, sources)
    for i, source in enumerate(sources):
        written = list(source)
        while len(written) < 9 and written[len(source) :][-1:] != [1]:
            shifted = np.zeros((1, 9), np.int32)
            shifted[0, 1 : len(written) + 1] = written[:8]
            written.append(int(logits(shifted)[0, len(written)].argmax()))
        assert found.tokens[i, 0, : found.lengths[i, 0]].tolist() == written
    guessing = DecodeConfig(max_length=9, proposer="draft_model", guesses=3)
    again = Generator(model, guessing, draft=model)(params, sources, draft=params)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    beams = Generator(model, DecodeConfig(max_length=9, method="beam", beams=2))(params, sources)
    assert all(row[0, : len(source)].tolist() == source for row, source in zip(beams.tokens, sources, strict=True))
