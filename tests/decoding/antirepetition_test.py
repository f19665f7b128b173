"""Penalties on repetition against slow references that read every prefix anew, and what they are for: loops end."""

from collections import Counter, defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.antirepetition import FSD, DiscreteFSD
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.state import State
from mlm.models.families import llama_style, sparse, t5_style
from mlm.models.specs import PositionSpec, RouterSpec
from mlm.models.transformer import Transformer
from tests.decoding.conftest import VOCAB, Tiny

EOS, LIMIT = 1, 9
PROMPTS = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]
LIMITS = [9, 4, 9, 3, 7, 2, 6, 9]
METHODS = ["contrastive_search", "fsd", "fsd_d"]


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def contrastive(states, text, token, config):
    last = states([*text, token])[-1]
    return max(cosine(last, earlier) for earlier in states(text))


def fsd(states, text, token, config):
    read, width = states(text), config.ngram - 1
    keys = {j: read[j - width + 1 : j + 1].ravel() for j in range(width - 1, len(read))}
    found = [cosine(keys[len(text)], keys[j]) for j in keys if j < len(text) and text[j] == token]
    return min(1.0, max([0.0, *found]))


def fsd_d(states, text, token, config):
    seen = defaultdict(Counter)  # what came behind every n-gram shorter than n
    for size in range(config.ngram):
        for end in range(size, len(text)):
            seen[tuple(text[end - size : end])][text[end]] += 1
    penalty, rest = 0.0, 1.0
    for size in reversed(range(min(config.ngram, len(text) + 1))):
        behind = seen[tuple(text[len(text) - size :])]
        if token not in behind:
            continue
        total = sum(behind.values())
        penalty += rest * (config.smoothing * behind[token] / (total + 1) if size else behind[token] / total)
        rest *= 1 - config.smoothing
    return penalty


PENALTIES = {"contrastive_search": contrastive, "fsd": fsd, "fsd_d": fsd_d}


def reference(tiny, config, source, prompt=(), limit=LIMIT):
    """(tokens, log-probability) by the rule, a whole pass for every prefix and candidate."""
    text, score, alpha = list(prompt), 0.0, config.penalty_alpha
    while len(text) < limit:
        log_probs = tiny.log_probs(source, text)
        p = np.exp(log_probs)
        if len(text) + 1 < config.min_length:
            p[EOS] = 0
        p /= p.sum()
        penalty = PENALTIES[config.method]
        states = lambda text: tiny.states(source, text)  # noqa: E731
        values = {
            token: (1 - alpha) * p[token] - alpha * penalty(states, text, int(token), config)
            for token in np.argsort(-p, kind="stable")[: config.candidates]
            if p[token] > 0
        }
        token = int(max(values, key=values.__getitem__))
        text.append(token)
        score += log_probs[token]
        written = text[len(prompt) :]
        if token == EOS or any(tuple(written[-len(phrase) :]) == phrase for phrase in config.stop):
            break
    return text, score


def same(found, i, expected):
    tokens, score = expected
    assert found.tokens[i, 0, : found.lengths[i, 0]].tolist() == tokens
    assert not found.tokens[i, 0, len(tokens) :].any()
    np.testing.assert_allclose(found.scores[i, 0], score, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_without_penalty_it_is_greedy_search(tiny, sources, method):
    config = DecodeConfig(method=method, penalty_alpha=0.0, max_length=LIMIT)
    found = tiny.decode(config, sources, prompts=PROMPTS, limits=LIMITS)
    greedy = tiny.decode(DecodeConfig(max_length=LIMIT), sources, prompts=PROMPTS, limits=LIMITS)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_array_equal(found.lengths, greedy.lengths)
    np.testing.assert_allclose(found.scores, greedy.scores, atol=1e-5)
    first = method == "contrastive_search"  # a pass that finds the first candidates
    np.testing.assert_array_equal(found.passes, greedy.passes + first)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("contrastive_search", {"candidates": 4}),
        ("fsd", {"ngram": 3, "penalty_alpha": 0.7, "candidates": 8}),
        ("fsd_d", {}),
    ],
)
def test_ragged_prompts_and_limits_as_by_the_rule_in_numpy(tiny, sources, method, options):
    """Every result is what the row alone would give."""
    config = DecodeConfig(method=method, max_length=LIMIT, **options)
    found = tiny.decode(config, sources, prompts=PROMPTS, limits=LIMITS)
    for i, source in enumerate(sources):
        same(found, i, reference(tiny, config, source, PROMPTS[i], LIMITS[i]))


@pytest.mark.parametrize("method", ["contrastive_search", "fsd"])
def test_an_end_that_comes_late_or_by_a_stop_sequence_as_by_the_rule_in_numpy(tiny, sources, method):
    config = DecodeConfig(method=method, max_length=LIMIT, min_length=5, stop=((9, 4), (2,)))
    found = tiny.decode(config, sources)
    expected = [reference(tiny, config, source) for source in sources]
    for i in range(len(sources)):
        same(found, i, expected[i])
    last = {tokens[-1] for tokens, _ in expected if len(tokens) < LIMIT}
    assert last - {EOS}


