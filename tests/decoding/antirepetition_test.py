"""Penalties on repetition against slow references that read every prefix anew, and what they are for: loops end."""

from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
        ("contrastive_search", {"min_length": 5, "stop": ((9, 4), (2,))}),
        ("fsd", {"min_length": 5, "stop": ((9, 4), (2,))}),
        ("fsd", {"ngram": 3, "penalty_alpha": 0.7, "candidates": 8}),
        ("fsd_d", {}),
    ],
)
def test_equals_the_rule_in_numpy(tiny, sources, method, options):
    """Ragged prompts and limits; every result is what the row alone would give."""
    config = DecodeConfig(method=method, max_length=LIMIT, **options)
    for prompts, limits in ((PROMPTS, LIMITS), (None, None)):
        found = tiny.decode(config, sources, prompts=prompts, limits=limits)
        for i, source in enumerate(sources):
            rest = (prompts[i], limits[i]) if prompts else ()
            same(found, i, reference(tiny, config, source, *rest))
