"""Noise against NumPy references that walk token by token, and the properties that make each objective what it is."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from mlm.data import noise
from mlm.data.noise import INSERT, INSIDE, KEEP, START, Denoise, Everything, PoissonWords, Spans, Suffix
from mlm.data.rows import Rows, cut, frame, from_lengths
from mlm.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(sentinels=125, extra_tokens=["<mask>"])
MASK = VOCABULARY.special("<mask>")
FIRST = VOCABULARY.sentinel_ids[0]
T5 = Denoise(Spans(), noise.sentinels, noise.hidden_with_sentinels)
ROLLED = Denoise(Spans(random_roll=True), noise.sentinels, noise.hidden_with_sentinels)
LENGTHS = [40, 1, 2, 3, 7, 100, 0, 64]


def text(length, seed=0):
    """Random letters with a space in every sixth place or so, and a full stop in every thirtieth."""
    random = np.random.default_rng(seed)
    letters = random.integers(ord("a"), ord("z"), length)
    letters[random.random(length) < 1 / 6] = ord(" ")
    letters[random.random(length) < 1 / 30] = ord(".")
    return (letters + 3).tolist()


def ragged(rows):
    return tf.ragged.constant(rows, tf.int32, ragged_rank=1, row_splits_dtype=tf.int64)


def seed(number):
    return tf.constant([7, number], tf.int64)


PIECES = [text(n, seed=n) for n in LENGTHS]


@functools.cache
def graph(mask):
    return tf.function(lambda pieces, seed: mask(pieces, seed, VOCABULARY), autograph=False, reduce_retracing=True)


def codes_of(mask, number=0, pieces=PIECES):
    """The codes of each piece."""
    codes = graph(mask)(ragged(pieces), seed(number))
    return [row.tolist() for row in np.split(codes.numpy(), np.cumsum([len(p) for p in pieces])[:-1])]


# References: one piece, one token at a time.


def reference_inputs(tokens, codes, name):
    out, sentinel = [], FIRST
    for i, (token, code) in enumerate(zip(tokens, codes, strict=True)):
        hidden, before = code in (START, INSIDE), i > 0 and codes[i - 1] in (START, INSIDE)
        if name == "sentinels":
            if not hidden:
                out.append(token)
            elif not before:  # spans that touch are one
                out.append(sentinel)
                sentinel -= 1
        elif name == "mask_token":
            out += {KEEP: [token], START: [MASK], INSIDE: [], INSERT: [MASK, token]}[code]
        elif not hidden:
            out.append(token)
    return out


def reference_targets(tokens, codes, name):
    if name == "full_text":
        return tokens
    hidden = [code in (START, INSIDE) for code in codes]
    if name == "hidden":
        return [t for t, h in zip(tokens, hidden, strict=True) if h]
    return reference_inputs(tokens, [KEEP if h else START for h in hidden], "sentinels")


def reconstruct(inputs, targets):
    """The text from a span corruption's two sides."""
    spans, current = [], []
    for token in targets:
        if token > 300:
            spans.append(current)
            current = []
        else:
            current.append(token)
    spans.append(current)
    if targets and targets[0] > 300:  # the text begins with a kept span: no hidden one stands before the first sentinel
        spans = spans[1:]
    out = []
    for token in inputs:
        out += spans.pop(0) if token > 300 else [token]
    return out


@pytest.mark.parametrize("mask", [Spans(), Spans(0.5, 1), Suffix(), Everything(), PoissonWords(0.4, 1.5)], ids=repr)
@pytest.mark.parametrize("name", sorted(noise.INPUTS))
def test_inputs_equal_the_reference(name, mask):
    codes = codes_of(mask)
    flat = tf.constant(np.concatenate(codes), tf.int32)
    got = noise.INPUTS[name](ragged(PIECES), flat, VOCABULARY).to_list()
    assert got == [reference_inputs(p, c, name) for p, c in zip(PIECES, codes, strict=True)]


@pytest.mark.parametrize("mask", [Spans(), Spans(0.5, 1), Suffix(), Everything(), PoissonWords(0.4, 1.5)], ids=repr)
@pytest.mark.parametrize("name", sorted(noise.TARGETS))
def test_targets_equal_the_reference(name, mask):
    codes = codes_of(mask)
    flat = tf.constant(np.concatenate(codes), tf.int32)
    got = noise.TARGETS[name](ragged(PIECES), flat, VOCABULARY).to_list()
    assert got == [reference_targets(p, c, name) for p, c in zip(PIECES, codes, strict=True)]


