"""A folder of safetensors, read and written a part at a time. Nothing in it is ever executed: pickles are refused."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlm.interop.rules import BLOCK_BYTES, ConversionError
from mlm.registry import nearest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 1 << 31  # of the files written; a larger tensor has one to itself
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KEPT_OPEN = 2 * BLOCK_BYTES  # bytes read before a file is opened anew: what was read of it stays mapped until then


class TensorFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises ConversionError, naming the file, for a folder without safetensors, a missing or truncated shard, or a tensor
    that is not of 16 or 32 bit floats.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Any = None
        self._open: tuple[Path | None, int] = (None, 0)
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        for path in self._shards():
            self._describe(path)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Those rows of a tensor's first axis, as float32."""
        path, (opened, done) = self._where[name], self._open
        if path != opened or done > KEPT_OPEN:
            self._file, done = _open_file(path), 0
        values = self._file.get_slice(name)[rows]
        self._open = (path, done + values.nbytes)
        return values.astype(np.float32, copy=False)

    def close(self) -> None:
        self._file, self._open = None, (None, 0)

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise ConversionError(f"{index} has no 'weight_map' of tensor names and files")
            paths = [self.folder / Path(name).name for name in sorted(set(listed.values()))]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ConversionError(
                    f"{self.folder}: {len(missing)} of {len(paths)} files that {INDEX} lists are missing: "
                    f"{', '.join(missing[:5])}; download them all"
                )
            return paths
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        found = sorted(path.name for path in self.folder.iterdir())
        if pickles := [name for name in found if name.endswith(PICKLES)]:
            raise ConversionError(
                f"{self.folder} holds {pickles[0]} and no {SINGLE}: loading a pickle can run any code in it, so it is "
                "refused; take the safetensors of the same model, or write them with transformers in a place you trust "
                "(model.save_pretrained)"
            )
        raise ConversionError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; it holds: {', '.join(found[:20])}")

    def _describe(self, path: Path) -> None:
        file = _open_file(path)
        for name in file.keys():  # noqa: SIM118
            if name in self._where:
                raise ConversionError(f"{name} stands in {self._where[name].name} and in {path.name}")
            tensor = file.get_slice(name)
            dtype = tensor.get_dtype()
            self._where[name], self.shapes[name] = path, tuple(tensor.get_shape())
            if dtype in FLOATS:
                self.dtypes.add(FLOATS[dtype])
            elif not name.endswith("position_ids"):
                raise ConversionError(
                    f"{path}: {name} is of type {dtype}, not of {', '.join(FLOATS)}: a quantised checkpoint? Convert "
                    "the model as it was published before that"
                )


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Iterator[tuple[slice, np.ndarray]]]],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes `model.safetensors`, or shards with their index; returns the number of files.

    shapes: of all tensors. tensors: (name, its (rows, values) in order), in the order in which they are to stand.
    Memory: one shard, and one block of rows.
    """
    kind = DTYPES[dtype]
    sizes = {name: int(np.prod(shape)) * kind.itemsize for name, shape in shapes.items()}
    metadata = {"format": "pt"}
    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = folder / f"part-{len(written):05d}.safetensors"
        save_file(shard, path, metadata=metadata)
        written.append((path, list(shard)))
        shard.clear()

    for name, blocks in tensors:
        if shard and sum(sizes[n] for n in shard) + sizes[name] > shard_bytes:
            flush()
        values = np.empty(shapes[name], kind)
        for rows, block in blocks:
            values[rows] = block
        shard[name] = values
        del values
    flush()
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return 1
    weights = {}
    for number, (path, names) in enumerate(written, 1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weights.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return len(written)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError when the file is missing, no JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
        raise ConversionError(f"no {path.name} in {path.parent}; {nearest(path.name, names)}") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ConversionError(
            f"{path} ({size:,} bytes) is no whole safetensors file ({error}): truncated, or of another kind; "
            "download it again"
        ) from None
