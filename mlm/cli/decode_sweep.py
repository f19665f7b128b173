"""`mlm decode-sweep --run_dir DIR`: methods over grids of their options on tasks: best, default, spread, tokens/s.

    DIR/decode_sweep/<step>/settings.jsonl    a record for each setting, seed and task, as soon as it is decoded
                           /summary.json      of this command's settings: a record for each method and for each setting
                           /sweep.html        the tables, quality against tokens/s, quality against each option

Killed at any moment, the same command goes on after the last whole record; a wider grid decodes what is new in it.
Tokens per second are those of the best results, without compilation.
"""

import argparse
import hashlib
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlm.cli import decoding_flags, screen
from mlm.cli.evaluate import named_tasks
from mlm.cli.infer import whole_records
from mlm.cli.main import Failed, UsageError
from mlm.registry import nearest

# What a record was made from and with. Records that differ in one of these are not comparable.
SAME = ("run", "step", "parameters", "quantise", "draft", "ensemble", "contrasted_with", "ngram_text", "vocabulary")
SAME += ("split", "num_examples", "device", "batch_size")
WRAP = 36  # letters of a setting on a line of a table

Record = dict[str, Any]


def run(arguments: list[str]) -> int:
    """Decodes what the folder does not hold yet. Raises Failed at the end where a method that was named could not be
    decoded; another such method is noted and left out.
    """
    from mlm.cli.decode_grids import tried
    from mlm.evaluation import sweep, sweep_html
    from mlm.session.trials import Trials

    flags = _parse(arguments)
    grids, asked, refused = _plan(flags)
    _check_models(flags, asked)
    session = decoding_flags.open_session(flags)
    tasks = _tasks(session, flags)
    try:
        trials = Trials(session, tasks, flags.split, flags.num_examples)
    except ValueError as error:
        raise UsageError(str(error)) from error
    metrics = {task: _metric(trials.metrics(task), task, flags.metric) for task in tasks}
    work = _Sweep(session, trials, flags)
    records = work(asked, tasks, flags)

    found = sweep.rows(records, metrics)
    if not found:
        raise Failed("no setting could be decoded: " + _listed(refused | work.refused))
    lines = sweep.compare(found, lower=flags.metric_mode == "min")
    result = {"about": work.about, "seeds": flags.seeds, "metric_mode": flags.metric_mode}
    result |= sweep.to_json(found, lines) | {"refused": refused | work.refused}
    work.write("summary.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    about = f"{session.run.path}, step {session.step}, {flags.split}, {work.about['device']}, {flags.seeds} seeds"
    title = f"Ways to decode, {session.run.path.name}"
    work.write("sweep.html", sweep_html.to_html(title, about, found, lines, tried(grids)))
    if flags.json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        show(found, lines)
    screen.say(f"written to {work.folder}")
    if refused | work.refused:
        text = "could not be decoded: " + _listed(refused | work.refused)
        if flags.methods or flags.grid:
            raise Failed(text)
        screen.say(text)
    return 0


def show(found: Sequence[Any], lines: Sequence[Any]) -> None:
    """For each task the methods, then their settings."""
    from mlm.evaluation import sweep_html

    for task in dict.fromkeys(row.task for row in found):
        own = [line for line in lines if line.best.task == task]
        cells = [sweep_html.method_cells(line) for line in own]
        title = f"{task}: {own[0].best.metric}"
        screen.table(title, sweep_html.METHOD_COLUMNS, _wrapped(cells, sweep_html.METHOD_COLUMNS.index("best with")))
        print()
        cells = [sweep_html.setting_cells(row) for row in found if row.task == task]
        screen.table("", sweep_html.SETTING_COLUMNS, _wrapped(cells, sweep_html.SETTING_COLUMNS.index("setting")))
        print()


class _Sweep:
    """One folder of records, and what adds to it. `refused`: setting -> why it could not be decoded."""

    def __init__(self, session: Any, trials: Any, flags: argparse.Namespace):
        self._session, self._trials = session, trials
        self.folder = Path(flags.output or session.run.path / "decode_sweep" / str(session.step))
        self._records = self.folder / "settings.jsonl"
        mesh, draft = session.rows.mesh, session.draft
        self.about: Record = session.origin | {
            "split": flags.split,
            "run": str(session.run.path.absolute()),
            "draft": None if draft is None else draft.name,
            "ngram_text": flags.ngram_text,
            "num_examples": flags.num_examples,
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "batch_size": flags.batch_size,
        }
        self.refused: dict[str, str] = {}
        if flags.overwrite:
            self._records.unlink(missing_ok=True)
        self._known = self._read()

    def __call__(self, settings: Sequence[Any], tasks: Sequence[str], flags: argparse.Namespace) -> list[Record]:
        """The records of the settings in their order, those that were missing decoded and written."""
        common = {} if flags.max_length is None else {"max_length": flags.max_length}
        jobs = [
            (task, setting, seed)
            for setting in settings
            for seed in range(flags.seeds if setting.draws else 1)
            for task in tasks
        ]
        if old := len(self._known):
            screen.say(f"{self._records} holds {old} records already")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._records, "ab") as file:
            found = []
            for record in screen.track(self._each(jobs, common), "settings x seeds x tasks", len(jobs)):
                if record is not None and (key := (record["task"], record["hash"])) not in self._known:
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    self._known[key] = record
                found.append(record)
        return [record for record in found if record is not None]

    def write(self, name: str, content: str) -> None:
        from mlm.checkpoints.run_directory import RunDirectory

        RunDirectory(self.folder).write(name, content)

    def _each(self, jobs: Sequence[tuple[str, Any, int]], common: Record) -> Iterator[Record | None]:
        for task, setting, seed in jobs:
            drawn = {"seed": seed} if setting.draws else {}
            try:
                generator = self._session.generator(setting.method, {**common, **setting.options, **drawn})
                key = (task, _hash(generator.config))
                yield self._known.get(key) or self._record(task, setting, seed, generator)
            except ValueError as error:
                self.refused[str(setting)] = str(error)
                yield None

    def _record(self, task: str, setting: Any, seed: int, generator: Any) -> Record:
        trial = self._trials(task, generator)
        return {
            "task": task,
            "method": setting.method,
            "options": dict(setting.options),
            "seed": seed,
            "hash": _hash(generator.config),
            **trial._asdict(),
            "tokens_per_second": trial.tokens / trial.seconds,
            "decode": generator.config.plain(),
            **self.about,
        }

    def _read(self) -> dict[tuple[str, str], Record]:
        """The whole records by task and configuration; what a kill left of another is cut off."""
        known, size = {}, 0
        for raw, record in whole_records(self._records):
            other = [name for name in SAME if record.get(name) != self.about[name]]
            if other:
                changes = ", ".join(f"{name}: {record.get(name)!r} then, {self.about[name]!r} now" for name in other)
                raise Failed(f"{self._records} was made otherwise ({changes}); choose another --output, or --overwrite")
            known[record["task"], record["hash"]] = record
            size += len(raw)
        if self._records.exists():
            os.truncate(self._records, size)
        return known