# Span corruption.


def draws(lengths, pair):
    """The uniform numbers behind random_ranks, row by row."""
    keys = tf.random.stateless_uniform([sum(lengths)], pair, dtype=tf.float64).numpy()
    return np.split(keys, np.cumsum(lengths)[:-1])


def reference_partition(total, parts, keys):
    """Cut before the items, of those after the first, that drew the parts − 1 smallest numbers."""
    cuts = sorted(np.argsort(keys[1:])[: parts - 1] + 1)
    return np.diff([0, *cuts, total]).tolist()


def reference_span_masks(lengths, mask, number):
    pairs = tf.random.experimental.stateless_split(seed(number), 3)
    hidden = [0 if n < 2 else min(max(round(n * mask.density), 1), n - 1) for n in lengths]
    spans = [max(1, min(max(round(h / mask.mean_span), 1), n - h)) for n, h in zip(lengths, hidden, strict=True)]
    kept_keys = draws([n - h for n, h in zip(lengths, hidden, strict=True)], pairs[0])
    hidden_keys = draws(hidden, pairs[1])
    masks = []
    for n, h, s, kept_key, hidden_key in zip(lengths, hidden, spans, kept_keys, hidden_keys, strict=True):
        kept_parts, hidden_parts = reference_partition(n - h, s, kept_key), reference_partition(h, s, hidden_key)
        masks.append([m for k, h in zip(kept_parts, hidden_parts, strict=True) for m in [False] * k + [True] * h])
    return masks


@pytest.mark.parametrize("mask", [Spans(), Spans(0.5, 3), Spans(0.3, 8), Spans(0.9, 1)], ids=repr)
@pytest.mark.parametrize("number", range(5))
def test_span_masks_equal_the_reference(mask, number):
    got = [[c in (START, INSIDE) for c in row] for row in codes_of(mask, number)]
    assert got == reference_span_masks(LENGTHS, mask, number)


@pytest.mark.parametrize(
    "rule", [T5, ROLLED, Denoise(Spans(0.5, 3), *list(vars(T5).values())[1:3])], ids=["t5", "rolled", "half"]
)
def test_span_corruption_loses_no_token(rule):
    for number in range(20):
        inputs, targets = (side.to_list() for side in rule.graph(VOCABULARY)(ragged(PIECES), seed(number)))
        assert [reconstruct(i, t) for i, t in zip(inputs, targets, strict=True)] == PIECES
        for i, t in zip(inputs, targets, strict=True):
            for side in (i, t):  # sentinels count down from the first, one by one
                sentinels = [token for token in side if token > 300]
                assert sentinels == list(range(FIRST, FIRST - len(sentinels), -1))


def test_statistics_of_t5s_spans():
    length, pieces = 568, 200
    codes = np.array(codes_of(Spans(), 3, [text(length)] * pieces))
    hidden = (codes == START) | (codes == INSIDE)
    assert (hidden.sum(1) == 85).all()  # round(568 · 0.15)
    assert ((codes == START).sum(1) == 28).all()  # round(85 / 3)
    np.testing.assert_allclose(hidden.mean(), 0.15, atol=0.01)
    np.testing.assert_allclose(hidden.sum() / (codes == START).sum(), 3, atol=0.1)
    assert not hidden[:, 0].any()
    assert hidden[:, -1].all()
    # elsewhere every place is hidden about equally often
    np.testing.assert_allclose(hidden[:, 10:-10].mean(0), 0.15, atol=0.12)


def test_random_roll_removes_the_bias_at_both_ends():
    codes = np.array(codes_of(Spans(random_roll=True), 3, [text(60)] * 1500))
    hidden = (codes == START) | (codes == INSIDE)
    assert (hidden.sum(1) == 9).all()
    np.testing.assert_allclose(hidden.mean(0), 0.15, atol=0.035)  # 4 standard errors of a share of 0.15 in 1500
    assert (codes == START).sum(1).max() <= Spans(random_roll=True).spans(60)


def test_span_lengths_of_a_random_partition_are_uniform_over_partitions():
    # 5 items in 3 parts: 6 ways, each 1/6
    parts = noise.random_partition(tf.fill([6000], 5), tf.fill([6000], 3), seed(0)).numpy().reshape(-1, 3)
    ways, counts = np.unique(parts, axis=0, return_counts=True)
    assert ways.tolist() == [[1, 1, 3], [1, 2, 2], [1, 3, 1], [2, 1, 2], [2, 2, 1], [3, 1, 1]]
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)


