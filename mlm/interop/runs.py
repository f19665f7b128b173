"""What a converted checkpoint holds as a run directory, beside its arrays."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm.checkpoints.run_directory import RunDirectory
from mlm.checkpoints.versions import versions
from mlm.interop.rules import ConversionError
from mlm.models.config import ModelConfig, to_json

RECORD = "published.json"  # in a run: the family it came from, and what of its config.json an export gives back


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
