"""Examples -> rows of a batch: each in a row of its own, or several packed into one. NumPy only; nothing here knows
TensorFlow.

Packing is first fit over a few open rows: an example goes to the oldest open row with room for both its source and its
target; when none has room, the oldest row is closed. A token's segment number says which example of its row it belongs
to, positions start again in every segment, and the decoder's input is the target shifted right inside its segment,
starting with the padding id, or with what the example says.

The rows that are still open are part of the state, so a restored packer goes on exactly where the saved one stood.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm.types import PAD_ID

OPEN_ROWS = 8  # more of them fill rows better and make the saved state larger


class Example(NamedTuple):
    """One preprocessed example: token ids with their end-of-sequence, and the ids of its languages and task. start:
    what the decoder reads first; the padding id: the model's own start token.
    """

    inputs: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [m]
    language: int  # of the targets
    task: int
    inputs_language: int
    start: int = PAD_ID


class Rows(NamedTuple):
    """Rows of a packer that wait to be taken, and rows that still have room."""

    ready: list[list[Example]]
    open: list[list[Example]]


class Packer:
    """Collects examples into rows of `inputs_length` source and `targets_length` target tokens.

    pack: False gives every example a row of its own. Complete rows wait in `ready`, oldest first.
    """

    def __init__(self, inputs_length: int, targets_length: int, pack: bool = True, open_rows: int = OPEN_ROWS):
        self.inputs_length, self.targets_length = inputs_length, targets_length
        self.open_rows = open_rows if pack else 0
        self.ready: deque[list[Example]] = deque()
        self._open: list[_Row] = []

    def add(self, example: Example) -> None:
        """Places one example. Raises ValueError when it is longer than a row."""
        n, m = len(example.inputs), len(example.targets)
        if n > self.inputs_length or m > self.targets_length:
            raise ValueError(
                f"an example of {n} source and {m} target tokens does not fit rows of {self.inputs_length} and "
                f"{self.targets_length}; its preprocessors must trim it, or the rows must be longer"
            )
        if not self.open_rows:
            self.ready.append([example])
            return
        for i, row in enumerate(self._open):
            if n <= row.inputs_left and m <= row.targets_left:
                row.put(example)
                if not row.targets_left or not row.inputs_left:
                    self.ready.append(self._open.pop(i).examples)
                return
        if len(self._open) == self.open_rows:
            self.ready.append(self._open.pop(0).examples)
        row = _Row(self.inputs_length, self.targets_length, [])
        row.put(example)
        self._open.append(row)

    def flush(self) -> None:
        """Closes every open row: the end of a finite pass over data."""
        self.ready.extend(row.examples for row in self._open)
        self._open.clear()

    def take(self, rows: int) -> dict[str, np.ndarray]:
        """The oldest `rows` complete rows as arrays (mlm.types.ROW_FEATURES), fewer when there are not as many."""
        rows = min(rows, len(self.ready))
        return assemble([self.ready.popleft() for _ in range(rows)], self.inputs_length, self.targets_length)

    def snapshot(self) -> Rows:
        """The rows that have not been taken; shares the examples, which never change."""
        return Rows(list(self.ready), [list(row.examples) for row in self._open])

    def restore(self, rows: Rows) -> None:
        """Continues where `rows` were taken."""
        self.ready, self._open = deque(rows.ready), []
        for examples in rows.open:
            row = _Row(self.inputs_length, self.targets_length, [])
            for example in examples:
                row.put(example)
            self._open.append(row)


@dataclasses.dataclass
class _Row:
    inputs_left: int
    targets_left: int
    examples: list[Example]

    def put(self, example: Example) -> None:
        self.inputs_left -= len(example.inputs)
        self.targets_left -= len(example.targets)
        self.examples.append(example)


def assemble(rows: Sequence[Sequence[Example]], inputs_length: int, targets_length: int) -> dict[str, np.ndarray]:
    """Rows of examples -> the arrays of a batch, int32 [rows, length] (decoder_loss_weights: float32)."""
    examples = list(itertools.chain(*rows))
    if not examples:
        return _features(_blank(len(rows), inputs_length), _blank(len(rows), targets_length))
    counts = np.array([len(row) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)
    first_of_row = np.repeat(np.cumsum(counts) - counts, counts)
    segment = np.arange(len(examples)) - first_of_row + 1
    languages = [np.array(ids) for ids in zip(*((e.inputs_language, e.language) for e in examples), strict=True)]
    task = np.array([e.task for e in examples])
    sides = (
        _fill(
            [e.inputs for e in examples], row_of, first_of_row, segment, languages[0], task, len(rows), inputs_length
        ),
        _fill(
            [e.targets for e in examples], row_of, first_of_row, segment, languages[1], task, len(rows), targets_length
        ),
    )
    batch = _features(*sides)
    first = (batch["decoder_positions"] == 0) & (batch["decoder_segment_ids"] > 0)
    batch["decoder_input_tokens"][first] = [e.start for e in examples if len(e.targets)]
    return batch


def _fill(tokens, row_of, first_of_row, segment, language, task, rows, length) -> dict[str, np.ndarray]:
    """Scatters one side of all examples with a constant number of NumPy calls, whatever the number of examples."""
    lengths = np.array([len(t) for t in tokens])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # Where an example starts in the flat [rows * length] array: its row's start, plus what its row holds before it.
    at = row_of * length + starts - starts[first_of_row]
    position = np.arange(ends[-1]) - np.repeat(starts, lengths)
    where = np.repeat(at, lengths) + position
    side = _blank(rows, length)
    flat = {name: array.reshape(-1) for name, array in side.items()}
    flat["tokens"][where] = np.concatenate(tokens)
    flat["segment_ids"][where] = np.repeat(segment, lengths)
    flat["positions"][where] = position
    flat["language_ids"][where] = np.repeat(language, lengths)
    flat["task_ids"][where] = np.repeat(task, lengths)
    return side


def _blank(rows: int, length: int) -> dict[str, np.ndarray]:
    names = ("tokens", "segment_ids", "positions", "language_ids", "task_ids")
    return {name: np.zeros((rows, length), np.int32) for name in names}


def _features(source: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens, positions = target["tokens"], target["positions"]
    shifted = np.full_like(tokens, PAD_ID)
    shifted[:, 1:] = np.where(positions[:, 1:] > 0, tokens[:, :-1], PAD_ID)
    return {
        "encoder_input_tokens": source["tokens"],
        "encoder_segment_ids": source["segment_ids"],
        "encoder_positions": source["positions"],
        "encoder_language_ids": source["language_ids"],
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (target["segment_ids"] > 0).astype(np.float32),
        "decoder_segment_ids": target["segment_ids"],
        "decoder_positions": positions,
        "decoder_language_ids": target["language_ids"],
        "decoder_task_ids": target["task_ids"],
    }


def fill_rate(batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of positions that hold a token, of the source and of the target; in [0, 1]."""
    return float((batch["encoder_segment_ids"] > 0).mean()), float((batch["decoder_segment_ids"] > 0).mean())


