"""A mixture of SeqIO tasks as an endless sequence of batches that can be stopped anywhere and continued exactly.

    batches = BatchIterator(DataConfig(mixture="quickstart", vocabulary="vocabulary.model", inputs_length=128, ...))
    rows = next(batches)                     # dict of NumPy arrays, mlm.types.ROW_FEATURES
    saved = batches.state()                  # virtual shard -> bytes
    BatchIterator(config).restore(saved)     # continues with the batch after `rows`

A run has a fixed number of virtual shards, whatever the number of processes. Shard s makes rows [s, s + 1) · batch_size
/ shards of every global batch; process p owns a contiguous block of shards. So one process and four see the same global
batches, and a run that was saved by four continues on two.

Inside a shard everything is a function of (seed, shard, number of the draw): draw i takes a uniform number from a
counter-based generator and picks a task by the rates that hold for the current batch; the task's reader
(mlm.data.readers) gives its next example; the packer (mlm.data.batching) puts it into a row. The state is the number of
draws, each reader's place and the rows still open.

Why SeqIO's own mixing is not used: it builds, traces and checkpoints one tf.data pipeline for every task, which took
15 s to build and 6 to 11 s to the first batch for 250 tasks on two cores, with text files. Here tasks that share a
recipe share one graph: the 638 tasks of `quickstart` are built in 1.5 s, corpora read and counted, and give their first
batch after 3.2 s; then 6,000 to 13,000 examples/s a core, packing included, and 6 kB of state a shard.
"""

import dataclasses
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlm.data.batching import Example, Packer, Rows, arrays_to_rows, rows_to_arrays
from mlm.data.readers import Place, Reader, fetch, in_template, is_unit_task, make_reader
from mlm.data.recipes import Denoising, Lengths
from mlm.data.registration import default_vocabulary, get, mixture_rates
from mlm.data.templates import Template
from mlm.data.tensorflow import seqio
from mlm.data.vocabulary import Vocabulary, load_vocabulary
from mlm.sampling import stages

