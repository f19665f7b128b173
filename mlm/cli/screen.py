"""What a person sees: a bar in a terminal, plain lines in a log file, tables that fit."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
B = TypeVar("B", bound="Bar")
LOG_SECONDS = 10.0  # a log file gets a line at most this often


_silent = False


def silence() -> None:
    """Nothing of this module reaches the screen from now on: of several processes only one talks. Errors still do."""
    global _silent
    _silent = True


def console(stderr: bool = False) -> Console:
    """A console that never wraps piped output. Only a real terminal counts as one: notebooks set FORCE_COLOR, and rich
    would take a pipe for a terminal.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 160
    return Console(stderr=stderr, highlight=False, soft_wrap=True, force_terminal=terminal, width=width, quiet=_silent)


def duration(seconds: float) -> str:
    """Seconds as 5s, 3m20s, 2h05m or 4d03h."""
    if not seconds < 1e9:
        return "?"
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{below}"
    return f"{whole}s"


def amount(value: float) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class Bar:
    """How far a long job is and what a line says of it: one bar in a terminal, elsewhere a line at most every ten
    seconds. total None: not known.
    """

    def __init__(self, what: str, total: int | None, start: int = 0, line: str = ""):
        self._what, self._total, self._start = what, total, start
        self._console = console(stderr=True)
        self._began = self._shown = time.perf_counter()
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn(f"[bold]{what}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(what, total=total, completed=start, line=line)

    def __enter__(self: B) -> B:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, completed: int, line: str) -> None:
        if self._progress:
            self._progress.update(self._task, completed=completed, line=line)
            return
        now = time.perf_counter()
        if now - self._shown >= LOG_SECONDS or completed == self._total:
            self._shown = now
            of, eta = "", ""
            if self._total is not None:
                left = (now - self._began) / max(completed - self._start, 1) * (self._total - completed)
                of, eta = f"/{self._total}", f"  ETA {duration(left)}"
            self._console.print(f"{self._what} {completed}{of}  {line}{eta}")

    def event(self, text: str) -> None:
        self._console.print(text)


class TrainingScreen(Bar):
    """The observer of a training run."""

    def __init__(self, steps: int, start: int):
        super().__init__("step", steps, start, "compiling …")

    def log(self, step: int, info: Mapping[str, float]) -> None:
        line = f"loss {info.get('loss', float('nan')):.3f}  {amount(info['tokens_per_second'])} tokens/s"
        line += f"  {amount(info['model_flops_per_second'])}FLOP/s"
        if "peak_share" in info:
            line += f" ({info['peak_share']:.0%} of peak)"
        if info.get("skipped"):
            line += f"  {info['skipped']:.0f} skipped"
        self.show(step, line)


def track(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar in a terminal and nothing elsewhere."""
    made = console(stderr=True)
    if not made.is_terminal:
        yield from items
        return
    with Progress(
        TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=made, transient=True
    ) as progress:
        yield from progress.track(items, total=total)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner with a text while something takes seconds."""
    made = console(stderr=True)
    if made.is_terminal:
        with made.status(text):
            yield
    else:
        yield


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], out: Console | None = None) -> None:
    """Prints a table; columns that start with ">" are right-aligned numbers."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    (out or console()).print(made)


def say(text: str) -> None:
    """One line to the person at the screen, not to a pipe."""
    if not _silent:
        print(text, file=sys.stderr)
