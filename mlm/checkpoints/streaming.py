"""Checkpoints of parameters written and read block by block, so that a model larger than the memory passes through.

The result is what `Checkpointer` writes: the same files, read by the same code. Only local directories.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from mlm.checkpoints import content, sidecar
from mlm.checkpoints.checkpointer import Checkpointer
from mlm.checkpoints.errors import CheckpointError, CorruptCheckpoint, read_reason, write_error
from mlm.checkpoints.versions import versions
from mlm.registry import nearest

PENDING_BYTES = 1 << 24
Index = tuple[int | slice, ...]


class Layout(NamedTuple):
    """shape of a float32 array, and how it is cut on disk."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]


def write_params(
    directory: str | os.PathLike,
    step: int,
    layouts: Mapping[str, Layout],
    blocks: Iterable[tuple[str, Index, np.ndarray]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """A checkpoint that holds {"params": …} of float32 arrays.

    layouts: path name -> shape and cut. blocks: (path name, numbers and slices, values), together every element once;
    blocks of one array follow each other. The directory of the step appears when all is written.
    Raises CheckpointError when the disk refuses.
    """
    folder = epath.Path(directory)
    target, partial = folder / str(step), folder / f"{step}.partial"
    try:
        if partial.exists():
            partial.rmtree()
        state, run = partial / sidecar.STATE, partial / sidecar.RUN
        state.mkdir(parents=True)
        run.mkdir()
        names = {f"params/{name}": layout for name, layout in layouts.items()}
        sums = dict.fromkeys(names, 0)
        store: Any = None
        current = ""
        with _Pending() as pending:
            for leaf, index, block in blocks:
                name = f"params/{leaf}"
                if name != current:
                    store, current = _create(state, name, names[name]), name
                sums[name] += _sum(block, index, names[name].shape)
                pending.add(store[index].write(block), block.nbytes)
        (state / "_METADATA").write_text(json.dumps(_orbax_metadata(names)))
        record = {
            "step": step,
            "metrics": {},
            "versions": versions(),
            "extra": dict(extra or {}),
            "leaves": {n: [list(layout.shape), "float32", sums[n] % 2**32] for n, layout in names.items()},
        }
        sidecar.write_record(run, record)
        sidecar.write_files(run)
        partial.rename(target)
    except (OSError, _WriteFailed) as error:
        raise write_error(error, step, str(directory)) from error


class StoredParams:
    """The parameters of one checkpoint, read block by block.

    leaves: path name -> shape. Raises CheckpointError when there is no such checkpoint or subtree, CorruptCheckpoint
    when a file is missing or truncated, or an array is not what was saved.
    """

    def __init__(self, directory: str | os.PathLike, step: int | None = None, subtree: str = "params"):
        checkpoints = Checkpointer(str(directory), read_only=True)
        record = checkpoints.record(step)
        self.step, self.extra = record["step"], record["extra"]
        self._path = checkpoints.directory / str(self.step)
        sidecar.check_files(self._path)
        self._saved = {
            n.removeprefix(f"{subtree}/"): v for n, v in record["leaves"].items() if n.startswith(f"{subtree}/")
        }
        if not self._saved:
            tops = {name.split("/")[0] for name in record["leaves"]}
            raise CheckpointError(f"{self._path} holds no {subtree!r}; {nearest(subtree, tops)}")
        self.leaves = {name: tuple(shape) for name, (shape, *_) in self._saved.items()}
        self._subtree, self._current, self._sum = subtree, "", 0

    def read(self, leaf: str, index: Index) -> np.ndarray:
        """One block. All blocks of a leaf are read, once, before the next leaf; then `finish` compares its sum."""
        if leaf != self._current:
            self._store, self._current, self._sum = self._open(leaf), leaf, 0
        try:
            block = self._store[index].read().result()
        except ValueError as error:
            raise CorruptCheckpoint(f"{self._path}: {leaf} cannot be read ({read_reason(error)})") from error
        self._sum += _sum(block, index, self.leaves[leaf])
        return block

    def finish(self, leaf: str) -> None:
        """Raises CorruptCheckpoint when what was read of the leaf is not what was saved."""
        if leaf != self._current or self._sum % 2**32 != self._saved[leaf][2]:
            raise CorruptCheckpoint(f"{self._path}: {leaf} differs from what was saved (sum)")
        self._current, self._store = "", None

    def _open(self, leaf: str) -> Any:
        name = f"{self._subtree}/{leaf}"
        # Training writes an array, or a device's share of it, as one chunk: read once, kept until the next.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 42}})
        spec = {"driver": "zarr", "kvstore": _kvstore(self._path / sidecar.STATE, name), "recheck_cached_data": "open"}
        return ts.open(spec, context=context, open=True).result()


class _WriteFailed(RuntimeError):
    """TensorStore reports a full disk as a ValueError."""


class _Pending:
    """Writes under way, up to PENDING_BYTES of them: together they cost one commit of the database, not one each."""

    def __init__(self):
        self._writes, self._bytes = [], 0

    def __enter__(self) -> "_Pending":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def add(self, write: Any, size: int) -> None:
        self._writes.append(write)
        self._bytes += size
        if self._bytes > PENDING_BYTES:
            self.wait()

    def wait(self) -> None:
        try:
            for write in self._writes:
                write.result()
        except ValueError as error:
            raise _WriteFailed(str(error)) from error
        self._writes, self._bytes = [], 0


def _sum(block: np.ndarray, index: Index, shape: tuple[int, ...]) -> int:
    start = tuple(i.start if isinstance(i, slice) else i for i in index)
    # Numbers in the index take their axes away.
    whole = np.expand_dims(block, tuple(a for a, i in enumerate(index) if not isinstance(i, slice)))
    return content.block_sum(whole, start, shape)


def _create(state: epath.Path, name: str, layout: Layout) -> Any:
    metadata = {"shape": layout.shape, "chunks": layout.chunk, "dtype": "<f4", "compressor": None}
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(state, name),
        "metadata": {**metadata, "fill_value": None, "filters": None, "order": "C", "dimension_separator": "."},
        "store_data_equal_to_fill_value": True,  # readers take a missing chunk for damage
    }
    return ts.open(spec, create=True).result()


def _kvstore(state: epath.Path, name: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{state.resolve()}/", "path": name.replace("/", ".") + "/"}


def _orbax_metadata(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """What Orbax keeps beside the arrays: their places in the tree, all of them keys of dicts (type 2)."""
    tree = {}
    for name, layout in layouts.items():
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(layout.shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
