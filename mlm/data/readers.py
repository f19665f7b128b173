"""One task's examples in one virtual data shard, in an order that can be left and found again exactly.

A task is read in *units*: a few records that its recipe turns into examples together (text of one language that is
joined and cut, or a single pair). A place is two numbers: a unit, and how many of its examples have been used.

Unit number g of a table is a pure function of (seed, task, g): records [g k, (g + 1) k) of an endless sequence in which
every epoch is a permutation of its own. Shard s of n reads the units s, s + n, s + 2n, …, so the shards together read
every record once an epoch.

Sources that cannot be addressed by number (TFDS, large files, SeqIO tasks with pipelines of their own) are read through
a tf.data iterator in blocks, shuffled inside the block by number. Where the iterator stood at the start of the block is
kept as the bytes of its checkpoint; a restored reader reads the block again. So no records are saved, and taking a
snapshot costs microseconds.
"""

import dataclasses
import functools
import zlib
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlm.data.batching import Example
from mlm.data.recipes import Lengths, Units, compile_recipe, with_vocabulary
from mlm.data.sources import TableSource
from mlm.data.templates import Template
from mlm.data.tensorflow import seqio, tf
from mlm.data.vocabulary import Vocabulary
from mlm.types import PAD_ID

BLOCK_RECORDS = 256  # of a source that is read in order: what is shuffled together
BLOCK_EXAMPLES = 64  # of a SeqIO task with its own pipeline


class Place(NamedTuple):
    """Where a reader stands: what a restored one needs to continue. iterator: bytes for the block of the unit, empty
    for tables.
    """

    unit: int
    used: int
    iterator: bytes = b""


class Reader:
    """The examples of one task in one shard, in order; `fetch` below fills `ready` for many readers at once.

    number: id of the task in its mixture, carried by every example.
    """

    def __init__(self, task: seqio.Task, number: int, split: str, shard: int, shards: int, seed: int):
        self.task, self.number = task, number
        self.split, self.shard, self.shards, self.seed = split, shard, shards, seed
        self.task_seed = (seed << 32 | zlib.crc32(task.name.encode())) & (2**63 - 1)
        self.ready: deque[Example] = deque()
        self.next_unit = 0
        self.examples_per_unit = 1.0  # a running estimate, to fetch about as much as is needed
        self._places: deque[tuple[int, int]] = deque()  # (unit, its n-th example) of everything in `ready`
        self._skip = 0  # examples of `next_unit` that were used before a restore

    def pop(self) -> Example:
        self._places.popleft()
        return self.ready.popleft()

    def receive(self, examples: Sequence[Example]) -> None:
        """Takes the examples of the unit `next_unit`, in order."""
        self._places.extend((self.next_unit, i) for i in range(self._skip, len(examples)))
        self.ready.extend(examples[self._skip :])
        self.next_unit += 1
        self._skip = 0
        self.examples_per_unit += 0.2 * (len(examples) - self.examples_per_unit)

    def place(self) -> Place:
        """The place of the example that comes next."""
        return Place(*(self._places[0] if self._places else (self.next_unit, self._skip)))

    def restore(self, place: Place) -> None:
        self.ready.clear()
        self._places.clear()
        self.next_unit, self._skip = place.unit, place.used


class UnitReader(Reader):
    """A reader of a task that is made from a recipe."""

    def __init__(self, task: seqio.Task, *args):
        super().__init__(task, *args)
        self.units: Units = task.preprocessors[0]

    def unit(self, number: int) -> dict[str, list[bytes]]:
        """The records of a unit, by the recipe's columns; asked for in growing order."""
        raise NotImplementedError


class TableReader(UnitReader):
    """Reads a TableSource: any unit at any time."""

    def __init__(self, *args):
        super().__init__(*args)
        table = self.task.source.table(self.split)
        self.columns = {name: table[column] for name, column in self.units.columns}
        self.count = len(next(iter(self.columns.values())))
        self.records = min(self.units.recipe.records, self.count)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def unit(self, number: int) -> dict[str, list[bytes]]:
        first = (number * self.shards + self.shard) * self.records
        chosen = [self._order(r // self.count)[r % self.count] for r in range(first, first + self.records)]
        return {name: [column[i] for i in chosen] for name, column in self.columns.items()}

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.task_seed, epoch]).permutation(self.count)


