"""Which settings of a decoding method a sweep tries: grids of its options, ours or from the command line.

    GRIDS["beam"]                                   # one option at a time, the others at their defaults
    parse_grid("beam:beams=1,4;alpha=0,0.6")        # ("beam", {"beams": (1, 4), "alpha": (0.0, 0.6)}): all four pairs

A method that stands in `METHODS` without a grid here is tried at its defaults.
"""

import ast
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mlm.cli.main import UsageError
from mlm.decoding.config import ALWAYS, METHODS, DecodeConfig
from mlm.registry import nearest

DEFAULTS = DecodeConfig()
Grid = Mapping[str, tuple]  # option -> values; of several options their product

# Values of Shi et al. 2024 (arXiv:2402.06925) where they give any.
GRIDS: dict[str, tuple[Grid, ...]] = {
    "sample": (
        {"temperature": (0.3, 0.5, 0.7, 0.9, 1.0)},
        {"top_k": (5, 10, 50, 100)},
        {"top_p": (0.8, 0.9, 0.95)},
        {"min_p": (0.05, 0.1)},
        {"epsilon": (3e-4, 9e-4)},
        {"eta": (3e-4, 2e-3)},
        {"typical": (0.2, 0.9, 0.95)},
        {"mirostat": (2.5, 3.0, 5.0)},
    ),
    "beam": ({"beams": (2, 4, 8)}, {"alpha": (0.0, 0.6, 1.0)}),
    "diverse_beam": ({"groups": (2, 4)}, {"diversity": (0.2, 0.5, 1.0)}),
    "contrastive_search": ({"penalty_alpha": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}, {"candidates": (3, 5, 8)}),
    "fsd": ({"penalty_alpha": (0.2, 0.4, 0.6)}, {"ngram": (2, 3)}),
    "fsd_d": ({"penalty_alpha": (0.2, 0.4, 0.6)}, {"ngram": (2, 3)}),
}


@dataclass(frozen=True)
class Setting:
    """A method, and those of its options that are not at their defaults."""

    method: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def draws(self) -> bool:
        """Whether a seed decides what is written."""
        return "seed" in METHODS[self.method].options


def parse_grid(text: str) -> tuple[str, Grid]:
    """ "METHOD:option=value,value;option=…" as the method and its grid.

    Raises UsageError, with the nearest names, for an unknown method or option, and for a value that it cannot have.
    """
    method, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon:
        raise UsageError(f"--grid={text!r} must read METHOD:option=value,value;option=value, as beam:beams=1,4;alpha=0")
    if method not in METHODS:
        raise UsageError(f"--grid={text!r}: no decoding method named {method!r}; {nearest(method, METHODS)}")
    grid: dict[str, tuple] = {}
    defaults = {**{field.name: field.default for field in fields(DecodeConfig)}, **METHODS[method].defaults}
    for part in filter(None, map(str.strip, rest.split(";"))):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        allowed = [option for option in (*ALWAYS, *METHODS[method].options) if option != "method"]
        if name not in allowed:
            raise UsageError(f"--grid={text!r}: {method} has no option {name!r}; {nearest(name, allowed)}")
        if name == "seed":
            raise UsageError(f"--grid={text!r}: seeds are averaged over, not compared; say --seeds 5")
        if not equals or not values:
            raise UsageError(f"--grid={text!r}: {name} needs values, as {name}={defaults[name]}")
        grid[name] = tuple(_value(name, value.strip(), defaults[name], text) for value in values.split(","))
    return method, grid


def as_given(method: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return options


def settings(
    method: str, grids: Iterable[Grid], decide: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] = as_given
) -> list[Setting]:
    """The method's defaults, then every point of its grids, each once; a method that needs more than defaults is tried
    where its grids say it. decide: (method, options) -> these and what the runs decide.

    Raises UsageError for a point that the method does not take.
    """
    found: dict[DecodeConfig, Setting] = {}
    grids = list(grids)
    for grid in ({}, *grids):
        for values in itertools.product(*grid.values()):
            options = {n: v for n, v in zip(grid, values, strict=True) if v != getattr(DEFAULTS, n)}
            try:
                found.setdefault(DecodeConfig(method=method, **decide(method, options)), Setting(method, options))
            except ValueError as error:
                if not grid and grids:
                    continue
                raise UsageError(f"{Setting(method, options)}: {error}") from error
    return list(found.values())


def tried(grids: Mapping[str, Sequence[Grid]]) -> dict[tuple[str, str], tuple]:
    """(method, option) -> the values asked for, over all grids of the method."""
    values: dict[tuple[str, str], tuple] = {}
    for method, own in grids.items():
        for grid in own:
            for option in grid:
                values[method, option] = (*values.get((method, option), ()), *grid[option])
    return values


def _value(name: str, text: str, default: Any, grid: str) -> Any:
    """A value of the type of the option's default."""
    kind = type(default)
    try:
        if kind in (int, float, str):
            return kind(text)
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UsageError(f"--grid={grid!r}: {name}={text} must be like its default, {default!r}") from None
