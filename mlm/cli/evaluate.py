"""`mlm eval --run_dir DIR`: metrics of tasks, loss and bits per byte by language; a table, and JSON in the run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm.cli import decoding_flags, screen
from mlm.cli.main import UsageError
from mlm.evaluation.results import combine, numbers, totals


def run(arguments: list[str]) -> int:
    """Evaluates every task in turn; each result is written as soon as it is known."""
    from mlm.decoding.config import METHODS

    flags = _parse(arguments)
    if flags.num_examples is not None and flags.num_examples < 1:
        raise UsageError(f"--num_examples={flags.num_examples} must be at least 1")
    options = decoding_flags.decode_options(flags)
    if needs := METHODS[options["method"]].needs:
        raise UsageError(
            f"--method={options['method']} needs {needs}, which no task has: try `mlm generate` or `infer`"
        )
    session = decoding_flags.open_session(flags)
    names = [name.strip() for name in flags.tasks.split(",") if name.strip()] if flags.tasks else [flags.mixture]
    tasks = named_tasks(session, names, flags.split)
    results: dict[str, dict[str, Any]] = {}
    folder = Path("eval") / str(session.step)
    found = session.evaluate_each(tasks, flags.split, flags.num_examples, **options)
    for task, result in screen.track(found, f"evaluating {len(tasks)} tasks", len(tasks)):
        results[task] = result
        written = session.run.write_json(str(folder / f"{task}.json"), result)
    languages = combine(result["languages"] for result in results.values())
    if flags.json:
        print(json.dumps({"tasks": results, "languages": languages, **totals(languages)}, ensure_ascii=False, indent=1))
        return 0
    show(session.step, flags.split, results, languages)
    screen.say(f"written to {written if len(tasks) == 1 else written.parent}")
    return 0


def show(step: int, split: str, results: dict[str, dict[str, Any]], languages: dict[str, Any]) -> None:
    """The tasks, a table for those with the same metrics, and the languages over all tasks."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for task, result in results.items():
        kinds.setdefault(tuple(numbers(result["metrics"])), []).append(task)
    for metrics, tasks in kinds.items():
        screen.table(
            f"step {step}, {split}: tasks",
            ["task", ">examples", ">loss", ">bits/byte", *(f">{name}" for name in metrics)],
            [
                [
                    task,
                    results[task]["examples"],
                    _number(results[task]["loss"]),
                    _number(results[task]["bits_per_byte"]),
                    *(_number(results[task]["metrics"][name], 2) for name in metrics),
                ]
                for task in tasks
            ],
        )
    rows = [*languages.items()] + ([("all", totals(languages))] if len(languages) > 1 else [])
    screen.table(
        "languages (loss: nats per target token; bits per byte: of text alone)",
        ["language", ">tokens", ">loss", ">bytes", ">bits/byte"],
        [
            [
                code,
                screen.amount(float(row["tokens"])),
                _number(row["loss"]),
                screen.amount(float(row["bytes"])),
                _number(row["bits_per_byte"]),
            ]
            for code, row in rows
        ],
    )


def named_tasks(session: Any, names: Sequence[str | None], split: str) -> list[str]:
    """The tasks of these names, mixtures among them (None: the run's), each once. Raises UsageError, with the nearest
    names, for one that is not registered.
    """
    found: dict[str, None] = {}
    for name in names:
        try:
            found |= dict.fromkeys(session.tasks(name, split))
        except (KeyError, ValueError) as error:
            raise UsageError(str(error.args[0])) from error
    return list(found)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm eval",
        description=(
            "Evaluate a checkpoint: the metrics of each task by SeqIO's evaluator (predictions decoded as asked for), "
            "and loss and bits per byte by language. A table on screen, and DIR/eval/<step>/<task>.json."
        ),
        epilog="example: mlm eval --run_dir runs/quickstart --tasks tatoeba.translate.en.fr --num_examples 200",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tasks", metavar="A,B", help="tasks or mixtures, separated by commas")
    which.add_argument("--mixture", metavar="NAME", help="a mixture (default: the one of the run)")
    parser.add_argument("--split", default="validation", help="validation (default), test or train")
    parser.add_argument("--num_examples", type=int, metavar="N", help="the first N of each task (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    decoding_flags.add_model_flags(parser)
    decoding_flags.add_decode_flags(parser)
    return parser.parse_args(arguments)
