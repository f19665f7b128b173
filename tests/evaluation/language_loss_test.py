"""Losses by language: against slow sums, by definition, whatever the batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.evaluation.language_loss import (
    LanguageLosses,
    Spelling,
    TokenLosses,
    language_losses,
    token_counts,
    unigram,
    unigram_log_probs,
)
from mlm.evaluation.results import combine, language_table, numbers, totals
from mlm.models.families import t5_style
from mlm.models.transformer import Transformer

VOCAB, LANGUAGES = 12, 4
# 0 padding, 1 end of sequence, 2 unknown, 3 … 8 text of 1 … 6 bytes (3 and 4 begin with a space), 9 a language token,
# 10 and 11 sentinels
TEXT = np.isin(np.arange(VOCAB), range(2, 9))
SIZE = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
SPELLING = Spelling(TEXT, SIZE, np.isin(np.arange(VOCAB), (3, 4)), np.arange(VOCAB) == 9)


def make_batch(rows: list[list[tuple[int, list[int]]]], length: int = 12) -> dict[str, np.ndarray]:
    """Rows of (language, target tokens); every source is the lone token 5."""
    shape = (len(rows), length)
    batch = {f"decoder_{name}": np.zeros(shape, np.int32) for name in ("target_tokens", "input_tokens", "segment_ids")}
    batch |= {f"decoder_{name}": np.zeros(shape, np.int32) for name in ("positions", "language_ids")}
    batch |= {f"encoder_{name}": np.zeros((len(rows), 4), np.int32) for name in ("input_tokens", "segment_ids")}
    for r, examples in enumerate(rows):
        place = 0
        for n, (language, tokens) in enumerate(examples, 1):
            here = slice(place, place + len(tokens))
            batch["decoder_target_tokens"][r, here] = tokens
            batch["decoder_input_tokens"][r, here] = [0, *tokens[:-1]]
            batch["decoder_segment_ids"][r, here] = n
            batch["decoder_positions"][r, here] = range(len(tokens))
            batch["decoder_language_ids"][r, here] = language
            batch["encoder_input_tokens"][r, n - 1] = 5
            batch["encoder_segment_ids"][r, n - 1] = n
            place += len(tokens)
    batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] > 0).astype(np.float32)
    return batch


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return make_batch([[(1, [3, 5, 1]), (2, [11, 4, 5, 10, 1])], [(1, [9, 3, 8, 1])], [(3, [1])]])


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, dict]:
    config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 1))
    made = Transformer(config)
    return made, made.init(jax.random.key(0))


def test_bits_per_byte_by_hand(batch):
    """Every token costs ln 2 nats, one bit.

    Language 1: " a"-like token 3 at the start of its text spells 0 bytes of 1, token 5 spells 3, the end none;
    in the other example text starts after the language token: 0 + 6. Text tokens 4, bytes 9, so 4/9 bits per byte;
    7 tokens in all. Language 2: the sentinels 11 and 10 spell nothing, so token 4 keeps its space: 2 + 3 bytes.
    Language 3 has an end of sequence alone: a loss and no text.
    """
    losses = language_losses(lambda b: np.full((3, 12), np.log(2)), [batch], SPELLING, languages=LANGUAGES)
    np.testing.assert_array_equal(losses.tokens, [0, 7, 5, 1])
    np.testing.assert_array_equal(losses.text_tokens, [0, 4, 2, 0])
    np.testing.assert_array_equal(losses.bytes, [0, 9, 5, 0])
    np.testing.assert_allclose(losses.bits_per_byte[1:3], [4 / 9, 2 / 5])
    np.testing.assert_allclose(losses.loss[1:], np.log(2))
    assert np.isnan(losses.bits_per_byte[[0, 3]]).all()
    assert losses.seen() == [1, 2, 3]
    np.testing.assert_allclose(losses.total().bits_per_byte, [6 / 14])


def test_padding_is_ignored_whatever_the_model_says_of_it(batch):
    nll = np.where(batch["decoder_segment_ids"] > 0, 1.0, np.nan)
    losses = language_losses(lambda b: nll, [batch], SPELLING, languages=LANGUAGES)
    np.testing.assert_array_equal(losses.nll, [0, 7, 5, 1])


def test_token_losses_are_those_of_a_plain_softmax(batch, model):
    made, params = model
    hidden = made(params, jax.tree.map(jnp.asarray, batch)).hidden
    logits = np.asarray(made.logits(params, hidden), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[..., 0]
    told = batch["decoder_segment_ids"] > 0
    for chunk in (1, 7, 4096):
        got = TokenLosses(made, chunk=chunk)(params, batch)
        np.testing.assert_allclose(got[told], want[told], rtol=1e-5, atol=1e-5)


def test_batches_and_packing_do_not_matter(batch, model):
    made, params = model
    nll = partial(TokenLosses(made), params)
    packed = language_losses(nll, [batch], SPELLING, languages=LANGUAGES)
    alone = [[(1, [3, 5, 1])]], [[(2, [11, 4, 5, 10, 1])], [(1, [9, 3, 8, 1])]], [[(3, [1])]]
    single = language_losses(nll, [make_batch(rows) for rows in alone], SPELLING, languages=LANGUAGES)
    for name in LanguageLosses.__dataclass_fields__:
        np.testing.assert_allclose(getattr(packed, name), getattr(single, name), rtol=1e-5)


def test_losses_add_up(batch):
    once = language_losses(lambda b: np.ones((3, 12)), [batch], SPELLING, languages=LANGUAGES)
    twice = language_losses(lambda b: np.ones((3, 12)), [batch, batch], SPELLING, languages=LANGUAGES)
    np.testing.assert_array_equal((once + once).nll, twice.nll)
    np.testing.assert_array_equal(once.loss, twice.loss)


def test_token_counts_by_language(batch):
    counts = token_counts([batch, batch], VOCAB)
    assert sorted(counts) == [1, 2, 3]
    np.testing.assert_array_equal(counts[2], 2 * np.bincount([11, 4, 5, 10, 1], minlength=VOCAB))


def test_unigram_by_hand(batch):
    """Text tokens 2 … 8. Counts over all languages: 3 twice, 4 once, 5 twice, 8 once; 6 in all. With one added to each
    of the 7: P(3) = 3/13, P(4) = 2/13, P(2) = 1/13. Language 2: tokens 4 and 5, log2(13/2) + log2(13/3) bits, 5 bytes.
    """
    counts = token_counts([batch], VOCAB)
    log_probs = unigram_log_probs(sum(counts.values()), SPELLING)
    np.testing.assert_allclose(np.exp(log_probs[[2, 3, 4, 5]]) * 13, [1, 3, 2, 3])
    np.testing.assert_allclose(np.nansum(np.exp(log_probs)), 1)
    assert np.isnan(log_probs[[0, 1, 9, 10, 11]]).all()
    losses = language_losses(unigram(log_probs), [batch], SPELLING, languages=LANGUAGES)
    np.testing.assert_allclose(losses.bits_per_byte[2], (np.log2(13 / 2) + np.log2(13 / 3)) / 5)
    assert np.isnan(losses.loss[2])  # special tokens have no probability here


def test_a_language_of_its_own_unigram_is_the_best_one_for_it(batch):
    counts = token_counts([batch], VOCAB)
    table = {i: unigram_log_probs(c, SPELLING) for i, c in counts.items()}
    own = language_losses(unigram(table), [batch], SPELLING, languages=LANGUAGES)
    shared = language_losses(
        unigram(unigram_log_probs(sum(counts.values()), SPELLING)), [batch], SPELLING, languages=LANGUAGES
    )
    assert own.bits_per_byte[2] < shared.bits_per_byte[2]
    # Its own counts: 4 and 5 once each, one added to all 7: P = 2/9 each.
    np.testing.assert_allclose(own.bits_per_byte[2], 2 * np.log2(9 / 2) / 5)
    del table[2]
    with pytest.raises(ValueError, match=r"languages with ids \[2\]"):
        unigram(table)(batch)


def test_tables_are_plain_and_combine(batch):
    codes = ["", "aa", "bb", "cc"]
    nll = np.arange(36.0).reshape(3, 12)
    once = language_losses(lambda b: nll, [batch], SPELLING, languages=LANGUAGES)
    table = language_table(once, codes)
    assert list(table) == ["aa", "bb", "cc"]
    assert table["cc"]["bits_per_byte"] is None
    assert totals(table)["bits_per_byte"] == pytest.approx(float(once.total().bits_per_byte[0]))
    assert totals(table)["loss"] == pytest.approx(float(once.total().loss[0]))
    double = combine([table, table])
    assert double["aa"] == pytest.approx({**table["aa"], "tokens": 14, "bytes": 18})


def test_signatures_are_no_numbers():
    assert numbers({"bleu": 1.0, "bleu_signature": "tok:13a"}) == {"bleu": 1.0}
