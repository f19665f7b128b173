"""Timing for the benchmarks: pinned threads, interleaved medians, one table, one JSON file.

Import this before numpy, jax or torch: `pin_threads` sets what they read when they start.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from traceback import format_exc
from typing import Any


def pin_threads(count: int) -> int:
    """Confines this process to `count` cores, or all where there are fewer, and every library to that many threads."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(len(cores))
    return len(cores)


def huge_pages() -> None:
    """Starts this program once more with large arrays in huge pages, as `mlm train` does, and so for every peer."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Peer:
    """A peer alone in a process, as in use: frameworks that share one disturb each other's memory and threads.

    make(*arguments) -> (call, facts) runs there, in a fresh Python that imports make's module; then this object is
    `call`, and `facts` what make told about it. Both must be picklable. Raises RuntimeError with the trace from there.
    """

    def __init__(self, make: Callable[..., tuple[Callable, Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def __call__(self, *arguments: Any) -> Any:
        self._pipe.send(arguments)
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, result, self.processor_seconds = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a peer's process ended with exit code {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(f"a peer failed:\n{result}")
        return result


def _serve(pipe: Any, make: Callable[..., tuple[Callable, Any]], arguments: tuple) -> None:
    def send(work):
        start = time.process_time()
        try:
            failed, result = False, work()
        except Exception:
            failed, result = True, format_exc()
        pipe.send((failed, result, time.process_time() - start))

    call = None

    def start():
        nonlocal call
        call, facts = make(*arguments)
        return facts

    send(start)
    while call is not None:
        try:
            given = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        send(partial(call, *given))


def measure(peers: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Per peer the median wall and processor seconds of `repeats` calls.

    Peers take turns, so that a busy moment of the machine falls on all of them. A turn is one call that warms up and
    one that is timed: while the others have theirs, a virtual machine takes free memory back, and to get it again
    costs as much as a second per gigabyte. A call must return only when its work is done. Processor seconds (all
    threads, of the process that works) tell how much of the wall time was spent waiting for other programs.
    """
    wall: dict[str, list[float]] = {name: [] for name in peers}
    processor: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(repeats):
        for name, call in peers.items():
            call()
            start, busy = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(call.processor_seconds if isinstance(call, Peer) else time.process_time() - busy)
            if sys.stderr.isatty():
                print(f"\r{turn + 1}/{repeats} {name:40s}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "fastest": min(wall[name]),
            "processor_seconds": statistics.median(processor[name]),
        }
        for name in peers
    }


def environment(*packages: str) -> dict[str, str]:
    """What a result depends on: processor, threads, load, and the versions of the packages that are installed."""
    model = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "?")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "threads": str(len(os.sched_getaffinity(0))),
        "load": f"{os.getloadavg()[0]:.1f}",
        **({"memory": os.environ["GLIBC_TUNABLES"]} if "GLIBC_TUNABLES" in os.environ else {}),
        **versions,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text; numbers to the right."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def report(title: str, setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: str | None) -> None:
    """Prints the table under its setting, and writes both as JSON when a path is given."""
    print(f"{title}\n" + "\n".join(f"  {name}: {value}" for name, value in setting.items()) + "\n\n" + table(rows))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(
            json.dumps({"title": title, "setting": dict(setting), "rows": list(rows)}, indent=1) + "\n"
        )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.3f}"
    return str(value)


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []
