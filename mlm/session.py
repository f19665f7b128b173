"""A trained model in a notebook: `mlm.load(run_dir)`, then `.generate(texts)`, `.score(pairs)`, `.evaluate(task)`.

    run = mlm.load("runs/quickstart")
    run.generate(["Where is the station?"], to="fr")
    run.score([("Good morning", "Bonjour")], to="fr")          # log P(target | source), nats
    run.evaluate("tatoeba.translate.en.fr", num_examples=100)  # metrics, loss and bits per byte by language

A run directory holds all that is needed: the model's shape, its vocabulary, the lengths and tasks it was trained with.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mlm.checkpoints import CheckpointConfig, Checkpointer, CheckpointError, CorruptCheckpoint
from mlm.checkpoints.run_directory import RunDirectory
from mlm.decoding.buckets import shards
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.scoring import Scorer
from mlm.evaluation.language_loss import LanguageLosses, Spelling, TokenLosses, language_losses
from mlm.evaluation.results import combine, language_table, totals
from mlm.models.config import ModelConfig, from_json
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, batch_sharding, constrain, make_mesh, shardings
from mlm.registry import nearest
from mlm.trees import count
from mlm.types import EOS_ID, Params

PARAMETERS = ("auto", "params", "ema")
PLACES = ("source", "target")
LOSS_ROWS = 16  # rows of a batch when losses are measured
SAMPLES = 5  # examples of a task that a result shows


@dataclass(frozen=True)
class Hypothesis:
    """text: decoded. score: log-probability in nats, for beam search over its length penalty. tokens: EOS included."""

    text: str
    score: float
    tokens: list[int]


@dataclass(frozen=True)
class Source:
    """tokens: what the encoder reads. trimmed: the text was longer than the model's inputs, and lost its end."""

    tokens: list[int]
    trimmed: bool


def load(
    run_dir: str | os.PathLike,
    step: int | str | None = None,
    *,
    parameters: str = "auto",
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 32,
    best_metric: str | None = None,
    best_mode: str = "min",
) -> "Session":
    """The model of a run directory.

    step: a checkpoint's number, "latest" (as None), or "best" by `best_metric` (default: the held-out loss).
    parameters: "ema", the running mean, "params", or "auto": the mean where the run kept one. mesh: how to split over
    the devices (default: rows over all); devices: some of them only. batch_size: examples per device call.
    Raises CheckpointError for a directory without a run or checkpoint, ValueError naming both hashes when the
    vocabulary is not the one that the model was trained with.
    """
    from mlm.data.vocabulary import check_same_vocabulary, load_vocabulary

    if parameters not in PARAMETERS:
        raise ValueError(f"parameters={parameters!r} is not one of {PARAMETERS}; {nearest(parameters, PARAMETERS)}")
    run = RunDirectory(run_dir)
    config, data = from_json(run.read_json("model.json")), run.read_json("data.json")
    vocabulary = load_vocabulary(run / data["vocabulary"])
    check_same_vocabulary(data["vocabulary_digest"], vocabulary, f"{run / 'data.json'}, written by the training", "now")
    if vocabulary.vocab_size > config.vocab_size:
        raise ValueError(f"{vocabulary} has more ids than the model's table of {config.vocab_size} rows")

    grid = make_mesh(mesh or MeshConfig(), devices)
    model = Transformer(config, constrain(grid))
    shapes = model.shapes()
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, model.axes(), grid),
    )
    metric = best_metric or f"{data.get('evaluation_split', 'validation')}/loss"
    retention = CheckpointConfig(best_metric=metric, best_mode=best_mode)
    checkpoints = Checkpointer(str(run.checkpoints), retention, read_only=True)
    number = _step(checkpoints, step, metric)
    subtree = _subtree(checkpoints, number, parameters)
    restored = checkpoints.restore_params(number, wanted, subtree)
    return Session(
        run=run,
        step=restored.step,
        parameters=subtree,
        config=config,
        data=data,
        extra=restored.extra,
        vocabulary=vocabulary,
        model=model,
        params=restored.state,
        rows=batch_sharding(grid),
        batch_size=batch_size,
    )