def test_the_seed_decides():
    for mask in (Spans(), Spans(random_roll=True), Suffix(), PoissonWords()):
        assert codes_of(mask, 1) == codes_of(mask, 1)
        assert codes_of(mask, 1) != codes_of(mask, 2)


def test_equal_rules_share_one_graph_and_it_equals_eager():
    again = Denoise(Spans(0.15, 3.0), noise.sentinels, noise.hidden_with_sentinels)
    assert T5.graph(VOCABULARY) is again.graph(VOCABULARY)
    eager, graph = T5(ragged(PIECES), seed(5), VOCABULARY), T5.graph(VOCABULARY)(ragged(PIECES), seed(5))
    assert [x.to_list() for x in eager] == [x.to_list() for x in graph]
    assert T5.graph(VOCABULARY).experimental_get_tracing_count() == 1


def test_a_piece_alone_is_noised_without_its_neighbours_leaking_in():
    inputs, targets = T5(ragged([text(50), text(50, 1)]), seed(0), VOCABULARY)
    for row, tokens in enumerate([text(50), text(50, 1)]):
        assert reconstruct(inputs[row].numpy().tolist(), targets[row].numpy().tolist()) == tokens


# Prefix LM.


def test_the_prefix_is_uniform_and_the_rest_is_the_targets():
    rule = Denoise(Suffix(), noise.drop, noise.hidden)
    inputs, targets = rule(ragged([text(5)] * 4000), seed(0), VOCABULARY)
    assert tf.concat([inputs, targets], 1).to_list() == [text(5)] * 4000
    kept, counts = np.unique(inputs.row_lengths().numpy(), return_counts=True)
    assert kept.tolist() == [1, 2, 3, 4]
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 3 / 4)


@pytest.mark.parametrize(("mask", "least", "most"), [(Suffix(0.25), 50, 99), (Suffix(0.25, fixed=True), 75, 75)])
def test_the_shortest_prefix(mask, least, most):  # round(0.5 · 99) = 50 (half to even); 0.75 · 100
    assert mask.shortest_prefix(100) == least
    kept = [row.index(START) for row in codes_of(mask, 0, [text(100)] * 800)]
    assert (min(kept), max(kept)) == (least, most)


# BART.


def words_of(tokens):
    """Word number of each token: a space begins a word, and so does the text."""
    return np.cumsum([i == 0 or t == ord(" ") + 3 for i, t in enumerate(tokens)]) - 1


@pytest.mark.parametrize("mask", [PoissonWords(), PoissonWords(0.35, 3.5), PoissonWords(0.5, 0.5)], ids=repr)
def test_poisson_words_meet_their_budget_in_whole_words(mask):
    for number in range(10):
        for tokens, codes in zip(PIECES, codes_of(mask, number), strict=True):
            if not tokens:
                continue
            word, hidden = words_of(tokens), np.isin(codes, [START, INSIDE])
            by_word = [set(hidden[word == w].tolist()) for w in range(word[-1] + 1)]
            assert all(len(states) == 1 for states in by_word)  # whole words
            assert sum(states == {True} for states in by_word) == int(np.ceil(len(by_word) * mask.density - 1e-9))
            starts, inserts = np.flatnonzero(np.equal(codes, START)), np.flatnonzero(np.equal(codes, INSERT))
            first_of_word = np.flatnonzero(np.diff(word, prepend=-1))
            assert set(starts) | set(inserts) <= set(first_of_word)


def test_statistics_of_poisson_words():
    tokens = text(3000)
    codes = np.array(codes_of(PoissonWords(0.3, 3), 0, [tokens] * 100))
    word = words_of(tokens)
    spans, empty = (codes == START).sum(), (codes == INSERT).sum()
    hidden_words = sum(len(np.unique(word[np.isin(row, [START, INSIDE])])) for row in codes)
    # Poisson(3): an empty span has probability e^-3 = 0.0498, so the mean length of the others is 3 / 0.9502 = 3.157
    np.testing.assert_allclose(hidden_words / spans, 3.157, rtol=0.03)
    np.testing.assert_allclose(empty / (empty + spans), 0.0498, rtol=0.2)


