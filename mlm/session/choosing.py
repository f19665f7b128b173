"""One of n results, by what the results and the run say: for `choose=` of a session, and `--choose` of a command.

    run.generate(texts, "fr", "sample", n_best=32, choose="mbr,utility=bleu")
    run.decode(texts, "fr", "beam", beams=8, n_best=8, choose=NoisyChannel(back="en"))

Names and options, and what calls a chooser; the choosers are in `mlm.session.choosers`.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from mlm.registry import Registry, nearest
from mlm.session.choosers import Chooser, Energy, MinimumBayesRisk, NoisyChannel, Relevance, Results, SelfConsistency
from mlm.session.records import Asked, Hypothesis
from mlm.session.session import Session


class Kind(NamedTuple):
    """A chooser, what it does, in a line, and the methods whose results it takes (None: all that give several)."""

    make: type[Any]
    summary: str
    methods: tuple[str, ...] | None = None


POSTPROCESSORS: Registry[Kind] = Registry(
    "way to choose",
    mbr=Kind(
        MinimumBayesRisk,
        "minimum Bayes risk: the result that the others agree with most (Eikema & Aziz 2020)",
    ),
    noisy_channel=Kind(
        NoisyChannel,
        "how well the source follows from a result, and how fluent it is, beside its own score (Yee et al. 2019)",
    ),
    rankgen=Kind(Relevance, "the result whose vector goes best with that of the source (RankGen, Krishna et al. 2022)"),
    energy=Kind(
        Energy,
        "a draw with weights that give the texts the statistics of human ones (DAEMON, Ji et al. 2024)",
        ("sample",),
    ),
    self_consistency=Kind(SelfConsistency, "the answer that most results end in (Wang et al. 2023)"),
)


def read_chooser(text: str) -> Chooser:
    """ "mbr,utility=bleu,references=8" as the chooser; `mlm decode list` says which options there are.

    Raises KeyError for an unknown name, ValueError for options that it does not have or that make no sense.
    """
    name, _, rest = text.partition(",")
    kind = POSTPROCESSORS[name].make
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    options = {}
    for part in re.split(r",(?=[a-z_]+=)", rest) if rest else []:
        option, _, value = part.partition("=")
        if option not in defaults:
            raise ValueError(f"{name} has no option {option!r}; {nearest(option, defaults)}")
        options[option] = _typed(f"{name},{option}", value, type(defaults[option]))
    return kind(**options)


def _typed(name: str, value: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"{name}={value} must be {kinds[kind]}") from None


def settings(chooser: Chooser, session: Session) -> dict[str, Any]:
    """Everything its choice depends on, ready for JSON."""
    (name,) = (name for name, kind in POSTPROCESSORS.items() if kind.make is type(chooser))
    steps = {f"{run}_step": chooser.run(run, session).step for run in chooser.runs if getattr(chooser, run)}
    return {"name": name, **dataclasses.asdict(chooser), **steps}  # type: ignore[call-overload]


def checked(choose: str | Chooser, asked: Asked) -> Chooser:
    """The chooser, which can choose among results of this kind. Raises as it and `read_chooser` do, and ValueError for
    one result.
    """
    chooser = read_chooser(choose) if isinstance(choose, str) else choose
    if asked.generator.config.n_best < 2:
        raise ValueError("there is nothing to choose from one result: ask for several, n_best=16 with method='sample'")
    nothing = dataclasses.replace(asked, sources=[], ids=[], languages=None if asked.languages is None else [])
    chooser.check(nothing)
    return chooser


def chosen(chooser: Chooser, asked: Asked, found: Results) -> list[list[Hypothesis]]:
    """All results of each source with their values, the chosen one first."""
    return [
        [dataclasses.replace(results[i], value=float(values[i])) for i in order]
        for results, (order, values) in zip(found, chooser(asked, found), strict=True)
    ]