def other(config) -> Tiny:
    """Another model in place of the tiny one."""
    tiny = Tiny(VOCAB, LIMIT + 1, seed=2)
    tiny.model = Transformer(config)
    tiny.params = tiny.model.init(jax.random.key(2))
    return tiny


def test_a_decoder_alone_with_a_window_looks_at_all_it_has_read():
    rope = PositionSpec(kind="rope")
    plain = llama_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=2, rope=rope)
    (layer,) = plain.decoder.group
    own, forward = layer.sublayers
    layer = replace(layer, sublayers=(replace(own, window=3), forward))
    tiny = other(replace(plain, decoder=replace(plain.decoder, group=(layer,))))
    config = DecodeConfig(method="contrastive_search", max_length=LIMIT)
    beginnings = [[5, 6, 7], [9], [3, 4]]
    found = tiny.decode(config, beginnings)
    for i, beginning in enumerate(beginnings):
        same(found, i, reference(tiny, config, [EOS], beginning))


def test_a_mixture_of_experts_reads_candidates_as_it_reads_tokens(sources):
    config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 2))
    tiny = other(sparse(config, RouterSpec(experts=4, k=2, gates="chosen", capacity=4.0), every=1))
    config = DecodeConfig(method="contrastive_search", max_length=LIMIT)
    found = tiny.decode(config, sources)
    for i, source in enumerate(sources):
        same(found, i, reference(tiny, config, source))


def looping(make_tiny):
    """All layers add nothing, and the head reads from the newest token what follows: 3 after 2, 2 after 3 and 4.

    The first input is followed by 2. Behind the best token come, at a distance, t + 1 and then the others by number.
    """
    tiny = make_tiny(VOCAB, LIMIT, seed=1)
    head = np.tile(-0.1 * np.arange(VOCAB, dtype=np.float32), (16, 1))
    head[np.arange(VOCAB), (np.arange(VOCAB) + 1) % VOCAB] = 0.25
    for token, best in ((0, 2), (2, 3), (3, 2), (4, 2)):
        head[token, best] = 0.5
    head[:, EOS] = -9.0
    nothing = jax.tree.map(jnp.zeros_like, tiny.params)
    nothing["decoder"]["final_norm"]["scale"] = jnp.ones(16)
    tiny.params = nothing | {"embedding": jnp.eye(VOCAB, 16), "head": jnp.asarray(head)}
    return tiny


def repeated(tokens, n=4):
    """Share of the n-grams that occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def test_loops_end(make_tiny):
    """Greedy search writes 2 3 2 3 …: of its 9 4-grams two are new."""
    tiny = looping(make_tiny)
    share = {}
    for method in ("greedy", *METHODS):
        options = {} if method == "greedy" else {"penalty_alpha": 0.6}
        found = tiny.decode(DecodeConfig(method=method, max_length=12, **options), [[5, 1]])
        share[method] = repeated(found.tokens[0, 0].tolist())
    assert share.pop("greedy") == 1 - 2 / 9
    assert max(share.values()) < 0.2, share


def written(texts, length):
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = jnp.array([len(text) for text in texts])
    return State(jnp.asarray(tokens), lengths, *(lengths,) * 8)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_penalties_of_tokens_equal_counts_in_dictionaries(n):
    draw = np.random.default_rng(n)
    texts = [draw.integers(0, 4, size).tolist() for size in (0, 1, 2, 5, 12, 30, 40)]
    config = DecodeConfig(method="fsd_d", ngram=n, smoothing=0.8)
    token = np.tile(np.arange(5), (len(texts), 1))
    got = DiscreteFSD(0.6, n=n, smoothing=0.8).penalty(jnp.asarray(token), written(texts, 40))
    want = [[fsd_d(None, text, v, config) for v in range(5)] for text in texts]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not got[:, 4].any()  # never written


@pytest.mark.parametrize("n", [2, 4])
def test_penalties_of_states_equal_cosines_one_by_one(n):
    draw = np.random.default_rng(n)
    texts = [draw.integers(0, 4, size).tolist() for size in (0, 1, 2, 5, 12, 19)]
    states = draw.normal(size=(len(texts), 20, 3))
    config = DecodeConfig(method="fsd", ngram=n)
    token = np.tile(np.arange(5), (len(texts), 1))
    got = FSD(0.4, n=n).penalty(jnp.asarray(token), jnp.asarray(states, jnp.float32), written(texts, 20))
    want = [
        [fsd(lambda text, row=row: row[: len(text) + 1], text, v, config) for v in range(5)]
        for text, row in zip(texts, states, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not got[:, 4].any()
    assert (np.array(want)[-1, :4] > 0).any()


@pytest.mark.parametrize("method", ["contrastive_search", "fsd", "fsd_d"])
def test_more_candidates_than_tokens_are_refused(tiny, method):
    config = DecodeConfig(method=method, candidates=VOCAB + 1, max_length=LIMIT)
    with pytest.raises(ValueError, match="candidates=13 exceeds the vocabulary of 12 tokens"):
        Generator(tiny.model, config)
