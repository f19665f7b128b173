"""Plans: objectives fitted to lengths, and refused when they cannot be."""

import numpy as np
import pytest
import tensorflow as tf

from mlm.data.plans import PLANS, raw_length
from mlm.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(sentinels=125, extra_tokens=["<mask>", "[R]"])


@pytest.mark.parametrize(
    ("inputs_length", "density", "mean_span", "want"),
    [
        # From T5's released code: n with kept + spans + 1 <= inputs_length, targets = hidden + spans + 1
        (64, 0.15, 3, (70, 14)),
        (128, 0.15, 3, (141, 29)),
        (256, 0.15, 3, (284, 58)),
        (512, 0.15, 3, (568, 114)),
        (1024, 0.15, 3, (1137, 229)),
        (512, 0.15, 8, (588, 100)),
        (512, 0.5, 3, (766, 512)),  # 767 gives targets of 513 > 512: both lose one
        (512, 0.15, 64, (600, 92)),
        (512, 0.5, 64, (1006, 512)),
        (512, 0.15, 20, (597, 95)),  # ByT5
        (1024, 0.15, 20, (1193, 189)),
    ],
)
def test_raw_length_is_t5s(inputs_length, density, mean_span, want):
    assert raw_length(inputs_length, density, mean_span) == want


@pytest.mark.parametrize("inputs_length", range(4, 200, 7))
@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
def test_raw_length_is_the_largest_that_fits(inputs_length, density):
    def inputs(n):
        return n - round(n * density) + round(round(n * density) / 3) + 1

    n, _ = raw_length(inputs_length, density, 3)
    assert inputs(n) <= inputs_length
    assert inputs(n + 1) > inputs_length or density == 0.5


def run(plan, count=3, number=0):
    pieces = tf.reshape(tf.range(count * plan.length) % 200 + 3, [count, plan.length])
    seed = tf.constant([1, number], tf.int64)
    inputs, targets = plan.examples(tf.RaggedTensor.from_tensor(pieces, ragged_rank=1), seed, VOCABULARY)
    return pieces.numpy(), inputs, targets


@pytest.mark.parametrize("lengths", [(32, 32), (64, 40), (40, 64), (128, 29)])
@pytest.mark.parametrize("name", sorted(PLANS))
def test_every_plan_fills_its_lengths_and_ends_in_eos(name, lengths):
    plan = PLANS[name](VOCABULARY, *lengths)
    longest = np.zeros(2, int)
    for number in range(5):
        _, *sides = run(plan, number=number)
        for side, (examples, length) in enumerate(zip(sides, lengths, strict=True)):
            for row in examples:
                assert row[-1] == 1
                assert tf.reduce_sum(tf.cast(row == 1, tf.int32)) == 1
                assert len(row) <= length
                longest[side] = max(longest[side], len(row))
    assert (longest >= np.array(lengths) - 1).any(), (longest, lengths)


def test_span_corruption_fills_inputs_and_targets_exactly():
    for lengths in [(64, 14), (128, 29), (512, 114)]:
        _, inputs, targets = run(PLANS["span_corruption"](VOCABULARY, *lengths))
        assert set(inputs.row_lengths().numpy()) == {lengths[0]}
        assert set(targets.row_lengths().numpy()) == {lengths[1]}


def test_a_rolled_mask_fits_too():
    plan = PLANS["span_corruption"](VOCABULARY, 64, 15, random_roll=True)
    for number in range(30):
        _, inputs, targets = run(plan, number=number)
        assert max(inputs.row_lengths().numpy()) <= 64
        assert max(targets.row_lengths().numpy()) <= 15
        assert not set(inputs.values.numpy()) & {0}
        for piece, i, t in zip(_, inputs, targets, strict=True):  # no token was cut off
            assert sorted(x for x in [*i.numpy(), *t.numpy()] if 3 <= x < 300) == sorted(piece)


def test_a_prefix_comes_first_and_once():
    for name in ("span_corruption", "prefix_lm"):
        _, inputs, _ = run(PLANS[name](VOCABULARY, 64, 64, prefix="[R]"))
        for row in inputs.to_list():
            assert row.index(VOCABULARY.special("[R]")) == 0
            assert row.count(VOCABULARY.special("[R]")) == 1
            assert len(row) <= 64


def test_causal_lm_reads_nothing_and_says_all():
    plan = PLANS["causal_lm"](VOCABULARY, 8, 17)
    pieces, inputs, targets = run(plan)
    assert inputs.to_list() == [[1]] * 3
    assert targets.to_list() == [[*row, 1] for row in pieces.tolist()]


def test_documents_are_joined_and_cut():
    documents = tf.ragged.constant([[5, 6, 7], [], [8, 9, 10, 11]], tf.int32, row_splits_dtype=tf.int64)
    plan = PLANS["prefix_lm"](VOCABULARY, 4, 4)
    assert plan.length == 4  # at most 3 tokens and </s> on either side
    assert plan.pieces(documents).to_list() == [[5, 6, 7, 8], [9, 10, 11]]
    causal = PLANS["causal_lm"](VOCABULARY, 4, 5)
    assert causal.pieces(documents).to_list() == [[5, 6, 7, 1], [1, 8, 9, 10], [11, 1]]


@pytest.mark.parametrize(
    ("name", "lengths", "options", "message"),
    [
        (
            "span_corruption",
            (512, 100),
            {},
            "has targets of 114 tokens, the task's hold 100; raise targets_length to 114",
        ),
        ("span_corruption", (512, 512), {"density": 0.5}, "needs 128 sentinels, bytes has 125; raise mean_span to 4"),
        ("span_corruption", (2, 100), {}, "inputs_length=2 is too short for span corruption, 3 is the least"),
        ("span_corruption", (64, 64), {"prefix": "[Q]"}, r"no special token '\[Q\]'"),
        ("prefix_lm", (2, 1), {}, "leave pieces of 0"),
        ("causal_lm", (64, 2), {}, "leave pieces of 1"),
        ("text_infilling", (2, 64), {}, "leave pieces of 1"),
    ],
)
def test_plans_that_cannot_work_are_refused(name, lengths, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        PLANS[name](VOCABULARY, *lengths, **options)


def test_text_infilling_needs_a_mask_token():
    with pytest.raises(KeyError, match="no special token '<mask>'"):
        PLANS["text_infilling"](ByteVocabulary(), 64, 64)


def test_four_times_the_mean_span_needs_a_quarter_of_the_sentinels():
    PLANS["span_corruption"](VOCABULARY, 512, 512, density=0.5, mean_span=4)
