"""Sizes are counted once and right; a mixture's table adds up; a task shows its corruption."""

import json

import numpy as np
import pytest

from mlm.data import statistics
from mlm.data.languages import language_id
from mlm.data.recipes import Lengths
from mlm.data.registration import (
    add_denoising_tasks,
    add_translation_tasks,
    default_vocabulary,
    mixture_rates,
    register_mixture,
)
from mlm.data.sources import TableSource
from mlm.data.statistics import Counts, inspect_task, mixture_table, pass_tokens, task_counts
from mlm.sampling import proportional

LENGTHS = Lengths(48, 40)


@pytest.fixture(scope="module")
def mixture():
    thai = [f"ภาษาไทย {i}".encode() for i in range(50)]
    english = [f"sentence {i}".encode() for i in range(50)]
    names = add_denoising_tasks("st", {"th": TableSource(lambda s: {"text": thai}, ("text",), ("train",))})
    names += add_translation_tasks(
        "st", {"th": TableSource(lambda s: {"english": english, "other": thai}, ("english", "other"), ("train",))}
    )
    names += add_denoising_tasks("st", {"en": TableSource(lambda s: {"text": english}, ("text",), ("train",))})
    return register_mixture("st.all", names, proportional)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlm" / "statistics.json"


# 50 × "ภาษาไทย " is 8 characters and 22 bytes, "sentence " 9 of both; the numbers 0 … 49 are 90 digits.
THAI = (50, 8 * 50 + 90, 22 * 50 + 90)
ENGLISH = (50, 9 * 50 + 90, 9 * 50 + 90)


def test_sizes_by_hand(mixture, cache):
    vocabulary = default_vocabulary()
    assert task_counts("st.denoise.th") == Counts(*THAI, 0)
    assert task_counts("st.denoise.th", vocabulary=vocabulary) == Counts(*THAI, tokens=THAI[2])
    both = [a + b for a, b in zip(THAI, ENGLISH, strict=True)]
    assert task_counts("st.translate.en.th", vocabulary=vocabulary) == Counts(50, both[1], both[2], tokens=both[2])


def test_one_pass_counts_each_column_for_its_language(mixture, cache):
    """Thai is denoised and stands on both sides of the translations, English too."""
    found = pass_tokens("st.all", default_vocabulary())
    assert found == {language_id("th"): 3 * THAI[2], language_id("en"): 3 * ENGLISH[2]}


def test_they_are_counted_once_and_kept(mixture, cache, monkeypatch):
    mixture_table(mixture, 1e4, lengths=LENGTHS)
    assert len(json.loads(cache.read_text())) == 4  # two columns, each with and without a vocabulary

    def count(*arguments):
        raise AssertionError("counted again")

    monkeypatch.setattr(statistics, "_count_tokens", count)
    statistics._open_cache.cache_clear()
    assert mixture_table(mixture, 1e4, lengths=LENGTHS)
    cache.write_text('{"damaged": ')
    statistics._open_cache.cache_clear()
    with pytest.raises(AssertionError, match="counted again"):
        mixture_table(mixture, 1e4, lengths=LENGTHS)


def test_a_mixture_at_a_budget(mixture, cache):
    rows = {row.name: row for row in mixture_table(mixture, 1e4, lengths=LENGTHS)}
    assert set(rows) == {"th", "en"}
    assert rows["th"].title == "Thai"
    assert rows["th"].script == "Thai"
    assert rows["th"].tasks == 3
    assert sum(row.rate for row in rows.values()) == pytest.approx(1)
    assert sum(row.expected_tokens for row in rows.values()) == pytest.approx(1e4)
    for row in rows.values():
        assert row.epochs == pytest.approx(row.expected_tokens / row.tokens)
    by_task = mixture_table(mixture, 1e4, lengths=LENGTHS, by_task=True)
    assert {row.name: row.rate for row in by_task} == pytest.approx(mixture_rates(mixture))
    assert [row.rate for row in by_task] == sorted((row.rate for row in by_task), reverse=True)


def test_a_task_shows_its_corruption(mixture, cache):
    view = inspect_task("st.denoise.en", lengths=LENGTHS, show=3, sample=30)
    assert len(view.shown) == 3
    assert all("<extra_id_0>" in inputs and targets.startswith("<extra_id_0>") for inputs, targets in view.shown)
    assert len(view.examples) >= 30
    longest = max(len(e.inputs) for e in view.examples)
    assert view.inputs_percentiles[100] == longest <= 48
    assert view.inputs_percentiles[50] == np.percentile([len(e.inputs) for e in view.examples], 50, method="nearest")
    assert view.per_second > 0
    assert view.counts.tokens == ENGLISH[2]
    with pytest.raises(ValueError, match=r"'st.all' is a mixture; its tasks: st.denoise.en"):
        inspect_task("st.all")
