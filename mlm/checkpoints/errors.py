"""What can go wrong with a checkpoint, said once and clearly."""

import errno


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The text gives the path, the cause and the fix."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint on disk is damaged: truncated, incomplete, or different from what was saved."""


def write_error(error: BaseException, step: int, directory: str) -> CheckpointError:
    """The error of a failed save as one sentence with the fix."""
    cause = _root(error)
    text = f"{type(cause).__name__}: {_first_line(cause)}"
    code = getattr(cause, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota" in text.lower():
        fix = "the disk is full: free some space or lower `keep`"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS) or "ermission denied" in text or "PERMISSION_DENIED" in text:
        fix = "no permission to write there: change the owner or mode of the directory, or use another one"
    elif code in (errno.ENOTDIR, errno.EEXIST):
        fix = "a file stands where a directory is needed: remove it or use another directory"
    else:
        fix = "see the cause"
    return CheckpointError(
        f"checkpoint of step {step} could not be written to {directory}: {fix} ({text}). "
        f"Earlier checkpoints there are untouched"
    )


def read_reason(error: BaseException) -> str:
    """The first line of what failed while reading."""
    cause = _root(error)
    return f"{type(cause).__name__}: {_first_line(cause)}"


def _root(error: BaseException) -> BaseException:
    """The operating system's error if there is one behind this error, else the first of the chain."""
    while not isinstance(error, OSError) and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error


def _first_line(error: BaseException, limit: int = 300) -> str:
    line = (str(error).strip() or "no further information").splitlines()[0]
    return line if len(line) <= limit else line[:limit] + "…"
