"""Each processor against a slow NumPy reference on tie-free logits."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.phrases import avoided
from mlm.decoding.processors import PROCESSORS
from mlm.decoding.ranking import cut, first_max
from mlm.decoding.state import NEG_INF, Seen, State
from tests.decoding.ranking_test import longest_message

RANDOM = np.random.default_rng(0)
LOGITS = jnp.asarray(RANDOM.normal(0, 3, (6, 50)), jnp.float32)


def state(length=0, prefixes=(), log_prob=0.0, start=0):
    """prefixes: tokens of each row, behind which stand tokens that nobody may read."""
    zero = jnp.zeros(6, jnp.int32)
    done = jnp.zeros(6, bool)
    tokens = np.full((6, 12), 7, np.int32)
    for row, prefix in zip(tokens, prefixes, strict=False):
        row[: len(prefix)] = prefix
    lengths = jnp.array([len(p) for p in prefixes], jnp.int32) if prefixes else zero + length
    log_prob = zero + jnp.float32(log_prob)
    return State(jnp.asarray(tokens), lengths, zero, log_prob, zero + start, zero + 12, done, zero, {}, ())


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


def keep_epsilon(logits, least):
    probs = softmax(logits)
    return set(np.flatnonzero(probs >= least)) | {probs.argmax()}


def entropy(logits):
    return -np.sum(softmax(logits) * np.log(softmax(logits)))


def keep_eta(logits, least):
    return keep_epsilon(logits, min(least, math.sqrt(least) * math.exp(-entropy(logits))))


def keep_typical(logits, mass):
    probs, kept, total = softmax(logits), {np.argmax(logits)}, 0.0
    for token in np.argsort(abs(-np.log(probs) - entropy(logits))):
        if total >= mass:
            break
        kept.add(token)
        total += probs[token]
    return kept


def keep_mirostat(logits, target, spent=0.0, written=0):
    """As Basu et al. published it, a token at a time; spent: bits of the tokens written so far."""
    mu = 2 * target - (spent - written * target)
    probs = sorted(softmax(logits), reverse=True)
    ranks = range(min(100, len(probs) - 1))
    b = [math.log(probs[i] / probs[i + 1]) for i in ranks]
    t = [math.log((i + 2) / (i + 1)) for i in ranks]
    s = sum(x * y for x, y in zip(b, t, strict=True)) / sum(y * y for y in t)
    k = (((s - 1) * 2**mu) / (1 - len(probs) ** (1 - s))) ** (1 / s)
    return keep_top_k(logits, round(min(k, len(probs))) + 1)


PREFIXES = [[], [3], [3, 4, 3], [5, 5, 5], [3, 4, 9, 3, 4, 2, 9, 3, 4], [9, 2, 3, 4, 8, 9, 2, 3]]
REFERENCES = [
    (name, reference, value)
    for name, reference, values in (
        ("top_k", keep_top_k, (1, 2, 7, 49, 50, 80)),
        ("top_p", keep_top_p, (0.001, 0.3, 0.8, 0.95, 0.999)),
        ("min_p", keep_min_p, (0.001, 0.05, 0.3, 1.0)),
        ("epsilon", keep_epsilon, (1e-5, 0.003, 0.1, 0.9)),
        ("eta", keep_eta, (1e-5, 0.003, 0.1, 0.9)),
        ("typical", keep_typical, (0.001, 0.2, 0.8, 0.95, 0.999)),
        ("mirostat", keep_mirostat, (0.1, 0.8, 2.0, 3.0, 50.0)),
    )
    for value in values
]


@pytest.mark.parametrize(("name", "reference", "value"), REFERENCES)
def test_truncations_keep_what_the_definition_keeps(name, reference, value):
    out = np.asarray(PROCESSORS[name].make(value)(LOGITS, state()))
    for row, logits in zip(out, np.asarray(LOGITS), strict=True):
        assert set(np.flatnonzero(row > NEG_INF)) == reference(logits, value)
        assert row.argmax() == logits.argmax()
        np.testing.assert_array_equal(row[row > NEG_INF], logits[row > NEG_INF])
        assert (row[row <= NEG_INF] == NEG_INF).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_k", (3, 9, 30)),
        ("top_p", (0.2, 0.6, 0.97)),
        ("min_p", (0.3, 0.05, 0.001)),
        ("epsilon", (0.1, 0.01, 0.0001)),
        ("eta", (0.1, 0.01, 0.0001)),
        ("typical", (0.2, 0.6, 0.97)),
        ("mirostat", (0.5, 2.0, 3.5)),
    ],
)
def test_looser_keeps_a_superset(name, values):
    kept = [np.asarray(PROCESSORS[name].make(value)(LOGITS, state())) > NEG_INF for value in values]
    assert all((small <= large).all() and (small < large).any() for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5),
        ("min_p", 0.1),
        ("min_length", 4),
        ("no_repeat_ngram", 1),
        ("bad_words", ((3, 4), (5,))),
    ],
)
def test_twice_is_once(name, value):
    process = PROCESSORS[name].make(value)
    now = state(prefixes=PREFIXES)
    once = process(LOGITS, now)
    assert (once != LOGITS).any()
    np.testing.assert_array_equal(process(once, now), once)


def test_top_p_twice_renormalises():
    """.5 .3 .2 at mass .6 keeps two tokens; they are .625 .375 then, and the first alone crosses .6."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 6))
    process = PROCESSORS["top_p"].make(0.6)
    once = process(logits, state())
    assert (np.asarray(once > NEG_INF).sum(1) == 2).all()
    assert (np.asarray(process(once, state()) > NEG_INF).sum(1) == 1).all()


