"""report.html: one file without references to anything outside it, readable by light and in the dark, and on paper."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from mlm.evaluation import report_plots as plots
from mlm.evaluation.report import FillIn, LanguageRow, Report
from mlm.evaluation.report_plots import COLOURS, MUTED, Line, Point
from mlm.evaluation.report_text import SAMPLING_TEXT, bits_table, facts, minutes, sampling_table, summary

NAMED_LINES = 8  # languages with a colour of their own
STYLE = """
:root { --back:#fff; --text:#1c2024; --soft:#5b6570; --edge:#dde1e6; --panel:#f6f7f9; --muted:#9aa3ad;
  --good:#2b8a3e; --bad:#c92a2a;
  --mark:#d3f0db; --wrong:#e9ecef; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back:#15181c; --text:#e8eaed; --soft:#a3adb8; --edge:#333a42;
  --panel:#1d2126;
  --muted:#6b7580; --good:#69db7c; --bad:#ff8787; --mark:#1f4d2c; --wrong:#343a41; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0; } .note, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; border: 1px solid; font-weight: 600;
  font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: .75rem; margin: 1.25rem
  0; }
.tile { background: var(--panel); border: 1px solid var(--edge); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; line-height: 1.3; } .tile span {
  color: var(--soft); font-size: .8rem; }
figure { margin: 1rem 0; } svg.plot { width: 100%; height: auto; display: block; font-family: inherit; }
.plot text { fill: var(--text); } .plot .tick, .plot .small { font-size: 12px; fill: var(--soft); } .plot .axis {
  font-size: 13px; }
.plot .label { font-size: 12px; font-weight: 600; } .grid { stroke: var(--edge); fill: none; } .line { fill: none;
  stroke-width: 2; }
.muted { fill: none; stroke-width: 1; opacity: .35; } .muted:hover, .line:hover { opacity: 1; stroke-width: 3; }
.mark { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; } .dot { fill-opacity: .85; stroke: var(--back); }
.box { max-height: 34rem; overflow: auto; border: 1px solid var(--edge); border-radius: .5rem; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; } td, th { padding: .3rem .7rem; text-align:
  left; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--panel); border-bottom: 1px solid var(--edge); font-weight: 600; }
