"""Metrics on the host: sums kept in float64, means computed once, written as JSON lines and TensorBoard events."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlm.checkpoints.run_directory import RunDirectory
from mlm.registry import nearest
from mlm.training.step import Metrics

# Sums of [L] arrays, one entry per language id.
LANGUAGE_NLL = "language_nll"
LANGUAGE_SOURCE = "language_source_tokens"
# Sums by layer, "routing/STACK/…": see `mlm.training.routing`.
ROUTING, EXPERT_LOAD, EXPERTS_BY_LANGUAGE = "routing/", "expert_load", "experts_by_language"


class Meter:
    """Running sums of the metrics of several steps. (sum, weight) pairs add up; scalars keep their last value."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Any, Any]] = {}
        self.last: dict[str, float] = {}
        self.steps = 0

    def add(self, metrics: Metrics) -> None:
        """Fetches the metrics of one step (waits for it) and adds them; of a skipped step, only the scalars."""
        self.steps += 1
        fetched = jax.device_get(dict(metrics))
        for name, value in fetched.items():
            if isinstance(value, tuple):
                if not fetched.get("finite", True):
                    continue
                old = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = tuple(a + np.asarray(b, np.float64) for a, b in zip(old, value, strict=True))
            else:
                self.last[name] = float(value)

    def means(self) -> dict[str, float]:
        """name -> sum / weight for the pairs without an axis, and the last scalars. Empty weights give no entry."""
        pairs = {n: s / w for n, (s, w) in self.sums.items() if np.ndim(s) == 0 and w > 0}
        return {n: float(v) for n, v in pairs.items()} | self.last

    def layers(self) -> dict[str, float]:
        """ "routing/encoder/dropped/0" -> the mean of the first mixture, and so on; "busiest": the load of the expert
        that is chosen most, over the mean load (1: even). Empty for a model without mixtures of experts.
        """
        found: dict[str, float] = {}
        for name, (total, weight) in self.sums.items():
            if not name.startswith(ROUTING):
                continue
            if np.ndim(total) == 1:
                means = total / np.maximum(weight, 1.0)
            elif name.endswith(EXPERT_LOAD):
                name = name.replace(EXPERT_LOAD, "busiest")
                means = np.max(total, axis=-1) / np.maximum(np.mean(total, axis=-1), 1e-9)
            else:
                continue
            found |= {f"{name}/{layer}": float(mean) for layer, mean in enumerate(means)}
        return found

    def experts(self) -> dict[str, np.ndarray]:
        """stack -> choices [n mixtures, L language ids, E experts]."""
        tables = {n: s for n, (s, _) in self.sums.items() if n.startswith(ROUTING) and n.endswith(EXPERTS_BY_LANGUAGE)}
        return {name.split("/")[1]: table for name, table in tables.items()}

    def languages(self) -> dict[int, tuple[float, int]]:
        """language id -> (mean loss in nats per target token, target tokens), for the languages seen."""
        if LANGUAGE_NLL not in self.sums:
            return {}
        nll, tokens = self.sums[LANGUAGE_NLL]
        return {int(i): (float(nll[i] / tokens[i]), int(tokens[i])) for i in np.flatnonzero(tokens)}


class TokenCounter:
    """Exact tokens seen per language since the run began: source and target, int64, part of every checkpoint."""

    def __init__(self, languages: int, seen: Mapping[str, int] | None = None):
        self.counts = np.zeros(languages, np.int64)
        for index, count in (seen or {}).items():
            self.counts[int(index)] = count

    def add(self, metrics: Metrics) -> None:
        """Counts the tokens of one step. A step that was skipped has not seen its tokens."""
        if not metrics.get("finite", True):
            return
        for name in (LANGUAGE_NLL, LANGUAGE_SOURCE):
            if name in metrics:
                value = metrics[name]
                counts = value[1] if isinstance(value, tuple) else value
                self.counts += np.rint(np.asarray(jax.device_get(counts), np.float64)).astype(np.int64)

    def to_json(self) -> dict[str, int]:
        return {str(i): int(self.counts[i]) for i in np.flatnonzero(self.counts)}


class MetricWriter:
    """metrics.jsonl and TensorBoard events below a run directory; only the first process writes.

    Lines after `resume_step` are dropped on opening: they belong to steps that a killed run will take again.
    """

    def __init__(self, directory: Path, languages: Sequence[str], resume_step: int):
        self._codes, self._directory = languages, RunDirectory(directory)
        self._path = directory / "metrics.jsonl"
        self._events: Any = None
        self._lines: Any = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            _truncate(self._path, resume_step)
            self._lines = open(self._path, "a", buffering=1)  # noqa: SIM115  `close` closes it
            self._events = SummaryWriter(
                str(directory / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
            )

    def write(
        self,
        kind: str,
        step: int,
        scalars: Mapping[str, float],
        languages: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """One line {"kind", "step", scalars…, "languages": {code: {...}}}, and the same as events."""
        if self._lines is None:
            return
        named = {self._codes[i]: dict(values) for i, values in (languages or {}).items()}
        record: dict[str, Any] = {"kind": kind, "step": step, **{k: _plain(v) for k, v in scalars.items()}}
        if named:
            record["languages"] = {c: {k: _plain(v) for k, v in values.items()} for c, values in named.items()}
        self._lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        for name, value in scalars.items():
            if np.isfinite(value):
                self._events.add_scalar(f"{kind}/{name}", value, step)
        for code, values in named.items():
            for name, value in values.items():
                self._events.add_scalar(f"{kind}_{name}/{code}", value, step)

    def write_experts(self, kind: str, step: int, tables: Mapping[str, np.ndarray]) -> None:
        """experts/KIND_STEP.npz: stack -> choices [n mixtures, L, E], "languages": the L codes. `read_experts`."""
        if self._lines is None or not tables:
            return
        packed = io.BytesIO()
        np.savez_compressed(packed, languages=np.array(self._codes), **dict(tables))  # type: ignore[arg-type]
        self._directory.write(f"experts/{kind}_{step}.npz", packed.getvalue())

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a line cut off by a kill is left out."""
    path = directory / "metrics.jsonl"
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def read_experts(directory: Path, kind: str = "validation", step: int | None = None) -> dict[str, np.ndarray]:
    """Which experts served which language at an evaluation (the last one): {"encoder"|"decoder": choices [n, L, E],
    "languages": [L] codes}. Only numbers and text are read from the file, never objects.

    Raises FileNotFoundError, naming what there is, when the run has no such table.
    """
    found = {p.stem: p for p in (directory / "experts").glob("*.npz")}
    steps = sorted(int(name.rpartition("_")[2]) for name in found if name.rpartition("_")[0] == kind)
    name = f"{kind}_{step if step is not None else (steps or [0])[-1]}"
    if name not in found:
        known = nearest(name, found) if found else "there is none: only models with mixtures of experts write them"
        raise FileNotFoundError(f"{directory / 'experts'} holds no table {name!r}; {known}")
    with np.load(found[name], allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    os.replace(temporary, path)


def _plain(value: float | int) -> float | None:
    number = float(value)
    return round(number, 6) if np.isfinite(number) else None  # JSON has no NaN
