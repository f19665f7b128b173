"""Tasks and mixtures from tables: one call registers a corpus in every language it has.

    names = add_denoising_tasks("help", {language: source(language) for language in LANGUAGES})
    register_mixture("help.all", names, partial(unimax, budget=1e9, max_epochs=4))

What is registered are ordinary `seqio.Task` and `seqio.Mixture` objects, found by `seqio.get_mixture_or_task(name)`.
Registering reads no data: sources are read, and rates computed from their sizes, when a dataset is asked for. Names:
`<corpus>.denoise.<language>`, `<corpus>.translate.<from>.<to>`, … with languages in our codes and `_` for `-`, which
SeqIO does not allow in names.

A task's own vocabulary (bytes, with a token for every language) is only a default; a run's vocabulary takes its place.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlm.data.languages import LANGUAGES, language, language_id
from mlm.data.recipes import REWRITING, SPAN_CORRUPTION, TRANSLATION, Recipe, Units
from mlm.data.sources import Counts, TableSource
from mlm.data.tensorflow import seqio, tf
from mlm.data.vocabulary import ByteVocabulary, Vocabulary
from mlm.registry import nearest

Policy = Callable[[np.ndarray], np.ndarray]  # counts -> rates
Metrics = Callable[[str], Sequence[Callable]]  # language of the targets -> functions of mlm.evaluation.metrics


# Tasks.


def add_denoising_tasks(
    corpus: str,
    sources: Mapping[str, seqio.DataSource],
    column: str = "text",
    recipe: Recipe = SPAN_CORRUPTION,
    objective="denoise",
) -> list[str]:
    """One task `<corpus>.<objective>.<language>` for each language -> source of a text column. Returns the names."""
    return [
        add_task(f"{corpus}.{objective}.{slug(code)}", source, recipe, code, code, {"text": column})
        for code, source in sources.items()
    ]


def add_translation_tasks(
    corpus: str,
    sources: Mapping[str, seqio.DataSource],
    columns: tuple[str, str] = ("english", "other"),
    pivot: str = "en",
    recipe: Recipe = TRANSLATION,
    objective: str = "translate",
    metrics: Metrics = lambda language: (),
) -> list[str]:
    """Two tasks for each language -> source: `<corpus>.<objective>.<pivot>.<language>` and back. Returns the names.

    columns: the source's column of the pivot language, and of the other one.
    """
    names = []
    for code, source in sources.items():
        for (a, a_column), (b, b_column) in (
            ((pivot, columns[0]), (code, columns[1])),
            ((code, columns[1]), (pivot, columns[0])),
        ):
            name = f"{corpus}.{objective}.{slug(a)}.{slug(b)}"
            sides = {"inputs": a_column, "targets": b_column}
            names.append(add_task(name, source, recipe, b, a, sides, metric_fns=metrics(b)))
    return names


def add_rewriting_tasks(
    corpus: str,
    sources: Mapping[str, seqio.DataSource],
    columns: tuple[str, str],
    objective: str,
    recipe: Recipe = REWRITING,
    metrics: Metrics = lambda language: (),
    **seqio_arguments,
) -> list[str]:
    """One task `<corpus>.<objective>.<language>` for each language -> source of (inputs, targets) columns. Returns the
    names.
    """
    return [
        add_task(
            f"{corpus}.{objective}.{slug(code)}",
            source,
            recipe,
            code,
            code,
            dict(zip(("inputs", "targets"), columns, strict=True)),
            metric_fns=metrics(code),
            **seqio_arguments,
        )
        for code, source in sources.items()
    ]


def add_task(
    name: str,
    source: seqio.DataSource,
    recipe: Recipe,
    to: str,
    from_: str,
    columns: Mapping[str, str],
    **seqio_arguments,
) -> str:
    """Registers one task made from a recipe. Raises KeyError with nearest codes for a language without an id."""
    language_id(to), language_id(from_)
    units = Units(recipe, to, from_, tuple(columns.items()), task=len(seqio.TaskRegistry.names()) + 1)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[units],
        output_features=features(default_vocabulary()),
        **{"metric_fns": [], "shuffle_buffer_size": 256, **seqio_arguments},
    )
    return name


def features(vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    """The `output_features` of every task: token ids, and the ids of its language and task. SeqIO mixes only tasks with
    equal ones.
    """
    number = seqio.Feature(seqio.PassThroughVocabulary(2**31 - 1), add_eos=False, rank=0, dtype=tf.int32)
    tokens = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    return {"inputs": tokens, "targets": tokens, "language": number, "task": number}


@functools.cache
def default_vocabulary() -> ByteVocabulary:
    """Bytes, 125 sentinels, and a token for every language that has an id."""
    return ByteVocabulary(languages=[record.code for record in LANGUAGES[1:]], where="bytes with language tokens")


def slug(code: str) -> str:
    """A language's part of a task name: our code with `_` for `-`."""
    return language(code).code.replace("-", "_")


