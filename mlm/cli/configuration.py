"""gin files to Python values: one file that binds names, three flat layers (model, mixture, run).

include 'gin/models/tiny.gin'      # found beside the file, in the working directory, or shipped with mlm
data.batch_size = 64               # NAME.parameter = value
MIXTURE = 'quickstart'             # a macro, used as %MIXTURE
"""

import inspect
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from mlm.cli.main import UsageError
from mlm.registry import nearest
from mlm.shipped import gin_path

_bound: dict[str, Any] = {}  # configurable name -> function or dataclass
LITERALS = (bool, int, float, str, type(None))


def bind(name: str, target: Any) -> None:
    """Makes a function or dataclass available to gin files under `name`."""
    if name not in _bound:
        with gin.unlock_config():  # an earlier configuration of this process may be locked
            gin.external_configurable(target, name=name)
        _bound[name] = target


@dataclass(frozen=True)
class Resolved:
    """text: the whole configuration, includes expanded. changes: what the command line changed, old to new."""

    text: str
    changes: tuple[str, ...]


def resolve(files: Sequence[str], overrides: Iterable[str]) -> Resolved:
    """Parses gin files in order (later wins), then `NAME.parameter=value` overrides, and locks the configuration.

    Raises UsageError for a missing file, an unknown name (with the nearest), a macro nobody uses or defines, a value of
    the wrong type, or a required value that was never set.
    """
    gin.clear_config()
    paths = [find(name) for name in files]
    _search([*(path.parent for path in paths), gin_path().parent, gin_path()])
    try:
        gin.parse_config_files_and_bindings([str(p) for p in paths], None, finalize_config=False)
    except Exception as error:
        raise UsageError(explain(error)) from error
    before, used = _bindings(), _used_macros()
    for override in overrides:
        try:
            gin.parse_config(_statement(override))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{override}: {explain(error)}") from error
    _check_macros(used | _used_macros())
    _check_values()
    gin.finalize()
    changes = [f"{k}: {before.get(k, 'not set')} -> {v}" for k, v in _bindings().items() if before.get(k) != v]
    return Resolved(gin.config_str(max_line_length=110), tuple(changes))


def bound(name: str) -> dict[str, Any]:
    """The parameters that the configuration sets of what is bound under this name.

    Raises UsageError where it sets anything else.
    """
    others = [binding for binding, _ in _values() if binding.rpartition(".")[0] not in (name, "")]
    if others:
        raise UsageError(f"{others[0]} is set, where only {name}.NAME = value has a meaning")
    return dict(gin.get_bindings(name))


def find(name: str) -> Path:
    """A gin file: as given, or below the shipped gin folder. Raises UsageError with the nearest shipped files."""
    shipped = gin_path()
    relative = name.removeprefix("gin/")
    for candidate in (Path(name), shipped / relative):
        if candidate.is_file():
            return candidate
    known = [f"gin/{p.relative_to(shipped)}" for p in shipped.rglob("*.gin")]
    raise UsageError(f"no gin file {name!r} here or among the shipped ones; {nearest(name, known)}")


def explain(error: Exception) -> str:
    """gin's errors, and those of what gin calls, in one line with the nearest names."""
    text = str(error).strip()
    line = re.search(r'In file "([^"]+)", line (\d+)', text)
    where = f"{line[1]}, line {line[2]}: " if line else ""
    if found := re.search(r"No configurable matching (?:reference )?'@?([^'()]+)", text):
        return f"{where}nothing is named {found[1]!r}; {nearest(found[1].split('/')[-1], _bound)}"
    if found := re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text):
        owner = found[1].split(".")[-1]
        return f"{where}{owner} has no parameter {found[2]!r}; {nearest(found[2], _parameters(owner))}"
    if found := re.search(r"Unable to open file: (.+?)\. Searched", text):
        try:
            find(found[1])
        except UsageError as missing:
            return f"{where}{missing}"
    if found := re.search(r"Failed to parse token '(.*)' \((.+), line (\d+)\)", text):
        return f"{found[2]}, line {found[3]}: {found[1]} is no value; text needs quotes, references @ or %"
    if (found := re.search(r"missing \w+ required .*?arguments?: (.+)", text)) and (
        owner := re.search(r"configurable '([^']+)'", text)
    ):
        names = ", ".join(f"{owner[1]}.{name}" for name in re.findall(r"'(\w+)'", found[1]))
        return f"the configuration sets no {names} (gin/runs/pretrain.gin has them all)"
    if "EOF in multi-line statement" in text:
        return f"{where}a bracket is not closed"
    return where + text.split("\n")[0]


def _statement(override: str) -> str:
    """`a.b=text` as a gin binding; a value that is no Python literal or gin reference is taken as a string."""
    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w./]+", name.strip()):
        raise UsageError(f"override {override!r} must read NAME.parameter=value, e.g. data.batch_size=64")
    value = value.strip()
    literal = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|True|False|None|[@%'\"\[({].*", value)
    return f"{name.strip()} = {value if literal else repr(value)}"


def _search(folders: Iterable[Path]) -> None:
    """Where gin looks for included files: the working directory, then these. Of gin's readers only plain files stay:
    the search of Python packages logs every miss as an error.
    """
    gin.config._LOCATION_PREFIXES[:] = ["", *dict.fromkeys(str(folder) for folder in folders)]
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]


def _bindings() -> dict[str, str]:
    """Every binding as text."""
    return {name: repr(value) for name, value in _values()}


def _values() -> Iterator[tuple[str, Any]]:
    for (scope, selector), parameters in gin.config._CONFIG.items():
        owner = scope if selector == "gin.macro" else "/".join(filter(None, (scope, selector.split(".")[-1])))
        for parameter, value in parameters.items():
            yield (owner if selector == "gin.macro" else f"{owner}.{parameter}"), value


def _used_macros() -> set[str]:
    return set(re.findall(r"%([\w.]+)", gin.config_str()))


def _check_macros(used: set[str]) -> None:
    """A macro that is misspelt where it is set would be accepted in silence, one misspelt where it is used would fail
    with the whole configuration as the message.
    """
    used = used - {"gin.REQUIRED"}
    defined = {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}
    for name in sorted(defined - used):
        raise UsageError(f"nothing uses the macro {name}; {nearest(name, used)}")
    if missing := sorted(_used_macros() - defined - {"gin.REQUIRED"}):
        raise UsageError(
            f"the macro {missing[0]} is used but not set; {nearest(missing[0], defined)} (MODEL and MIXTURE are set by "
            "the files of gin/models and gin/mixtures)"
        )


def _check_values() -> None:
    """Required values are there, and plain ones have the type that their parameter is declared with."""
    required = [name for name, value in _values() if repr(value) == "%gin.REQUIRED"]
    if required:
        raise UsageError(f"required, but not set: {', '.join(sorted(required))}")
    for name, value in _values():
        owner, _, parameter = name.rpartition(".")
        target = _bound.get(owner.split("/")[-1])
        hint = typing.get_type_hints(target).get(parameter) if target else None
        allowed = typing.get_args(hint) or (hint,)
        fits = type(value) in allowed or (type(value) is int and float in allowed)
        if isinstance(value, LITERALS) and set(allowed) <= set(LITERALS) and not fits:
            raise UsageError(f"{name}={value!r} must be {' or '.join(_named(kind) for kind in allowed)}")


def _named(kind: type) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}
    return names[kind]


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_bound[name]).parameters) if name in _bound else []
