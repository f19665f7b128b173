"""What can go wrong with a checkpoint, said once and clearly."""

import re


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The text gives the path, the cause and the fix."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint on disk is damaged: truncated, incomplete, or different from what was saved."""


FIXES = (  # what the operating system says, wherever in the error it stands -> what to do
    ("No space left on device|Disk quota exceeded|File too large", "the disk is full: free some space or lower `keep`"),
    (
        "Permission denied|Operation not permitted|Read-only file system",
        "no permission to write: use another directory",
    ),
    ("Not a directory|File exists", "a file stands where a directory is needed: remove it or use another directory"),
)


def write_error(error: BaseException, step: int | None, directory: str) -> CheckpointError:
    """The error of a failed save (step None: of opening the directory) as one sentence with the fix."""
    what = "the directory could not be opened" if step is None else f"checkpoint of step {step} could not be written"
    chain = " | ".join(str(e) for e in _chain(error))
    for pattern, fix in FIXES:
        if match := re.search(pattern, chain):
            return CheckpointError(f"{directory}: {what}, {fix} ({match[0]}). Earlier checkpoints there are untouched")
    return CheckpointError(f"{directory}: {what} ({read_reason(error)}). Earlier checkpoints there are untouched")


def read_reason(error: BaseException, limit: int = 300) -> str:
    """Type and first line of what failed first."""
    first = _chain(error)[-1]
    line = (str(first).strip() or "no further information").splitlines()[0]
    return f"{type(first).__name__}: {line if len(line) <= limit else line[:limit] + '…'}"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those that led to it, the first to happen last."""
    errors = [error]
    while (deeper := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(deeper)
    return errors