.sort th { cursor: pointer; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr + tr td { border-top: 1px solid var(--edge); } td:first-child { font-weight: 600; }
.sample { border: 1px solid var(--edge); border-radius: .5rem; padding: .7rem .9rem; margin: .75rem 0; }
.sample h3 { font-size: .875rem; margin: 0 0 .4rem; } .sample dl { display: grid; grid-template-columns: 8rem 1fr;
  gap: .3rem .8rem; margin: 0; }
.sample dt { color: var(--soft); font-size: .8rem; padding-top: .15rem; } .sample dd { margin: 0; overflow-wrap:
  anywhere; }
mark { background: var(--wrong); color: inherit; border-radius: .2rem; padding: 0 .2rem; } mark.yes { background:
  var(--mark); } i.none { color: var(--soft); }
pre { background: var(--panel); border: 1px solid var(--edge); border-radius: .5rem; padding: .7rem .9rem; overflow:
  auto; font-size: .85rem; margin: .3rem 0 1rem; }
@media (max-width: 40rem) { .tiles { grid-template-columns: repeat(2, 1fr); } }
@media print { .box { max-height: none; overflow: visible; } }
"""
# A click on a heading sorts by that column; numbers as numbers.
SCRIPT = """
document.querySelectorAll('table.sort th').forEach(function (head) { head.addEventListener('click', function () {
  var body = head.closest('table').tBodies[0], column = head.cellIndex, down = head.dataset.down === '1';
  var number = function (row) { return parseFloat(row.cells[column].textContent.replace(/[,%]/g, '')); };
  var rows = Array.from(body.rows).sort(function (a, b) {
    if (!head.classList.contains('n')) return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
    return (number(a) || 0) - (number(b) || 0); });
  head.dataset.down = down ? '0' : '1';
  (down ? rows.reverse() : rows).forEach(function (row) { body.appendChild(row); }); }); });
"""


def to_html(report: Report) -> str:
    """The whole page."""
    passed = report.verdict.passed
    badge = f'<span class="verdict {"good" if passed else "bad"}">{"passed" if passed else "failed"}</span>'
    body = [
        f"<h1>Run {escape(report.run)}</h1>{badge}<p>{escape(summary(report))}</p>",
        _tiles(report),
        section("Loss", _losses(report)),
        section("Loss of each language over time", _language_losses(report)),
        section("Bits per byte of held-out text", _bits(report)),
        section("What was read", f'<p class="note">{escape(SAMPLING_TEXT)}</p>' + table(*sampling_table(report))),
        section("Translations of held-out sentences", _translations(report)),
        section("Gaps in held-out text", _gaps(report)),
        section("Throughput", _throughput(report)),
        section(
            "How to go on", "".join(f"<p>{escape(what)}</p><pre>{escape(how)}</pre>" for what, how in report.next_steps)
        ),
    ]
    return page(f"Run {report.run}", body)


def page(title: str, body: Iterable[str]) -> str:
    """HTML of a whole file: its parts under one style; a click on the head of a table sorts it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _tiles(report: Report) -> str:
    won = sum(row.won for row in report.languages)
    entries = [
        (f"{won} of {len(report.languages)}", "languages won"),
        (f"{report.mean('trained'):.2f}", "bits per byte, trained"),
        (f"{report.mean('unigram'):.2f}", "bits per byte, unigram"),
        (f"{report.steps:,}", "steps"),
        (_short(report.tokens), "tokens read"),
        (_short(report.tokens_per_second), "tokens per second"),
        (_short(report.parameters), "parameters"),
        (minutes(report.seconds), "of training"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(v)}</b><span>{t}</span></div>' for v, t in entries)
        + "</div>"
    )


def _losses(report: Report) -> str:
    series = [
        Line("training", report.curve("train"), 0),
        Line(report.held_out, report.curve(report.held_out), 1, dots=True),
    ]
    return figure(
        plots.lines(series, x="step", y="loss (nats per target token)"),
        "Training: the mean of the batches since the point before. Held out: the same rows at every evaluation.",
    )


def _language_losses(report: Report) -> str:
    curves = report.language_curves
    named = {code: colour for colour, code in enumerate(prominent(report.languages, NAMED_LINES))}
    series = [
        Line(report.names.get(code, code), points, named.get(code, MUTED), f"{code} {report.names.get(code, '')}")
        for code, points in curves.items()
    ]
    windows = max(map(len, curves.values()), default=0)
    return figure(
        plots.lines(series, x="step", y="training loss (nats per target token)"),
        f"One line for each of {len(curves)} languages: the mean over its target tokens, denoised and translated, "
        f"in {windows} windows of steps. Coloured: the most text in each of {len(named)} writing systems. "
        "Hover over a grey line for its language.",
    )


def _bits(report: Report) -> str:
    scripts = list(report.scripts)
    shown = scripts[: len(COLOURS) if len(scripts) <= len(COLOURS) else len(COLOURS) - 1]
    colours = {script: index for index, script in enumerate(shown)}
    points = [
        Point(
            row.unigram,
            row.trained,
            row.code,
            f"{row.code} {row.name} ({row.script}): trained {row.trained:.2f}, unigram {row.unigram:.2f}, own unigram "
            f"{row.own_unigram:.2f}, fresh {row.untrained:.2f} bits per byte; {row.bytes:,} bytes",
            colours.get(row.script, MUTED),
        )
        for row in report.languages
        if row.bytes
    ]
    legend = [(f"{script} ({report.scripts[script]})", colours[script]) for script in shown]
    if len(scripts) > len(shown):
        rest = scripts[len(shown) :]
        legend.append((f"{len(rest)} others ({sum(report.scripts[s] for s in rest)})", MUTED))
    plot = plots.scatter(
        points,
        x="unigram of the mixture (bits per byte)",
        y="trained model (bits per byte)",
        diagonal="equal",
        legend=legend,
    )
    caption = (
        "One point for each language, coloured by script. Below the dashed line the trained model is better. "
        "Hover for numbers."
    )
    text = (
        f"{report.task} {report.told} Bytes: UTF-8, of the hidden text that was scored. Fresh: the same model before "
        "training. Gain: bits saved against the better of fresh parameters and the mixture's unigram."
    )
    return figure(plot, caption) + f'<p class="note">{escape(text)}</p>' + table(*bits_table(report))


def _translations(report: Report) -> str:
    if not report.translations:
        return '<p class="nothing">The mixture holds no translation with held-out text.</p>'
    cards = []
    for t in report.translations:
        lines: list[tuple[str, str, str]] = [
            (f"source ({t.source})", t.source, t.text),
            ("fresh parameters", t.target, t.before),
        ]
        lines += [("trained", t.target, t.after), (f"reference ({t.target})", t.target, t.reference)]
        way = " → ".join(report.names.get(code, code) for code in (t.source, t.target))
        rows = "".join(
            f"<dt>{escape(what)}</dt>{_text(report, code, _clip(text, 110 if what == 'fresh parameters' else 240))}"
            for what, code, text in lines
        )
        cards.append(f'<div class="sample"><h3>{escape(way)}</h3><dl>{rows}</dl></div>')
    return '<p class="note">Greedy decoding.</p>' + "".join(cards)


def _gaps(report: Report) -> str:
    if not report.fill_ins:
        return '<p class="nothing">The mixture hides no gaps in held-out text.</p>'
    cards = []
    for f in report.fill_ins:
        rows = "".join(
            f"<dt>{what}</dt>" + _text(report, f.language, _marked(f, gaps), raw=True)
            for what, gaps in (("fresh parameters", f.before), ("trained", f.after), ("the text", f.truth))
        )
        cards.append(
            f'<div class="sample"><h3>{escape(report.names.get(f.language, f.language))}</h3><dl>{rows}</dl></div>'
        )
    return '<p class="note">Greedy decoding; what stands in a gap is marked, green where it is right.</p>' + "".join(
        cards
    )


def _throughput(report: Report) -> str:
    plot = plots.lines([Line("", report.throughput, 0)], x="step", y="tokens per second", zero=True)
    return figure(plot, "Source and target tokens of training, evaluation not counted.") + table(
        ("", ""), facts(report), sort=False
    )


def prominent(rows: Sequence[LanguageRow], count: int) -> list[str]:
    """Codes of at most `count` languages: of each writing system the one with the most text; those that most languages
    use come first.
    """
    system = lambda row: "Han" if row.script in ("Hans", "Hant") else row.script  # noqa: E731
    users = Counter(map(system, rows))
    best: dict[str, LanguageRow] = {}
    for row in sorted(rows, key=lambda row: (-row.characters, row.code)):
        best.setdefault(system(row), row)
    ordered = sorted(best, key=lambda script: (-users[script], -best[script].characters))
    return [best[script].code for script in ordered[:count]]


def _marked(fill: FillIn, gaps: Sequence[str]) -> str:
    parts = [escape(fill.kept[0])]
    for gap, truth, kept in zip(gaps, fill.truth, fill.kept[1:], strict=True):
        right = ' class="yes"' if gap.strip() == truth.strip() else ""
        parts += [f"<mark{right}>{escape(_clip(gap, 60)) if gap.strip() else '∅'}</mark>", escape(kept)]
    return "".join(parts)


def _text(report: Report, code: str, text: str, raw: bool = False) -> str:
    shown = text if raw else escape(text)
    direction = report.directions.get(code, "auto")
    return f'<dd lang="{escape(code)}" dir="{direction}">{shown or "<i class=none>(nothing)</i>"}</dd>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], sort: bool = True) -> str:
    """A column with ">" in front holds numbers."""
    numbers = [c.startswith(">") for c in columns]
    kind = ['<td class="n">' if number else "<td>" for number in numbers]
    head = "".join(
        f"<th{' class=n' if n else ''}>{escape(c.removeprefix('>'))}</th>"
        for c, n in zip(columns, numbers, strict=True)
    )
    lines = (
        "<tr>" + "".join(f"{k}{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    start = f'<table class="sort"><thead><tr>{head}</tr></thead>' if sort else "<table>"
    return f'<div class="box">{start}<tbody>{"".join(lines)}</tbody></table></div>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _clip(text: str, letters: int = 240) -> str:
    return text if len(text) <= letters else text[:letters] + " …"


def _short(value: int | float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
