"""How much text a task has: counted once, kept in a small file."""

from typing import NamedTuple

import seqio

from mlm.data.sources import TableSource


class Counts(NamedTuple):
    """Size of a task's training text; 0: not known."""

    examples: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


def source_counts(task: seqio.Task, split: str = "train") -> Counts:
    """Records, and characters and bytes of the task's text, without any vocabulary."""
    columns = [column for _, column in task.preprocessors[0].columns]
    if isinstance(task.source, TableSource):
        table = task.source.table(split)
        texts = [t for column in columns for t in table[column]]
        return Counts(len(table[columns[0]]), sum(len(t.decode()) for t in texts), sum(map(len, texts)))
    known = getattr(task.source, "counts", {}).get(split)
    if known is None:
        raise ValueError(f"task {task.name!r}: the size of its {split} split is not known")
    return known
