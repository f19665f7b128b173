"""What a run was worth, as values: measured once, written as report.json, report.md and report.html.

    report = Report(languages=rows, ...)
    report.verdict.passed         # the exit code of `mlm train` with a report
    to_json(report); report_text.to_markdown(report); report_html.to_html(report)

Four models are compared on the same held-out rows, language by language, in bits per UTF-8 byte of the text hidden from
them: the trained model, the same model with fresh parameters, and two baselines that know token frequencies only, those
of the whole training mixture and those of the language itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

SHARE_TO_WIN = 0.9  # of the languages, for a run to pass
WINDOWS = 12  # points of a language's loss over time

Curve = list[tuple[float, float]]  # (step, value)


class Verdict(NamedTuple):
    """passed: the trained model beats fresh parameters and the mixture's unigram in enough languages. text: the same in
    words.
    """

    passed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class LanguageRow:
    """One language. Models: bits per byte of held-out text. bytes: UTF-8, of the hidden text that was scored.

    characters: of training text. rate: share of examples. tokens_seen: source and target, special tokens included.
    epochs: how often its text was read at these rates.
    """

    code: str
    name: str
    script: str  # ISO 15924
    trained: float
    untrained: float
    unigram: float
    own_unigram: float
    bytes: int
    characters: int = 0
    rate: float = 0.0
    tokens_seen: int = 0
    epochs: float = float("nan")

    @property
    def won(self) -> bool:
        """Fewer bits than fresh parameters and than the mixture's unigram."""
        return self.trained < self.untrained and self.trained < self.unigram

    @property
    def gain(self) -> float:
        """Share of the bits that are saved against the better of the two."""
        return 1 - self.trained / min(self.untrained, self.unigram)


@dataclass(frozen=True)
class Translation:
    """A held-out sentence, and what the two models write. source, target: language codes."""

    source: str
    target: str
    text: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class FillIn:
    """Held-out text with gaps: kept[0] gap 0 kept[1] gap 1 …; what was there, and what the two models put there."""

    language: str
    kept: tuple[str, ...]
    truth: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the three files say. records: metrics.jsonl of the run; facts: (name, value) in order.

    told: how the unigrams were counted. task: what was hidden from the model. held_out: the split's name.
    names: code -> English name, directions: code -> "ltr" or "rtl", of every language. next_steps: (purpose, command).
    """

    run: str
    mixture: str
    steps: int
    parameters: int
    languages: Sequence[LanguageRow]
    records: Sequence[Mapping[str, Any]]
    translations: Sequence[Translation]
    fill_ins: Sequence[FillIn]
    versions: Mapping[str, str]
    machine: str
    model: str
    told: str
    task: str
    held_out: str
    names: Mapping[str, str]
    directions: Mapping[str, str]
    next_steps: Sequence[tuple[str, str]]

    @cached_property
    def verdict(self) -> Verdict:
        return judge(self.languages)

    @cached_property
    def scripts(self) -> dict[str, int]:
        """Script -> number of languages, most first."""
        found = [row.script for row in self.languages]
        return {s: found.count(s) for s in sorted(set(found), key=lambda s: (-found.count(s), s))}

    @cached_property
    def seconds(self) -> float:
        """Of training: evaluation and saving are not counted, the first step's compilation is."""
        return sum((seconds for _, seconds, _ in _windows(self.records)), 0.0)

    @property
    def tokens(self) -> int:
        """Source and target tokens that the model was trained on."""
        return sum(row.tokens_seen for row in self.languages)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")

    @cached_property
    def throughput(self) -> Curve:
        """Tokens per second over steps."""
        return [(float(step), rate) for step, _, rate in _windows(self.records)]

    def curve(self, kind: str, name: str = "nll") -> Curve:
        """A value over steps: kind "train", or the held-out split."""
        return [
            (float(r["step"]), float(r[name])) for r in self.records if r["kind"] == kind and r.get(name) is not None
        ]

    @cached_property
    def language_curves(self) -> dict[str, Curve]:
        """Language code -> training loss over steps, nats per target token, the mean of each of WINDOWS windows."""
        return language_curves([r for r in self.records if r["kind"] == "train"])

    def mean(self, model: str) -> float:
        """Of a model's bits per byte over the languages, each counting the same."""
        return float(np.nanmean([getattr(row, model) for row in self.languages]))


