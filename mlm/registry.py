"""A dict that answers a typo with the nearest names."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Text for an error message: the names closest to `name`, or all of them when none is close.

    >>> nearest("mt5_smal", ["mt5_small", "mt5_base", "tiny"])
    "did you mean 'mt5_small', 'mt5_base'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=count)
    if close:
        return "did you mean " + ", ".join(repr(n) for n in close) + "?"
    shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    return f"known: {shown or 'none'}"


class UnknownName(KeyError):
    """A name that a registry does not hold; the message suggests the nearest ones."""

    def __str__(self) -> str:  # KeyError would show the quoted repr
        return str(self.args[0])


class Registry(dict[str, T]):
    """Named choices of one kind. A missing name raises UnknownName with the nearest names.

    >>> Registry("optimizer", adafactor=1)["adafctor"]
    Traceback (most recent call last):
    mlm.registry.UnknownName: no optimizer named 'adafctor'; did you mean 'adafactor'?
    """

    def __init__(self, kind: str, **entries: T):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: str) -> T:
        raise UnknownName(f"no {self.kind} named {name!r}; {nearest(name, self)}")
