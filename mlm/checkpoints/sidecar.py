"""What a checkpoint holds beside the arrays: the record, the data positions, and the list of all files.

<step>/state/…                 the arrays, in Orbax's OCDBT format
<step>/run/record.json         step, shapes and sums of the arrays, metrics, versions, the caller's `extra`
<step>/run/shard_00003.bin     position of virtual data shard 3, written by the process that owns it
<step>/run/files.json          size of every file, checksum of every file in run/; written last
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from mlm.checkpoints.errors import CorruptCheckpoint, read_reason

STATE, RUN = "state", "run"


class SidecarHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes run/ in the background of a save."""

    async def async_save(self, directory: epath.Path, args: "SidecarSave"):
        return [future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="sidecar")]

    async def _write(self, directory: epath.Path, args: "SidecarSave") -> None:
        for shard, state in args.data_states.items():
            (directory / f"shard_{shard:05d}.bin").write_bytes(state)
        if jax.process_index() == 0:
            sums = {name: int(np.asarray(value)) for name, value in args.sums.items()}
            leaves = {name: [*shape_and_type, sums[name]] for name, shape_and_type in args.leaves.items()}
            write_record(directory, {**args.record, "leaves": leaves})

    def finalize(self, directory: epath.Path) -> None:
        """Runs in process 0, after every process has written everything and the arrays are in place."""
        write_files(directory)

    def save(self, directory: epath.Path, args: "SidecarSave") -> None:
        raise NotImplementedError("the record is written asynchronously")

    def restore(self, directory: epath.Path, args: "SidecarRestore | None" = None) -> dict:
        return read_record(directory.parent)


@ocp.args.register_with_handler(SidecarHandler, for_save=True)
@dataclass
class SidecarSave(ocp.args.CheckpointArgs):
    """record: JSON values; leaves: name -> [shape, dtype]; sums: name -> uint32; data_states: of this process."""

    record: dict[str, Any]
    leaves: dict[str, list]
    sums: Mapping[str, Any]
    data_states: Mapping[int, bytes]


@ocp.args.register_with_handler(SidecarHandler, for_restore=True)
@dataclass
class SidecarRestore(ocp.args.CheckpointArgs):
    """Reads the record."""


def write_record(directory: epath.Path, record: Mapping[str, Any]) -> None:
    """directory: the run/ of a checkpoint that is being written."""
    (directory / "record.json").write_text(json.dumps(_encode(record), indent=1))


def write_files(directory: epath.Path) -> None:
    """files.json of a checkpoint whose other files are all written."""
    listed: dict[str, list[int]] = {}
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        listed[f"{RUN}/{path.name}"] = [len(content), zlib.crc32(content)]
    for name, path in _files(directory.parent / STATE, STATE):
        listed[name] = [path.stat().length]
    (directory / "files.json").write_text(json.dumps(listed, indent=1))


def check_files(step_directory: epath.Path) -> None:
    """Raises CorruptCheckpoint, naming the file, when one is missing, truncated, or (in run/) changed."""
    for name, (size, *checksum) in _json(step_directory / RUN / "files.json").items():
        path = step_directory / name
        if not path.exists():
            raise CorruptCheckpoint(f"{name} is missing")
        found = path.stat().length
        if found != size:
            raise CorruptCheckpoint(f"{name} has {found} bytes instead of {size}")
        if checksum and zlib.crc32(path.read_bytes()) != checksum[0]:
            raise CorruptCheckpoint(f"{name} differs from what was saved (checksum)")


def read_record(step_directory: epath.Path) -> dict:
    """record.json, with NumPy values as they were. Raises CorruptCheckpoint when it cannot be read."""
    return _decode(_json(step_directory / RUN / "record.json"))


def read_data_states(step_directory: epath.Path) -> dict[int, bytes]:
    """Virtual shard -> its position, of all processes."""
    paths = sorted((step_directory / RUN).glob("shard_*.bin"))
    return {int(path.stem.removeprefix("shard_")): path.read_bytes() for path in paths}


def _files(directory: epath.Path, name: str) -> Iterator[tuple[str, epath.Path]]:
    """All files below a directory; epath refuses the pattern `**`."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{name}/{path.name}")
        else:
            yield f"{name}/{path.name}", path


def _json(path: epath.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path.parent.name}/{path.name} cannot be read ({read_reason(error)})") from error


def _encode(value):
    """JSON values; NumPy arrays and scalars keep their type and every bit of their values."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, np.generic):
        return {"numpy": value.dtype.name, "value": value.item()}
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return {"numpy": array.dtype.name, "shape": list(array.shape), "values": array.reshape(-1).tolist()}
    return value


def _decode(value):
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "numpy" in value and "values" in value:
        return np.asarray(value["values"], dtype=value["numpy"]).reshape(value["shape"])
    if "numpy" in value and "value" in value:
        return np.dtype(value["numpy"]).type(value["value"])
    return {key: _decode(item) for key, item in value.items()}
