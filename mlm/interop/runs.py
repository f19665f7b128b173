"""A converted checkpoint as a run directory, whole or not at all, and the way back."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm.checkpoints.run_directory import RunDirectory
from mlm.checkpoints.versions import versions
from mlm.interop.rules import ConversionError
from mlm.models.config import ModelConfig, to_json

RECORD = "published.json"  # in a run: the family it came from, and what of its config.json an export gives back


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed to `path` when the block ends well and removed when it does not.

    Raises ConversionError when something is there already, or the place cannot be written.
    """
    target = path.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{path} exists and is not empty; name a new folder, or remove this one")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ConversionError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_run_files(
    folder: Path,
    config: ModelConfig,
    *,
    vocabulary: Path,
    digest: str,
    origin: str,
    lengths: tuple[int, int],
    record: Mapping[str, Any],
    template: Mapping[str, Any] | None = None,
) -> None:
    """All that a run holds beside checkpoints and the vocabulary file. lengths: tokens that it reads and writes.
    template: how its sources are written, where it says (`mlm.data.templates`).
    """
    for name, stack in config.stacks().items():
        length = lengths[name == "decoder"]
        if stack.embedding.length is not None and length > stack.embedding.length:
            raise ConversionError(
                f"the {name} has {stack.embedding.length} learned positions and cannot take {length} tokens; choose "
                f"{'--inputs_length' if name == 'encoder' else '--targets_length'} of at most {stack.embedding.length}"
            )
    run = RunDirectory(folder)
    run.write_json("model.json", to_json(config))
    data = {"mixture": origin, "inputs_length": lengths[0], "targets_length": lengths[1], "task_modules": []}
    data |= {"vocabulary": vocabulary.name, "vocabulary_digest": digest}
    run.write_json("data.json", data if template is None else {**data, "template": dict(template)})
    run.write_json("versions.json", versions())
    run.write_json(RECORD, dict(record))


def read_record(run: RunDirectory) -> dict[str, Any]:
    """What the run was converted from; empty for a run that was trained here."""
    path = run / RECORD
    return json.loads(path.read_text()) if path.exists() else {}
