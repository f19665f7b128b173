"""What a sweep over ways to decode says: of each method the best, its defaults, and how much its options matter.

    found = rows(records, metrics={"tatoeba.translate.en.fr": "bleu"})
    compare(found, lower=False)       # best, default and spread of each method on each task

A record is one task decoded once: {"task", "method", "options": what is not at its default, "decode": the whole
configuration, "seed", "metrics", "tokens", "seconds", "passes"}. The best methods are often those whose options matter
most, so a best value says little without its default and spread (Shi et al. 2024, arXiv:2402.06925).
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting of a method on one task. value: mean over seeds; seed_std: their population standard deviation.

    options: what is not at its default. decode: the whole configuration of the first seed. passes: mean over seeds.
    """

    task: str
    method: str
    options: Mapping[str, Any]
    decode: Mapping[str, Any]
    metric: str
    value: float
    seed_std: float
    seeds: int
    tokens_per_second: float
    passes: float

    @property
    def setting(self) -> str:
        """The options in words: "beams=2, alpha=0.0"."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items()) or "defaults"


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method on one task over its settings. std: population standard deviation of their values; span: best minus
    worst, never negative. default: None where the defaults could not be decoded.
    """

    best: Row
    default: Row | None
    std: float
    span: float
    settings: int


def rows(records: Iterable[Record], metrics: Mapping[str, str]) -> list[Row]:
    """Settings in the order of their first records, the seeds of each averaged. metrics: task -> the metric to look at.

    Records of other tasks are left out. Tokens per second: all tokens over all seconds.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record["task"] in metrics:
            groups.setdefault((record["task"], record["method"], *sorted(record["options"].items())), []).append(record)
    found = []
    for same in groups.values():
        first = same[0]
        metric = metrics[first["task"]]
        values = [float(record["metrics"][metric]) for record in same]
        found.append(
            Row(
                **{name: first[name] for name in ("task", "method", "options", "decode")},
                metric=metric,
                value=statistics.fmean(values),
                seed_std=statistics.pstdev(values),
                seeds=len(same),
                tokens_per_second=sum(r["tokens"] for r in same) / max(sum(r["seconds"] for r in same), 1e-9),
                passes=statistics.fmean(r["passes"] for r in same),
            )
        )
    return found


def compare(found: Sequence[Row], lower: bool = False) -> list[MethodRow]:
    """A line for each method of each task, in order. lower: a smaller value is the better one.

    Of equal values the first is the best, so that the defaults are where nothing beats them.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.task, row.method), []).append(row)
    lines = []
    for same in groups.values():
        values = [row.value for row in same]
        lines.append(
            MethodRow(
                best=(min if lower else max)(same, key=lambda row: row.value),
                default=next((row for row in same if not row.options), None),
                std=statistics.pstdev(values),
                span=max(values) - min(values),
                settings=len(same),
            )
        )
    return lines


def to_json(found: Sequence[Row], lines: Sequence[MethodRow]) -> dict[str, Any]:
    """Plain values: "methods", a record for each method and task, and "settings", one for each row."""
    return {
        "methods": [
            {
                "task": line.best.task,
                "method": line.best.method,
                "metric": line.best.metric,
                "best": line.best.value,
                "best_options": dict(line.best.options),
                "default": None if line.default is None else line.default.value,
                "std": line.std,
                "best_minus_worst": line.span,
                "settings": line.settings,
                "best_tokens_per_second": line.best.tokens_per_second,
                "default_tokens_per_second": None if line.default is None else line.default.tokens_per_second,
            }
            for line in lines
        ],
        "settings": [
            {
                "task": row.task,
                "method": row.method,
                "options": dict(row.options),
                "metric": row.metric,
                "value": row.value,
                "seeds": row.seeds,
                "seed_std": row.seed_std,
                "tokens_per_second": row.tokens_per_second,
                "passes": row.passes,
            }
            for row in found
        ],
    }
