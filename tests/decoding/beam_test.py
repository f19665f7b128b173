"""Beam search against the same rules in slow Python, and against the enumeration of every sequence."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.beam import Beam, Candidates, Finished
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.state import NEG_INF, State

EOS = 1


def reference(tiny, source, beams, alpha, length, prompt=(), early_stop=True, groups=1, diversity=0.0, bonus=None):
    """[(score, tokens)], best first: 2K candidates, K finished places, brevity penalty, live fallback.

    groups: such searches of beams / groups beams; at every position a token costs `diversity` for each beam of an
    earlier group that chose it. (rank, log-probability, tokens) is a live hypothesis. bonus: of ended tokens.
    """

    def penalty(n):
        return ((5.0 + n) / 6.0) ** alpha

    beams //= groups
    live, finished = [[(0.0, 0.0, list(prompt))] for _ in range(groups)], [[] for _ in range(groups)]
    while len(live[0][0][2]) < length:
        chosen = Counter()
        for group in range(groups):
            candidates = [
                (rank + log_prob - diversity * chosen[token], score + log_prob, [*tokens, token])
                for rank, score, tokens in live[group]
                for token, log_prob in enumerate(tiny.log_probs(source, tokens))
            ]
            candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
            ended = [(score / penalty(len(tokens)), tokens) for _, score, tokens in candidates if tokens[-1] == EOS]
            ended = [(score + (bonus(tokens) if bonus else 0.0), tokens) for score, tokens in ended]
            finished[group] = sorted(finished[group] + ended, key=lambda c: -c[0])[:beams]
            live[group] = [c for c in candidates if c[2][-1] != EOS][:beams]
            chosen.update(tokens[-1] for _, _, tokens in live[group])
        if early_stop and all(
            len(done) == beams and done[-1][0] > max(score for _, score, _ in alive) / penalty(length)
            for alive, done in zip(live, finished, strict=True)
        ):
            break
    results = [done or [c[1:] for c in alive] for alive, done in zip(live, finished, strict=True)]
    return sorted(itertools.chain(*results), key=lambda c: -c[0])


def same(decoded, i, expected):
    for j, (score, tokens) in enumerate(expected[: decoded.scores.shape[1]]):
        assert list(decoded.tokens[i, j, : decoded.lengths[i, j]]) == tokens
        np.testing.assert_allclose(decoded.scores[i, j], score, atol=1e-4)
    for j in range(len(expected), decoded.scores.shape[1]):
        assert decoded.lengths[i, j] == 0
        assert decoded.scores[i, j] == NEG_INF


@pytest.mark.parametrize(("beams", "alpha"), [(1, 0.6), (2, 0.0), (2, 0.6), (4, 0.6), (4, 2.0)])
def test_equals_the_rules_in_python(tiny, sources, beams, alpha):
    config = DecodeConfig(method="beam", beams=beams, alpha=alpha, n_best=beams, max_length=7)
    out = tiny.decode(config, sources)
    for i, source in enumerate(sources):
        expected = reference(tiny, source, beams, alpha, 7)
        same(out, i, expected)
        # The early stop loses nothing: searching to the end finds the same.
        assert expected == reference(tiny, source, beams, alpha, 7, early_stop=False)


@pytest.mark.parametrize(("groups", "diversity"), [(2, 0.5), (2, 30.0), (4, 1.0)])
def test_diverse_beams_equal_the_rules_in_python(tiny, sources, groups, diversity):
    rule = {"groups": groups, "diversity": diversity}
    config = DecodeConfig(method="diverse_beam", beams=4, n_best=4, max_length=7, **rule)
    out = tiny.decode(config, sources)
    for i, source in enumerate(sources[:4]):
        expected = reference(tiny, source, 4, 0.6, 7, **rule)
        same(out, i, expected)
        assert expected == reference(tiny, source, 4, 0.6, 7, early_stop=False, **rule)


def test_diverse_beams_without_groups_are_beam_search(tiny, sources):
    diverse = DecodeConfig(method="diverse_beam", groups=1, diversity=2.0, n_best=4, max_length=7)
    beam = tiny.decode(DecodeConfig(method="beam", n_best=4, max_length=7), sources)
    for got, want in zip(tiny.decode(diverse, sources), beam, strict=True):
        np.testing.assert_array_equal(got, want)


def test_without_diversity_all_groups_are_the_same_beam_search(tiny, sources):
    diverse = DecodeConfig(method="diverse_beam", groups=2, diversity=0.0, n_best=4, max_length=7)
    out = tiny.decode(diverse, sources)
    for tokens, scores, lengths in zip(out.tokens, out.scores, out.lengths, strict=True):
        np.testing.assert_array_equal(tokens[::2], tokens[1::2])
        np.testing.assert_array_equal(scores[::2], scores[1::2])
        np.testing.assert_array_equal(lengths[::2], lengths[1::2])
    half = tiny.decode(DecodeConfig(method="beam", beams=2, n_best=2, max_length=7), sources)
    np.testing.assert_array_equal(out.tokens[:, ::2], half.tokens)
    np.testing.assert_allclose(out.scores[:, ::2], half.scores, rtol=1e-6)


def test_much_diversity_gives_every_group_a_first_token_of_its_own(tiny, sources):
    rule = {"groups": 4, "diversity": 50.0, "min_length": 3}  # nothing ends at once
    out = tiny.decode(DecodeConfig(method="diverse_beam", n_best=4, max_length=5, **rule), sources)
    assert [len({*tokens[:, 0]}) for tokens in out.tokens] == [4] * 8


@pytest.mark.parametrize(("second", "stops"), [(-1.0, False), (-3.0, True)])
def test_a_part_waits_for_its_most_probable_beam_whatever_ranks_first(second, stops):
    """The worst finished score is -2. The beam that ranks second, for want of novelty, may still beat it at -1."""
    none, two = jnp.zeros((2,), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    finished = Finished(jnp.zeros((1, 2, 4), jnp.int32), jnp.array([[-1.5, -2.0]]), two + 2)
    state = State(
        jnp.zeros((2, 4), jnp.int32), none + 2, none, none - 0.5, none, none + 4, none > 0, none, {}, finished
    )
    candidates = Candidates(two + 5, two, jnp.array([[-5.0, second]]), jnp.array([[-5.0, -9.0]]))
    choice = Beam(2, alpha=0.0).grow(candidates, none[None] > 0, jnp.array([[0, 1]]), finished, state)
    assert choice.ended.tolist() == [stops, stops]


@pytest.mark.parametrize("rule", [{}, {"groups": 2, "diversity": 1.0}], ids=["beam", "diverse_beam"])
def test_ragged_prompts_and_limits(tiny, sources, rule):
    prompts = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]
    limits = [7, 2, 7, 3, 6, 2, 6, 1 + 1]
    config = DecodeConfig(method="diverse_beam" if rule else "beam", beams=2, n_best=2, max_length=7, **rule)
    out = tiny.decode(config, sources, prompts=prompts, limits=limits)
    unfinished = 0
    for i, source in enumerate(sources):
        expected = reference(tiny, source, 2, 0.6, limits[i], prompts[i], **rule)
        same(out, i, expected)
        unfinished += expected[0][1][-1] != EOS
    assert unfinished  # the fallback to live hypotheses is covered


def test_wide_enough_beams_find_the_best_of_all_sequences(make_tiny):
    """V = 5, T = 4: 4 + 16 + 64 prefixes; K = 64 beams keep every one alive."""
    tiny = make_tiny(5, 4, seed=1)
    source, alpha = [3, 4, 1], 0.6
    others = [t for t in range(5) if t != EOS]
    ended = [[*head, EOS] for n in range(4) for head in itertools.product(others, repeat=n)]
    scores = [tiny.total(source, tokens) / ((5 + len(tokens)) / 6) ** alpha for tokens in ended]
    config = DecodeConfig(method="beam", beams=64, alpha=alpha, n_best=3, max_length=4)
    out = tiny.decode(config, [source])
    best = sorted(zip(scores, ended, strict=True), reverse=True)[:3]
    same(out, 0, best)


def test_a_larger_alpha_prefers_longer_results(tiny, sources):
    lengths = []
    for alpha in (0.0, 1.0, 4.0):
        config = DecodeConfig(method="beam", beams=4, alpha=alpha, max_length=10)
        lengths.append(tiny.decode(config, sources).lengths.mean())
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]


def test_min_length_forbids_an_early_end_and_leaves_scores_alone(tiny, sources):
    config = DecodeConfig(method="beam", beams=4, min_length=5, max_length=8)
    out = tiny.decode(config, sources)
    for i, source in enumerate(sources):
        tokens = list(out.tokens[i, 0, : out.lengths[i, 0]])
        assert len(tokens) >= 5
        penalty = ((5 + len(tokens)) / 6) ** 0.6 if tokens[-1] == EOS else 1.0
        assert math.isclose(out.scores[i, 0], tiny.total(source, tokens) / penalty, abs_tol=1e-4)


def test_the_search_stops_when_nothing_can_improve(tiny, sources):
    config = DecodeConfig(method="beam", beams=1, alpha=0.0, max_length=10)
    passes = [int(tiny.decode(config, [source]).passes[0]) for source in sources]
    assert min(passes) < 10


def test_memory_does_not_grow_with_vocabulary_times_length(make_tiny):
    """Four times the length may add slots and tokens, but no table of beams x vocabulary x length."""
    vocab, beams = 4096, 4
    tiny = make_tiny(vocab, 8, seed=0)

    def bytes_needed(length):
        config = DecodeConfig(method="beam", beams=beams, max_length=length)
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        inputs = {"sources": jax.ShapeDtypeStruct((1, 8), jnp.int32), "source_lengths": row, "limits": row, "ids": row}
        compiled = Generator(tiny.model, config)._run.lower((tiny.params,), inputs, None, None, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = bytes_needed(64) - bytes_needed(16)
    assert growth < 0.1 * beams * vocab * (64 - 16) * 4