MODELS = ("trained", "untrained", "unigram", "own_unigram")


def judge(rows: Sequence[LanguageRow]) -> Verdict:
    """Passed when the trained model beats both baselines in SHARE_TO_WIN of the languages.

    A language without held-out text is not won. Raises ValueError when there is none with.
    """
    if not any(row.bytes for row in rows):
        raise ValueError(f"none of the {len(rows)} languages has held-out text: nothing can be said about the run")
    won = sum(row.won for row in rows)
    passed = won >= SHARE_TO_WIN * len(rows)
    return Verdict(
        passed,
        f"{'passed' if passed else 'failed'}: in {won} of {len(rows)} languages ({won / len(rows):.1%}) the trained "
        "model needs fewer bits per byte of held-out text than fresh parameters and than the unigram of the mixture; "
        f"{SHARE_TO_WIN:.0%} are asked for",
    )


def language_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """From training records with `languages`: {code: {loss, tokens}}: the mean over tokens in each window of steps."""
    if not records:
        return {}
    last = max(r["step"] for r in records)
    size = max(1, -(-last // WINDOWS))
    sums: dict[str, dict[int, list[float]]] = {}
    for record in records:
        window = min((record["step"] - 1) // size, WINDOWS - 1)
        for code, values in record.get("languages", {}).items():
            if values.get("loss") is None:
                continue
            pair = sums.setdefault(code, {}).setdefault(window, [0.0, 0.0])
            pair[0] += values["loss"] * values["tokens"]
            pair[1] += values["tokens"]
    middle = lambda window: (window * size + min((window + 1) * size, last)) / 2  # noqa: E731
    return {c: [(middle(w), s / n) for w, (s, n) in sorted(ws.items()) if n] for c, ws in sorted(sums.items())}


def _windows(records: Iterable[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, seconds, tokens per second) of each logged window; a resumed run's windows begin where it resumed."""
    found, before = [], 0
    for record in records:
        if record["kind"] == "train" and record.get("steps_per_second"):
            steps = record["step"] - before
            found.append((record["step"], steps / record["steps_per_second"], float(record["tokens_per_second"])))
            before = record["step"]
    return found


def to_json(report: Report) -> dict[str, Any]:
    """report.json. bits_per_byte: of the held-out text hidden from the model; rate: share of examples."""
    return {
        "run": report.run,
        "passed": report.verdict.passed,
        "verdict": report.verdict.text,
        "languages_won": sum(row.won for row in report.languages) / len(report.languages),
        "mixture": report.mixture,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "tokens": report.tokens,
        "tokens_per_second": _number(report.tokens_per_second, 1),
        "parameters": report.parameters,
        "model": report.model,
        "machine": report.machine,
        "versions": dict(report.versions),
        "held_out": {"split": report.held_out, "task": report.task, "unigram": report.told},
        "mean_bits_per_byte": {model: _number(report.mean(model)) for model in MODELS},
        "languages": {
            row.code: {
                "name": row.name,
                "script": row.script,
                "won": row.won,
                "bits_per_byte": {model: _number(getattr(row, model)) for model in MODELS},
                "held_out_bytes": row.bytes,
                "characters": row.characters,
                "rate": _number(row.rate, 6),
                "tokens_seen": row.tokens_seen,
                "epochs": _number(row.epochs),
            }
            for row in report.languages
        },
    }


def _number(value: float, digits: int = 4) -> float | None:
    return round(float(value), digits) if np.isfinite(value) else None
