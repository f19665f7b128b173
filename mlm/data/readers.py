"""One task's examples in one virtual data shard, in an order that can be left and found again exactly.

A task is read in *units*: a few records that its recipe turns into examples together (text of one language that is joined and cut,
or a single pair). Unit number g of a table is a pure function of (seed, task, g): records [g k, (g + 1) k) of an endless sequence in
which every epoch is a permutation of its own. Shard s of n reads the units s, s + n, s + 2n, …, so the shards together read every
record once an epoch, and a place is two numbers: the unit, and how many of its examples have been used.

Sources that cannot be addressed by number (TFDS, large files, SeqIO tasks with pipelines of their own) are read through a tf.data
iterator, whose place is saved as the bytes of its checkpoint.
"""

import functools
import zlib
from collections import deque
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from mlm.data.batching import Example, arrays_to_examples, examples_to_arrays
from mlm.data.recipes import Lengths, Units, compile_recipe, with_vocabulary
from mlm.data.sources import TableSource
from mlm.data.vocabulary import Vocabulary

SHUFFLE_BUFFER = 256  # records; small, because it is saved with every checkpoint and must fill before the first batch
State = dict[str, np.ndarray]


class Reader:
    """Examples of one task in one shard. `fetch` makes more of them for many readers at once; `pop` hands out the next one."""

    task: seqio.Task
    examples_per_unit = 1.0  # a running estimate, to fetch about as much as is needed

    def __init__(self) -> None:
        self.ready: deque[Example] = deque()

    def pop(self) -> Example:
        return self.ready.popleft()

    def state(self) -> State:
        raise NotImplementedError

    def restore(self, state: State) -> None:
        raise NotImplementedError


class UnitReader(Reader):
    """Reads units one after the other and remembers for each ready example where it came from."""

    def __init__(self, task: seqio.Task, number: int, split: str, shard: int, shards: int, seed: int):
        super().__init__()
        self.task, self.number = task, number
        self.units: Units = task.preprocessors[0]
        self.split, self.shard, self.shards, self.seed = split, shard, shards, seed
        self.task_seed = (seed << 32 | zlib.crc32(task.name.encode())) & (2**63 - 1)
        self.next_unit = 0
        self._places: deque[tuple[int, int]] = deque()  # (unit, its n-th example) of everything in `ready`
        self._skip = 0  # examples of `next_unit` that were used before a restore

    def unit(self, number: int) -> dict[str, list[bytes]]:
        """The records of a unit, by column."""
        raise NotImplementedError

    def receive(self, examples: Sequence[Example]) -> None:
        """Takes the examples of the unit `next_unit`, in order."""
        self._places.extend((self.next_unit, i) for i in range(self._skip, len(examples)))
        self.ready.extend(examples[self._skip :])
        self.next_unit += 1
        self._skip = 0
        self.examples_per_unit += 0.2 * (len(examples) - self.examples_per_unit)

    def pop(self) -> Example:
        self._places.popleft()
        return self.ready.popleft()

    @property
    def place(self) -> tuple[int, int]:
        """(unit, n) of the example that comes next."""
        return self._places[0] if self._places else (self.next_unit, self._skip)

    def clear(self, next_unit: int, skip: int) -> None:
        self.ready.clear()
        self._places.clear()
        self.next_unit, self._skip = next_unit, skip


