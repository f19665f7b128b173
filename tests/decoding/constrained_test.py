"""Constrained beam search against the same rules one hypothesis at a time, and against the enumeration of all texts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.constrained import continuing, progressed, shares
from mlm.decoding.generate import Generator
from mlm.decoding.phrases import avoided, constraints
from mlm.models.families import sparse, t5_style
from mlm.models.specs import RouterSpec
from mlm.models.transformer import Transformer

EOS, K, T = 1, 4, 9
PHRASES = [[[7, 8], [9]], [], [[3]], [[5, 5, 6]], [[4, 2], [4, 3]], [[10], [11], [2]], [[6, 7, 8, 9]], [[9], [9, 9]]]


def follows(phrases, written):
    """written: tokens of each phrase. (the tokens that may come next with a phrase, the phrase that is begun)."""
    for p, (phrase, n) in enumerate(zip(phrases, written, strict=True)):
        if 0 < n < len(phrase):
            return {phrase[n]}, p
    return {phrase[0] for phrase, n in zip(phrases, written, strict=True) if n == 0}, None


def advanced(phrases, written, token):
    written, (expected, begun) = list(written), follows(phrases, written)
    if begun is not None:
        if token in expected:
            written[begun] += 1
            return written
        written[begun] = 0
    for p, phrase in enumerate(phrases):
        if written[p] == 0 and phrase[0] == token:
            written[p] = 1
            break
    return written


def shared(count, beams):
    """Beams of each bank, filled one after another as in Sockeye."""
    banks = len(count)
    size = [beams // banks] * banks
    size[-1] += beams % banks
    for i in reversed(range(banks)):
        over = size[i] - count[i]
        if over > 0:
            size[i] -= over
            size[(i - 1) % banks] += over
    return size


def reference(tiny, source, phrases, beams=K, alpha=0.6, length=T, prompt=()):
    """[(score, tokens)], best first. (log-probability, tokens, written tokens of each phrase) is a live hypothesis."""

    def penalty(n):
        return ((5.0 + n) / 6.0) ** alpha

    total = sum(map(len, phrases))
    live, finished = [(0.0, list(prompt), [0] * len(phrases))], []
    while len(live[0][1]) < length:
        scored = []  # (log-probability, beam, token)
        extra = []
        for beam, (log_prob, tokens, written) in enumerate(live):
            now = tiny.log_probs(source, tokens) + log_prob
            met = sum(written) == total
            possible = [(now[t], beam, t) for t in range(tiny.vocab) if met or t != EOS]
            scored += possible
            if phrases:
                extra += [max(possible)] + [(now[t], beam, t) for t in follows(phrases, written)[0]]
                extra += [(now[EOS], beam, EOS)] if met else []
        wide = sorted(scored, key=lambda c: -c[0])[: 2 * beams]
        candidates = list(dict.fromkeys([*wide, *extra]))
        banks = [[] for _ in range(total + 1)]
        for log_prob, beam, token in candidates:
            _, tokens, written = live[beam]
            if token == EOS:
                finished.append((log_prob / penalty(len(tokens) + 1), [*tokens, EOS]))
            else:
                written = advanced(phrases, written, token)
                banks[sum(written)].append((log_prob, [*tokens, token], written))
        finished = sorted(finished, key=lambda c: -c[0])[:beams]
        sizes = shared([len(bank) for bank in banks], beams)
        kept = [c for bank, size in zip(banks, sizes, strict=True) for c in sorted(bank, key=lambda c: -c[0])[:size]]
        live = sorted(kept, key=lambda c: -c[0])
    return finished


def results(out, i):
    return [t[:n].tolist() for t, n in zip(out.tokens[i], out.lengths[i], strict=True) if n]


def holds(tokens, phrase):
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


def config(**options):
    return DecodeConfig(**{"method": "constrained_beam", "beams": K, "n_best": 2, "max_length": T, **options})


def random_runs(seed, runs=300):
    """Phrases, and texts of ten tokens in which their tokens are frequent."""
    rng = np.random.default_rng(seed)
    for _ in range(runs):
        phrases = [rng.integers(2, 5, rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 4))]
        yield phrases, rng.integers(2, 5, 10).tolist()


def test_progress_equals_the_rules_in_python():
    phrases, texts = zip(*random_runs(0), strict=True)
    table = jnp.array(constraints(phrases)["phrases"])
    written = [[0] * len(own) for own in phrases]
    progress = jnp.zeros(table.shape[:2], jnp.int32)
    step = jax.jit(lambda progress, token: (continuing(table, progress), progressed(table, progress, token)))
    for tokens in np.transpose(texts):
        (following, allowed), after = step(progress, jnp.array(tokens))
        for i, own in enumerate(phrases):
            assert {*np.asarray(following)[i][np.asarray(allowed)[i]].tolist()} == follows(own, written[i])[0]
            written[i] = advanced(own, written[i], tokens[i])
            assert after[i, : len(own)].tolist() == written[i]
        progress = after
    held = [
        holds(text, phrase)
        for text, own, counts in zip(texts, phrases, written, strict=True)
        for phrase, n in zip(own, counts, strict=True)
        if n == len(phrase)
    ]
    assert all(held)
    assert len(held) > 100


def test_shares_equal_filling_bank_after_bank():
    rng = np.random.default_rng(1)
    totals = rng.integers(0, 8, 500).astype(np.int32)
    counts = rng.integers(0, 6, (500, 8)).astype(np.int32) * (np.arange(8) <= totals[:, None])
    for beams in (1, 4, 20):
        got = shares(jnp.array(counts), jnp.array(totals), beams)
        for row, count, total in zip(np.asarray(got), counts, totals, strict=True):
            assert row[: total + 1].tolist() == shared(count[: total + 1].tolist(), beams)
            assert not row[total + 1 :].any()


def test_the_search_equals_the_rules_in_python(tiny, sources):
    out = tiny.decode(config(), sources, given=constraints(PHRASES))
    for i, (source, phrases) in enumerate(zip(sources, PHRASES, strict=True)):
        expected = reference(tiny, source, phrases)[:2]
        assert results(out, i) == [tokens for _, tokens in expected]
        np.testing.assert_allclose(out.scores[i], [score for score, _ in expected], atol=1e-4)
        for tokens, phrase in itertools.product(results(out, i), phrases):
            assert holds(tokens, phrase)


def test_without_phrases_it_is_beam_search(tiny, sources):
    beam = tiny.decode(config(method="beam"), sources)
    for got, want in zip(tiny.decode(config(), sources, given=constraints([[]] * 8)), beam, strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_the_plain_text_holds_anyway_changes_nothing(tiny, sources):
    """Beams wide enough that both find the same best text."""
    plain = tiny.decode(config(method="beam", min_length=6, beams=24), sources)
    phrases = [[t[1:3].tolist(), t[3:4].tolist()] for t in plain.tokens[:, 0]]
    out = tiny.decode(config(min_length=6, beams=24), sources, given=constraints(phrases))
    np.testing.assert_array_equal(out.tokens[:, 0], plain.tokens[:, 0])
    np.testing.assert_allclose(out.scores[:, 0], plain.scores[:, 0], atol=1e-4)


def test_every_order_and_tight_limit_holds_all_phrases(tiny, sources):
    """With as many tokens as phrases and EOS have, and behind prompts."""
    needed = [1 + sum(map(len, own)) for own in PHRASES]
    for order in (1, -1):
        given = constraints([own[::order] for own in PHRASES])
        out = tiny.decode(config(), sources, given=given, prompts=[[9]] * 8, limits=[1 + n for n in needed])
        for i, phrases in enumerate(PHRASES):
            text = results(out, i)[0]
            assert text[0] == 9
            assert text[-1] == EOS
            assert all(holds(text[1:], phrase) for phrase in phrases)


def test_wide_enough_beams_find_the_best_of_all_texts_with_the_phrase(make_tiny):
    """V = 5, T = 4: 4 + 16 + 64 prefixes."""
    tiny, source, phrase = make_tiny(5, 4, seed=1), [3, 4, 1], [4, 2]
    texts = [[*head, EOS] for n in range(4) for head in itertools.product([0, 2, 3, 4], repeat=n)]
    texts = [text for text in texts if holds(text, phrase)]
    best = max((tiny.total(source, text) / ((5 + len(text)) / 6) ** 0.6, text) for text in texts)
    out = tiny.decode(config(beams=200, max_length=4), [source], given=constraints([[phrase]]))
    assert results(out, 0)[0] == best[1]
    np.testing.assert_allclose(out.scores[0, 0], best[0], atol=1e-4)


def test_avoided_phrases_are_never_written_by_any_method(tiny, sources):
    for options in ({"method": "greedy", "n_best": 1, "beams": 4}, {"method": "beam"}):
        own = config(**options, min_length=6)
        plain = tiny.decode(own, sources)
        avoid = [[t[1:3].tolist(), t[:1].tolist()] if i % 2 else [] for i, t in enumerate(plain.tokens[:, 0])]
        out = tiny.decode(config(**options, min_length=6, avoid=True), sources, given=avoided(avoid))
        for i, phrases in enumerate(avoid):
            assert not any(holds(text, phrase) for text in results(out, i) for phrase in phrases)
            assert (results(out, i) == results(plain, i)) == (i % 2 == 0)


def test_phrases_and_avoided_ones_go_together(tiny, sources):
    given = constraints([[[7, 8]]] * 8) | avoided([[[8, 4], [6]]] * 8)
    out = tiny.decode(config(avoid=True), sources, given=given)
    for i in range(8):
        assert all(holds(t, [7, 8]) and not holds(t, [8, 4]) and 6 not in t for t in results(out, i))


def test_a_stop_sequence_ends_no_text_that_lacks_a_phrase(tiny, sources):
    out = tiny.decode(config(stop=((4,), (9,))), sources, given=constraints([[[7, 8], [9]]] * 8))
    for i in range(8):
        text = results(out, i)[0]
        assert holds(text, [7, 8])
        assert 4 not in text[:-1]
        assert text.index(9) == len(text) - 1


def test_a_mixture_of_experts_on_eight_devices_gives_the_texts_of_one(sources):
    dense = t5_style(vocab_size=12, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 2))
    model = Transformer(sparse(dense, RouterSpec(experts=4, k=2, gates="chosen"), every=1))
    params = model.init(jax.random.key(3))
    given = constraints(PHRASES)
    one = Generator(model, config())(params, sources, given=given)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    eight = Generator(model, config(), rows=NamedSharding(mesh, P("data")))(params, sources, given=given)
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_allclose(one.scores, eight.scores, rtol=1e-5)
    assert all(holds(results(one, i)[0], phrase) for i, own in enumerate(PHRASES) for phrase in own)


@pytest.mark.parametrize(
    ("phrases", "options", "message"),
    [
        ([[[3]], [[]]], {}, r"source 1: phrase 0 is \[\]; a phrase is one token id or more"),
        ([[[3]], [[3], [4, EOS]]], {}, "source 1: phrase 1 .* none of them EOS"),
        ([[[3]], [[3], [4, 99]]], {}, "phrases of source 1: phrase 1 holds token 99, outside the model's vocabulary"),
        ([[[3]], [[5] * 5, [6] * 4]], {}, "source 1: its phrases have 9 tokens, which with EOS make 10, .* may have 9"),
        ([[[3]]], {}, "1 phrases for 2 sources"),
        ([[[3]], [[4, 5, 6]]], {"bad_words": ((5, 6),)}, r"phrase \[4, 5, 6\] holds \[5, 6\], which bad_words"),
        ([[[3]], [[4, 5]]], {"stop": ((4,),)}, "holds .* which stop rules out"),
        ([[[3]], [[4]]], {"method": "beam"}, "method='constrained_beam' and given=constraints.* belong together"),
        (None, {}, "belong together"),
        (None, {"method": "beam", "avoid": True}, r"avoid=True and given=avoided.* belong together"),
    ],
)
def test_impossible_phrases_are_refused_before_compiling(tiny, phrases, options, message):
    generator = Generator(tiny.model, config(**options))
    with pytest.raises(ValueError, match=message):
        generator(tiny.params, [[3], [4]], given={} if phrases is None else constraints(phrases))
    assert generator.compilations == 0