def _plan(flags: argparse.Namespace) -> tuple[dict[str, list], list[Any], dict[str, str]]:
    """(method -> its grids, the settings of all methods in order, method -> why its defaults alone make no sense)."""
    from mlm.cli.decode_grids import GRIDS, parse_grid, settings
    from mlm.cli.decoding_flags import by_runs
    from mlm.decoding.config import METHODS

    own: dict[str, list] = {}
    for text in flags.grid:
        method, grid = parse_grid(text)
        own.setdefault(method, []).append(grid)
    named = _names(flags.methods)
    for method in named:
        METHODS[method]  # raises UnknownName with the nearest
    methods = dict.fromkeys([*named, *own] or METHODS)
    grids = {method: own.get(method) or list(GRIDS.get(method, ())) for method in methods}
    asked, refused, decide = [], {}, by_runs(flags)
    for method, of_method in grids.items():
        try:
            asked += settings(method, of_method, decide)
        except UsageError as error:
            if flags.methods or flags.grid:
                raise
            refused[method] = str(error)
    return grids, asked, refused


def _check_models(flags: argparse.Namespace, asked: Sequence[Any]) -> None:
    """Raises UsageError for models and texts that no setting reads."""
    from mlm.decoding.proposers import PROPOSERS

    guessing = [PROPOSERS[setting.options.get("proposer", "none")] for setting in asked]
    for flag, read, how in (
        ("draft", any(kind.drafts for kind in guessing), "proposer=draft_model"),
        ("ngram_text", any(kind.counts for kind in guessing), "proposer=ngram_table"),
        ("contrast", any(s.options.get("contrast") == "model" for s in asked), "contrast=model"),
    ):
        if getattr(flags, flag) and not read:
            raise UsageError(f'--{flag} is read by no setting: add one, as --grid "greedy:{how}"')