BLOCK = 256  # draws that are looked ahead, so that their units go through TensorFlow together


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    mixture: a registered mixture or task. batch_size: global rows. inputs_length, targets_length: tokens of a row.
    shards: virtual data shards; the most processes that can share the reading. vocabulary: path of a vocabulary file,
    or "bytes"; None: the tasks' default. stages: ((progress, mixture), …): from that share of `steps` on, rates are
    those of another mixture, e.g. ((0.0, "all"), (0.8, "clean")); overrides `mixture`. template: how sources and
    targets are framed, in place of what the tasks say: that of the published model that a run began with.
    """

    mixture: str
    inputs_length: int
    targets_length: int
    batch_size: int
    split: str = "train"
    pack: bool = True
    shards: int = 1
    seed: int = 0
    vocabulary: str | None = None
    stages: tuple[tuple[float, str], ...] = ()
    steps: int | None = None
    template: Template | None = None

    def __post_init__(self):
        for name in ("inputs_length", "targets_length", "batch_size", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.batch_size % self.shards:
            near = max(1, round(self.batch_size / self.shards)) * self.shards
            raise ValueError(
                f"batch_size={self.batch_size} rows do not divide over shards={self.shards} virtual shards; "
                f"use a multiple of {self.shards} (nearest: {near}), or fewer shards"
            )
        starts = [start for start, _ in self.stages]
        if self.stages and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1 or not self.steps):
            raise ValueError(
                f"stages={self.stages} with steps={self.steps}: stages start at growing shares of the steps, "
                "the first at 0.0, all below 1.0, and steps says of how many batches"
            )

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.inputs_length, self.targets_length)

    def load_vocabulary(self) -> Vocabulary:
        return load_vocabulary(self.vocabulary) if self.vocabulary else default_vocabulary()


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """This process's rows of every global batch. Attributes: `tasks`, task id − 1 -> name; `vocabulary`; `batch`, how
    many were taken.

    Raises KeyError with nearest names for an unknown mixture, ValueError when processes do not divide the shards.
    """

    def __init__(self, config: DataConfig, process_index: int = 0, process_count: int = 1):
        if config.shards % process_count:
            near = max(1, round(config.shards / process_count)) * process_count
            raise ValueError(
                f"shards={config.shards} virtual data shards do not divide over {process_count} processes; "
                f"use a multiple of {process_count} (nearest: {near})"
            )
        self.config = config
        self.vocabulary = config.load_vocabulary()
        self.rates = Rates(config)
        self.tasks = self.rates.tasks
        _check_tasks(self.tasks, self.vocabulary, config)
        self.batch = 0
        local = config.shards // process_count
        self._shards = [_Shard(self, s) for s in range(process_index * local, (process_index + 1) * local)]

    def __next__(self) -> dict[str, np.ndarray]:
        rates = self.rates.at(self.batch)
        rows = [shard.rows(self.config.batch_size // self.config.shards, rates) for shard in self._shards]
        self.batch += 1
        if len(rows) == 1:
            return rows[0]
        return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}

    def state(self) -> dict[int, bytes]:
        """Virtual shard -> its place, for the shards of this process; a few kilobytes each."""
        return self.encode(self.snapshot())

    def snapshot(self) -> list["Snapshot"]:
        """The place now, taken in microseconds; `encode` makes bytes of it, later and in any thread."""
        return [shard.snapshot() for shard in self._shards]

    def encode(self, snapshots: list["Snapshot"]) -> dict[int, bytes]:
        """Virtual shard -> bytes."""
        return {shard.number: shard.encode(place) for shard, place in zip(self._shards, snapshots, strict=True)}

    def restore(self, states: Mapping[int, bytes]) -> "BatchIterator":
        """Continues after the batch that was the last one when `states` were taken; other processes' shards may be
        among them.

        Raises ValueError when a shard is missing, or when the states belong to other data, another seed or other
        lengths.
        """
        missing = [shard.number for shard in self._shards if shard.number not in states]
        if missing:
            raise ValueError(f"no saved place for virtual shards {missing}; saved: {sorted(states)}")
        for shard in self._shards:
            self.batch = shard.restore(states[shard.number])
        return self


def _check_tasks(tasks: Sequence[str], vocabulary: Vocabulary, config: DataConfig) -> None:
    """Raises ValueError when what a task hides does not fit into its targets, and what `in_template` and `Units.around`
    raise; later TensorFlow would say so.
    """
    fitted = set()
    for task in (in_template(seqio.TaskRegistry.get(name), config.template) for name in tasks):
        if not is_unit_task(task):
            continue
        around, rule = task.preprocessors[0].around(vocabulary), task.preprocessors[0].recipe.examples
        if isinstance(rule, Denoising) and rule not in fitted:
            rule.fit(vocabulary, config.lengths, around)
            fitted.add(rule)


class Rates:
    """How often each task is drawn, by training progress. tasks: every task of every stage, sorted."""

    def __init__(self, config: DataConfig):
        table = config.stages or ((0.0, config.mixture),)
        by_stage = [mixture_rates(name) for _, name in table]
        names = sorted({name for rates in by_stage for name in rates})
        self.tasks = [name for name in names if config.split in get(name).splits]
        if not self.tasks:
            raise ValueError(
                f"no task of {', '.join(name for _, name in table)} has a split {config.split!r}; "
                f"{names[0]} has {', '.join(get(names[0]).splits)}"
            )
        self._steps = config.steps or 1
        self._stages = [
            (start, np.array([rates.get(task, 0.0) for task in self.tasks]))
            for (start, _), rates in zip(table, by_stage, strict=True)
        ]

    def at(self, batch: int) -> np.ndarray:
        """Rates of `tasks` for a batch, summing to 1."""
        return stages(self._stages, min(batch / self._steps, 1.0))


class Snapshot(NamedTuple):
    """Where a shard stands after a batch."""

    batch: int
    draws: int
    places: dict[int, Place]  # task -> place of its reader
    rows: Rows  # that are not yet part of a batch


class _Shard:
    def __init__(self, owner: BatchIterator, number: int):
        self.owner, self.number, self.config = owner, number, owner.config
        self.packer = Packer(self.config.inputs_length, self.config.targets_length, self.config.pack)
        self.draws = 0
        self._readers: dict[int, Reader] = {}  # made when first drawn
        self._uniform = np.zeros(0)
        self._fetched_to = 0

    def rows(self, count: int, rates: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum(rates)
        while len(self.packer.ready) < count:
            self.packer.add(self._draw(ends))
        return self.packer.take(count)

    def _draw(self, ends: np.ndarray) -> Example:
        block, place = divmod(self.draws, BLOCK)
        if place == 0 or not len(self._uniform):
            generator = np.random.Philox(key=[self.config.seed, self.number], counter=[0, block, 0, 0])
            self._uniform = np.random.Generator(generator).random(BLOCK)
        if self.draws >= self._fetched_to:
            ahead = _pick(ends, self._uniform[place:])
            tasks, needed = np.unique(ahead, return_counts=True)
            self._fetch([self._reader(t) for t in tasks.tolist()], needed.tolist())
            self._fetched_to = (block + 1) * BLOCK
        reader = self._reader(int(_pick(ends, self._uniform[place : place + 1])[0]))
        if not reader.ready:  # the rates have changed since the block was fetched
            self._fetch([reader], [1])
        self.draws += 1
        return reader.pop()

    def _fetch(self, readers: Sequence[Reader], needed: Sequence[int]) -> None:
        fetch(readers, needed, self.owner.vocabulary, self.config.lengths)

    def _reader(self, task: int) -> Reader:
        if task not in self._readers:
            c = self.config
            provider = in_template(seqio.TaskRegistry.get(self.owner.tasks[task]), c.template)
            self._readers[task] = make_reader(
                provider, task + 1, c.split, self.number, c.shards, c.seed, c.lengths, self.owner.vocabulary
            )
        return self._readers[task]

    def _identity(self) -> str:
        c = self.config
        tasks = zlib.crc32("\n".join(self.owner.tasks).encode())
        return json.dumps(
            {
                "tasks": f"{len(self.owner.tasks)} ({tasks:08x})",
                "vocabulary": self.owner.vocabulary.digest[:16],
                **{k: getattr(c, k) for k in ("split", "seed", "shards", "inputs_length", "targets_length", "pack")},
                **({"template": str(c.template)} if c.template else {}),
            },
            sort_keys=True,
        )

    def snapshot(self) -> Snapshot:
        places = {number: reader.place() for number, reader in self._readers.items()}
        return Snapshot(self.owner.batch, self.draws, places, self.packer.snapshot())

    def encode(self, snapshot: Snapshot) -> bytes:
        places = sorted(snapshot.places.items())
        iterators = {f"iterator/{n}": np.frombuffer(p.iterator, np.uint8) for n, p in places if p.iterator}
        file = io.BytesIO()
        arrays = {
            "identity": np.array(self._identity()),
            "progress": np.array([snapshot.batch, snapshot.draws], np.int64),
            "places": np.array([(number, place.unit, place.used) for number, place in places], np.int64).reshape(-1, 3),
            **iterators,
            **{f"packer/{name}": array for name, array in rows_to_arrays(snapshot.rows).items()},
        }
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes the first one for allow_pickle
        return file.getvalue()

    def restore(self, state: bytes) -> int:
        with np.load(io.BytesIO(state), allow_pickle=False) as file:
            arrays = dict(file)
        saved, ours = str(arrays["identity"]), self._identity()
        if saved != ours:
            raise ValueError(
                f"the saved place in the data belongs to other data:\n  saved: {saved}\n  now:   {ours}\n"
                "continue with the configuration of the run, or start its data anew"
            )
        packer = {name.removeprefix("packer/"): array for name, array in arrays.items() if name.startswith("packer/")}
        self.packer.restore(arrays_to_rows(packer))
        self._readers.clear()
        for number, unit, used in arrays["places"].tolist():
            iterator = arrays.get(f"iterator/{number}")
            self._reader(number).restore(Place(unit, used, b"" if iterator is None else iterator.tobytes()))
        batch, self.draws = (int(x) for x in arrays["progress"])
        self._uniform, self._fetched_to = np.zeros(0), self.draws
        return batch


def _pick(ends: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index of the interval each number in [0, 1) falls into; the last one takes what rounding leaves over."""
    return np.searchsorted(ends[:-1], uniform, side="right")
