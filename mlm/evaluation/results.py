"""Results as plain values: tables of languages that can be written, read back, added and shown."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mlm.evaluation.language_loss import LanguageLosses

# Language code -> loss (nats per target token), tokens, bits_per_byte (None: no text), bytes (UTF-8).
LanguageTable = dict[str, dict[str, float | None]]


def language_table(losses: LanguageLosses, codes: Sequence[str]) -> LanguageTable:
    """The languages with tokens, by code; codes: id -> code."""
    loss, bits = losses.loss, losses.bits_per_byte
    return {
        codes[i]: {
            "loss": _finite(loss[i]),
            "tokens": int(losses.tokens[i]),
            "bits_per_byte": _finite(bits[i]),
            "bytes": int(losses.bytes[i]),
        }
        for i in losses.seen()
    }


def combine(tables: Iterable[LanguageTable]) -> LanguageTable:
    """One table from several: every token and every byte counts the same."""
    by_code: dict[str, list[Mapping]] = {}
    for table in tables:
        for code, row in table.items():
            by_code.setdefault(code, []).append(row)
    return {code: totals(dict(enumerate(rows))) for code, rows in sorted(by_code.items())}


def totals(table: Mapping) -> dict[str, float | None]:
    """All rows of a table as one."""
    rows = list(table.values())
    tokens, size = sum(r["tokens"] for r in rows), sum(r["bytes"] for r in rows)
    nats = sum((r["loss"] or 0.0) * r["tokens"] for r in rows)
    bits = sum((r["bits_per_byte"] or 0.0) * r["bytes"] for r in rows)
    return {
        "loss": nats / tokens if tokens else None,
        "tokens": tokens,
        "bits_per_byte": bits / size if size else None,
        "bytes": size,
    }


def numbers(metrics: Mapping[str, float | str]) -> dict[str, float]:
    """The metrics without their signatures, for a table on screen."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def _finite(value: np.floating) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None  # JSON has no NaN
