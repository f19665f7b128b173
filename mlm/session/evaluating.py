"""Tasks on a session's model, some hundred examples at a time: losses in packed rows, predictions in full batches."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlm.data.batching import Example
from mlm.data.evaluator import compute_metrics, forced_beginning, packed_batches, predicts, read_examples
from mlm.data.languages import LANGUAGES
from mlm.data.recipes import Lengths
from mlm.decoding.buckets import shards
from mlm.decoding.generate import Generator
from mlm.evaluation.language_loss import LanguageLosses
from mlm.evaluation.results import LanguageTable, language_table, totals
from mlm.session.session import Session

GROUP = 1024  # examples; their tasks are evaluated together, and their results known
LOSS_ROWS = 16  # rows of a batch when losses are measured
SAMPLES = 5  # examples of a task that a result shows

Tokens = Sequence[np.ndarray]
Group = dict[str, list[Example]]
Search = Callable[[int | None], Generator]  # start token, None for the model's own -> what decodes from there
Told = tuple[int, int]  # what a model is told beside the source: the target's language id, and where it starts


def evaluate_each(
    session: Session, tasks: Sequence[str], split: str, num_examples: int | None, search: Search
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, result) in order: metrics, loss and bits per byte by language, how it was decoded, a few samples."""
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    read = partial(read_examples, tasks, session.vocabulary, lengths, split, num_examples)
    for group in _groups(read(template=session.template)):
        tables = _tables(session, group, lengths)
        predictions = Predictions(session, search)
        asked = [example for name, examples in group.items() if predicts(name) for example in examples]
        begins = partial(forced_beginning, vocabulary=session.vocabulary)
        predictions.learn([e.inputs for e in asked], [begins(e.targets) for e in asked], list(map(_told, asked)))
        for name, examples in group.items():
            outcome = compute_metrics(
                name,
                session.vocabulary,
                lengths,
                predict=_telling(predictions, {_key(e.inputs, begins(e.targets)): _told(e) for e in examples}),
                score=_telling(partial(_scored, session), {_key(e.inputs, e.targets): _told(e) for e in examples}),
                split=split,
                num_examples=num_examples,
                template=session.template,
            )
            result = {**session.about(name, split), "examples": len(examples), **totals(tables[name])}
            result["metrics"] = outcome.metrics
            if outcome.predictions:
                result["decode"] = dataclasses.asdict(search(None).config)
                result["samples"] = _samples(session, examples, outcome.predictions)
            yield name, {**result, "languages": tables[name]}


class Predictions:
    """(sources, forced beginnings, what the model is told) -> tokens. Remembers what it has decoded, so that the
    examples of many tasks can be decoded together before SeqIO asks for them one task at a time.

    Raises ValueError for a decoder alone, which is trained on targets without their sources.
    """

    def __init__(self, session: Session, search: Search):
        self._session, self._search = session, search
        self._known: dict[tuple[Told, tuple[bytes, bytes]], np.ndarray] = {}

    def learn(self, sources: Tokens, prompts: Tokens, told: Sequence[Told]) -> None:
        """Decodes what is not known yet. Randomness comes from the example itself, not from who stands beside it."""
        asked = zip(sources, prompts, told, strict=True)
        new = {(t, _key(s, p)): (s, p) for s, p, t in asked if (t, _key(s, p)) not in self._known}
        for first in sorted({start for (_, start), _ in new}):
            alike = {key: value for key, value in new.items() if key[0][1] == first}
            self._known.update(zip(alike, self._decoded(alike, first or None), strict=True))

    def _decoded(self, asked: Mapping[tuple[Told, tuple[bytes, bytes]], tuple], start: int | None) -> np.ndarray:
        if self._session.config.encoder is None:
            raise ValueError(
                f"{self._session.run.path} holds a decoder alone, which is trained on the targets of a task and never "
                "reads its inputs: what it would write says nothing. Evaluate tasks without metrics of written text"
            )
        generator = self._search(start)
        found = generator(
            self._session.params,
            [source for source, _ in asked.values()],
            prompts=[prompt for _, prompt in asked.values()],
            ids=[zlib.crc32(b"|".join(key)) & 0x7FFFFFFF for _, key in asked],
            languages=[language for (language, _), _ in asked],
            draft=self._session.draft_params(generator),
        )
        return found.tokens[:, 0]

    def __call__(self, sources: Tokens, prompts: Tokens, told: Sequence[Told]) -> np.ndarray:
        """int32 [examples, length]: the best result of each, beginning and end of sequence included."""
        self.learn(sources, prompts, told)
        return np.stack([self._known[t, _key(s, p)] for s, p, t in zip(sources, prompts, told, strict=True)])


def _scored(session: Session, sources: Tokens, targets: Tokens, told: Sequence[Told]) -> np.ndarray:
    """log P(target | source) of one task's examples, which all start alike."""
    languages, starts = zip(*told, strict=True)
    return session.score_tokens(sources, targets, languages, starts[0] or None)


def _told(example: Example) -> Told:
    return example.language, example.start


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