def test_top_p_keeps_the_whole_of_a_tie():
    """Four equal tokens at mass .5: two would do, but nothing tells them apart."""
    kept = PROCESSORS["top_p"].make(0.5)(jnp.zeros((6, 4)), state())
    assert (np.asarray(kept) == 0).all()


def test_top_p_survives_one_certain_token():
    logits = jnp.full((6, 5), NEG_INF).at[:, 3].set(2.0)
    np.testing.assert_array_equal(PROCESSORS["top_p"].make(0.9)(logits, state()), logits)


def test_temperature_divides_and_forbidden_stays_forbidden():
    np.testing.assert_allclose(PROCESSORS["temperature"].make(2.0)(LOGITS, state()), LOGITS / 2.0)
    assert float(PROCESSORS["temperature"].make(50.0)(LOGITS.at[0, 0].set(NEG_INF), state())[0, 0]) == NEG_INF


def test_min_length_counts_eos_as_a_token():
    """With 4 tokens at least, EOS may be the fourth: forbidden after 2 tokens, allowed after 3."""
    process = PROCESSORS["min_length"].make(4)
    assert (np.asarray(process(LOGITS, state(2)))[:, 1] == NEG_INF).all()
    np.testing.assert_array_equal(process(LOGITS, state(2))[:, 2:], LOGITS[:, 2:])
    np.testing.assert_array_equal(process(LOGITS, state(3)), LOGITS)


@pytest.mark.parametrize("name", ["epsilon", "eta", "typical", "mirostat"])
def test_ties_stay_together_and_forbidden_stays_forbidden(name):
    """Half of the tokens tie and the others are forbidden: which of the first go, nothing could say."""
    logits = jnp.where(jnp.arange(50) % 2 == 0, jnp.full((6, 50), 1.5), NEG_INF)
    for value in (0.01, 0.5, 0.9):
        np.testing.assert_array_equal(PROCESSORS[name].make(value)(logits, state()), logits)


def test_typical_prefers_the_average_surprise_and_keeps_the_best():
    """H = 1.32 nats, surprises .69, 1.6, 2.3, 2.3 and 2.3: the second token comes first."""
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.1, 0.1, 0.1]] * 6))
    kept = np.asarray(PROCESSORS["typical"].make(0.15)(logits, state()) > NEG_INF)
    assert (kept == [True, True, False, False, False]).all()


def test_mirostat_follows_the_surprise_of_what_was_written():
    """The prompt is not counted; a surprising text leaves fewer tokens, a dull one more."""
    sizes = []
    for spent in (0.0, 12.0, 14.0, 200.0):
        now = state(7, log_prob=-spent * math.log(2), start=3)
        kept = np.asarray(PROCESSORS["mirostat"].make(3.0)(LOGITS, now)) > NEG_INF
        for row, logits in zip(kept, np.asarray(LOGITS), strict=True):
            assert set(np.flatnonzero(row)) == keep_mirostat(logits, 3.0, spent, 4)
        sizes.append(kept.sum())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 6 < sizes[1]


def test_repetition_penalty_makes_what_is_there_less_probable():
    logits = LOGITS.at[:, 9].set(NEG_INF)
    expected = np.array(logits)
    for row, prefix in zip(expected, PREFIXES, strict=True):
        for token in {*prefix} - {9}:
            row[token] = row[token] / 1.5 if row[token] > 0 else row[token] * 1.5
    out = PROCESSORS["repetition_penalty"].make(1.5)(logits, state(prefixes=PREFIXES))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert (out <= logits).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 20])
def test_no_ngram_twice(n):
    out = PROCESSORS["no_repeat_ngram"].make(n)(LOGITS, state(prefixes=PREFIXES))
    for row, prefix, logits in zip(np.asarray(out), PREFIXES, np.asarray(LOGITS), strict=True):
        seen = [prefix[i : i + n] for i in range(len(prefix) - n + 1)]
        forbidden = [[*prefix, token][-n:] in seen for token in range(50)]
        np.testing.assert_array_equal(row, np.where(forbidden, NEG_INF, logits))