def rows_to_arrays(rows: Rows) -> dict[str, np.ndarray]:
    """Rows as a few flat arrays, for saving: all tokens end to end, their lengths, languages and tasks."""
    every = [*rows.ready, *rows.open]
    examples = list(itertools.chain(*every))
    tokens = [t for e in examples for t in (e.inputs, e.targets)]
    return {
        "waiting": np.array(len(rows.ready), np.int32),
        "rows": np.array([len(row) for row in every], np.int32),
        "tokens": np.concatenate([*tokens, np.zeros(0, np.int32)]).astype(np.int32),
        "lengths": np.array([len(t) for t in tokens], np.int32),
        "ids": np.array([e[2:] for e in examples], np.int32).reshape(-1, len(Example._fields) - 2),
    }


def arrays_to_rows(arrays: dict[str, np.ndarray]) -> Rows:
    """Inverse of `rows_to_arrays`."""
    cuts = np.split(arrays["tokens"], np.cumsum(arrays["lengths"]))
    examples = iter([Example(cuts[2 * i], cuts[2 * i + 1], *ids) for i, ids in enumerate(arrays["ids"].tolist())])
    rows = [list(itertools.islice(examples, n)) for n in arrays["rows"].tolist()]
    waiting = int(arrays["waiting"])
    return Rows(rows[:waiting], rows[waiting:])