class TableReader(UnitReader):
    """Reads a TableSource: any unit at any time."""

    def __init__(self, *args, shuffle: bool = True):
        super().__init__(*args)
        table = self.task.source.table(self.split)
        self.columns = {name: table[column] for name, column in self.units.columns}
        self.count = len(next(iter(self.columns.values())))
        self.records = min(self.units.recipe.records, self.count)
        self.shuffle = shuffle
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def unit(self, number: int) -> dict[str, list[bytes]]:
        first = (number * self.shards + self.shard) * self.records
        chosen = [self._order(r // self.count)[r % self.count] for r in range(first, first + self.records)]
        return {name: [column[i] for i in chosen] for name, column in self.columns.items()}

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.count)
        return np.random.default_rng([self.task_seed, epoch]).permutation(self.count)

    def state(self) -> State:
        return {"place": np.array(self.place, np.int64)}

    def restore(self, state: State) -> None:
        unit, n = (int(x) for x in state["place"])
        self.clear(unit, n)


class StreamReader(UnitReader):
    """Reads any other source through a tf.data iterator of raw records; what is ready is part of its state."""

    def __init__(self, *args):
        super().__init__(*args)
        shard_info = seqio.ShardInfo(self.shard, self.shards) if self.shards > 1 else None
        source, records = self.task.source, self.units.recipe.records
        if shard_info and not source.supports_arbitrary_sharding and len(source.list_shards(self.split)) < self.shards:
            dataset = source.get_dataset(self.split, shuffle=True, seed=self.seed).shard(self.shards, self.shard)
        else:
            dataset = source.get_dataset(self.split, shuffle=True, seed=self.seed, shard_info=shard_info)
        dataset = dataset.repeat().shuffle(SHUFFLE_BUFFER, seed=self.seed).batch(records)
        self.iterator = _Iterator(dataset, self.task.name, self.split)

    def unit(self, number: int) -> dict[str, list[bytes]]:
        record = next(self.iterator)
        return {name: record[column].tolist() for name, column in self.units.columns}

    def state(self) -> State:
        return {
            **examples_to_arrays(list(self.ready)),
            "next_unit": np.array(self.next_unit),
            "iterator": self.iterator.state(),
        }

    def restore(self, state: State) -> None:
        self.clear(int(state["next_unit"]), 0)
        self.ready.extend(arrays_to_examples(state))
        self._places.extend((self.next_unit, i) for i in range(len(self.ready)))
        self.iterator.restore(state["iterator"])


class ExampleReader(Reader):
    """Reads a SeqIO task with preprocessors of its own: its examples as they come out of `task.get_dataset`."""

    def __init__(self, task, number, split, shard, shards, seed, lengths: Lengths, vocabulary: Vocabulary):
        super().__init__()
        task = with_vocabulary(task, vocabulary)
        self.task, self.number = task, number
        dataset = task.get_dataset(
            lengths._asdict(),
            split,
            shuffle=True,
            shuffle_buffer_size=SHUFFLE_BUFFER,
            seed=seed,
            shard_info=seqio.ShardInfo(shard, shards),
            num_epochs=None,
        )
        missing = {"inputs", "targets", "language"} - set(dataset.element_spec)
        if missing:
            raise ValueError(
                f"task {task.name!r} has no feature {', '.join(sorted(missing))}; every example carries inputs, targets and "
                "the id of its language: add a preprocessor such as mlm.data.registration.tag('sw')"
            )
        self.iterator = _Iterator(dataset, task.name, split)

    def fetch(self) -> None:
        self.ready.append(to_example(next(self.iterator), self.number))

    def state(self) -> State:
        return {**examples_to_arrays(list(self.ready)), "iterator": self.iterator.state()}

    def restore(self, state: State) -> None:
        self.ready = deque(arrays_to_examples(state))
        self.iterator.restore(state["iterator"])


def to_example(record: dict[str, np.ndarray], task: int) -> Example:
    """A SeqIO example as a packer takes it."""
    language = int(record["language"])
    return Example(record["inputs"], record["targets"], language, task, int(record.get("inputs_language", language)))


class _Iterator:
    """A tf.data iterator that runs on one thread and whose place is an array of bytes."""

    def __init__(self, dataset: tf.data.Dataset, task: str, split: str):
        options = tf.data.Options()
        options.autotune.enabled = False
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        self._iterator = iter(dataset.with_options(options))
        self._empty = ValueError(f"task {task!r} has no example in its {split} split")

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return {name: value.numpy() for name, value in next(self._iterator).items()}
        except StopIteration:
            raise self._empty from None

    def state(self) -> np.ndarray:
        saved = tf.raw_ops.SerializeIterator(resource_handle=self._iterator._iterator_resource, external_state_policy=1)
        return np.frombuffer(tf.io.serialize_tensor(saved).numpy(), np.uint8)

    def restore(self, state: np.ndarray) -> None:
        saved = tf.io.parse_tensor(state.tobytes(), tf.variant)
        tf.raw_ops.DeserializeIterator(resource_handle=self._iterator._iterator_resource, serialized=saved)


def make_reader(
    task: seqio.Task,
    number: int,
    split: str,
    shard: int,
    shards: int,
    seed: int,
    lengths: Lengths,
    vocabulary: Vocabulary,
) -> Reader:
    """The reader that fits a task's source and preprocessors."""
    if not is_unit_task(task):
        return ExampleReader(task, number, split, shard, shards, seed, lengths, vocabulary)
    kind = TableReader if isinstance(task.source, TableSource) else StreamReader
    return kind(task, number, split, shard, shards, seed)


def is_unit_task(task: seqio.Task) -> bool:
    """Whether a task's whole preprocessing is one recipe, so that its graph is shared with other tasks."""
    return len(task.preprocessors) == 1 and isinstance(task.preprocessors[0], Units)


def fetch(readers: Sequence[Reader], needed: Sequence[int], vocabulary: Vocabulary, lengths: Lengths) -> None:
    """Makes sure that each reader holds `needed` examples. Units of one recipe go through its graph together."""
    tries = 0
    while True:
        short = [(r, n - len(r.ready)) for r, n in zip(readers, needed, strict=True) if len(r.ready) < n]
        if not short:
            return
        tries += 1
        if tries > 100:
            raise ValueError(f"task {short[0][0].task.name!r} gives no example: every record of it is dropped")
        by_recipe: dict = {}
        for reader, missing in short:
            if isinstance(reader, UnitReader):
                count = max(1, round(missing / max(reader.examples_per_unit, 1.0)))
                by_recipe.setdefault(reader.units.recipe, []).extend((reader, i) for i in range(count))
            else:
                for _ in range(missing):
                    reader.fetch()
        for recipe, asked in by_recipe.items():
            numbers = [reader.next_unit + i for reader, i in asked]
            units = [reader.unit(n) for (reader, _), n in zip(asked, numbers, strict=True)]
            # The second half of the seed tells the units of a task apart, also between shards.
            seeds = [(r.task_seed, n * r.shards + r.shard) for (r, _), n in zip(asked, numbers, strict=True)]
            process = compile_recipe(recipe, vocabulary, lengths)
            results = process([reader.units for reader, _ in asked], units, seeds)
            for (reader, _), examples in zip(asked, results, strict=True):
                language, source = reader.units.language_ids
                reader.receive([Example(i, t, language, reader.number, source) for i, t in examples])
