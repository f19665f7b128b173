"""Each processor against a slow NumPy reference on tie-free logits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.processors import PROCESSORS
from mlm.decoding.state import NEG_INF, State

RANDOM = np.random.default_rng(0)
LOGITS = jnp.asarray(RANDOM.normal(0, 3, (6, 50)), jnp.float32)


def state(length=0):
    zero = jnp.zeros(6, jnp.int32)
    done = jnp.zeros(6, bool)
    tokens, log_prob = jnp.zeros((6, 8), jnp.int32), jnp.zeros(6)
    return State(tokens, zero + length, zero, log_prob, zero, zero + 8, done, jnp.zeros((), jnp.int32), {}, ())


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def keep_top_k(logits, k):
    return set(np.argsort(-logits)[:k])


def keep_top_p(logits, mass):
    probs, kept, total = softmax(logits), set(), 0.0
    for token in np.argsort(-logits):
        if total >= mass:
            break
        kept.add(token)
        total += probs[token]
    return kept


def keep_min_p(logits, share):
    probs = softmax(logits)
    return set(np.flatnonzero(probs >= share * probs.max()))


REFERENCES = [
    (name, reference, value)
    for name, reference, values in (
        ("top_k", keep_top_k, (1, 2, 7, 49, 50, 80)),
        ("top_p", keep_top_p, (0.001, 0.3, 0.8, 0.95, 0.999)),
        ("min_p", keep_min_p, (0.001, 0.05, 0.3, 1.0)),
    )
    for value in values
]


@pytest.mark.parametrize(("name", "reference", "value"), REFERENCES)
def test_truncations_keep_what_the_definition_keeps(name, reference, value):
    out = np.asarray(PROCESSORS[name](value)(LOGITS, state()))
    for row, logits in zip(out, np.asarray(LOGITS), strict=True):
        assert set(np.flatnonzero(row > NEG_INF)) == reference(logits, value)
        assert row.argmax() == logits.argmax()
        np.testing.assert_array_equal(row[row > NEG_INF], logits[row > NEG_INF])
        assert (row[row <= NEG_INF] == NEG_INF).all()


@pytest.mark.parametrize(
    ("name", "values"), [("top_k", (3, 9, 30)), ("top_p", (0.2, 0.6, 0.97)), ("min_p", (0.3, 0.05, 0.001))]
)
def test_looser_keeps_a_superset(name, values):
    kept = [np.asarray(PROCESSORS[name](value)(LOGITS, state())) > NEG_INF for value in values]
    assert all((small <= large).all() and (small < large).any() for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("min_p", 0.1), ("min_length", 4)])
def test_twice_is_once(name, value):
    process = PROCESSORS[name](value)
    once = process(LOGITS, state())
    np.testing.assert_array_equal(process(once, state()), once)


def test_top_p_twice_renormalises():
    """.5 .3 .2 at mass .6 keeps two tokens; they are .625 .375 then, and the first alone crosses .6."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 6))
    process = PROCESSORS["top_p"](0.6)
    once = process(logits, state())
    assert (np.asarray(once > NEG_INF).sum(1) == 2).all()
    assert (np.asarray(process(once, state()) > NEG_INF).sum(1) == 1).all()


def test_top_p_keeps_the_whole_of_a_tie():
    """Four equal tokens at mass .5: two would do, but nothing tells them apart."""
    kept = PROCESSORS["top_p"](0.5)(jnp.zeros((6, 4)), state())
    assert (np.asarray(kept) == 0).all()


def test_top_p_survives_one_certain_token():
    logits = jnp.full((6, 5), NEG_INF).at[:, 3].set(2.0)
    np.testing.assert_array_equal(PROCESSORS["top_p"](0.9)(logits, state()), logits)


def test_temperature_divides_and_forbidden_stays_forbidden():
    np.testing.assert_allclose(PROCESSORS["temperature"](2.0)(LOGITS, state()), LOGITS / 2.0)
    assert float(PROCESSORS["temperature"](50.0)(LOGITS.at[0, 0].set(NEG_INF), state())[0, 0]) == NEG_INF


def test_min_length_counts_eos_as_a_token():
    """With 4 tokens at least, EOS may be the fourth: forbidden after 2 tokens, allowed after 3."""
    process = PROCESSORS["min_length"](4)
    assert (np.asarray(process(LOGITS, state(2)))[:, 1] == NEG_INF).all()
    np.testing.assert_array_equal(process(LOGITS, state(2))[:, 2:], LOGITS[:, 2:])
    np.testing.assert_array_equal(process(LOGITS, state(3)), LOGITS)


def test_unknown_processor_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'top_p'"):
        PROCESSORS["topp"]
