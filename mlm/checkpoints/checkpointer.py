"""Saving while training goes on, and restoring onto any mesh.

A checkpoint is written beside its final name and renamed when complete, so a killed run leaves whole checkpoints and
leftovers that the next run removes. An older checkpoint is deleted only after a newer one is complete.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mlm.checkpoints import content, sidecar
from mlm.checkpoints.errors import CheckpointError, CorruptCheckpoint, read_reason, write_error
from mlm.checkpoints.quiet import silence_orbax
from mlm.checkpoints.versions import versions
from mlm.registry import nearest
from mlm.types import Params, PyTree

logger = logging.getLogger(__name__)
silence_orbax()


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    every_steps: a checkpoint is due at multiples of it. keep: this many newest checkpoints. keep_every_steps: and all
    at multiples of it. best_metric: and the best one by this metric (best_mode: is "min" or "max" better).
    """

    every_steps: int = 1000
    keep: int = 3
    keep_every_steps: int | None = None
    best_metric: str | None = None
    best_mode: str = "min"

    def __post_init__(self):
        for name in ("every_steps", "keep", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode={self.best_mode!r}: must be 'min' or 'max'")


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory. skipped: (step, reason) of newer checkpoints that turned out damaged."""

    step: int
    state: PyTree
    data_states: dict[int, bytes]
    extra: dict[str, Any]
    skipped: tuple[tuple[int, str], ...] = ()


class Checkpointer:
    """The checkpoints of one run directory. All processes of a run make the same calls in the same order.

    read_only: for evaluation beside a running training; nothing is created, moved or removed.
    Raises CheckpointError when the directory cannot be created.
    """

    def __init__(self, directory: str, config: CheckpointConfig | None = None, *, read_only: bool = False):
        self.directory = epath.Path(directory)
        if "://" not in str(directory):
            self.directory = epath.Path(self.directory.expanduser().absolute())
        self.config = config or CheckpointConfig()
        self.read_only = read_only
        self._saving: int | None = None
        self._metrics = {step: self._stored_metrics(step) for step in self.steps()} if not read_only else {}
        self._manager = None if read_only else self._open()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """True at multiples of every_steps."""
        return step > 0 and step % self.config.every_steps == 0

    def save(
        self,
        step: int,
        state: PyTree,
        data_states: Mapping[int, bytes] | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Copies the state to the host and writes it in the background; False when the step is already there.

        state: tree of arrays. data_states: virtual shard -> position, of the shards that this process owns. metrics:
        must hold `best_metric` if given. extra: JSON values; NumPy arrays in it keep their type.
        Raises CheckpointError when this save, or the one before it, could not be written.
        """
        if self._manager is None:
            raise CheckpointError(f"{self.directory} was opened with read_only=True")
        self.wait()
        if step in self.steps():
            return False
        name = self.config.best_metric
        if name and metrics is not None and name not in metrics:
            raise CheckpointError(f"best_metric={name!r} is not among the metrics; {nearest(name, metrics)}")
        flat = content.by_name(state)
        numbers = {key: float(value) for key, value in (metrics or {}).items()}
        record = {"step": step, "metrics": numbers, "versions": versions(), "extra": dict(extra or {})}
        self._saving, self._metrics[step] = step, numbers
        try:
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    **{
                        sidecar.STATE: ocp.args.PyTreeSave(content.nest(flat)),
                        sidecar.RUN: sidecar.SidecarSave(
                            record, content.describe(flat), content.sums(flat), dict(data_states or {})
                        ),
                    }
                ),
            )
        except Exception as error:
            self._failed(error)
        return True

    def wait(self) -> None:
        """Blocks until the save in progress is on disk. Raises CheckpointError when it failed."""
        if self._manager is None or self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self._saving = None
        self._retire()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, rising."""
        if not self.directory.exists():
            return []
        paths = [path for path in self.directory.iterdir() if path.name.isdigit()]
        if "://" in str(self.directory):  # buckets cannot rename a directory at once: a last file marks it complete
            paths = [path for path in paths if (path / "commit_success.txt").exists()]
        return sorted(int(path.name) for path in paths)

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step that is best by `best_metric`; None without one."""
        metrics = {step: self._metrics.get(step) or self._stored_metrics(step) for step in self.steps()}
        return _best(metrics, self.config)

    def record(self, step: int | None = None) -> dict[str, Any]:
        """step, metrics, versions, extra and leaves (path -> [shape, dtype, sum]) of a checkpoint (default: newest)."""
        step = self.latest() if step is None else step
        if step is None or not self._path(step).exists():
            raise CheckpointError(f"no checkpoint {'' if step is None else step} in {self.directory}; {self._known()}")
        return sidecar.read_record(self._path(step))

    def restore(self, step: int | None, abstract: PyTree) -> Restored:
        """Reads a checkpoint into the structure of `abstract`: a tree of jax.ShapeDtypeStruct with shardings.

        step None: the newest intact one; damaged newer ones are reported, and renamed to `<step>.corrupt` unless
        read_only. Every array is compared with the sum taken when it was saved.
        Raises CheckpointError when there is none, when `step` is damaged (CorruptCheckpoint), or when the saved arrays
        are not those of `abstract`.
        """
        wanted = content.by_name(abstract)

        def read(path: epath.Path, record: dict) -> PyTree:
            lines = content.differences(record["leaves"], content.describe(wanted))
            if lines:
                raise CheckpointError(f"{path} holds another state than this run:\n  " + "\n  ".join(lines))
            flat = _read_arrays(path, wanted, record["leaves"])
            return jax.tree.structure(abstract).unflatten([flat[name] for name in wanted])

        return self._restore(step, read)

    def restore_params(
        self, step: int | None = None, abstract: PyTree | None = None, subtree: str = "params"
    ) -> Restored:
        """Reads one subtree of the state, without knowing the rest (the optimizer). Result: its nested dict.

        abstract: shapes and shardings of the subtree; without it, shapes as saved, all on the first device.
        Otherwise as `restore`.
        """
        prefix = subtree + "/"

        def read(path: epath.Path, record: dict) -> Params:
            saved = {name: leaf for name, leaf in record["leaves"].items() if name.startswith(prefix)}
            if not saved:
                tops = {name.split("/")[0] for name in record["leaves"]}
                raise CheckpointError(f"{path} holds no {subtree!r}; {nearest(subtree, tops)}")
            if abstract is None:
                wanted = content.abstract(saved, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
            else:
                wanted = {prefix + name: leaf for name, leaf in content.by_name(abstract).items()}
            lines = content.differences(saved, content.describe(wanted))
            if lines:
                raise CheckpointError(f"{path} holds other parameters than this model:\n  " + "\n  ".join(lines))
            flat = _read_arrays(path, wanted, saved)
            return content.nest({name.removeprefix(prefix): leaf for name, leaf in flat.items()})

        return self._restore(step, read)

    def close(self) -> None:
        """Waits for the save in progress and ends Orbax's threads."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                self._manager.close()
                self._manager = None

    def _restore(self, step: int | None, read) -> Restored:
        self.wait()
        known = self.steps()
        if step is not None and step not in known:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; {self._known()}")
        if not known:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        skipped: list[tuple[int, str]] = []
        for candidate in [step] if step is not None else reversed(known):
            path = self._path(candidate)
            try:
                sidecar.check_files(path)
                record = sidecar.read_record(path)
                state = read(path, record)
                data_states = sidecar.read_data_states(path)
            except CorruptCheckpoint as error:
                if step is not None:
                    raise CorruptCheckpoint(f"checkpoint {path} is damaged: {error}; {self._known()}") from error
                skipped.append((candidate, str(error)))
                continue
            if skipped:
                self._set_aside(skipped, candidate)
            return Restored(candidate, state, data_states, record["extra"], tuple(skipped))
        reasons = "; ".join(f"{bad}: {reason}" for bad, reason in skipped)
        raise CorruptCheckpoint(f"every checkpoint in {self.directory} is damaged ({reasons})")

    def _retire(self) -> None:
        """Removes checkpoints that are kept for no reason. Called when the newest is known to be complete.

        A directory is renamed before it is emptied, so that a kill in between leaves no half-empty checkpoint.
        """
        if jax.process_index() == 0:
            known = self.steps()
            kept = _kept({step: self._metrics.get(step, {}) for step in known}, self.config)
            for step in known:
                if step not in kept:
                    self._path(step).rename(self.directory / f"{step}.removed")
            for path in self.directory.glob("*.removed"):
                path.rmtree()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("old checkpoints removed")

    def _set_aside(self, skipped: list[tuple[int, str]], used: int) -> None:
        """Says which checkpoints are damaged and moves them out of the way of the steps to come."""
        for step, reason in skipped:
            moved = f"; it is now {step}.corrupt" if not self.read_only else ""
            logger.warning("checkpoint %s is damaged (%s)%s; using step %s", self._path(step), reason, moved, used)
        if self._manager is None:
            return
        if jax.process_index() == 0:
            for step, _ in skipped:
                target = self.directory / f"{step}.corrupt"
                if target.exists():
                    target.rmtree()
                self._path(step).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        for step, _ in skipped:
            self._metrics.pop(step, None)
        self._manager.reload()

    def _open(self) -> ocp.CheckpointManager:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        # Weights hardly shrink (8 % with zstd, at five times the processor time, which training needs).
        arrays, run = ocp.PyTreeCheckpointHandler(use_compression=False), sidecar.SidecarHandler()
        registry.add(sidecar.STATE, ocp.args.PyTreeSave, arrays)  # finalized in this order: run/ lists state/
        registry.add(sidecar.STATE, ocp.args.PyTreeRestore, arrays)
        registry.add(sidecar.RUN, sidecar.SidecarSave, run)
        registry.add(sidecar.RUN, sidecar.SidecarRestore, run)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # `_retire` removes old ones: Orbax, killed at it, would leave half a checkpoint
            cleanup_tmp_directories=True,
            save_root_metadata=False,
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)
        except OSError as error:
            raise write_error(error, None, str(self.directory)) from error

    def _failed(self, error: Exception) -> None:
        """Forgets the failed step, removes what is left of it, and raises CheckpointError."""
        step, self._saving = self._saving, None
        if step is not None:
            self._metrics.pop(step, None)
        if jax.process_count() == 1:  # with others, the run ends here and the next one cleans up
            self._manager = self._open()
        raise write_error(error, step, str(self.directory)) from error

    def _path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _known(self) -> str:
        return f"complete checkpoints: {', '.join(map(str, self.steps())) or 'none'}"

    def _stored_metrics(self, step: int) -> dict[str, float]:
        try:
            return sidecar.read_record(self._path(step))["metrics"]
        except CorruptCheckpoint:
            return {}


def _kept(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int | None]:
    """Of the steps with their metrics: the newest `keep`, those at multiples of keep_every_steps, and the best."""
    multiples = {s for s in metrics if config.keep_every_steps and s % config.keep_every_steps == 0}
    return {*sorted(metrics)[-config.keep :], *multiples, _best(metrics, config)}


def _best(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> int | None:
    """The step with the best finite metric; the later one of equals."""
    name = config.best_metric
    if name is None:
        return None
    values = {s: m[name] for s, m in metrics.items() if math.isfinite(m.get(name, math.nan))}
    if not values:
        return None
    sign = 1 if config.best_mode == "max" else -1
    return max(values, key=lambda step: (sign * values[step], step))


def _read_arrays(path: epath.Path, wanted: dict[str, Any], saved: dict[str, list]) -> dict[str, jax.Array]:
    """The wanted arrays, each proved to be what was saved. Raises CorruptCheckpoint."""
    args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in wanted.items()
    }
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with ocp.Checkpointer(handler) as reader:
            restored = reader.restore(
                path / sidecar.STATE,
                args=ocp.args.PyTreeRestore(
                    item=content.nest(wanted), restore_args=content.nest(args), partial_restore=True
                ),
            )
    except (ValueError, OSError, KeyError) as error:  # memory errors are not the checkpoint's fault
        raise CorruptCheckpoint(f"arrays cannot be read ({read_reason(error)})") from error
    flat = content.by_name(restored)
    changed = [name for name, value in content.sums(flat).items() if int(value) != saved[name][2]]
    if changed:
        shown = ", ".join(changed[:5]) + (" …" if len(changed) > 5 else "")
        raise CorruptCheckpoint(f"{len(changed)} arrays differ from what was saved: {shown}")
    return flat
