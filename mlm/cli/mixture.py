"""`mlm mixture show MIXTURE --budget 1e9`: how often each language is seen, before anything trains."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm.cli import screen, tasks
from mlm.cli.main import UsageError

WIDTH = 100  # of the table
CAP = 4.0  # epochs; repeating text more often than four times is worth less and less (Muennighoff et al. 2023)


def run(arguments: list[str]) -> int:
    """Prints to stdout; warnings go to stderr."""
    options = _parse(arguments)
    if not options.budget > 0:
        raise UsageError(f"--budget={options.budget:g}: a number of tokens above 0, e.g. 1e9")
    plot = Path(options.plot) if options.plot else None
    if plot and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise UsageError(f"--plot={plot}: must be a .png in a folder that exists")
    tasks.load_tasks(options.module)
    tasks.find(options.mixture, "mixture")
    vocabulary = tasks.load_vocabulary(options.vocabulary)
    with screen.working(f"counting {options.mixture} …"):
        from mlm.data.recipes import Lengths
        from mlm.data.statistics import mixture_table

        lengths = Lengths(options.inputs_length, options.targets_length)
        rows = mixture_table(options.mixture, options.budget, vocabulary, lengths, by_task=options.by_task)
    if plot:
        draw(plot, rows, options.mixture, options.budget, options.cap)
        screen.say(f"plot: {plot}")
    if options.json:
        print(json.dumps(as_json(options.mixture, options.budget, vocabulary, rows), ensure_ascii=False, indent=1))
    else:
        _print(options, rows, counted_in="bytes" if options.vocabulary in (None, "bytes") else options.vocabulary)
    warning = above(rows, options.cap)
    if warning:
        screen.say(warning)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlm mixture", description="How often each language of a mixture is seen.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="examples, characters, tokens, rate, and what a budget makes of them")
    show.add_argument("mixture")
    show.add_argument(
        "--budget", type=float, default=1e9, metavar="TOKENS", help="text tokens to train on (default 1e9)"
    )
    show.add_argument("--cap", type=float, default=CAP, metavar="EPOCHS", help=f"warn above it (default {CAP:g})")
    show.add_argument("--by_task", action="store_true", help="a line for each task instead of each language")
    show.add_argument("--plot", metavar="FILE.png", help="draw rates and epochs against the size of each language")
    show.add_argument("--inputs_length", type=int, default=512, metavar="N", help="of an example, tokens (default 512)")
    show.add_argument(
        "--targets_length", type=int, default=114, metavar="N", help="of an example, tokens (default 114)"
    )
    tasks.add_vocabulary_flag(show)
    tasks.add_common_flags(show)
    return parser.parse_args(arguments)


def above(rows: Sequence[Any], cap: float) -> str:
    """A warning that names the languages read more often than the cap allows; empty without one."""
    often = sorted((row for row in rows if row.epochs > cap), key=lambda row: -row.epochs)
    if not often:
        return ""
    named = ", ".join(f"{row.name} ({row.epochs:.1f})" for row in often[:8]) + (", …" if len(often) > 8 else "")
    return (
        f"warning: {len(often)} of {len(rows)} are read more than {cap:g} times: {named}. Lower the budget, or give "
        "the mixture a sampling policy with a cap, such as unimax(budget=…, max_epochs=…)"
    )


def as_json(mixture: str, budget: float, vocabulary: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """The table as plain values; epochs null where the size of the text is not known."""
    plain = [{**row._asdict(), "epochs": None if math.isnan(row.epochs) else row.epochs} for row in rows]
    return {"mixture": mixture, "budget": budget, "vocabulary": vocabulary.digest, "total": total(rows), "rows": plain}


def total(rows: Sequence[Any]) -> dict[str, Any]:
    """Sums over the rows, the number of scripts, and the span of rates and epochs."""
    epochs = [row.epochs for row in rows if not math.isnan(row.epochs)]
    return {
        "rows": len(rows),
        "scripts": len({row.script for row in rows}),
        **{
            name: sum(getattr(row, name) for row in rows)
            for name in ("tasks", "examples", "characters", "tokens", "rate")
        },
        "expected_tokens": sum(row.expected_tokens for row in rows),
        "epochs": sum(row.expected_tokens for row in rows if row.tokens) / max(sum(row.tokens for row in rows), 1),
        "largest_rate": max(row.rate for row in rows),
        "smallest_rate": min(row.rate for row in rows),
        "most_epochs": max(epochs, default=None),
    }


def _print(options: argparse.Namespace, rows: Sequence[Any], counted_in: str) -> None:
    sums = total(rows)
    numbers = [
        [
            *map(_amount, (row.examples, row.characters, row.tokens)),
            f"{row.rate:.3%}",
            screen.amount(row.expected_tokens),
            "?" if math.isnan(row.epochs) else f"{row.epochs:.2f}{'!' if row.epochs > options.cap else ' '}",
        ]
        for row in rows
    ]
    last = [*map(_amount, (sums["examples"], sums["characters"], sums["tokens"])), f"{sums['rate']:.1%}"]
    last += [screen.amount(sums["expected_tokens"]), f"{sums['epochs']:.2f} " if sums["tokens"] else "?"]
    heads = ["examples", "characters", "tokens", "rate", "expected", "epochs"]
    names = [[row.name, row.script, row.title] for row in rows]
    used = sum(2 + max(map(len, column)) for column in zip(heads, last, *numbers, strict=True))
    used += 2 + max(len(name) for name, _, _ in names) + 2 + len("script")
    room = max(8, WIDTH - used)
    screen.table(
        f"{options.mixture} at {screen.amount(options.budget)} tokens of text; tokens: {counted_in}",
        ["task" if options.by_task else "code", "language", "script", *(f">{head}" for head in heads)],
        [
            *(
                [name, _short(title, room), script, *line]
                for (name, script, title), line in zip(names, numbers, strict=True)
            ),
            ["all", str(sums["rows"]), str(sums["scripts"]), *last],
        ],
    )
    screen.say(
        f"{sums['rows']} {'tasks' if options.by_task else 'languages'}, scripts: {sums['scripts']}, rates from "
        f"{sums['smallest_rate']:.3%} to {sums['largest_rate']:.3%}"
    )


def _amount(count: int) -> str:
    return screen.amount(float(count)) if count else "?"


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def draw(path: Path, rows: Sequence[Any], mixture: str, budget: float, cap: float) -> None:
    """A picture of two panels: rate and epochs of each language against its characters of text, logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [row for row in rows if row.characters]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True, layout="constrained")
    panels = (above, below)
    share = sum(row.characters for row in known) or 1
    for panel, values, label in (
        (panels[0], [100 * row.rate for row in known], "share of examples (%)"),
        (panels[1], [row.epochs for row in known], f"epochs at {screen.amount(budget)} tokens"),
    ):
        panel.scatter([row.characters for row in known], values, s=18, color="#2b6cb0", zorder=3)
        panel.set(xscale="log", yscale="log", ylabel=label)
        panel.grid(True, which="major", color="#dde1e6", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelbottom=True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_major_formatter(lambda value, _: screen.amount(value))
    ends = sorted(row.characters for row in known)
    if known and ends[0] < ends[-1]:
        panels[0].plot(
            [ends[0], ends[-1]], [100 * ends[0] / share, 100 * ends[-1] / share], "--", color="#868e96", linewidth=1
        )
        panels[0].annotate(
            "in proportion to size", (ends[-1], 100 * ends[-1] / share), ha="right", va="bottom", color="#5b6570"
        )
    panels[1].axhline(cap, linestyle="--", color="#c92a2a", linewidth=1)
    panels[1].annotate(f"{cap:g} epochs", (ends[0] if ends else 1, cap), va="bottom", color="#c92a2a")
    _name(panels, known)
    panels[1].set_xlabel("characters of training text")
    panels[0].set_title(f"{mixture}: {len(known)} languages, {screen.amount(budget)} tokens of text", loc="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _name(panels: Sequence[Any], rows: Sequence[Any]) -> None:
    """Codes beside the smallest and the largest languages, and one in between at every tenth of the way."""
    ordered = sorted(rows, key=lambda row: row.characters)
    chosen = (
        {
            ordered[round(i * (len(ordered) - 1) / 14)].name: ordered[round(i * (len(ordered) - 1) / 14)]
            for i in range(15)
        }
        if ordered
        else {}
    )
    for panel, value in ((panels[0], lambda row: 100 * row.rate), (panels[1], lambda row: row.epochs)):
        for row in chosen.values():
            panel.annotate(
                row.name, (row.characters, value(row)), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