@pytest.mark.parametrize("phrases", [((6,),), ((3, 4),), ((3, 4, 7), (9, 3, 4, 8), (4, 3), (11,), (5, 5, 5, 5, 5))])
def test_no_bad_word(phrases):
    out = PROCESSORS["bad_words"].make(phrases)(LOGITS, state(prefixes=PREFIXES))
    for row, prefix, logits in zip(np.asarray(out), PREFIXES, np.asarray(LOGITS), strict=True):
        forbidden = [any((*prefix, token)[-len(p) :] == p for p in phrases) for token in range(50)]
        np.testing.assert_array_equal(row, np.where(forbidden, NEG_INF, logits))


def test_what_is_forbidden_is_not_written(tiny, sources):
    """In a search as a whole, where every step reads a longer prefix; a bad phrase, too, may begin in the prompt."""
    plain = tiny.decode(DecodeConfig(max_length=10), sources, prompts=[[7]] * 8)
    begun = {(7, int(tokens[0, 1])) for tokens in plain.tokens}
    config = DecodeConfig(no_repeat_ngram=2, bad_words=tuple(begun), max_length=10)
    out = tiny.decode(config, sources, prompts=[[7]] * 8)
    for tokens, length in zip(out.tokens[:, 0], out.lengths[:, 0], strict=True):
        pairs = list(itertools.pairwise(map(int, tokens[:length])))
        assert len(set(pairs)) == len(pairs)
        assert not begun & set(pairs)


def test_tokens_of_a_language():
    """Each row has its own; what is forbidden stays so, whatever its frequency."""
    allowed, bias = RANDOM.random((6, 50)) < 0.5, RANDOM.normal(size=(6, 50)).astype(np.float32)
    now = state()._replace(given={"language_mask": jnp.asarray(allowed), "language_bias": jnp.asarray(bias)})
    masked = PROCESSORS["language_mask"].make(True)(LOGITS, now)
    np.testing.assert_array_equal(masked, np.where(allowed, LOGITS, NEG_INF))
    both = PROCESSORS["language_bias"].make(0.25)(masked, now)
    np.testing.assert_allclose(both, np.where(allowed, LOGITS + 0.25 * bias, NEG_INF), rtol=1e-6)


def test_a_contrast_is_among_what_is_allowed():
    """log 0.1 = -2.3 below the best: of 4, 3, 2, 1 the last is out; with the best one forbidden, it is in.

    Against 0, 0, 2, -6 and beta = 0.5: 1.5 s - 0.5 s' = 6, 4.5, 2, 4.5.
    """
    logits, other = (jnp.array([row] * 6, jnp.float32) for row in ([4, 3, 2, 1], [0, 0, 2, -6]))
    now = state()._replace(seen=Seen(logits, (other,)))
    contrast = PROCESSORS["contrast"].make("model", 0.1, 0.5)
    np.testing.assert_allclose(contrast(logits, now)[0], [6, 4.5, 2, NEG_INF])
    np.testing.assert_allclose(contrast(logits.at[:, 0].set(NEG_INF), now)[0], [NEG_INF, 4.5, 2, 4.5])
    with pytest.raises(ValueError, match="nothing to contrast the model with"):
        contrast(logits, state())


def test_every_processor_is_local_to_its_rows():
    """Rows over eight devices: no processor tells one row of another."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"top_k": 5, "no_repeat_ngram": 2, "bad_words": ((3, 4), (5,)), "min_length": 4, "mirostat": 2.0}
    options |= {"avoid": True, "language_mask": True, "contrast": "model", "dola_layers": (1,)}
    made = [kind.make(options.get(name, 0.5), *[0.5] * len(kind.further)) for name, kind in PROCESSORS.items()]

    def every(logits, now):
        for process in made:
            logits = process(logits, now)
        return logits

    rows = NamedSharding(mesh, P("data"))
    beside = state(prefixes=PREFIXES)._replace(
        closing=jnp.ones((6, 1), jnp.int32),
        given={
            "avoid": jnp.asarray(avoided([[[3, 4], [5]]] * 6)["avoid"]),
            "language_mask": LOGITS > 0,
            "language_bias": LOGITS,
        },
        seen=Seen(LOGITS, (LOGITS,)),
    )
    eight = jax.tree.map(lambda x: jax.device_put(jnp.concatenate([x, x[:2]]), rows), (LOGITS, beside))
    compiled = jax.jit(every).lower(*eight).compile()
    assert not re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce)\(", compiled.as_text())


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"typical": 0.9}], ids=str)
def test_truncating_and_drawing_never_gather_the_vocabulary(options):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits = jax.device_put(jnp.zeros((6, 4096)), NamedSharding(mesh, P("data", "tensor")))
    (process,) = DecodeConfig(method="sample", **options).processors()
    now = state()

    def drawn(logits):
        with cut(4):
            kept = process(logits, now)
        return first_max(kept + jax.random.gumbel(jax.random.key(0), logits.shape))

    assert longest_message(jax.jit(drawn).lower(logits).compile()) <= 4 * 5


def test_unknown_processor_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'top_p'"):
        PROCESSORS["topp"]
