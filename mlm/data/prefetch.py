"""Batches made ahead of time in a background thread, without losing the place of the one that was handed out last."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Resumable(Protocol):
    """What can be read ahead: batches, a cheap snapshot of the place after each, and the snapshot as bytes."""

    def __next__(self) -> Any: ...
    def snapshot(self) -> Any: ...
    def encode(self, snapshots: Any) -> dict[int, bytes]: ...


class Prefetcher(Iterator):
    """Hands out the batches of `source` in order; at most `depth` wait ready.

    `state()` is the place after the batch that was handed out last, whatever lies ready behind it: a run that is saved
    and restored sees every batch exactly once. prepare: done to every batch in the thread, e.g. moving it to the
    devices. An error of the source is raised by the call that would have returned its batch. `close` ends the thread.
    """

    def __init__(self, source: Resumable, depth: int = 2, prepare: Callable[[Any], Any] = lambda batch: batch):
        if depth < 1:
            raise ValueError(f"depth={depth}: at least one batch must have room")
        self._source, self._prepare = source, prepare
        self._place = source.snapshot()
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        batch, place = self._queue.get()
        if isinstance(place, BaseException):
            self._stop.set()
            raise place
        self._place = place
        return batch

    def state(self) -> dict[int, bytes]:
        """Virtual shard -> bytes, after the batch handed out last."""
        return self._source.encode(self._place)

    def close(self) -> None:
        """Ends the thread and forgets the batches that were not handed out."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room, so that a thread waiting for it sees the stop
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._prepare(next(self._source)), self._source.snapshot()
            except BaseException as error:  # StopIteration as well: it ends the consumer's loop
                item = None, error
            self._queue.put(item)
            if isinstance(item[1], BaseException):
                return

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *unused) -> None:
        self.close()