def test_text_infilling_keeps_the_text_as_targets_and_one_mask_a_span():
    rule = Denoise(PoissonWords(), noise.mask_token, noise.full_text)
    inputs, targets = rule(ragged(PIECES), seed(0), VOCABULARY)
    assert targets.to_list() == PIECES
    seeds = tf.random.experimental.stateless_split(seed(0), 2)
    codes = PoissonWords()(ragged(PIECES), seeds[0], VOCABULARY).numpy()
    assert (inputs.values.numpy() == MASK).sum() == np.isin(codes, [START, INSERT]).sum()


def test_sentences_are_shuffled_whole_inside_their_piece():
    pieces = [VOCABULARY.encode(f"One {i}. Two {i}! Three {i}? Four.") for i in range(30)] + [
        [],
        VOCABULARY.encode("x"),
    ]
    got = noise.shuffle_sentences(ragged(pieces), seed(0), VOCABULARY).to_list()
    split = lambda ids: sorted(VOCABULARY.decode(ids).replace("!", ".").replace("?", ".").split("."))  # noqa: E731
    assert [split(row) for row in got] == [split(row) for row in pieces]
    assert sum(row != piece for row, piece in zip(got, pieces, strict=True)) > 20
    orders = {VOCABULARY.decode(row).replace(str(i), "") for i, row in enumerate(got[:30])}
    assert len(orders) > 10  # of 24
    alone = Denoise(PoissonWords(1e-9), noise.mask_token, noise.full_text, permute_sentences=True)
    assert alone(ragged(pieces), seed(0), VOCABULARY)[1].to_list() == pieces


def test_shuffled_sentences_need_the_whole_text_as_targets():
    with pytest.raises(ValueError, match="needs the whole text as targets, not hidden"):
        Denoise(Suffix(), noise.drop, noise.hidden, permute_sentences=True)


@pytest.mark.parametrize(("density", "mean_span"), [(0, 3), (1, 3), (0.15, 0.5)])
def test_impossible_spans_are_refused(density, mean_span):
    with pytest.raises(ValueError, match="must lie in"):
        Spans(density, mean_span)


# Rows.


def test_rows_count_inside_themselves():
    rows = Rows(ragged([[1, 2, 3], [], [4]]))
    assert rows.row.numpy().tolist() == [0, 0, 0, 2]
    assert rows.place.numpy().tolist() == [0, 1, 2, 0]
    assert rows.sum(tf.constant([1, 2, 3, 4])).numpy().tolist() == [6, 0, 4]
    assert rows.cumsum(tf.constant([1, 2, 3, 4])).numpy().tolist() == [1, 3, 6, 4]
    assert rows.spread(tf.constant([7, 8, 9])).numpy().tolist() == [7, 7, 7, 9]


def test_random_ranks_are_permutations_of_each_row():
    rows = from_lengths(tf.constant([4, 0, 9]))
    marked = tf.constant([False] * 4 + [True] * 3 + [False] * 6)
    ranks = rows.random_ranks(seed(0), first=marked).numpy()
    assert sorted(ranks[:4]) == list(range(4))
    assert sorted(ranks[4:7]) == [0, 1, 2]
    assert sorted(ranks[7:]) == [3, 4, 5, 6, 7, 8]
    assert sorted(rows.random_ranks(seed(0), last=marked).numpy()[4:7]) == [6, 7, 8]


def test_cut_and_frame():
    pieces = cut(tf.range(10, 17), 3)
    assert pieces.to_list() == [[10, 11, 12], [13, 14, 15], [16]]
    assert cut(tf.zeros([0], tf.int32), 3).to_list() == []
    assert frame(pieces, 3).to_list() == [[10, 11, 1], [13, 14, 1], [16, 1]]
    assert frame(pieces, 4, [99]).to_list() == [[99, 10, 11, 1], [99, 13, 14, 1], [99, 16, 1]]
    assert frame(pieces, None).to_list() == [[10, 11, 12, 1], [13, 14, 15, 1], [16, 1]]
    assert frame(pieces, 4, [], [1, 98]).to_list() == [[10, 11, 1, 98], [13, 14, 1, 98], [16, 1, 98]]
    assert frame(pieces, 3, [99], []).to_list() == [[99, 10, 11], [99, 13, 14], [99, 16]]
    with pytest.raises(ValueError, match="a length of 2 tokens has no room"):
        frame(pieces, 2, [99])
