"""The same tasks decoded in many ways: their examples are read once, and decoding alone is timed."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm.data.evaluator import predicts, read_examples
from mlm.data.recipes import Lengths
from mlm.decoding.buckets import pad
from mlm.decoding.generate import Generator
from mlm.decoding.state import Decoded
from mlm.evaluation.results import numbers
from mlm.session.evaluating import Predictions, check_sources_are_read, outcome_of
from mlm.session.session import Session
from mlm.types import Params


class Trial(NamedTuple):
    """One task decoded in one way. metrics: by name, signatures among them. tokens: written by the best result of each
    example, the end of sequence included and what was forced first not. seconds: of decoding, nothing being compiled.
    """

    metrics: dict[str, float | str]
    examples: int
    tokens: int
    seconds: float
    passes: int


class Trials:
    """Reads the examples of tasks and decodes them as often as asked.

    num_examples: the first ones of each task; None: all. Raises ValueError for a task without metrics of decoded text,
    for one without an example in the split, and for a decoder alone.
    """

    def __init__(self, session: Session, tasks: Sequence[str], split: str, num_examples: int | None = None):
        if silent := [name for name in tasks if not predicts(name)]:
            raise ValueError(
                f"{', '.join(silent)}: no metric of decoded text, so that no way to decode is better than another; "
                "choose tasks with such metric functions"
            )
        self._session, self._split, self._num_examples = session, split, num_examples
        self._lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
        check_sources_are_read(session)
        template = session.own_template
        self._examples = dict(read_examples(tasks, session.vocabulary, self._lengths, split, num_examples, template))

    def metrics(self, task: str) -> list[str]:
        """Names of the task's metrics that are numbers. Nothing is decoded: a source passes for its own translation."""

        def copied(sources: Sequence, *_: Any) -> np.ndarray:
            return pad(sources, len(sources), max(map(len, sources)))

        return list(numbers(self._outcome(task, copied)))

    def __call__(self, task: str, generator: Generator) -> Trial:
        """Raises ValueError for what the model or its examples cannot be decoded with."""
        start = self._examples[task][0].start  # all of a task begin alike
        clock = _Clock(self._session.beginning(generator, start or None))
        metrics = self._outcome(task, Predictions(self._session, generator, lambda _: clock))
        return Trial(metrics, len(self._examples[task]), clock.tokens, clock.seconds, clock.passes)

    def _outcome(self, task: str, predict: Any) -> dict[str, float | str]:
        examples = self._examples[task]
        given = (self._lengths, self._split, self._num_examples)
        return outcome_of(self._session, task, examples, predict, *given).metrics


class _Clock:
    """A generator that adds up its tokens, seconds and passes. A call that compiled is made again, so that the time is
    that of decoding.
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self.tokens = self.passes = 0
        self.seconds = 0.0

    def __call__(self, params: Params, sources: Sequence, **others: Any) -> Decoded:
        compiled = self._generator.compilations
        found, seconds = self._timed(params, sources, **others)
        if self._generator.compilations > compiled:
            found, seconds = self._timed(params, sources, **others)
        self.tokens += int(found.lengths[:, 0].sum()) - sum(map(len, others["prompts"]))
        self.seconds += seconds
        self.passes += int(found.passes.sum())
        return found

    def _timed(self, params: Params, sources: Sequence, **others: Any) -> tuple[Decoded, float]:
        began = time.perf_counter()
        found = self._generator(params, sources, **others)
        return found, time.perf_counter() - began
