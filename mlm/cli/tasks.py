"""`mlm tasks list` and `mlm tasks show TASK`: what is registered, and what a task's examples look like."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlm.cli import screen
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> int:
    """Prints to stdout; a spinner, and what else is worth knowing, go to stderr."""
    options = _parse(arguments)
    load_tasks(options.module)
    return _list(options) if options.command == "list" else _show(options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlm tasks", description="List the registered tasks, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    several = commands.add_parser("list", help="every task: corpus, objective, languages, splits")
    several.add_argument("--match", default="", metavar="REGEX", help="only tasks in whose name this is found")
    show = commands.add_parser("show", help="decoded examples, length percentiles, throughput")
    show.add_argument("task")
    show.add_argument("--examples", type=int, default=3, metavar="N", help="examples to show (default 3)")
    show.add_argument("--split", default="train", help="train (default), validation or test")
    show.add_argument("--inputs_length", type=int, default=512, metavar="N", help="tokens at most (default 512)")
    show.add_argument("--targets_length", type=int, default=114, metavar="N", help="tokens at most (default 114)")
    show.add_argument("--seed", type=int, default=0, help="of order and corruption (default 0)")
    add_vocabulary_flag(show)
    for command in (several, show):
        add_common_flags(command)
    return parser.parse_args(arguments)


def add_vocabulary_flag(parser: argparse.ArgumentParser) -> None:
    """--vocabulary, as every command takes it that counts tokens."""
    parser.add_argument("--vocabulary", metavar="FILE", help="a file, a shipped name, or bytes (default)")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--module, --json, --traceback."""
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="a Python module that registers your tasks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def load_tasks(modules: Sequence[str]) -> None:
    """Registers the shipped tasks and those of the modules. Raises UsageError for a module that cannot be found."""
    with screen.working("reading the tasks …"):
        from mlm.data import registration

        try:
            registration.load_tasks(*modules)
        except ValueError as error:
            raise UsageError(f"--module: {error}") from error


def load_vocabulary(name: str | None) -> Any:
    """None: bytes with a token for every language. Raises UsageError for a file that is missing or no vocabulary."""
    from mlm.data import vocabulary
    from mlm.data.registration import default_vocabulary

    if name is None:
        return default_vocabulary()
    try:
        return vocabulary.load_vocabulary(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"--vocabulary: {error}") from error


def find(name: str, kind: str) -> Any:
    """A registered "task" or "mixture". Raises UsageError with the nearest names of that kind."""
    from mlm.registry import nearest

    known = registered(kind)
    if name in known:
        return known[name]
    other = {"task": "mixture", "mixture": "task"}[kind]
    if name in registered(other):
        raise UsageError(f"{name!r} is a {other}; look at it with: mlm {_COMMAND[other]} show {name}")
    raise UsageError(f"no {kind} named {name!r}; {nearest(name, known)}")


_COMMAND = {"task": "tasks", "mixture": "mixture"}


def registered(kind: str) -> dict[str, Any]:
    """Name -> SeqIO task or mixture, sorted; kind: "task" or "mixture"."""
    from mlm.data.tensorflow import seqio

    registry = {"task": seqio.TaskRegistry, "mixture": seqio.MixtureRegistry}[kind]
    return {name: registry.get(name) for name in sorted(registry.names())}


def _list(options: argparse.Namespace) -> int:
    try:
        wanted = re.compile(options.match)
    except re.error as error:
        raise UsageError(f"--match={options.match!r} is not a regular expression: {error}") from error
    tasks = [describe(name, task) for name, task in registered("task").items() if wanted.search(name)]
    if options.json:
        print(json.dumps(tasks, ensure_ascii=False, indent=1))
        return 0
    columns = ["task", "objective", "reads", "writes", "splits"]
    screen.table("", columns, [[_cell(task[column]) for column in columns] for task in tasks])
    screen.say(f"{len(tasks)} tasks; mixtures: {', '.join(registered('mixture'))}")
    return 0


def describe(name: str, task: Any) -> dict[str, Any]:
    """name, corpus, objective (its recipe), the languages it reads and writes, splits, metrics."""
    from mlm.data.languages import language
    from mlm.data.readers import is_unit_task

    units = task.preprocessors[0] if is_unit_task(task) else None
    return {
        "task": name,
        "corpus": name.split(".")[0],
        "objective": units.recipe.name if units else "",
        "reads": language(units.inputs_language).code if units else "",
        "writes": language(units.language).code if units else "",
        "splits": list(task.splits),
        "metrics": [getattr(m, "__name__", getattr(getattr(m, "func", m), "__name__", "?")) for m in task.metric_fns],
    }


def _cell(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _show(options: argparse.Namespace) -> int:
    for name in ("examples", "inputs_length", "targets_length"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name}={getattr(options, name)} must be at least 1")
    task = find(options.task, "task")
    if options.split not in task.splits:
        raise UsageError(f"task {options.task!r} has no split {options.split!r}; it has {', '.join(task.splits)}")
    vocabulary = load_vocabulary(options.vocabulary)
    with screen.working(f"reading {options.task} …"):
        from mlm.data.recipes import Lengths
        from mlm.data.statistics import inspect_task

        view = inspect_task(
            options.task,
            options.split,
            vocabulary,
            Lengths(options.inputs_length, options.targets_length),
            show=options.examples,
            seed=options.seed,
        )
    tokens = sum(len(e.inputs) + len(e.targets) for e in view.examples) / len(view.examples)
    found = {
        **describe(options.task, task),
        "split": options.split,
        "vocabulary": vocabulary.digest,
        **view.counts._asdict(),
        "inputs_percentiles": view.inputs_percentiles,
        "targets_percentiles": view.targets_percentiles,
        "examples_per_second": round(view.per_second, 1),
        "tokens_per_second": round(view.per_second * tokens, 1),
        "shown": [{"inputs": inputs, "targets": targets} for inputs, targets in view.shown],
    }
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        _print(found)
    return 0


def _print(found: Mapping[str, Any]) -> None:
    way = found["reads"] if found["reads"] == found["writes"] else f"{found['reads']} → {found['writes']}"
    print(f"{found['task']}: {found['objective'] or 'a SeqIO task of its own making'} {way}, {found['split']}")
    sizes = [
        f"{found[name]:,} {name if name != 'examples' else 'records'}"
        for name in ("examples", "characters", "tokens")
        if found[name]
    ]
    print(", ".join(sizes) or "sizes are not known")
    for number, example in enumerate(found["shown"], start=1):
        print(f"\n{number}  inputs   {example['inputs']}\n{' ' * len(str(number))}  targets  {example['targets']}")
    print()
    points = found["inputs_percentiles"]
    screen.table(
        "tokens of an example, end of sequence included, by percentile",
        ["", *(f">{point} %" for point in points)],
        [[side, *found[f"{side}_percentiles"].values()] for side in ("inputs", "targets")],
    )
    speed = screen.amount(found["tokens_per_second"])
    print(f"{found['examples_per_second']:,.0f} examples/s, {speed} tokens/s on this machine")
