"""Choosers: each reads what was asked and all results, and says in which order they stand, and by what value.

The rules themselves are functions of arrays: `mlm.evaluation.choosing`. Here they meet a run, and their options.
"""

import dataclasses
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlm.data.templates import FROM, PLACES, TO
from mlm.decoding.config import DecodeConfig
from mlm.evaluation.choosing import energy
from mlm.evaluation.choosing.agreement import last_match, votes
from mlm.evaluation.choosing.bayes_risk import expected_utilities, some
from mlm.evaluation.choosing.noisy_channel import Parts, Weights, channel_scores
from mlm.evaluation.choosing.utilities import aggregated_chrf, utility
from mlm.session.records import Asked, Hypothesis
from mlm.session.session import Session
from mlm.types import EOS_ID

Results = Sequence[Sequence[Hypothesis]]  # of every source


class Choice(NamedTuple):
    """order: numbers of the n results of a source, the chosen one first. values: of the results as they were given."""

    order: np.ndarray
    values: np.ndarray


class Chooser(ABC):
    """A frozen dataclass: its fields are its options, text, numbers and truth values; those that `runs` names are run
    directories, or "" for the run that decodes.
    """

    runs: tuple[str, ...] = ()

    def check(self, asked: Asked) -> None:
        """Raises ValueError where it cannot choose among such results; before they are made."""
        for name in self.runs:
            self.run(name, asked.session)

    def run(self, name: str, own: Session) -> Session:
        path = getattr(self, name)
        return own.companion(path) if path else own

    @abstractmethod
    def __call__(self, asked: Asked, found: Results) -> list[Choice]: ...


@dataclass(frozen=True, kw_only=True)
class MinimumBayesRisk(Chooser):
    """The highest mean utility against the other results; its value is that mean, per cent.

    utility: a metric of two texts. references: so many of the results, drawn for each source by `seed` (0: all).
    aggregate: against the mean n-gram counts of the references, for chrF.
    """

    utility: str = "chrf"
    references: int = 0
    aggregate: bool = False
    seed: int = 0

    def __post_init__(self):
        utility(self.utility)
        if self.references < 0 or self.seed < 0:
            raise ValueError(f"references={self.references} and seed={self.seed} must be at least 0")
        if self.seed and not self.references:
            raise ValueError(
                f"seed={self.seed} draws references, and references=0 takes all; give a number, or no seed"
            )
        if self.aggregate and self.utility != "chrf":
            raise ValueError(f"aggregate=True is for utility='chrf', whose counts have a mean; not {self.utility!r}")

    def __call__(self, asked: Asked, found: Results) -> list[Choice]:
        table = utility(self.utility, asked.to or "")
        choices = []
        for number, results in zip(asked.ids, found, strict=True):
            texts = [result.text for result in results]
            size = self.references or len(texts)
            references = [texts[i] for i in some(len(texts), size, seed=self.seed, example=number)]
            means = aggregated_chrf if self.aggregate else lambda h, r: expected_utilities(h, r, table)
            choices.append(_highest(means(texts, references)))
        return choices


@dataclass(frozen=True, kw_only=True)
class SelfConsistency(Chooser):
    """The most probable of the results that end in the answer of most; its value is the share of that answer.

    answer: regular expression; an answer is its last match, or what its first group holds of it.
    """

    answer: str = ""

    def __post_init__(self):
        if not self.answer:
            raise ValueError(r"say what an answer looks like, by answer=EXPRESSION, as answer=answer is (\d+)")
        try:
            re.compile(self.answer)
        except re.error as error:
            raise ValueError(f"answer={self.answer!r} is no regular expression: {error}") from error

    def __call__(self, asked: Asked, found: Results) -> list[Choice]:
        answer = last_match(self.answer)
        return [_highest(votes([answer(result.text) for result in results])) for results in found]


