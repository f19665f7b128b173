"""Raw text of a mixture in the proportions that training will see: what a vocabulary is trained on."""

from collections.abc import Iterator

import numpy as np

from mlm.data.recipes import Units
from mlm.data.registration import mixture_rates
from mlm.data.sources import TableSource
from mlm.data.tensorflow import seqio


def sample_lines(mixture: str, lines: int, split: str = "train", seed: int = 0) -> Iterator[str]:
    """About `lines` text lines of a mixture, shuffled; each task gives its share of them, small tasks repeatedly.

    A task's text columns all count. Raises KeyError for an unknown mixture, ValueError when there is no text.
    """
    rates = mixture_rates(mixture)
    generator = np.random.default_rng(seed)
    total = sum(rates.values())
    sampled: list[bytes] = []
    for name in sorted(rates):
        wanted = int(generator.poisson(lines * rates[name] / total))
        if wanted:
            sampled += _take(seqio.TaskRegistry.get(name), wanted, split, generator)
    if not sampled:
        raise ValueError(f"mixture {mixture!r} gave no text for lines={lines}; ask for more lines")
    for index in generator.permutation(len(sampled)):
        yield sampled[index].decode("utf-8", errors="ignore")


def _take(task: seqio.Task, wanted: int, split: str, generator: np.random.Generator) -> list[bytes]:
    columns = [column for _, column in task.preprocessors[0].columns]
    if isinstance(task.source, TableSource):
        table = task.source.table(split)
        text = [value for column in columns for value in table[column]]
        repeats, rest = divmod(wanted, len(text))
        return text * repeats + [text[i] for i in generator.choice(len(text), rest, replace=False)]
    records = task.source.get_dataset(split, shuffle=False).take(wanted).as_numpy_iterator()
    return [record[column] for record in records for column in columns][:wanted]


def mixture_languages(mixture: str) -> list[str]:
    """Codes of the languages that a mixture's tasks read or write, sorted: those that need a token `<2xx>`."""
    found: set[str] = set()
    for name in mixture_rates(mixture):
        units = next(iter(seqio.TaskRegistry.get(name).preprocessors), None)
        if isinstance(units, Units):
            found |= {units.language, units.inputs_language}
    return sorted(found)
