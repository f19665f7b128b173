"""What a report shows: held-out sentences translated, and gaps filled in, before and after training."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mlm.evaluation.report import FillIn, Translation

GAPS_SHOWN = 4  # of a fill-in
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_TAGS = re.compile(r"^(<2[A-Za-z0-9-]+>)+|(<2[A-Za-z0-9-]+>)+$")


def sample(
    session: Any, fresh: Any, tasks: Sequence[str], codes: Sequence[str], split: str
) -> tuple[list[Translation], list[FillIn]]:
    """One held-out example a task of each of the languages, decoded by the trained and the fresh parameters; none for a
    decoder alone, which does not read sources.
    """
    from mlm.data.languages import LANGUAGES
    from mlm.data.once import examples_once
    from mlm.data.recipes import Lengths

    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    names = _shown_tasks(tasks, [code for code in codes if code != "en"])
    read = examples_once(names, split, session.vocabulary, lengths, limit=50, template=session.own_template)
    found = {name: examples for name, examples in read if examples}
    examples = [_typical(session, found[name]) for name in names if name in found]
    if not examples or session.config.encoder is None:
        return [], []
    before, after = (_written(model, examples) for model in (fresh, session))
    translations, fill_ins = [], []
    for example, *written in zip(examples, before, after, strict=True):
        text, reference = (session.vocabulary.decode(side.tolist()) for side in (example.inputs, example.targets))
        source, target = LANGUAGES[example.inputs_language].code, LANGUAGES[example.language].code
        if source != target:
            plain = [_TAGS.sub("", t).strip() for t in (text, reference, *written)]
            translations.append(Translation(source, target, *plain))
        elif "<extra_id_0>" in text:
            fill_ins.append(fill_in(target, text, reference, *written))
    return translations, fill_ins


def _shown_tasks(tasks: Sequence[str], codes: Iterable[str]) -> list[str]:
    """For each language its first translation from English, into English, and its first task that hides text."""
    from mlm.data.readers import is_unit_task
    from mlm.data.registration import get

    by_pair: dict[tuple[str, str], str] = {}
    for name in tasks:
        task = get(name)
        if is_unit_task(task):
            units = task.preprocessors[0]
            if units.inputs_language != units.language or hiding_plan(name):
                by_pair.setdefault((units.inputs_language, units.language), name)
    wanted = [pair for code in codes for pair in (("en", code), (code, "en"), (code, code))]
    return [by_pair[pair] for pair in wanted if pair in by_pair]


def _written(model: Any, examples: Sequence[Any]) -> list[str]:
    """What the model writes greedily, without the language tokens that it was given to begin with."""
    from mlm.data.evaluator import forced_beginning
    from mlm.session.evaluating import Predictions, told

    prompts = [forced_beginning(e.targets, model.vocabulary) for e in examples]
    write = Predictions(model, model.generator("greedy", {}))
    found = write([e.inputs for e in examples], prompts, list(map(told, examples)))
    return [model.vocabulary.decode(row[len(p) :].tolist()) for row, p in zip(found, prompts, strict=True)]


def _typical(session: Any, examples: Sequence[Any]) -> Any:
    """One that can be read at a glance, and whose pieces are whole characters (bytes of one may stand apart)."""

    def distance(example: Any) -> tuple[bool, int]:
        broken = any("\ufffd" in session.vocabulary.decode(side.tolist()) for side in example[:2])
        return broken, abs(len(example.targets) - 16)

    return min(examples, key=distance)


def fill_in(language: str, text: str, truth: str, before: str, after: str) -> FillIn:
    """The first gaps of a corrupted text, and what stands after the same sentinels in the targets and the predictions.

    >>> fill_in("en", "A<extra_id_0> sat", "<extra_id_0> cat", "x", "<extra_id_0> dog<extra_id_1>").after
    (' dog',)
    """
    parts = _SENTINEL.split(text)  # text, number, text, number, text
    kept, numbers = parts[0::2], parts[1::2]
    if len(numbers) > GAPS_SHOWN:
        kept = [*kept[:GAPS_SHOWN], kept[GAPS_SHOWN].rstrip() + " …"]
        numbers = numbers[:GAPS_SHOWN]

    def gaps(written: str) -> tuple[str, ...]:
        cut = _SENTINEL.split(written)
        by_number = dict(zip(reversed(cut[1::2]), reversed(cut[2::2]), strict=True))  # the first of a repeated one
        return tuple(by_number.get(number, "") for number in numbers)

    return FillIn(language, tuple(kept), gaps(truth), gaps(before), gaps(after))


def hiding_plan(name: str) -> str | None:
    """How a task hides text, e.g. "span_corruption"; None for one that does not."""
    from mlm.data.readers import is_unit_task
    from mlm.data.recipes import Denoising
    from mlm.data.registration import get

    task = get(name)
    examples = task.preprocessors[0].recipe.examples if is_unit_task(task) else None
    return examples.plan if isinstance(examples, Denoising) else None