# Mixtures.


def register_mixture(
    name: str, members: Sequence[str | tuple[str, float]], policy: Policy | None = None, count: str = "characters"
) -> str:
    """Registers a mixture of tasks whose rates come from their sizes, or of (mixture or task, rate) pairs.

    policy: sizes of the *languages* in training text -> their rates; a language's rate is divided among its tasks by
    size. A translation belongs to the language that is not the pivot's, so that English does not count a hundred times.
    count: "characters", "examples" or "tokens", the unit of these sizes. Raises ValueError when members without a rate
    come without a policy.
    """
    named = [m for m in members if isinstance(m, str)]
    if policy is None and named:
        raise ValueError(f"mixture {name!r}: {named[0]!r} has neither a rate nor a sampling policy; give one of them")
    for member in (m if isinstance(m, str) else m[0] for m in members):
        get(member)

    @functools.cache
    def rates() -> dict[str, float]:
        return language_rates([seqio.TaskRegistry.get(task) for task in named], policy, count) if policy else {}

    from_size = lambda task: rates()[task.name]  # noqa: E731  SeqIO calls it with the task when it needs the rate
    seqio.MixtureRegistry.add(name, [(m, from_size) if isinstance(m, str) else m for m in members])
    return name


def language_rates(tasks: Sequence[seqio.Task], policy: Policy, count: str) -> dict[str, float]:
    """Task name -> rate, by a policy over languages."""
    sizes = {task.name: _size(task, count) for task in tasks}
    by_language: dict[str, float] = {}
    for task in tasks:
        by_language[owner(task)] = by_language.get(owner(task), 0.0) + sizes[task.name]
    rates = dict(zip(by_language, policy(np.array(list(by_language.values()), np.float64)), strict=True))
    return {t.name: float(rates[owner(t)] * sizes[t.name] / by_language[owner(t)]) for t in tasks}


def owner(task: seqio.Task) -> str:
    """The language that a task's text counts for: of a pair, the one that is not English."""
    units = task.preprocessors[0] if task.preprocessors else None
    if not isinstance(units, Units):
        return task.name
    return units.inputs_language if units.language == "en" else units.language


def _size(task: seqio.Task, count: str) -> float:
    counts = training_counts(task)
    size = getattr(counts, count)
    if not size:
        raise ValueError(f"task {task.name!r}: the number of {count} of its training text is not known ({counts})")
    return float(size)


def training_counts(task: seqio.Task) -> Counts:
    """Records, characters and bytes of a task's training text; for published datasets what their table says."""
    units = task.preprocessors[0] if task.preprocessors else None
    if not (isinstance(units, Units) and isinstance(task.source, TableSource)):
        return getattr(task.source, "counts", {}).get("train", Counts())
    table = task.source.table("train")
    texts = [table[column] for _, column in units.columns]
    characters = sum(len(text.decode()) for column in texts for text in column)
    return Counts(len(texts[0]), characters, sum(len(text) for column in texts for text in column))


def mixture_rates(name: str) -> dict[str, float]:
    """Task name -> share of examples, of a registered mixture (or 1 for a task alone); they sum to 1."""
    provider = get(name)
    rates = _rates(provider) if isinstance(provider, seqio.Mixture) else {name: 1.0}
    total = sum(rates.values())
    return {task: rate / total for task, rate in sorted(rates.items())}


def _rates(mixture: seqio.Mixture) -> dict[str, float]:
    # Mixture.get_rate gives the same numbers one by one, and takes seconds for a mixture of mixtures of hundreds of
    # tasks.
    rates: dict[str, float] = {}
    for member, rate in mixture.rate_per_task_name.items():
        provider = get(member)
        value = float(rate(provider) if callable(rate) else rate)
        inner = _rates(provider) if isinstance(provider, seqio.Mixture) else {member: 1.0}
        for task, share in inner.items():
            rates[task] = rates.get(task, 0.0) + value * share / sum(inner.values())
    return rates


# Finding them.


def load_tasks(*modules: str) -> None:
    """Imports the shipped registrations (every module of `tasks`), and the modules that a user names.

    Raises ValueError for a module that Python does not find.
    """
    package = importlib.import_module("tasks")
    for shipped in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"tasks.{shipped.name}")
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (module, module.split(".")[0]):
                raise
            raise ValueError(
                f"no Python module {module!r} to register tasks from: it must lie in the working directory or on "
                "PYTHONPATH"
            ) from error


def get(name: str) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture. Raises KeyError with the nearest names."""
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    hint = nearest(name, [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
    raise KeyError(f"no task or mixture named {name!r}; {hint}")
