"""Every example of a split exactly once, in order: what evaluation and inspection read.

Hundreds of tasks go through the shared graphs together, so that the held-out text of every language costs seconds;
SeqIO's `task.get_dataset` gives the same records, at half a second to two seconds for each task before its first
example.
"""

import zlib
from collections.abc import Iterator, Sequence

from mlm.data.batching import Example
from mlm.data.readers import check_features, in_template, is_unit_task, to_example
from mlm.data.recipes import Lengths, Units, compile_recipe, with_vocabulary
from mlm.data.registration import get
from mlm.data.sources import TableSource
from mlm.data.templates import Template
from mlm.data.tensorflow import seqio
from mlm.data.vocabulary import Vocabulary
from mlm.types import PAD_ID

SEED = 42  # of the noise; the same examples at every evaluation
UNITS_AT_ONCE = 512


def examples_once(
    names: Sequence[str],
    split: str,
    vocabulary: Vocabulary,
    lengths: Lengths,
    seed: int = SEED,
    limit: int | None = None,
    template: Template | None = None,
) -> Iterator[tuple[str, list[Example]]]:
    """(task name, its examples) for each of `names` in order; an example's task id is the place of its name, from 1.

    limit: the first so many examples of each task. template: of a run that has its own (`in_template`). Raises KeyError
    for an unknown name, ValueError for a split that it does not have.
    """
    tasks = {number: in_template(_task(name, split), template) for number, name in enumerate(names, start=1)}
    waiting: list[int] = []
    units = 0
    for number, task in tasks.items():
        waiting.append(number)
        if is_unit_task(task) and isinstance(task.source, TableSource):
            units += task.source.num_input_examples(split) // task.preprocessors[0].recipe.records
        if units >= UNITS_AT_ONCE or number == len(tasks):
            found = _read(tasks, waiting, split, vocabulary, lengths, seed, limit)
            yield from ((tasks[n].name, found[n]) for n in waiting)
            waiting, units = [], 0


def _task(name: str, split: str) -> seqio.Task:
    task = get(name)
    if not isinstance(task, seqio.Task):
        raise ValueError(f"{name!r} is a mixture; give its tasks one by one")
    if split not in task.splits:
        raise ValueError(f"task {name!r} has no split {split!r}; it has {', '.join(task.splits)}")
    return task


def _read(tasks, numbers, split, vocabulary, lengths, seed, limit) -> dict[int, list[Example]]:
    found: dict[int, list[Example]] = {}
    by_recipe: dict = {}
    for number in numbers:
        task = tasks[number]
        if is_unit_task(task) and isinstance(task.source, TableSource):
            by_recipe.setdefault(task.preprocessors[0].recipe, []).append(number)
        else:
            dataset = with_vocabulary(task, vocabulary).get_dataset(lengths._asdict(), split, shuffle=False, seed=seed)
            check_features(task, dataset.element_spec)
            dataset = dataset if limit is None else dataset.take(limit)
            found[number] = [to_example(record, number) for record in dataset.as_numpy_iterator()]
    for recipe, group in by_recipe.items():
        owners, units, seeds = [], [], []
        for number in group:
            table = tasks[number].source.table(split)
            columns = {name: table[column] for name, column in tasks[number].preprocessors[0].columns}
            count = len(next(iter(columns.values())))
            if limit is not None:  # a unit gives at least one example, unless its records are empty
                count = min(count, limit * recipe.records)
            for first in range(0, count, recipe.records):
                owners.append(number)
                units.append({name: column[first : first + recipe.records] for name, column in columns.items()})
                seeds.append((seed << 32 | zlib.crc32(tasks[number].name.encode()), first))
        results = compile_recipe(recipe, vocabulary, lengths)([tasks[n].preprocessors[0] for n in owners], units, seeds)
        for number, examples in zip(owners, results, strict=True):
            own: Units = tasks[number].preprocessors[0]
            language, source = own.language_ids
            start = own.around(vocabulary).start or PAD_ID
            found.setdefault(number, []).extend(Example(i, t, language, number, source, start) for i, t in examples)
    return {number: examples[:limit] for number, examples in found.items()}
