"""Beam search by a value: with none of it plain beam search, with nothing else the best text, with noise in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig

WANTED = np.array([7, 3, 9, 9, 4, 1, 0, 0])  # the text of most utility, and what follows its end


def matches(tokens, length, hidden):
    """Utility: places where a text is the wanted one, up to the wanted one's six."""
    within = jnp.arange(tokens.shape[1])[None] < jnp.minimum(length, 6)[:, None]
    return jnp.sum(within & (tokens == WANTED), axis=1).astype(jnp.float32)


def noisy(size):
    """The utility, and noise of this standard deviation, drawn by what is written."""

    def value(tokens, length, hidden):
        key = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), jnp.sum(row * 31 ** jnp.arange(8))))(tokens)
        return matches(tokens, length, hidden) + size * jax.vmap(jax.random.normal)(key)

    return value


def config(value=matches, **options):
    return DecodeConfig(
        method="value_guided_beam", max_length=8, **{"valued": 12, "n_best": 4, **options, "value": value}
    )


def utilities(out):
    return matches(jnp.array(out.tokens[:, 0]), jnp.array(out.lengths[:, 0]), None)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_by_likelihood_alone_it_is_beam_search(tiny, sources, alpha):
    """All tokens valued, also where prompts and limits leave some texts unended."""
    rows = {"prompts": [[7]] * 8, "limits": [8, 3, 8, 2, 8, 8, 5, 8]}
    beam = tiny.decode(DecodeConfig(method="beam", n_best=4, max_length=8, alpha=alpha), sources, **rows)
    out = tiny.decode(config(likelihood=1.0, alpha=alpha), sources, **rows)
    np.testing.assert_array_equal(out.tokens, beam.tokens)
    np.testing.assert_allclose(out.scores, beam.scores, rtol=1e-6)
    np.testing.assert_array_equal(out.passes, beam.passes)


def test_by_the_utility_alone_it_writes_the_wanted_text(tiny, sources):
    out = tiny.decode(config(likelihood=0.0), sources)
    assert (out.tokens[:, 0] == WANTED).all()
    np.testing.assert_allclose(out.scores[:, 0], 6.0, atol=1e-4)
    assert (np.diff(out.scores, axis=1) <= 0).all()


def test_scores_are_the_weighted_mean(tiny, sources):
    out = tiny.decode(config(likelihood=0.3), sources)
    for i, source in enumerate(sources):
        for tokens, score, length in zip(out.tokens[i], out.scores[i], out.lengths[i], strict=True):
            assert length
            log_prob = tiny.total(source, tokens[:length].tolist())
            log_prob /= ((5 + length) / 6) ** 0.6 if tokens[length - 1] == 1 else 1.0
            value = float(matches(jnp.array(tokens[None]), jnp.array([length]), None)[0])
            np.testing.assert_allclose(score, 0.3 * log_prob + 0.7 * value, atol=1e-4)


def test_utility_falls_with_the_noise_of_the_value(tiny, sources):
    found = [float(utilities(tiny.decode(config(noisy(size), likelihood=0.1), sources)).mean()) for size in (0, 1, 8)]
    plain = float(utilities(tiny.decode(DecodeConfig(method="beam", max_length=8), sources)).mean())
    assert found[0] == 6.0 > found[1] > found[2]
    assert found[1] > plain


def test_a_value_may_read_the_state_that_its_token_comes_from(tiny, sources):
    """Log P of the newest token, made of the state by the model's own head."""

    def newest(tokens, length, hidden):
        log_probs = jax.nn.log_softmax(tiny.model.logits(tiny.params, hidden[:, None])[:, 0])
        token = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
        return jnp.take_along_axis(log_probs, token, axis=1)[:, 0]

    out = tiny.decode(config(newest, likelihood=0.0, n_best=1), sources)
    for source, tokens, score, length in zip(sources, out.tokens[:, 0], out.scores, out.lengths, strict=True):
        *before, last = tokens[: length[0]].tolist()
        np.testing.assert_allclose(score, tiny.log_probs(source, before)[last], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": None}, "value=None must be a function"),
        ({"likelihood": 1.5}, r"likelihood=1.5 must be in \[0, 1\]"),
        ({"valued": 1}, "valued=1 must be an integer of at least 2"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
    with pytest.raises(ValueError, match="means nothing to method='beam'"):
        DecodeConfig(method="beam", value=matches)