def _tasks(session: Any, flags: argparse.Namespace) -> list[str]:
    """Those asked for that have metrics of decoded text. Raises UsageError where none has."""
    from mlm.data.evaluator import predicts

    found = named_tasks(session, _names(flags.tasks) or [None], flags.split)
    fit = [task for task in found if predicts(task)]
    if not fit:
        raise UsageError(f"none of {len(found)} tasks has a metric of decoded text; name tasks that have, by --tasks")
    if len(fit) < len(found):
        screen.say(f"left out, without a metric of decoded text: {len(found) - len(fit)} of {len(found)} tasks")
    return fit


def _metric(known: Sequence[str], task: str, wanted: str | None) -> str:
    """Raises UsageError, with the nearest names, for a metric that the task does not have."""
    if wanted is not None and wanted not in known:
        raise UsageError(f"--metric={wanted}: task {task} has no such metric; {nearest(wanted, known)}")
    return wanted or known[0]


def _hash(config: Any) -> str:
    """Of everything that a decode depends on besides the model and the examples."""
    return hashlib.sha256(json.dumps(config.plain(), sort_keys=True).encode()).hexdigest()[:16]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _listed(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refused.items())


def _wrapped(rows: Sequence[Sequence[str]], column: int) -> Iterator[list[str]]:
    """The rows, those with a long text in the column going on below."""
    for row in rows:
        for index, line in enumerate(textwrap.wrap(row[column], WRAP)):
            cells = list(row) if index == 0 else [""] * len(row)
            yield [*cells[:column], line, *cells[column + 1 :]]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm decode-sweep",
        description=(
            "Decode tasks by several methods, each at its defaults and over a grid of its options: for each method and "
            "task the best, the defaults, the spread and tokens per second. Tables on screen, JSON lines as settings "
            "are done, a summary and a page with plots. Killed, the same command goes on where it stopped."
        ),
        epilog="example: mlm decode-sweep --run_dir runs/quickstart --tasks tatoeba.translate.en.fr --num_examples 100 "
        '--methods greedy,sample --grid "beam:beams=1,4;alpha=0,0.6"',
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks or mixtures (default: the mixture of the run)")
    parser.add_argument("--split", default="validation", help="validation (default), test or train")
    parser.add_argument("--num_examples", type=int, metavar="N", help="the first N of each task (default: all)")
    parser.add_argument("--methods", metavar="A,B", help="methods (default: those of --grid, or else all)")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="METHOD:OPTION=V,V;…",
        help="values of a method's options instead of the built-in ones, several options in all combinations; repeat "
        "it for other methods, or to vary one option after another",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of what draws, averaged (default 3)")
    parser.add_argument("--metric", metavar="NAME", help="what makes a setting the best (default: a task's first)")
    parser.add_argument("--metric_mode", choices=("max", "min"), default="max", help="is a larger value better")
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens at most (default: those of the run)")
    parser.add_argument("--output", metavar="FOLDER", help="default: DIR/decode_sweep/<step>")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever the folder holds")
    parser.add_argument("--json", action="store_true", help="print the summary instead of tables")
    decoding_flags.add_model_flags(parser)
    flags = parser.parse_args(arguments)
    for name in ("num_examples", "seeds", "max_length"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} must be at least 1")
    return flags
