"""A report says what its rows say: the verdict, the tables, the files; and it is whole in itself."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from mlm.evaluation import report_plots as plots
from mlm.evaluation.report import FillIn, LanguageRow, Report, Translation, judge, language_curves, to_json
from mlm.evaluation.report_html import prominent, to_html
from mlm.evaluation.report_text import bits_table, minutes, sampling_table, to_markdown


def row(code="fr", trained=2.0, untrained=5.0, unigram=3.0, script="Latn", **values):
    defaults = {"name": code.upper(), "own_unigram": 2.5, "bytes": 1000, "characters": 9, "rate": 0.1, "epochs": 0.5}
    return LanguageRow(
        code=code, script=script, trained=trained, untrained=untrained, unigram=unigram, **{**defaults, **values}
    )


def record(step, loss, kind="train", **values):
    return {"kind": kind, "step": step, "nll": loss, **values}


@pytest.fixture
def report():
    train = [
        record(
            s,
            9 - s,
            steps_per_second=2.0,
            tokens_per_second=100.0 * s,
            languages={"fr": {"loss": 9.0 - s, "tokens": s}},
        )
        for s in (2, 4)
    ]
    return Report(
        run="tiny <run>",
        mixture="all",
        steps=4,
        parameters=1234567,
        languages=[row("fr", tokens_seen=300), row("ar", trained=4.0, script="Arab", tokens_seen=100)],
        records=[*train, record(4, 5.5, "validation")],
        translations=[Translation("en", "ar", "a <b> & c", "مرحبا", "??", "مر|حبا")],
        fill_ins=[FillIn("fr", ("un ", " noir ", "."), ("chat", "dort"), ("", "x"), ("chat ", "court"))],
        versions={"jax": "0.10"},
        machine="2 CPU cores",
        model="a small one",
        told="Counted so.",
        task="Scored so.",
        held_out="validation",
        names={"ar": "Arabic", "fr": "French", "en": "English"},
        directions={"ar": "rtl", "fr": "ltr"},
        next_steps=[("Go", "mlm generate")],
    )


# The verdict.


@pytest.mark.parametrize(
    ("trained", "won"),
    [(2.9, True), (3.0, False), (3.1, False), (5.1, False), (math.nan, False)],
)
def test_a_language_is_won_against_both(trained, won):
    assert row(trained=trained, untrained=5.0, unigram=3.0).won is won
    assert row(trained=trained, untrained=3.0, unigram=5.0).won is won


@pytest.mark.parametrize(("won", "passed"), [(18, True), (17, False), (20, True), (0, False)])
def test_nine_of_ten_languages_must_be_won(won, passed):
    verdict = judge([row(trained=2.0)] * won + [row(trained=4.0)] * (20 - won))
    assert verdict.passed is passed
    assert f"{won} of 20 languages ({won / 20:.1%})" in verdict.text


def test_a_language_without_held_out_text_counts_as_not_won():
    silent = row(trained=math.nan, untrained=math.nan, unigram=math.nan, bytes=0)
    assert not judge([row(), silent]).passed
    assert judge([row()] * 9 + [silent]).passed
    with pytest.raises(ValueError, match="none of the 2 languages has held-out text"):
        judge([silent, silent])


# Numbers over time.


def test_curves_of_languages_are_means_over_tokens():
    records = [
        {"step": step, "languages": {"fr": {"loss": loss, "tokens": tokens}, "xx": {"loss": None, "tokens": 3}}}
        for step, loss, tokens in ((6, 8.0, 1), (12, 4.0, 3), (18, 3.0, 2), (24, 1.0, 2))
    ]
    # Twelve windows of two steps: each record has one of its own, with its middle one step before its end.
    assert language_curves(records) == {"fr": [(5.0, 8.0), (11.0, 4.0), (17.0, 3.0), (23.0, 1.0)]}
    coarse = [{**r, "step": r["step"] // 6} for r in records] + [{"step": 48}]
    # Windows of four steps: (8·1 + 4·3 + 3·2 + 1·2) / 8.
    assert language_curves(coarse) == {"fr": [(2.0, 3.5)]}
    assert language_curves([]) == {}


def test_time_and_throughput(report):
    assert report.seconds == 2.0  # two windows of two steps at two steps a second
    assert report.tokens_per_second == 200.0
    assert report.throughput == [(2, 200.0), (4, 400.0)]
    assert report.curve("train") == [(2, 7), (4, 5)]
    assert report.curve("validation") == [(4, 5.5)]


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59 s"), (425.0, "7 min 5 s"), (12000.0, "3 h 20 min")])
def test_durations_are_readable(seconds, text):
    assert minutes(seconds) == text


# The files.


def test_json_holds_every_language(report):
    data = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert data["passed"] is False
    assert data["languages_won"] == 0.5
    assert data["languages"]["fr"] == {
        "name": "FR",
        "script": "Latn",
        "won": True,
        "bits_per_byte": {"trained": 2.0, "untrained": 5.0, "unigram": 3.0, "own_unigram": 2.5},
        "held_out_bytes": 1000,
        "characters": 9,
        "rate": 0.1,
        "tokens_seen": 300,
        "epochs": 0.5,
    }
    assert data["mean_bits_per_byte"]["trained"] == 3.0
    assert (data["steps"], data["seconds"], data["tokens_per_second"], data["parameters"]) == (4, 2.0, 200.0, 1234567)
    assert data["versions"] == {"jax": "0.10"}


def test_nothing_unknown_becomes_nan(report):
    silent = row("xx", trained=math.nan, untrained=math.nan, unigram=math.nan, own_unigram=math.nan, bytes=0)
    object.__setattr__(report, "languages", [*report.languages, silent])
    data = to_json(report)
    assert data["languages"]["xx"]["bits_per_byte"]["trained"] is None
    assert data["mean_bits_per_byte"]["trained"] == 3.0
    for text in (json.dumps(data, allow_nan=False), to_markdown(report), to_html(report)):
        assert "nan" not in text.replace("tenant", "")


def test_tables_are_ordered_and_of_one_width(report):
    columns, rows = bits_table(report)
    assert [r[0] for r in rows] == ["fr", "ar"]  # gains of 1/3 and -1/3
    assert [r[-2:] for r in rows] == [["+33.3%", ""], ["-33.3%", "not won"]]
    assert {len(r) for r in rows} == {len(columns)}
    columns, rows = sampling_table(report)
    assert rows[0] == ["ar", "AR", "Arab", "9", "10.00%", "100", "0.50"]


def test_markdown_says_the_same(report):
    text = to_markdown(report)
    assert "in 1 of 2 languages (50.0%)" in text
    assert "| fr | FR | Latn | 1,000 | 2.00 | 3.00 | 2.50 | 5.00 | +33.3% |  |" in text
    assert "| 4 | 5.000 | 5.500 |" in text
    assert r"- trained: مر\|حبا" in text  # a bar would end a cell
    assert "- trained: un [chat] noir [court]." in text
    assert text.count("\n## ") == 7


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags with their attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_outside(report):
    text = to_html(report)
    page = Page(text)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 4
    assert {"link", "img", "iframe", "object"} & set(tags) == set()
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", text)
    assert "tiny &lt;run&gt;" in text
    assert "<run>" not in text
    assert "a &lt;b&gt; &amp; c" in text


def test_right_to_left_text_runs_from_the_right(report):
    page = Page(to_html(report))
    directions = {(a["lang"], a["dir"]) for tag, a in page.seen if tag == "dd"}
    assert directions == {("ar", "rtl"), ("fr", "ltr"), ("en", "auto")}


def test_what_is_right_in_a_gap_is_marked(report):
    text = to_html(report)
    assert '<mark class="yes">chat </mark>' in text
    assert "<mark>court</mark>" in text
    assert "<mark>∅</mark>" in text


def test_a_report_without_samples_and_curves_is_still_a_page(report):
    for name in ("records", "translations", "fill_ins"):
        object.__setattr__(report, name, [])
    text = to_html(report)
    Page(text)
    assert "No values were logged." in text
    to_markdown(report)


def test_prominent_languages_stand_for_writing_systems():
    rows = [row("a", characters=5), row("b", characters=9), row("c", script="Hans", characters=99)]
    rows += [row("d", script="Hant", characters=100), row("e", script="Deva", characters=1)]
    assert prominent(rows, 9) == ["d", "b", "e"]  # Han and Latin are used by two, Han has more text
    assert prominent(rows, 1) == ["d"]


# Plots.


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 10.0, [0, 2, 4, 6, 8, 10]), (1.3, 4.9, [1, 2, 3, 4, 5]), (10, 60, [10, 20, 30, 40, 50, 60])],
)
def test_ticks_are_round_and_reach_beyond_the_data(low, high, ticks):
    span, found = plots._scale(low, high)
    assert found == pytest.approx(ticks)
    assert span == pytest.approx((ticks[0], ticks[-1]))


def test_one_point_has_a_scale_too():
    (low, high), ticks = plots._scale(3.0, 3.0)
    assert low < 3.0 < high
    assert len(ticks) > 1


def test_points_stand_where_their_values_are():
    text = plots.scatter([plots.Point(0, 0, "a", "A"), plots.Point(10, 5, "b", "B")], x="x (m)", y="y (s)", height=450)
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert circles == [(plots.LEFT, 450 - plots.BOTTOM), (plots.WIDTH - plots.RIGHT, plots.TOP)]
    assert "<title>B</title>" in text
    assert ">x (m)</text>" in text
    assert ">y (s)</text>" in text


def test_line_labels_keep_apart_inside_the_frame():
    places = plots._apart([10.0, 11.0, 12.0, 99.0], 10.0, 100.0)
    assert places == [10.0, 23.0, 36.0, 99.0]
    crowded = plots._apart([98.0, 99.0, 100.0], 10.0, 100.0)
    assert crowded == [74.0, 87.0, 100.0]


def test_labels_of_points_cover_neither_points_nor_each_other():
    points = [plots.Point(x, y, f"p{x}{y}", "") for x in range(6) for y in range(6)]
    frame = plots._Frame((0, 5), (0, 5), plots.RIGHT)
    placed = [(frame.x(p.x) / 9, frame.y(p.y) / 9, p) for p in points]  # crowded
    boxes = [(left, base - 10, left + plots.LETTER * 3, base + 2) for left, base, _ in plots._labels(placed, frame)]
    boxes += [(a - 5, b - 5, a + 5, b + 5) for a, b, _ in placed[:0]]
    for i, a in enumerate(boxes):
        assert all(a[2] < b[0] or a[0] > b[2] or a[3] < b[1] or a[1] > b[3] for b in boxes[:i])