class Session:
    """A model with its parameters and vocabulary. Made by `load`; compiled programs are kept for the next call.

    Texts are cleaned and encoded as the training tasks do it. A text longer than the run's inputs loses its end, with a
    warning. language_token says where a target language stands: first in the "source", as the translation tasks put it,
    or forced first in the "target".
    """

    def __init__(
        self,
        *,
        run: RunDirectory,
        step: int,
        parameters: str,
        config: ModelConfig,
        data: Mapping[str, Any],
        extra: Mapping[str, Any],
        vocabulary: Any,
        model: Transformer,
        params: Params,
        rows: jax.sharding.NamedSharding,
        batch_size: int,
    ):
        self.run, self.step, self.parameters, self.config = run, step, parameters, config
        self.data, self.extra, self.vocabulary = data, extra, vocabulary
        self.model, self.params = model, params
        self._rows, self._batch_size = rows, batch_size
        self._generators: dict[DecodeConfig, Generator] = {}
        self._scorer = Scorer(model, rows=rows, batch_size=batch_size)
        self._token_losses = TokenLosses(model, rows=rows)

    def __repr__(self) -> str:
        kind = "running mean of the parameters" if self.parameters == "ema" else "parameters"
        return (
            f"Session of {self.run.path}, step {self.step} ({count(self.params):,} {kind})\n"
            f"  trained on {self.data['mixture']!r}: up to {self.data['inputs_length']} tokens in, "
            f"{self.data['targets_length']} out\n"
            f"  vocabulary {self.data['vocabulary']}: {self.vocabulary.vocab_size:,} ids, "
            f"{len(self.languages)} language tokens\n"
            f'  .generate(texts, to="fr")   .score(pairs, to="fr")   .evaluate(task)   .languages'
        )

    @property
    def languages(self) -> list[str]:
        """Codes that `to` accepts: the languages that have a token."""
        return sorted(self.vocabulary.language_tokens)

    def generate(
        self,
        texts: str | Sequence[str],
        to: str | None = None,
        method: str = "greedy",
        *,
        language_token: str = "source",
        **options: Any,
    ) -> list:
        """Decoded texts, in order; with n_best > 1 a list of texts for each, best first.

        to: language to write. Without it a text may hold special tokens, as in "The <extra_id_0> sat on the mat".
        options: those of `DecodeConfig`: beams, alpha, n_best, temperature, top_k, top_p, max_length, seed, …
        Raises ValueError for an empty text, KeyError for a language without a token or an unknown method.
        """
        found = self.decode(texts, to, method, language_token=language_token, **options)
        single = options.get("n_best", 1) == 1
        return [best[0].text if single else [h.text for h in best] for best in found]

    def decode(
        self,
        texts: str | Sequence[str] | Sequence[Source],
        to: str | None = None,
        method: str = "greedy",
        *,
        language_token: str = "source",
        ids: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """As `generate`, with scores and tokens.

        texts: or what `encode` made of them. ids: numbers of the texts, the source of their randomness.
        """
        encoded = [text for text in texts if isinstance(text, Source)]
        sources = [s.tokens for s in encoded or self.encode(texts, to, language_token=language_token)]
        prompts = None
        if to is not None and language_token == "target":
            prompts = [[self.vocabulary.language_token(to)]] * len(sources)
        skip = 0 if prompts is None else 1
        decoded = self._generator(method, options)(self.params, sources, prompts=prompts, ids=ids)
        return [
            [
                Hypothesis(self._text(tokens[skip:length]), float(score), tokens[:length].tolist())
                for tokens, score, length in zip(*row, strict=True)
                if length
            ]
            for row in zip(decoded.tokens, decoded.scores, decoded.lengths, strict=True)
        ]

    def score(
        self, pairs: Iterable[tuple[str, str]], to: str | None = None, *, language_token: str = "source"
    ) -> np.ndarray:
        """log P(target, EOS | source) of (source, target) texts, in nats; float32 [pairs]. `to` as in `generate`.

        Raises ValueError for an empty source or target.
        """
        pairs = list(pairs)
        sources = [s.tokens for s in self.encode([source for source, _ in pairs], to, language_token=language_token)]
        targets = [[*self._tokens(i, "target", target, to), EOS_ID] for i, (_, target) in enumerate(pairs)]
        if to is None or language_token == "source":
            return self._scorer(self.params, sources, targets).totals
        token = self.vocabulary.language_token(to)  # given, so its own probability does not count
        found = self._scorer(self.params, sources, [[token, *target] for target in targets])
        return found.totals - found.tokens[:, 0]

    def evaluate(
        self,
        task: str | None = None,
        split: str = "validation",
        num_examples: int | None = None,
        method: str = "greedy",
        **options: Any,
    ) -> dict[str, Any]:
        """Metrics of a task, and loss and bits per byte by language; plain values, ready for JSON.

        task: a task or mixture, default: the run's mixture (then its tasks' results stand under "tasks").
        num_examples: of each task, the first ones. method, options: how predictions are decoded.
        Raises KeyError with the nearest names for an unknown task, ValueError for a split without examples.
        """
        name = task or self.data["mixture"]
        results = dict(self.evaluate_each(self.tasks(name, split), split, num_examples, method, **options))
        if list(results) == [name]:
            return results[name]
        table = combine(result["languages"] for result in results.values())
        return {**self._about(name, split), **totals(table), "languages": table, "tasks": results}

    def evaluate_each(
        self,
        tasks: Sequence[str],
        split: str = "validation",
        num_examples: int | None = None,
        method: str = "greedy",
        **options: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(task, what `evaluate` says of it) one by one: first the losses of all of them, then the metrics of each."""
        from mlm.data.evaluator import compute_metrics
        from mlm.data.languages import LANGUAGES

        self._load_tasks()
        generator = self._generator(method, options)
        read = self._read(tasks, split, num_examples)
        for name in tasks:
            outcome = compute_metrics(
                name,
                self.vocabulary,
                self._lengths(),
                predict=lambda sources, prompts: generator(self.params, sources, prompts=prompts).tokens[:, 0],
                score=lambda sources, targets: self._scorer(self.params, sources, targets).totals,
                split=split,
                num_examples=num_examples,
            )
            table = language_table(read[name].losses, [language.code for language in LANGUAGES])
            result = {**self._about(name, split), "examples": read[name].count, **totals(table)}
            result["metrics"] = outcome.metrics
            if outcome.predictions:
                result["decode"] = dataclasses.asdict(generator.config)
                result["samples"] = [
                    {"inputs": self._text(e.inputs), "targets": self._text(e.targets), "prediction": prediction}
                    for e, prediction in zip(read[name].samples, outcome.predictions, strict=False)
                ]
            yield name, {**result, "languages": table}

    def tasks(self, name: str | None = None, split: str = "validation") -> list[str]:
        """The tasks of a mixture (default: the run's) that have the split."""
        from mlm.data.evaluator import task_names

        self._load_tasks()
        return task_names(name or self.data["mixture"], split)

    def language_losses(
        self, batches: Iterable[Mapping[str, np.ndarray]], params: Params | None = None
    ) -> LanguageLosses:
        """Sums by language id over rows (`mlm.types.ROW_FEATURES`). params: others than its own, e.g. `untrained()`."""
        from mlm.data.languages import LANGUAGES

        nll = partial(self._token_losses, self.params if params is None else params)
        return language_losses(nll, batches, self.spelling(), languages=len(LANGUAGES))

    def spelling(self) -> Spelling:
        """What each id writes, over all rows of the model's table."""
        from mlm.data.spelling import spelled_bytes

        spare = self.config.vocab_size - self.vocabulary.vocab_size
        return Spelling(*(np.pad(values, (0, spare)) for values in spelled_bytes(self.vocabulary)))

    def untrained(self, seed: int = 0) -> Params:
        """Fresh parameters of the same model, split over the devices like the trained ones."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return jax.jit(self.model.init, out_shardings=placed)(jax.random.key(seed))

    def encode(
        self, texts: str | Sequence[str], to: str | None = None, *, language_token: str = "source"
    ) -> list[Source]:
        """What the encoder reads for each text: the language token if it stands in the source, the text, EOS."""
        if language_token not in PLACES:
            raise ValueError(f"language_token={language_token!r} is not one of {PLACES}")
        first = [self.vocabulary.language_token(to)] if to is not None and language_token == "source" else []
        room = self.data["inputs_length"] - 1 - len(first)
        sources = []
        for index, text in enumerate([texts] if isinstance(texts, str) else texts):
            tokens = self._tokens(index, "text", text, to)
            sources.append(Source([*first, *tokens[:room], EOS_ID], len(tokens) > room))
        trimmed = [i for i, source in enumerate(sources) if source.trimmed]
        if trimmed:
            warnings.warn(
                f"{len(trimmed)} of {len(sources)} texts are longer than the {self.data['inputs_length']} tokens that "
                f"the model reads and lose their ends (first: text {trimmed[0]})",
                stacklevel=3,
            )
        return sources

    def _tokens(self, index: int, kind: str, text: str, to: str | None) -> list[int]:
        from mlm.data.preprocessors import clean_line

        cleaned = clean_line(text)
        tokens = self.vocabulary.encode(cleaned) if to is not None else self.vocabulary.encode_prompt(cleaned)
        if not tokens:
            raise ValueError(f"{kind} {index} is empty: {text!r}")
        return [int(token) for token in tokens]

    def _text(self, tokens: np.ndarray) -> str:
        return self.vocabulary.decode([int(token) for token in tokens])

    def _generator(self, method: str, options: Mapping[str, Any]) -> Generator:
        try:
            config = DecodeConfig(**{"method": method, "max_length": self.data["targets_length"], **options})
        except TypeError:
            known = DecodeConfig.__dataclass_fields__
            wrong = next(name for name in options if name not in known)
            raise ValueError(f"no decoding option {wrong!r}; {nearest(wrong, known)}") from None
        if config not in self._generators:
            self._generators[config] = Generator(self.model, config, rows=self._rows, batch_size=self._batch_size)
        return self._generators[config]

    def _load_tasks(self) -> None:
        from mlm.data.registration import load_tasks

        load_tasks(*self.data.get("task_modules", ()))

    def _about(self, name: str, split: str) -> dict[str, Any]:
        return {
            "task": name,
            "split": split,
            "run": str(self.run.path),
            "step": self.step,
            "parameters": self.parameters,
            "vocabulary": self.vocabulary.digest,
        }

    def _lengths(self) -> Any:
        from mlm.data.recipes import Lengths

        return Lengths(self.data["inputs_length"], self.data["targets_length"])

    def _read(self, tasks: Sequence[str], split: str, num_examples: int | None) -> dict[str, "_Read"]:
        """One pass over all tasks, their examples packed together, the sums kept apart by task and language."""
        from mlm.data.evaluator import packed_batches, read_examples
        from mlm.data.languages import LANGUAGES

        read: dict[str, _Read] = {}

        def examples() -> Iterator[Any]:
            found = read_examples(tasks, self.vocabulary, self._lengths(), split, num_examples)
            for name, of_task in found:
                read[name] = _Read(len(of_task), of_task[:SAMPLES])
                yield from of_task

        def batches() -> Iterator[dict[str, np.ndarray]]:
            rows = -(-LOSS_ROWS // shards(self._rows)) * shards(self._rows)
            for batch in packed_batches(examples(), self._lengths(), rows):
                both = batch["decoder_task_ids"] * len(LANGUAGES) + batch["decoder_language_ids"]
                yield {**batch, "decoder_language_ids": both}

        nll = partial(self._token_losses, self.params)
        groups = (len(tasks) + 1) * len(LANGUAGES)  # tasks count from 1
        sums = language_losses(nll, batches(), self.spelling(), languages=groups)
        for number, name in enumerate(tasks, start=1):
            own = slice(number * len(LANGUAGES), (number + 1) * len(LANGUAGES))
            read[name].losses = LanguageLosses(*(getattr(sums, f.name)[own] for f in dataclasses.fields(sums)))
        return read


@dataclass
class _Read:
    """What one pass over a task's examples leaves."""

    count: int
    samples: list[Any]
    losses: LanguageLosses | None = None


def _step(checkpoints: Checkpointer, step: int | str | None, metric: str) -> int | None:
    if step is None or step == "latest":
        return None
    if step == "best":
        best = checkpoints.best()
        if best is None:
            stored = sorted({name for s in checkpoints.steps() for name in checkpoints.record(s)["metrics"]})
            raise CheckpointError(
                f"no checkpoint in {checkpoints.directory} has the metric {metric!r}; {nearest(metric, stored)}"
            )
        return best
    if isinstance(step, bool) or not str(step).isdigit():
        raise ValueError(f"step={step!r} must be a checkpoint's number, 'latest' or 'best'")
    return int(step)


def _subtree(checkpoints: Checkpointer, step: int | None, parameters: str) -> str:
    if parameters != "auto":
        return parameters
    for candidate in reversed(checkpoints.steps()) if step is None else [step]:
        try:
            leaves = checkpoints.record(candidate)["leaves"]
        except CorruptCheckpoint:  # restoring falls back to an older one, and says so
            continue
        return "ema" if any(name.startswith("ema/") for name in leaves) else "params"
    return "params"
