"""Tasks on a session's model, some hundred examples at a time: losses in packed rows, predictions in full batches."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlm.data.batching import Example
from mlm.data.evaluator import Outcome, compute_metrics, forced_beginning, packed_batches, predicts, read_examples
from mlm.data.languages import LANGUAGES
from mlm.data.recipes import Lengths
from mlm.decoding.buckets import shards
from mlm.decoding.generate import Generator
from mlm.decoding.phrases import stop_size
from mlm.decoding.state import Decoded
from mlm.evaluation.language_loss import LanguageLosses
from mlm.evaluation.results import LanguageTable, language_table, totals
from mlm.session.language_control import by_language
from mlm.session.session import Session
from mlm.types import PAD_ID

GROUP = 1024  # examples; their tasks are evaluated together, and their results known
LOSS_ROWS = 16  # rows of a batch when losses are measured
SAMPLES = 5  # examples of a task that a result shows

Tokens = Sequence[np.ndarray]
Group = dict[str, list[Example]]
Told = tuple[int, int]  # what a model is told beside the source: the target's language id, and where it starts
Search = Callable[[int | None], Callable[..., Decoded]]  # start token, None for the model's own -> generator


def evaluate_each(
    session: Session, tasks: Sequence[str], split: str, num_examples: int | None, generator: Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, result) in order: metrics, loss and bits per byte by language, how it was decoded, a few samples."""
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    if any(map(predicts, tasks)):
        check_sources_are_read(session)
    read = partial(read_examples, tasks, session.vocabulary, lengths, split, num_examples)
    for group in _groups(read(template=session.own_template)):
        tables = _tables(session, group, lengths)
        predictions = Predictions(session, generator)
        asked = [example for name, examples in group.items() if predicts(name) for example in examples]
        begins = partial(forced_beginning, vocabulary=session.vocabulary)
        predictions.learn([e.inputs for e in asked], [begins(e.targets) for e in asked], list(map(told, asked)))
        for name, examples in group.items():
            outcome = outcome_of(session, name, examples, predictions, lengths, split, num_examples)
            result = {**session.about(name, split), "examples": len(examples), **totals(tables[name])}
            result["metrics"] = outcome.metrics
            if outcome.predictions:
                result["decode"] = generator.config.plain()
                result["samples"] = _samples(session, examples, outcome.predictions)
            yield name, {**result, "languages": tables[name]}


def check_sources_are_read(session: Session) -> None:
    """Raises ValueError for a decoder alone."""
    if session.config.encoder is None:
        raise ValueError(
            f"{session.run.path} holds a decoder alone, which is trained on the targets of a task and never reads its "
            "inputs: what it would write says nothing. Evaluate tasks without metrics of written text"
        )


def outcome_of(
    session: Session,
    name: str,
    examples: Sequence[Example],
    predict: Callable[[Tokens, Tokens, Sequence[Told]], np.ndarray],
    lengths: Lengths,
    split: str,
    num_examples: int | None,
) -> Outcome:
    """The metrics of a task whose examples have been read. predict: (sources, prompts, what the model is told) ->
    tokens.
    """
    begins = partial(forced_beginning, vocabulary=session.vocabulary)
    return compute_metrics(
        name,
        session.vocabulary,
        lengths,
        predict=_telling(predict, {_key(e.inputs, begins(e.targets)): told(e) for e in examples}),
        score=_telling(partial(_scored, session), {_key(e.inputs, e.targets): told(e) for e in examples}),
        split=split,
        num_examples=num_examples,
        template=session.own_template,
    )


