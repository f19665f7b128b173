"""The training loop: takes iterators and callables, knows no dataset and no screen."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mlm.checkpoints import Checkpointer
from mlm.parallel import global_batch, preempted, prefetch
from mlm.training.metrics import Meter, MetricWriter, TokenCounter
from mlm.training.state import TrainState
from mlm.training.trainer import Trainer

Rows = Mapping[str, np.ndarray]


@runtime_checkable
class RowSource(Protocol):
    """An endless iterator of this process's rows whose position can be saved: virtual shard -> opaque bytes."""

    def __next__(self) -> Rows: ...

    def __iter__(self) -> Iterator[Rows]: ...

    def state(self) -> dict[int, bytes]: ...


@runtime_checkable
class Observer(Protocol):
    """A screen, or a test, that is told what happens. `info` holds the numbers of a progress line."""

    def log(self, step: int, info: Mapping[str, float]) -> None: ...

    def event(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Rhythm, in steps. evaluate_every=0: only at the end."""

    log_every: int = 20
    evaluate_every: int = 0

    def __post_init__(self):
        if self.log_every < 1 or self.evaluate_every < 0:
            raise ValueError(
                f"LoopConfig: log_every={self.log_every} must be at least 1 "
                f"and evaluate_every={self.evaluate_every} at least 0"
            )


class TrainingDiverged(RuntimeError):
    """Loss or gradients stopped being finite, and the run was asked to stop then."""


@dataclass(frozen=True)
class Outcome:
    """step: updates done. interrupted: stopped by a signal before the last step, with everything saved."""

    step: int
    state: TrainState
    interrupted: bool


def fit(
    trainer: Trainer,
    rows: RowSource,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    observer: Observer,
    loop: LoopConfig,
    counter: TokenCounter,
    state: TrainState,
    start: int = 0,
    schedule: Callable[[int], Any] = lambda step: float("nan"),
    evaluations: Mapping[str, Callable[[], Iterable[Rows]]] | None = None,
    language_info: Mapping[int, Mapping[str, float]] | None = None,
    flops_per_step: float = 0.0,
    peak_flops: float | None = None,
) -> Outcome:
    """Trains from step `start` to the configured last step; saves, evaluates and logs on the way.

    rows must stand where the state's last batch ended. evaluations: name -> fresh rows of a held-out set.
    language_info: language id -> {"rate": share of examples, "epoch_tokens": tokens of one pass}. flops_per_step: model
    FLOPs of one global batch; peak_flops: of all devices together, per second, None when unknown.
    Metrics of a step are read one step later, so the device never waits for the host.
    Raises TrainingDiverged under on_nonfinite="stop".
    """
    last = trainer.config.steps
    draws = _Draws(rows, start, last, checkpointer)
    meter, window = Meter(), time.perf_counter()
    flag = _StopFlag()
    pending: tuple[int, Any] | None = None
    step = start

    def settle() -> None:
        """Reads the metrics of the step before, and logs when one is due."""
        nonlocal pending, meter, window
        if pending is None:
            return
        number, metrics = pending
        pending = None
        meter.add(metrics)
        counter.add(metrics)
        if not meter.last["finite"] and trainer.config.on_nonfinite == "stop":
            raise TrainingDiverged(
                f"loss or gradients are not finite at step {number} (gradient norm {meter.last['gradient_norm']:.4g}); "
                f"the parameters are those of step {number - 1}. Lower the learning rate, set optimizer.clip_norm, "
                "or set train.on_nonfinite='skip' to leave such batches out"
            )
        if number % loop.log_every == 0 or number == last:
            seconds = time.perf_counter() - window
            info = _summary(meter, seconds, schedule(number - 1), flops_per_step, peak_flops)
            per_language = _languages(meter, counter, language_info or {})
            writer.write("train", number, info, per_language)
            observer.log(number, info)
            meter, window = Meter(), time.perf_counter()

    def evaluate() -> dict[str, float]:
        nonlocal window
        began = time.perf_counter()
        results: dict[str, float] = {}
        for name, make_rows in (evaluations or {}).items():
            scores = Meter()
            params = state.params if state.ema is None else state.ema
            for local in make_rows():
                scores.add(trainer.evaluate_batch(params, global_batch(local, trainer.mesh)))
            means = scores.means() | scores.layers()
            writer.write_experts(name, step, scores.experts())
            results |= {f"{name}/{metric}": value for metric, value in means.items()}
            losses = {i: {"loss": nll, "tokens": tokens} for i, (nll, tokens) in scores.languages().items()}
            writer.write(name, step, means, losses)
            observer.event(f"step {step}: {name} loss {means.get('loss', float('nan')):.4f} nats/token")
        window += time.perf_counter() - began
        return results

    def save(position: dict[int, bytes], metrics: Mapping[str, float]) -> None:
        nonlocal window
        began = time.perf_counter()
        extra = {"tokens_seen": counter.to_json(), "seconds": time.time()}
        checkpointer.save(step, state, position, metrics or None, extra)
        window += time.perf_counter() - began

    evaluated = -1
    results: dict[str, float] = {}
    with _signals(flag):
        for batch, position in prefetch(draws, trainer.mesh, draws.position):
            state, metrics = trainer.step(state, batch)
            settle()
            step += 1
            pending = (step, metrics)
            if flag.is_set() or preempted(step):
                draws.stop()
            if loop.evaluate_every and step % loop.evaluate_every == 0 and step < last:
                settle()
                results, evaluated = evaluate(), step
            if checkpointer.due(step) and step < last and position is not None:
                settle()
                save(position, results if evaluated == step else {})
        settle()
        interrupted = step < last
        if not interrupted and evaluations and step > start:
            results = evaluate()
        if step > start:
            save(rows.state(), results)
        checkpointer.wait()
    return Outcome(step, state, interrupted)


def _summary(
    meter: Meter, seconds: float, rate: Any, flops_per_step: float, peak_flops: float | None
) -> dict[str, float]:
    info = {name: value for name, value in meter.means().items() if name not in ("finite",)} | meter.layers()
    tokens = sum(float(meter.sums[n][1].sum()) for n in ("language_nll", "language_source_tokens") if n in meter.sums)
    per_second = meter.steps / max(seconds, 1e-9)
    info |= {
        "learning_rate": float(rate),
        "steps_per_second": per_second,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "model_flops_per_second": flops_per_step * per_second,
    }
    if peak_flops:
        info["peak_share"] = flops_per_step * per_second / peak_flops
    return info


def _languages(
    meter: Meter, counter: TokenCounter, known: Mapping[int, Mapping[str, float]]
) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for index, (nll, tokens) in meter.languages().items():
        seen = int(counter.counts[index])
        rows[index] = {"loss": nll, "tokens": tokens, "tokens_seen": seen}
        info = known.get(index, {})
        if "rate" in info:
            rows[index]["rate"] = info["rate"]
        if info.get("epoch_tokens"):
            rows[index]["epochs"] = seen / info["epoch_tokens"]
    return rows


class _Draws:
    """Draws batches up to the last step, or until told to stop; remembers positions where a checkpoint is due.

    Batches are drawn a few steps ahead of training. A position is worth its cost only where a checkpoint will be
    taken; after the last draw the source itself stands right.
    """

    def __init__(self, rows: RowSource, start: int, last: int, checkpointer: Checkpointer):
        self._rows, self._drawn, self._last, self._checkpointer = rows, start, last, checkpointer
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[Rows]:
        while self._drawn < self._last and not self._stopped:
            local = next(self._rows)
            self._drawn += 1
            yield local

    def position(self) -> dict[int, bytes] | None:
        return self._rows.state() if self._checkpointer.due(self._drawn) else None


class _StopFlag(threading.Event):
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""


@contextmanager
def _signals(flag: _StopFlag) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield  # several processes agree on a step through the coordinator instead
        return
    names: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}

    def stop(signum: int, frame: Any) -> None:
        flag.set()
        for name in names:
            signal.signal(name, before[name])

    for name in names:
        signal.signal(name, stop)
    try:
        yield
    finally:
        for name in names:
            signal.signal(name, before[name])