@dataclass(frozen=True, kw_only=True)
class NoisyChannel(Chooser):
    """log p(y|x)/|y| + channel · log p(x|y)/|x| + language_model · log p(y)/|y| + length · |y|, in nats.

    p(x|y): the same run with the languages swapped, or channel_run; back: the language of the sources, where the run is
    not told it (from_). p(y): the same run without a source, or language_model_run. A weight of 0 costs nothing.
    """

    channel: float = 1.0
    language_model: float = 1.0
    length: float = 0.0
    back: str = ""
    channel_run: str = ""
    language_model_run: str = ""
    runs = ("channel_run", "language_model_run")

    def __post_init__(self):
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be finite: {self.weights}")
        for weight, ignored in (("channel", ("back", "channel_run")), ("language_model", ("language_model_run",))):
            for option in ignored:
                if getattr(self, option) and not getattr(self, weight):
                    raise ValueError(f"{option}={getattr(self, option)!r} means nothing to {weight}=0")

    @property
    def weights(self) -> Weights:
        return Weights(self.channel, self.language_model, self.length)

    def check(self, asked: Asked) -> None:
        super().check(asked)
        if self.channel and not self.channel_run and not (asked.to and (self.back or asked.from_)):
            raise ValueError(
                "the noisy channel translates back: name both languages, the one to be written (to, --to) and that of "
                "the sources (from_, --from, or back= where the model is not told it), or a run that does, channel_run="
            )
        asked.session.log_probs(asked.frame, [], [])
        self._back(asked, [])
        self._model(asked, [])

    def __call__(self, asked: Asked, found: Results) -> list[Choice]:
        return [_highest(channel_scores(parts, self.weights)) for parts in self.parts(asked, found)]

    def parts(self, asked: Asked, found: Results) -> list[Parts]:
        """What the formula weighs, of every source; zeros for what has no weight."""
        texts = [
            (source, result.text) for source, results in zip(asked.texts, found, strict=True) for result in results
        ]
        around = len(asked.frame.before) + len(asked.frame.after)
        counts = [len(results) for results in found]
        direct = _split(result_log_probs(asked, found), counts)
        back = _split(self._back(asked, texts), counts)
        model = _split(self._model(asked, [text for _, text in texts]), counts)
        parts = []
        for number, (results, skip, source) in enumerate(zip(found, asked.skips, asked.sources, strict=True)):
            lengths = np.array([len(result.tokens) - skip for result in results])
            size = len(source) - around + 1  # EOS ends the source, too, where it is written
            parts.append(Parts(direct[number], back[number], model[number], lengths, size))
        return parts

    def _back(self, asked: Asked, texts: Sequence[tuple[str, str]]) -> np.ndarray:
        if not self.channel:
            return np.zeros(len(texts))
        told = asked.language_token if not self.channel_run else None
        run = self.run("channel_run", asked.session)
        pairs = [(text, source) for source, text in texts]
        return run.score(pairs, **_told(run, self.back or asked.from_, asked.to, told), empty=True)

    def _model(self, asked: Asked, texts: Sequence[str]) -> np.ndarray:
        if not self.language_model:
            return np.zeros(len(texts))
        run = self.run("language_model_run", asked.session)
        told = asked.language_token if not self.language_model_run else None
        return language_model(run, texts, **_told(run, asked.to, asked.from_ or self.back, told))[0]