class Predictions:
    """(sources, forced beginnings, what the model is told) -> tokens. Remembers what it has decoded, so that the
    examples of many tasks can be decoded together before SeqIO asks for them one task at a time. A stop sequence is cut
    off. search: what is called in the place of the session's generators.
    """

    def __init__(self, session: Session, generator: Generator, search: Search | None = None):
        self._session, self._config = session, generator.config
        self._search = search or partial(session.beginning, generator)
        self._others = session.others(generator)
        self._known: dict[tuple[Told, tuple[bytes, bytes]], np.ndarray] = {}

    def learn(self, sources: Tokens, prompts: Tokens, told: Sequence[Told]) -> None:
        """Decodes what is not known yet. Randomness comes from the example itself, not from who stands beside it."""
        asked = zip(sources, prompts, told, strict=True)
        new = {(t, _key(s, p)): (s, p) for s, p, t in asked if (t, _key(s, p)) not in self._known}
        for first in sorted({start for (_, start), _ in new}):
            alike = {key: value for key, value in new.items() if key[0][1] == first}
            languages = [language for (language, _), _ in alike]
            found = self._search(first or None)(
                self._session.params,
                [source for source, _ in alike.values()],
                prompts=[prompt for _, prompt in alike.values()],
                ids=[zlib.crc32(b"|".join(key)) & 0x7FFFFFFF for _, key in alike],
                languages=languages,
                given=by_language(self._session, self._config, languages),
                **self._others,
            )
            for row, length, (_, prompt) in zip(found.tokens[:, 0], found.lengths[:, 0], alike.values(), strict=True):
                row[length - stop_size(row[len(prompt) : length], self._config.stop) :] = PAD_ID
            self._known.update(zip(alike, found.tokens[:, 0], strict=True))

    def __call__(self, sources: Tokens, prompts: Tokens, told: Sequence[Told]) -> np.ndarray:
        """int32 [examples, length]: the best result of each, beginning and end of sequence included."""
        self.learn(sources, prompts, told)
        return np.stack([self._known[t, _key(s, p)] for s, p, t in zip(sources, prompts, told, strict=True)])


def told(example: Example) -> Told:
    return example.language, example.start


def _scored(session: Session, sources: Tokens, targets: Tokens, told: Sequence[Told]) -> np.ndarray:
    """log P(target | source) of one task's examples, which all start alike."""
    languages, starts = zip(*told, strict=True)
    return session.score_tokens(sources, targets, languages, starts[0] or None)


def _telling(function: Callable[..., np.ndarray], told: Mapping[tuple[bytes, bytes], Told]) -> Callable:
    """function(sources, others, told) without the last, which is looked up: SeqIO hands over tokens alone."""

    def of_tokens(sources: Tokens, others: Tokens) -> np.ndarray:
        return function(sources, others, [told[_key(s, o)] for s, o in zip(sources, others, strict=True)])

    return of_tokens


def _key(source: np.ndarray, prompt: np.ndarray) -> tuple[bytes, bytes]:
    return np.asarray(source, np.int32).tobytes(), np.asarray(prompt, np.int32).tobytes()


def _groups(tasks: Iterator[tuple[str, list[Example]]]) -> Iterator[Group]:
    group: Group = {}
    for name, examples in tasks:
        group[name] = examples
        if sum(map(len, group.values())) >= GROUP:
            yield group
            group = {}
    if group:
        yield group


def _tables(session: Session, group: Group, lengths: Lengths) -> dict[str, LanguageTable]:
    """One pass over all tasks, packed together; the sums are kept apart by task and language."""
    names = list(group)
    numbered = [e._replace(task=number) for number, name in enumerate(names) for e in group[name]]
    pieces = shards(session.rows)
    rows = -(-LOSS_ROWS // pieces) * pieces

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for batch in packed_batches(numbered, lengths, rows):
            both = batch["decoder_task_ids"] * len(LANGUAGES) + batch["decoder_language_ids"]
            yield {**batch, "task_and_language": both}

    sums = session.language_losses(batches(), languages=len(names) * len(LANGUAGES), by="task_and_language")
    codes = [language.code for language in LANGUAGES]
    tables = {}
    for number, name in enumerate(names):
        own = slice(number * len(LANGUAGES), (number + 1) * len(LANGUAGES))
        of_task = LanguageLosses(*(getattr(sums, field.name)[own] for field in dataclasses.fields(sums)))
        tables[name] = language_table(of_task, codes)
    return tables


def _samples(session: Session, examples: list[Example], predictions: list[str]) -> list[dict[str, str]]:
    decode = session.vocabulary.decode
    return [
        {"inputs": decode(e.inputs.tolist()), "targets": decode(e.targets.tolist()), "prediction": prediction}
        for e, prediction in list(zip(examples, predictions, strict=True))[:SAMPLES]
    ]