class StreamReader(UnitReader):
    """Reads any other source in blocks of raw records."""

    def __init__(self, *args):
        super().__init__(*args)
        source = self.task.source
        shard_info = seqio.ShardInfo(self.shard, self.shards)
        if source.supports_arbitrary_sharding or len(source.list_shards(self.split)) >= self.shards:
            dataset = source.get_dataset(self.split, shuffle=True, seed=self.seed, shard_info=shard_info)
        else:
            dataset = source.get_dataset(self.split, shuffle=True, seed=self.seed).shard(self.shards, self.shard)
        self._records = self.units.recipe.records
        self._units_per_block = max(1, BLOCK_RECORDS // self._records)
        dataset = dataset.map(lambda record: {name: record[column] for name, column in self.units.columns})
        self._blocks = _Blocks(dataset.repeat().batch(self._records * self._units_per_block), self.task, self.split)

    def unit(self, number: int) -> dict[str, list[bytes]]:
        block, i = divmod(number, self._units_per_block)
        columns = self._blocks.read(block)
        count = len(next(iter(columns.values())))
        order = np.random.default_rng([self.task_seed, self.shard, block]).permutation(count)
        chosen = order[i * self._records : (i + 1) * self._records]
        return {name: column[chosen].tolist() for name, column in columns.items()}

    def place(self) -> Place:
        place = super().place()
        return place._replace(iterator=self._blocks.start(place.unit // self._units_per_block))

    def restore(self, place: Place) -> None:
        super().restore(place)
        self._blocks.restore(place.unit // self._units_per_block, place.iterator)


class ExampleReader(Reader):
    """Reads a SeqIO task with preprocessors of its own: a unit is a block of what `task.get_dataset` gives."""

    def __init__(self, task, number, split, shard, shards, seed, lengths: Lengths, vocabulary: Vocabulary):
        super().__init__(with_vocabulary(task, vocabulary), number, split, shard, shards, seed)
        dataset = self.task.get_dataset(
            lengths._asdict(),
            split,
            shuffle=True,
            shuffle_buffer_size=BLOCK_EXAMPLES,
            seed=seed,
            shard_info=seqio.ShardInfo(shard, shards),
            num_epochs=None,
        )
        check_features(self.task, dataset.element_spec)
        kept = ("inputs", "targets", "language", "inputs_language")
        dataset = dataset.map(lambda example: {name: example[name] for name in kept if name in example})
        self._blocks = _Blocks(dataset.ragged_batch(BLOCK_EXAMPLES), self.task, split)

    def fetch(self) -> None:
        block = self._blocks.read(self.next_unit)
        language = block["language"].tolist()
        sources = block.get("inputs_language", block["language"]).tolist()
        sides = zip(block["inputs"], block["targets"], language, sources, strict=True)
        self.receive([Example(np.asarray(i), np.asarray(t), lang, self.number, source) for i, t, lang, source in sides])

    def place(self) -> Place:
        place = super().place()
        return place._replace(iterator=self._blocks.start(place.unit))

    def restore(self, place: Place) -> None:
        super().restore(place)
        self._blocks.restore(place.unit, place.iterator)


def to_example(record: dict[str, np.ndarray], task: int) -> Example:
    """One example of a SeqIO dataset, in NumPy, as a packer takes it."""
    language = int(record["language"])
    own, start = (int(record.get(name, other)) for name, other in (("inputs_language", language), ("start", PAD_ID)))
    return Example(record["inputs"], record["targets"], language, task, own, start)


def check_features(task: seqio.Task, features) -> None:
    """Raises ValueError when a task's examples lack a feature that every example carries."""
    if missing := {"inputs", "targets", "language"} - set(features):
        raise ValueError(
            f"task {task.name!r} has no feature {', '.join(sorted(missing))}; every example carries inputs, targets "
            "and the id of its language: add the preprocessor "
            "partial(mlm.data.preprocessors.add_ids, language='sw', task=0)"
        )


class _Blocks:
    """Blocks 0, 1, 2, … of a dataset, and the iterator's bytes at the start of every block that may still be needed."""

    def __init__(self, dataset: tf.data.Dataset, task: seqio.Task, split: str):
        options = tf.data.Options()
        options.autotune.enabled = False  # one thread for each of hundreds of tasks is enough
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        self._iterator = iter(dataset.with_options(options))
        self._name = f"task {task.name!r}, split {split!r}"
        self._starts: dict[int, bytes] = {}
        self._next, self._last = 0, {}

    def read(self, block: int) -> dict[str, np.ndarray]:
        """The block that was read last, or the one after it."""
        if block == self._next:
            if block not in self._starts:
                self._starts[block] = self._save()
            self._next += 1
            try:
                features = next(self._iterator)
            except StopIteration:
                raise ValueError(f"{self._name}: no examples") from None
            self._last = {name: value.numpy() for name, value in features.items()}
        return self._last

    def start(self, block: int) -> bytes:
        """The iterator's bytes at the start of a block; those of earlier blocks are forgotten."""
        self._starts = {b: saved for b, saved in self._starts.items() if b >= block}
        if block not in self._starts:  # it comes next
            self._starts[block] = self._save()
        return self._starts[block]

    def restore(self, block: int, start: bytes) -> None:
        saved = tf.io.parse_tensor(start, tf.variant)
        tf.raw_ops.DeserializeIterator(resource_handle=self._iterator._iterator_resource, serialized=saved)
        self._starts, self._next, self._last = {}, block, {}

    def _save(self) -> bytes:
        saved = tf.raw_ops.SerializeIterator(resource_handle=self._iterator._iterator_resource, external_state_policy=1)
        return tf.io.serialize_tensor(saved).numpy()


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


def in_template(task: seqio.Task, template: Template | None) -> seqio.Task:
    """The task as a run with a template of its own reads and writes it. What preprocessors of other kinds than a recipe
    write stays as it is.

    Raises ValueError for one of these where the template sets what the decoder reads first: it has no way to say so.
    """
    if template is None:
        return task
    if is_unit_task(task):
        units = task.preprocessors[0]
        recipe = dataclasses.replace(units.recipe, template=template)
        return task.replace(preprocessors=[dataclasses.replace(units, recipe=recipe)])
    if template.start:
        raise ValueError(
            f"task {task.name!r} has preprocessors of its own, which cannot tell the decoder of this run to begin with "
            f"{template.start} ({template}); make it from a recipe (mlm.data.registration.add_task)"
        )
    return task


def fetch(readers: Sequence[Reader], needed: Sequence[int], vocabulary: Vocabulary, lengths: Lengths) -> None:
    """Makes sure that each reader holds `needed` examples. Units of one recipe go through its graph together.

    Raises ValueError for a task that gives no example at all.
    """
    for _ in range(100):
        short = [(r, n - len(r.ready)) for r, n in zip(readers, needed, strict=True) if len(r.ready) < n]
        if not short:
            return
        by_recipe: dict = {}
        for reader, missing in short:
            if isinstance(reader, ExampleReader):
                reader.fetch()
            elif isinstance(reader, UnitReader):
                count = max(1, round(missing / max(reader.examples_per_unit, 1.0)))
                by_recipe.setdefault(reader.units.recipe, []).append((reader, count))
        for recipe, asked in by_recipe.items():
            _fetch_units(recipe, asked, vocabulary, lengths)
    raise ValueError(f"task {short[0][0].task.name!r} gives no example: every record of it is dropped")


def _fetch_units(recipe, asked: Sequence[tuple[UnitReader, int]], vocabulary: Vocabulary, lengths: Lengths) -> None:
    tasks, units, seeds = [], [], []
    for reader, count in asked:
        for number in range(reader.next_unit, reader.next_unit + count):
            tasks.append(reader)
            units.append(reader.unit(number))
            # The second half of the seed tells the units of a task apart, also between shards.
            seeds.append((reader.task_seed, number * reader.shards + reader.shard))
    results = compile_recipe(recipe, vocabulary, lengths)([reader.units for reader in tasks], units, seeds)
    for reader, examples in zip(tasks, results, strict=True):
        language, source = reader.units.language_ids
        start = reader.units.around(vocabulary).start or PAD_ID
        reader.receive([Example(i, t, language, reader.number, source, start) for i, t in examples])
