"""A report in words and tables: what both pages say, and report.md, which says it without plots."""

from collections.abc import Iterable, Sequence

import numpy as np

from mlm.evaluation.report import MODELS, FillIn, Report

SAMPLING_TEXT = (
    "Characters: of training text. Rate: share of the examples. Tokens seen: source and target, special tokens "
    "included. Epochs: how often the language's text was read at these rates; a pair counts for the language that is "
    "not English."
)


def summary(report: Report) -> str:
    """One paragraph: what was trained, and the verdict."""
    bits = {model: f"{report.mean(model):.2f}" for model in MODELS}
    return (
        f"A model of {report.parameters:,} parameters ({report.model}) was trained for {report.steps:,} steps on "
        f"{report.mixture}: {report.tokens:,} tokens in {len(report.languages)} languages and {len(report.scripts)} "
        f"scripts, in {minutes(report.seconds)} on {report.machine}. On held-out text it needs {bits['trained']} bits "
        f"per byte, the mean over languages; fresh parameters need {bits['untrained']}, the unigram of the mixture "
        f"{bits['unigram']}, each language's own unigram {bits['own_unigram']}. "
        f"{report.verdict.text[:1].upper()}{report.verdict.text[1:]}."
    )


def to_markdown(report: Report) -> str:
    """report.md: the same tables, without the plots."""
    held_out = dict(report.curve(report.held_out))
    train = report.curve("train")
    shown = train[:: max(1, len(train) // 10)] + train[-1:]
    near = lambda step: next((f"{loss:.3f}" for s, loss in held_out.items() if s == step), "")  # noqa: E731
    steps = sorted({*(step for step, _ in shown), *held_out})
    losses = dict(train)
    parts = [
        f"# Run {report.run}",
        summary(report),
        "## Loss",
        "Nats per target token; the training loss is the mean since the line before in metrics.jsonl.",
        table(
            (">step", ">train", f">{report.held_out}"),
            ([f"{step:,.0f}", f"{losses[step]:.3f}" if step in losses else "", near(step)] for step in steps),
        ),
        "## Bits per byte of held-out text",
        f"{report.task} {report.told}",
        table(*bits_table(report)),
        "## What was read",
        SAMPLING_TEXT,
        table(*sampling_table(report)),
        "## Translations of held-out sentences",
        *(
            f"**{t.source} → {t.target}** {_line(t.text)}\n\n- fresh parameters: {_line(t.before)}\n"
            f"- trained: {_line(t.after)}\n- reference: {_line(t.reference)}"
            for t in report.translations
        ),
        "## Gaps in held-out text",
        *(
            f"**{f.language}**\n\n- fresh parameters: {_line(_filled(f, f.before))}\n"
            f"- trained: {_line(_filled(f, f.after))}\n- the text: {_line(_filled(f, f.truth))}"
            for f in report.fill_ins
        ),
        "## Throughput and versions",
        table(("", ""), facts(report)),
        "## How to go on",
        *(f"{purpose}:\n\n    {command}" for purpose, command in report.next_steps),
    ]
    return "\n\n".join(parts) + "\n"


def bits_table(report: Report) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows, the language won by most first. A column with ">" in front holds numbers."""
    columns = ("language", "name", "script", ">bytes", ">trained", ">unigram", ">own unigram", ">fresh", ">gain", "")
    ordered = sorted(report.languages, key=lambda row: (not row.bytes, -row.gain, row.code))
    return columns, [
        [
            row.code,
            row.name,
            row.script,
            f"{row.bytes:,}",
            _shown(row.trained),
            _shown(row.unigram),
            _shown(row.own_unigram),
            _shown(row.untrained),
            _shown(row.gain, "+.1%"),
            "" if row.won else "not won",
        ]
        for row in ordered
    ]


def sampling_table(report: Report) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows, the largest rate first."""
    columns = ("language", "name", "script", ">characters", ">rate", ">tokens seen", ">epochs")
    ordered = sorted(report.languages, key=lambda row: (-row.rate, row.code))
    return columns, [
        [
            row.code,
            row.name,
            row.script,
            f"{row.characters:,}",
            f"{row.rate:.2%}",
            f"{row.tokens_seen:,}",
            _shown(row.epochs),
        ]
        for row in ordered
    ]


def facts(report: Report) -> list[list[str]]:
    """(what, value) lines of the section on throughput."""
    return [
        ["training time", minutes(report.seconds)],
        ["tokens", f"{report.tokens:,}"],
        ["tokens per second", f"{report.tokens_per_second:,.0f}"],
        ["steps per second", f"{report.steps / report.seconds:.2f}" if report.seconds else "–"],
        ["machine", report.machine],
        ["model", f"{report.model}, {report.parameters:,} parameters"],
        *([name, version] for name, version in report.versions.items()),
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; columns that start with ">" are right-aligned."""
    head = "| " + " | ".join(c.removeprefix(">") for c in columns) + " |"
    rule = "|" + "|".join("---:" if c.startswith(">") else "---" for c in columns) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def minutes(seconds: float) -> str:
    """Seconds as "48 s", "7 min 5 s" or "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _filled(fill: FillIn, gaps: Sequence[str]) -> str:
    parts = [fill.kept[0]]
    for gap, kept in zip(gaps, fill.kept[1:], strict=True):
        parts += [f"[{gap.strip()}]", kept]
    return "".join(parts)


def _shown(value: float, form: str = ".2f") -> str:
    return f"{value:{form}}" if np.isfinite(value) else "–"


def _line(text: str) -> str:
    return _cell(text) or "(nothing)"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
