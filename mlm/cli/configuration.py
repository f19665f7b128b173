"""gin files to Python values: one file that binds names, three flat layers (model, mixture, run).

include 'gin/models/tiny.gin'      # found beside the file, in the working directory, or shipped with mlm
data.batch_size = 64               # NAME.parameter = value
MIXTURE = 'quickstart'             # a macro, used as %MIXTURE
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from mlm.cli.main import UsageError
from mlm.registry import nearest
from mlm.shipped import gin_path

_bound: dict[str, list[str]] = {}  # configurable name -> its parameters


def bind(name: str, target: Callable[..., Any]) -> None:
    """Makes a function or dataclass available to gin files under `name`."""
    if name not in _bound:
        gin.external_configurable(target, name=name)
        _bound[name] = list(inspect.signature(target).parameters)


@dataclass(frozen=True)
class Resolved:
    """text: the whole configuration, includes expanded. changes: what the command line changed, old to new."""

    text: str
    changes: tuple[str, ...]


def resolve(files: Sequence[str], overrides: Iterable[str]) -> Resolved:
    """Parses gin files in order (later wins), then `NAME.parameter=value` overrides, and locks the configuration.

    Raises UsageError for a missing file, an unknown name (with the nearest), a macro nobody uses, or a required
    value that was never set.
    """
    gin.clear_config()
    gin.add_config_file_search_path(str(gin_path().parent))
    if gin_path().name != "gin" or not (gin_path().parent / "gin").is_dir():
        gin.add_config_file_search_path(str(gin_path()))
    paths = [find(name) for name in files]
    try:
        gin.parse_config_files_and_bindings([str(p) for p in paths], None, finalize_config=False)
        before = _bindings()
        for override in overrides:
            gin.parse_config(_statement(override))
        after = _bindings()
        _check_macros()
        gin.finalize()
        text = gin.config_str(max_line_length=110)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(_explain(error)) from error
    changes = [f"{k}: {before.get(k, 'not set')} -> {v}" for k, v in after.items() if before.get(k) != v]
    return Resolved(text, tuple(changes))


def find(name: str) -> Path:
    """A gin file: as given, or below the shipped gin folder. Raises UsageError with the nearest shipped files."""
    shipped = gin_path()
    relative = name.removeprefix("gin/")
    for candidate in (Path(name), shipped / relative):
        if candidate.is_file():
            return candidate
    known = [f"gin/{p.relative_to(shipped)}" for p in shipped.rglob("*.gin")]
    raise UsageError(f"no gin file {name!r} here or among the shipped ones; {nearest(name, known)}")


def _statement(override: str) -> str:
    """`a.b=text` as a gin binding; a value that is no Python literal or gin reference is taken as a string."""
    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w./]+", name.strip()):
        raise UsageError(f"override {override!r} must read NAME.parameter=value, e.g. data.batch_size=64")
    value = value.strip()
    literal = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|True|False|None|[@%'\"\[({].*", value)
    return f"{name.strip()} = {value if literal else repr(value)}"


def _bindings() -> dict[str, str]:
    """Every binding as text."""
    return {
        (f"{'/'.join(filter(None, scope))}.{parameter}" if selector != "gin.macro" else scope[0]): repr(value)
        for (scope_name, selector), parameters in gin.config._CONFIG.items()
        for scope in [(scope_name, selector.split(".")[-1])]
        for parameter, value in parameters.items()
    }


def _check_macros() -> None:
    """A misspelt macro would be accepted in silence: every macro that is set must be used by some binding."""
    config = gin.config._CONFIG
    defined = {scope for scope, selector in config if selector == "gin.macro"}
    used = set(re.findall(r"%(\w+)", gin.config_str()))
    for name in sorted(defined - used):
        raise UsageError(f"nothing uses the macro {name}; {nearest(name, used)}")


def _explain(error: Exception) -> str:
    text = str(error).strip()
    first = text.split("\n")[0]
    unknown = re.search(r"No configurable matching '([^']+)'", text)
    if unknown:
        return f"{first} {nearest(unknown[1].split('/')[-1], _bound)}"
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if parameter:
        return f"{first} {nearest(parameter[2], _bound.get(parameter[1].split('.')[-1], []))}"
    return text
