"""`mlm decode list`: every way to decode, by what it does: methods, processors of the logits, proposers of guesses,
postprocessors of the results, what fills blanks, rules for labels.
"""

import argparse
import dataclasses
import inspect
import json
import textwrap
from typing import Any

from mlm.cli import screen

WIDTH = 78  # characters of the second column
FILLS = "blanks in any order, several for two passes, by a run trained with any_order (ASSD, Guo & Ermon 2025)"


def run(arguments: list[str]) -> None:
    options = _parse(arguments)
    records = _records()
    if options.json:
        print(json.dumps(records, indent=1))
    else:
        _print(records)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlm decode", description="List the ways to decode.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list",
        help="every method, processor, proposer and postprocessor with its options",
        description="Every method, processor, proposer and postprocessor with its options, their defaults and its "
        "paper. A method chooses tokens; a processor, one for each option that is switched on, reshapes or forbids "
        "before that; a proposer guesses ahead, so that one pass confirms several tokens; a postprocessor chooses one "
        "of several results; a tree rule decides on a label, out of probabilities of the leaves of a tree.",
    )
    listing.add_argument("--json", action="store_true", help="machine-readable")
    return parser.parse_args(arguments)


def _records() -> list[dict[str, Any]]:
    """What is registered: kind, name, options with their defaults, methods that take it, one line and the paper."""
    from mlm.decoding.any_subset import Filler
    from mlm.decoding.config import ALWAYS, METHODS, DecodeConfig
    from mlm.decoding.processors import PROCESSORS
    from mlm.decoding.proposers import PROPOSERS
    from mlm.evaluation.hierarchy import RULES
    from mlm.session.choosing import POSTPROCESSORS

    defaults = {field.name: field.default for field in dataclasses.fields(DecodeConfig)}
    asks = inspect.signature(Filler).parameters
    filling = {name: asks[name].default for name in ("block", "temperature", "seed")}
    asked = {method: {*ALWAYS, *METHODS[method].options} for method in METHODS}
    shared = [option for option in ALWAYS if option != "method"]

    def record(kind: str, name: str, options: list[str], methods: list[str], summary: str) -> dict[str, Any]:
        own = METHODS[name].defaults if kind == "method" else {}
        told = {option: own.get(option, defaults[option]) for option in options}
        return described(kind, name, told, methods, summary)

    def described(kind: str, name: str, told: Any, methods: Any, summary: str) -> dict[str, Any]:
        return {"kind": kind, "name": name, "options": dict(told), "methods": list(methods), "summary": summary}

    def takers(option: str) -> list[str]:
        return [method for method, options in asked.items() if option in options]

    return [
        *(record("method", name, [*m.options, *shared], [name], m.summary) for name, m in METHODS.items()),
        *(record("processor", name, [name, *p.further], takers(name), p.summary) for name, p in PROCESSORS.items()),
        *(record("proposer", name, [*p.options], takers("proposer"), p.summary) for name, p in PROPOSERS.items()),
        *(
            described(
                "postprocessor",
                name,
                {field.name: field.default for field in dataclasses.fields(p.make)},
                p.methods or takers("n_best"),
                p.summary,
            )
            for name, p in POSTPROCESSORS.items()
        ),
        described("filler", "any_subset", filling, [], FILLS),
        *(described("tree_rule", name, rule.options, [], rule.summary) for name, rule in RULES.items()),
    ]


def _print(records: list[dict[str, Any]]) -> None:
    methods = [record for record in records if record["kind"] == "method"]
    shared = [name for name in methods[0]["options"] if all(name in method["options"] for method in methods)]

    def _own(record: dict[str, Any]) -> str:
        return _options({"options": {n: value for n, value in record["options"].items() if n not in shared}})

    def _takers(record: dict[str, Any]) -> str:
        told = f"{_options(record)}; " if record["options"] else ""
        every = len(record["methods"]) == len(methods)
        return f"{told}{'every method' if every else 'methods: ' + ', '.join(record['methods'])}"

    kinds = {
        "method": ("methods: method=NAME, one of", _own),
        "processor": ("processors: NAME=VALUE, any of those that the method takes", _takers),
        "proposer": ("proposers: proposer=NAME, one of; the text stays the same", _takers),
        "postprocessor": ("postprocessors: choose=NAME, one of; n_best results, one is kept", _takers),
        "filler": ("filling blanks: mlm fill, Session.fill", _options),
        "tree_rule": ("rules for trees of labels, in Python: mlm.evaluation.hierarchy.RULES", _options),
    }
    for kind, (title, details) in kinds.items():
        rows: list[tuple[str, str]] = []
        for record in (record for record in records if record["kind"] == kind):
            lines = [*textwrap.wrap(record["summary"], WIDTH), *textwrap.wrap(details(record), WIDTH)]
            rows += zip((record["name"], *[""] * len(lines)), lines, strict=False)
        if kind == "method":
            each = textwrap.wrap(f"with {', '.join(shared)}", WIDTH)
            rows += zip(("each", *[""] * len(each)), each, strict=False)
        screen.table(title, ("name", "what it does"), rows)
        print()


def _options(record: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={default!r}" for name, default in record["options"].items())
    return f"with {told}" if told else ""
