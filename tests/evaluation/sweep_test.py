"""A sweep's tables say what its records say."""

import re

import pytest

from mlm.evaluation import sweep
from mlm.evaluation.sweep_html import to_html


def record(method, value, seed=0, task="t", tokens=10, seconds=2.0, passes=4, **options):
    metrics = {"bleu": value, "bleu_signature": "x", "error": 100 - value}
    decode = {"method": method, "beams": 4, "alpha": 0.6, "top_p": 1.0, **options}
    facts = {"tokens": tokens, "seconds": seconds, "passes": passes, "metrics": metrics, "decode": decode}
    return {"task": task, "method": method, "options": options, "seed": seed, **facts}


RECORDS = [
    record("greedy", 20.0),
    record("sample", 10.0),
    record("sample", 14.0, seed=1, tokens=30, passes=6),
    record("sample", 18.0, top_p=0.9),
    record("sample", 18.0, top_p=0.9, seed=1),
    record("beam", 30.0),
    record("beam", 24.0, beams=1),
    record("beam", 27.0, alpha=0.0),
    record("beam", 27.0, alpha=0.0, beams=1),
    record("beam", 1.0, task="other"),
]


def test_seeds_are_averaged():
    found = sweep.rows(RECORDS, {"t": "bleu"})
    assert [(r.method, r.setting, r.value) for r in found[:3]] == [
        ("greedy", "defaults", 20.0),
        ("sample", "defaults", 12.0),
        ("sample", "top_p=0.9", 18.0),
    ]
    # 40 tokens in 4 seconds; 10 and 14 lie two from their mean.
    assert (found[1].tokens_per_second, found[1].seed_std, found[1].seeds, found[1].passes) == (10.0, 2.0, 2, 5.0)
    assert all(row.task == "t" for row in found)


def test_best_default_and_spread():
    """Beam: 30, 24, 27, 27 have mean 27 and variance (9 + 9) / 4."""
    greedy, sample, beam = sweep.compare(sweep.rows(RECORDS, {"t": "bleu"}))
    assert (greedy.best.value, greedy.default.value, greedy.std, greedy.span, greedy.settings) == (20, 20, 0, 0, 1)
    assert (sample.best.setting, sample.default.value, sample.span) == ("top_p=0.9", 12.0, 6.0)
    assert (beam.best.setting, beam.span, beam.settings) == ("defaults", 6.0, 4)
    assert beam.std == pytest.approx(4.5**0.5)


def test_the_smaller_error_is_the_better():
    found = sweep.rows(RECORDS, {"t": "error"})
    assert sweep.compare(found, lower=True)[2].best.value == 70.0
    assert sweep.compare(found)[2].best.value == 76.0


def test_of_equal_settings_the_defaults_are_the_best():
    same = [record("beam", 5.0), record("beam", 5.0, beams=8)]
    (line,) = sweep.compare(sweep.rows(same, {"t": "bleu"}))
    assert line.best is line.default


def test_defaults_that_could_not_be_decoded_are_none():
    (line,) = sweep.compare(sweep.rows([record("beam", 5.0, beams=8)], {"t": "bleu"}))
    assert line.default is None
    assert sweep.to_json([line.best], [line])["methods"][0]["default"] is None
    assert "beams=8" in to_html("a", "b", [line.best], [line], {("beam", "beams"): (8,)})


def test_the_page_plots_speed_and_options():
    found = sweep.rows(RECORDS, {"t": "bleu", "other": "bleu"})
    tried = {("beam", "beams"): (1, 4), ("beam", "alpha"): (0.0,), ("sample", "top_p"): (0.9,)}
    text = to_html("Ways <a>", "about", found, sweep.compare(found), tried)
    assert "Ways &lt;a&gt;" in text
    # Speed on two tasks, and the beams: of alpha and top_p a single value was asked for.
    assert text.count("<svg") == 3
    for label in ("tokens per second", "beams of beam", "bleu"):
        assert f">{label}</text>" in text
    assert "alpha of beam" not in text
    points = re.findall(r"<title>beam with ([^<]*) at (\d): ([\d.]+)</title>", text)
    defaults = "the other options at their defaults"
    assert sorted(points) == [
        ("alpha=0.0", "1", "27.000"),
        ("alpha=0.0", "4", "27.000"),
        (defaults, "1", "24.000"),
        (defaults, "4", "30.000"),
    ]
    assert "http" not in text