@dataclass(frozen=True, kw_only=True)
class Relevance(Chooser):
    """The highest dot product of the vectors of source and result; its value is that product. No likelihood is in it.

    embedder: a run whose encoder makes the vectors, means of its states; it takes one trained to tell a text's true
    continuation from others for this to mean more than likeness. prefix_tag, suffix_tag: written before sources and
    results, so that one encoder can tell them apart.
    """

    embedder: str = ""
    prefix_tag: str = ""
    suffix_tag: str = ""
    runs = ("embedder",)

    def check(self, asked: Asked) -> None:
        super().check(asked)
        self.run("embedder", asked.session).embed([])

    def __call__(self, asked: Asked, found: Results) -> list[Choice]:
        embed = self.run("embedder", asked.session).embed
        prefixes = embed([self.prefix_tag + text for text in asked.texts])
        suffixes = embed([self.suffix_tag + result.text for results in found for result in results])
        grouped = _split(suffixes, [len(results) for results in found])
        return [_highest((own @ prefix).astype(np.float64)) for prefix, own in zip(prefixes, grouped, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Energy(Chooser):
    """A draw with the weights exp(-μ · f), so that statistics of the texts become those that μ was fitted to; its value
    is the log of the weight, nats.

    mu: statistic -> its μ ("sr2", "tr16", "div", "coh", "eent": `mlm.evaluation.choosing.energy`), or a JSON file of
    that, as `fit_energy(…).write` makes them. seed: of the draw. embedder: the run whose vectors "coh" compares;
    evaluator: the run whose perplexity "eent" is.
    """

    mu: str | Mapping[str, float] = ""
    seed: int = 0
    embedder: str = ""
    evaluator: str = ""
    runs = ("embedder", "evaluator")

    def __post_init__(self):
        mu = _read_mu(self.mu) if isinstance(self.mu, str) else dict(self.mu)
        if not isinstance(mu, dict) or not mu or not all(map(_finite, mu.values())):
            raise ValueError(f"mu={mu!r} must give each statistic of a text a finite number, as {{'sr3': 4.5}}")
        energy.check_features(list(mu))
        object.__setattr__(self, "mu", mu)  # a file may change, and what is chosen by is part of a result
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        for run, user in (("embedder", "coh"), ("evaluator", "eent")):
            if getattr(self, run) and user not in self.mu:
                raise ValueError(f"{run}={getattr(self, run)!r} is for {user!r}, which mu does not weigh: {self.mu}")

    def check(self, asked: Asked) -> None:
        super().check(asked)
        check_pure(asked.generator.config)
        self.features(asked, [])
        corrections(asked, [])

    def __call__(self, asked: Asked, found: Results) -> list[Choice]:
        assert isinstance(self.mu, dict)
        mu = np.array(list(self.mu.values()), np.float64)
        features, base = self.features(asked, found), corrections(asked, found)
        weights = [energy.log_weights(own, mu, its) for own, its in zip(features, base, strict=True)]
        return [
            Choice(energy.resampled(own, seed=self.seed, example=number), own)
            for number, own in zip(asked.ids, weights, strict=True)
        ]

    def features(self, asked: Asked, found: Results) -> list[np.ndarray]:
        """[n, m] of every source: the statistics that mu names, of each result."""
        counts = np.array([len(results) for results in found], np.int64)
        texts = [result.text for results in found for result in results]
        written = [
            result.tokens[skip : -1 if result.tokens[-1] == EOS_ID else None]
            for skip, results in zip(asked.skips, found, strict=True)
            for result in results
        ]
        columns = []
        for name in self.mu:
            if name == "coh":
                embed = self.run("embedder", asked.session).embed
                column = energy.coherence(np.repeat(embed(asked.texts), counts, axis=0), embed(texts))
            elif name == "eent":
                run = self.run("evaluator", asked.session)
                told = asked.language_token if not self.evaluator else None
                spoken = language_model(run, texts, **_told(run, asked.to, asked.from_, told))
                column = energy.exponential_entropy(*spoken)
            else:
                column = np.array([energy.of_tokens(name, tokens) for tokens in written])
            columns.append(column.astype(np.float64))
        return _split(np.stack(columns, axis=1), counts)

    def write(self, path: str | Path) -> None:
        """mu as the JSON file that the option takes."""
        Path(path).write_text(json.dumps(self.mu, indent=1) + "\n")


def check_pure(config: DecodeConfig) -> None:
    """Raises ValueError for anything but samples of the model, at a temperature."""
    kept = ("n_best", "seed", "temperature", "max_length", "proposer", "guesses", "branches", "mask_token")
    pure = DecodeConfig(method="sample", **{name: getattr(config, name) for name in kept})
    differ = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(pure, field.name)
    ]
    if differ:
        raise ValueError(
            f"energy re-samples what method='sample' draws from the model, at a temperature at most, as only then are "
            f"the weights known; leave out {', '.join(differ)}"
        )


def corrections(asked: Asked, found: Results) -> list[np.ndarray]:
    """log p - log q of samples: 0 where they are drawn from the model p, else by softmax(logits / temperature)."""
    temperature, counts = asked.generator.config.temperature, [len(results) for results in found]
    if temperature == 1:
        return [np.zeros(count) for count in counts]
    drawn = result_log_probs(asked, found, temperature)
    own = np.array([result.score for results in found for result in results])
    return _split(own - drawn, counts)


def result_log_probs(asked: Asked, found: Results, temperature: float = 1.0) -> np.ndarray:
    """log p(y|x) of all results in a row, in nats, whatever their scores are."""
    counts = [len(results) for results in found]
    sources = [source for source, count in zip(asked.sources, counts, strict=True) for _ in range(count)]
    languages = None if asked.languages is None else np.repeat(asked.languages, counts).tolist()
    sizes = [skip - len(asked.frame.prompt) for skip in asked.skips]  # of the source that a decoder alone begins with
    targets = [result.tokens[size:] for size, results in zip(sizes, found, strict=True) for result in results]
    return asked.session.log_probs(asked.frame, sources, targets, languages, temperature).astype(np.float64)


def language_model(run: Session, texts: Sequence[str], **told: Any) -> tuple[np.ndarray, np.ndarray]:
    """(log p(text, EOS) without a source, in nats, tokens that this is the sum over), of every text."""
    scores = run.score([("", text) for text in texts], **told, empty=True).astype(np.float64)
    return scores, np.array([len(run.tokens(text, told["to"])) + 1 for text in texts], np.int64)


def _told(run: Session, to: str | None, from_: str | None, language_token: str | None) -> dict[str, Any]:
    """The languages, as far as the run has a place for them."""
    asks = (run.template if language_token is None else PLACES[language_token]).asks_for
    known = {"to": to if TO in asks else None, "from_": from_ if FROM in asks else None}
    return {**{name: code or None for name, code in known.items()}, "language_token": language_token}


def _highest(values: np.ndarray) -> Choice:
    """Of equal values the earlier result, which is the more probable one, comes first."""
    return Choice(np.argsort(-values, kind="stable"), values)


def _split(values: np.ndarray, counts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(counts)[:-1]) if len(counts) else []


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_mu(path: str) -> Any:
    if not path:
        raise ValueError("say what the energy weighs, by mu=FILE.json, as fit_energy writes it")
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"mu={path!r} cannot be read as JSON: {error}") from error
