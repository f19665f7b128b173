"""The page of a sweep over ways to decode: tables, quality against speed, and quality against each option."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from mlm.evaluation import report_plots as plots
from mlm.evaluation.report_html import figure, page, section, table
from mlm.evaluation.report_plots import MUTED, Line, Point
from mlm.evaluation.sweep import MethodRow, Row

# Columns of a table, on screen as here.
METHOD_COLUMNS = ("method", ">best", ">default", ">std", ">best-worst", ">tokens/s", "best with")
SETTING_COLUMNS = ("method", "setting", ">value", ">± seeds", ">tokens/s", ">passes")


# (method, option) -> the values that were asked for.
Tried = Mapping[tuple[str, str], Collection[Any]]


def to_html(title: str, about: str, found: Sequence[Row], lines: Sequence[MethodRow], tried: Tried) -> str:
    """The whole page: a section for each task. about: what was decoded, by which checkpoint. tried: what is plotted;
    a default that nobody asked for is not, since one that means "off" has no place on a scale.
    """
    body = [f"<h1>{escape(title)}</h1><p>{escape(about)}</p>"]
    for task in dict.fromkeys(row.task for row in found):
        own = [row for row in found if row.task == task]
        body.append(section(task, _task(own, [line for line in lines if line.best.task == task], tried)))
    return page(title, body)


def method_cells(line: MethodRow) -> list[str]:
    """The cells of METHOD_COLUMNS. Tokens per second: at the defaults, or else at the best."""
    speed = (line.default or line.best).tokens_per_second
    default = "-" if line.default is None else f"{line.default.value:.2f}"
    return [
        line.best.method,
        f"{line.best.value:.2f}",
        default,
        f"{line.std:.2f}",
        f"{line.span:.2f}",
        f"{speed:,.0f}",
        line.best.setting,
    ]


def setting_cells(row: Row) -> list[str]:
    """The cells of SETTING_COLUMNS."""
    seeds = f"{row.seed_std:.2f}" if row.seeds > 1 else ""
    return [row.method, row.setting, f"{row.value:.2f}", seeds, f"{row.tokens_per_second:,.0f}", f"{row.passes:,.0f}"]


def _task(found: Sequence[Row], lines: Sequence[MethodRow], tried: Tried) -> str:
    metric = found[0].metric
    colours = {line.best.method: min(index, MUTED) for index, line in enumerate(lines)}
    named = {id(row) for line in lines for row in (line.default, line.best)}
    points = [
        Point(
            row.tokens_per_second,
            row.value,
            f"{row.method}: {row.setting}" if id(row) in named else "",
            f"{row.method}: {row.setting}: {row.value:.2f} at {row.tokens_per_second:,.0f} tokens/s",
            colours[row.method],
        )
        for row in found
    ]
    parts = [
        table(METHOD_COLUMNS, map(method_cells, lines)),
        figure(
            plots.scatter(points, x="tokens per second", y=metric, legend=list(colours.items())),
            "One point for each setting, coloured by method; written beside it: the defaults and the best of a method. "
            "Compilation is not counted.",
        ),
    ]
    for line in lines:
        own = [row for row in found if row.method == line.best.method]
        for (method, option), values in tried.items():
            if method == line.best.method and (series := _series(own, option, values)):
                parts.append(_option(option, line, series))
    return "".join([*parts, table(SETTING_COLUMNS, map(setting_cells, found))])


def _series(own: Sequence[Row], option: str, values: Collection[Any]) -> dict[str, list[Row]]:
    """Setting of the other options -> rows by rising value of this one, where there are numbers, two or more."""
    groups: dict[str, list[Row]] = {}
    for row in own:
        value = row.decode[option]
        if value in values and isinstance(value, int | float) and not isinstance(value, bool):
            others = ", ".join(f"{name}={other}" for name, other in row.options.items() if name != option)
            groups.setdefault(others, []).append(row)
    return {
        others: sorted(rows, key=lambda row: row.decode[option]) for others, rows in groups.items() if len(rows) > 1
    }


def _option(option: str, line: MethodRow, series: Mapping[str, Sequence[Row]]) -> str:
    method, metric = line.best.method, line.best.metric
    drawn = [
        Line(
            others or "defaults",
            [(row.decode[option], row.value) for row in rows],
            min(index, MUTED),
            f"{method} with {others or 'the other options at their defaults'}",
            dots=True,
        )
        for index, (others, rows) in enumerate(series.items())
    ]
    marks = [] if line.default is None else [(line.default.value, "all options at their defaults")]
    plot = plots.lines(drawn, x=f"{option} of {method}", y=metric, marks=marks)
    return figure(plot, f"{method}: {metric} against {option}, a line for each setting of its other options.")
