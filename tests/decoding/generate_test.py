"""Shapes are reused, order is kept, bad input is refused before anything compiles."""

import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator


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
