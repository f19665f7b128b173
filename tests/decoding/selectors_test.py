"""Sampling draws from the distribution it promises, reproducibly."""

import itertools

import jax.numpy as jnp
import numpy as np

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.processors import PROCESSORS
from mlm.decoding.selectors import Sample
from mlm.decoding.state import Seen, Start, State

# Critical values of chi-square at 0.1 %: seeds are fixed, so a failure is a change, not chance.
CHI_SQUARE = {5: 20.5, 11: 31.3, 143: 199.0}


def chi_square(counts, probs):
    expected = counts.sum() * probs
    return float(np.sum((counts - expected) ** 2 / expected))


def draws(processors, logits, count=20_000):
    """One draw from the same logits by each of `count` examples."""
    selector = Sample(seed=7)
    log_prob, keys = selector.init(
        Start(jnp.arange(count), 4, {}, jnp.zeros(count, int), lambda: Seen(jnp.zeros((count, 0, 1))))
    )
    zero = jnp.zeros(count, jnp.int32)
    done = jnp.zeros(count, bool)
    tokens = jnp.zeros((count, 4), jnp.int32)
    state = State(tokens, zero, zero, log_prob, zero, zero + 4, done, zero, {}, keys)
    raw = processed = jnp.broadcast_to(logits, (count, logits.size))
    for process in processors:
        processed = process(processed, state)
    return selector.choose(raw, processed, state)


def test_one_step_follows_the_softmax():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1, 12), jnp.float32)
    choice = draws([], logits)
    probs = np.exp(logits) / np.exp(logits).sum()
    assert chi_square(np.bincount(choice.token, minlength=12), probs) < CHI_SQUARE[11]
    np.testing.assert_allclose(choice.log_prob, np.log(probs)[choice.token], atol=1e-5)


def test_processed_draws_follow_the_processed_distribution_and_are_scored_by_the_model():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, 12), jnp.float32)
    choice = draws([PROCESSORS["temperature"].make(1.7), PROCESSORS["top_k"].make(6)], logits)
    kept = np.argsort(-logits)[:6]
    probs = np.exp(logits[kept] / 1.7) / np.exp(logits[kept] / 1.7).sum()
    counts = np.bincount(choice.token, minlength=12)
    assert counts.sum() == counts[kept].sum()
    assert chi_square(counts[kept], probs) < CHI_SQUARE[5]
    raw = np.log(np.exp(logits) / np.exp(logits).sum())
    np.testing.assert_allclose(choice.log_prob, raw[choice.token], atol=1e-5)


def test_two_steps_of_the_model_follow_the_exact_joint(tiny, sources):
    source, count = sources[0], 4096
    out = Generator(tiny.model, DecodeConfig(method="sample", max_length=2, seed=1), batch_size=count)(
        tiny.params, [source] * count
    )
    first = np.exp(tiny.log_probs(source, []))
    pairs = [(a, b) for a, b in itertools.product(range(tiny.vocab), repeat=2) if a != 1]
    probs = [first[a] * np.exp(tiny.log_probs(source, [a]))[b] for a, b in pairs]
    counts = [np.sum((out.tokens[:, 0] == pair).all(1)) for pair in pairs]
    counts.append(np.sum(out.tokens[:, 0, 0] == 1))  # EOS at once
    probs.append(first[1])
    counts, probs = np.array(counts), np.array(probs)
    rare = probs * count < 5  # chi-square wants five expected draws per cell
    if rare.any():
        counts, probs = np.append(counts[~rare], counts[rare].sum()), np.append(probs[~rare], probs[rare].sum())
    assert counts.sum() == count
    assert chi_square(counts, probs) < CHI_SQUARE[143]


def test_top_1_at_any_temperature_is_greedy(tiny, sources):
    greedy = tiny.decode(DecodeConfig(max_length=10), sources)
    for temperature in (0.1, 1.0, 5.0):
        config = DecodeConfig(method="sample", top_k=1, temperature=temperature, max_length=10)
        sampled = tiny.decode(config, sources)
        np.testing.assert_array_equal(sampled.tokens, greedy.tokens)
        np.testing.assert_allclose(sampled.scores, greedy.scores, rtol=1e-6)


def test_draws_depend_on_seed_and_example_alone(tiny, sources):
    def sample(n, seed, **kwargs):
        config = DecodeConfig(method="sample", n_best=n, seed=seed, max_length=10)
        return tiny.decode(config, sources, **kwargs)

    first, again, other = sample(1, 1), sample(1, 1), sample(1, 2)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    three = sample(3, 1)
    assert all((row == three.tokens[i]).all(1).any() for i, row in enumerate(first.tokens[:, 0]))
    moved = sample(1, 1, ids=[10, *range(1, 8)])
    np.testing.assert_array_equal(moved.tokens[1:], first.tokens[1:])
    assert (moved.tokens[0] != first.tokens[0]).any()
