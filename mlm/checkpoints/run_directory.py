"""The folder of one run: what a later reader needs, each file written under a temporary name and renamed.

config.gin       the resolved configuration          model.json       the model's shape
data.json        mixture, lengths, template          vocabulary.*     the vocabulary file itself
versions.json    packages and platform               mesh.json        devices and axes
parameters.txt   path, shape, axes, count            metrics.jsonl    a line per logged step
checkpoints/     see checkpointer.py                 tensorboard/     the same metrics as events
published.json   of a converted run: its origin      tokenizer/       and its tokenizer files as published
token_counts.npz how often each token stands in each language's training text, once a language mask was asked for
experts/         of a model with mixtures: who served which language, an array file per evaluation
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm.checkpoints.errors import CheckpointError


class RunDirectory:
    """Paths and atomic writes below one run folder."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def create(self) -> "RunDirectory":
        """Makes the folder. Raises CheckpointError, naming the path, when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe, name = tempfile.mkstemp(dir=self.path)
            os.close(probe)
            os.unlink(name)
        except OSError as error:
            raise CheckpointError(
                f"cannot write in the run directory {self.path}: {error.strerror}; choose another with --run_dir"
            ) from error
        return self

    def write(self, name: str, content: str | bytes) -> Path:
        """Writes a whole file or nothing. Raises CheckpointError when the disk refuses."""
        target = self.path / name
        data = content.encode() if isinstance(content, str) else content
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {target}: {error.strerror}") from error
        return target

    def write_json(self, name: str, data: Any) -> Path:
        return self.write(name, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """Raises CheckpointError when the file is missing or not JSON: no run directory, or a damaged one."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: {self.path} is not the directory of a run") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed to `path` when the block ends well and removed when it does not.

    Raises FileExistsError when something is there already, CheckpointError when the place cannot be written.
    """
    target = path.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; name a new folder, or remove this one")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
