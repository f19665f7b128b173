"""A model with its parameters and vocabulary, asked in texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Key

from mlm.checkpoints.run_directory import RunDirectory
from mlm.data.prompts import USUAL_FORM, Example, Format, Pool
from mlm.data.templates import FROM, TO, Frame
from mlm.decoding.any_subset import Filler
from mlm.decoding.config import PHRASES, DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.ngrams import Trigrams
from mlm.decoding.phrases import stop_size
from mlm.decoding.proposers import PROPOSERS
from mlm.decoding.scoring import Scorer, Scores, mean_probability, together
from mlm.evaluation.embedding import Embedder
from mlm.evaluation.language_loss import LanguageLosses, Spelling, TokenLosses, language_losses
from mlm.evaluation.results import combine, totals
from mlm.models.config import ModelConfig
from mlm.models.quantisation import quantised
from mlm.models.transformer import Transformer
from mlm.registry import nearest
from mlm.session.language_control import against, by_language, token_counts
from mlm.session.reading import Reader
from mlm.session.records import Asked, FilledText, Hypothesis, Ranked, Source
from mlm.trees import count
from mlm.types import EOS_ID, Params

if TYPE_CHECKING:
    from mlm.session.choosers import Chooser
    from mlm.session.phrases import Phrase


class Session(Reader):
    """A model with its parameters and vocabulary. Made by `load`; compiled programs are kept for the next call.

    How texts are read, and where languages are named, says `Reader`. With an ensemble, all its models write, score and
    are evaluated as one.
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
        quantise: str | None = None,
        draft: "Session | None" = None,
        ensemble: Sequence["Session"] = (),
        contrast: "Session | None" = None,
        table: Trigrams | None = None,
    ):
        super().__init__(config, data, vocabulary)
        self.run, self.step, self.parameters, self.extra = run, step, parameters, extra
        self.model, self.params = model, params
        self.rows, self._batch_size = rows, batch_size
        self.quantise, self.draft, self.ensemble, self.contrast = quantise, draft, tuple(ensemble), contrast
        self.table = table
        self._generators: dict[tuple[DecodeConfig, int | None], Generator] = {}
        self._scorers: dict[tuple[int | None, float], Scorer] = {}
        self._fillers: dict[tuple, Filler] = {}
        self._embedder = Embedder(model, rows=rows, batch_size=batch_size)
        self._companions: dict[str, Session] = {}
        self._token_losses = TokenLosses(model, rows=rows)

    def __repr__(self) -> str:
        example = ", ".join({TO: 'to="fr"', FROM: 'from_="en"'}[name] for name in reversed(self.template.asks_for))
        asked = f", {example}" if example else ""
        kind = "running mean of the parameters" if self.parameters == "ema" else "parameters"
        kind += f", layers as {self.quantise}" if self.quantise else ""
        kind += "".join(f", with {member.name}" for member in self.ensemble)
        return (
            f"Session of {self.run.path}, step {self.step} ({count(self.model.shapes()):,} {kind})\n"
            f"  trained on {self.data['mixture']!r}: up to {self.data['inputs_length']} tokens in, "
            f"{self.data['targets_length']} out\n"
            f"  vocabulary {self.data['vocabulary']}: {self.vocabulary.vocab_size:,} ids, "
            f"{len(self.languages)} language tokens\n"
            f"  .generate(texts{asked})   .score(pairs{asked})   .evaluate(task)   .languages"
        )

    @property
    def name(self) -> str:
        """Where the parameters come from, as `load` finds them again."""
        return f"{self.run.path.absolute()}@{self.step}"

    def generate(
        self,
        texts: str | Sequence[str],
        to: str | None = None,
        method: str = "greedy",
        *,
        from_: str | None = None,
        language_token: str | None = None,
        choose: "str | Chooser | None" = None,
        **options: Any,
    ) -> list:
        """Decoded texts, in order; with n_best > 1 a list of texts for each, best first, or the chosen one.

        to: language to write. Without it a text may hold special tokens, as in "The <extra_id_0> sat on the mat".
        from_: language of the texts. method, options: those of `DecodeConfig`: beams, alpha, n_best, temperature,
        top_k, top_p, no_repeat_ngram, proposer, max_length, seed, …; bad_words and stop: texts that are not written, or
        behind which a result ends; `mlm decode list` names them all. phrases, avoid: as in `ask`.
        choose: how one of n_best results is chosen, as "mbr" or "mbr,utility=bleu" (`mlm.session.choosing`).
        Against words of other languages than `to`: language_mask=True, and `contrast_to`, see `decode`.
        Raises ValueError for an empty text, a missing language, or one that the model is not told, KeyError for a
        language without a token or an unknown method.
        """
        found = self.decode(texts, to, method, from_=from_, language_token=language_token, choose=choose, **options)
        single = options.get("n_best", 1) == 1 or choose is not None
        return [best[0].text if single else [h.text for h in best] for best in found]

    def decode(
        self,
        texts: str | Sequence[str] | Sequence[Source],
        to: str | None = None,
        method: str = "greedy",
        *,
        from_: str | None = None,
        language_token: str | None = None,
        ids: Sequence[int] | None = None,
        languages: Sequence[int] | None = None,
        contrast_to: str | None = None,
        choose: "str | Chooser | None" = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """As `generate`, with scores and tokens; with `choose` all results, the chosen one first, with their values.

        texts: or what `encode` made of them. ids: numbers of the texts, the source of their randomness. languages: ids
        of the languages that are to be written, where they are not all `to`. contrast_to: away from what the model
        would write when told this language, or "none" (contrast="language"; contrast_alpha and contrast_beta say how
        far). language_mask=True: only tokens of `to`, as the run's training text has them. phrases, avoid:
        as in `ask`.
        """
        told = {"from_": from_, "language_token": language_token, "contrast_to": contrast_to}
        asked = self.ask(texts, to, method, ids=ids, languages=languages, **told, **options)
        if choose is not None:
            from mlm.session.choosing import checked, chosen

            return chosen(checked(choose, asked), asked, self.answer(asked))
        return self.answer(asked)

    def ask(
        self,
        texts: str | Sequence[str] | Sequence[Source] = (),
        to: str | None = None,
        method: str = "greedy",
        *,
        from_: str | None = None,
        language_token: str | None = None,
        ids: Sequence[int] | None = None,
        languages: Sequence[int] | None = None,
        phrases: "Sequence[Sequence[Phrase]] | None" = None,
        avoid: "Sequence[Sequence[Phrase]] | None" = None,
        contrast_to: str | None = None,
        **options: Any,
    ) -> Asked:
        """What `decode` gives to the model. Raises as it does.

        phrases: for each text those that its result must hold (method="constrained_beam"). avoid: for each text those
        that it may not hold.
        """
        from mlm.session.phrases import given_phrases

        frame = self.frame(to, from_, language_token)
        all_texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = iter(self._encode([t for t in all_texts if isinstance(t, str)], to, frame))
        sources = [(text if isinstance(text, Source) else next(encoded)).tokens for text in all_texts]
        other = None
        if contrast_to is not None:
            options = {"contrast": "language", **options}
            other = against(self, sources, frame, to, contrast_to, from_=from_, language_token=language_token)
        told = given_phrases(self.vocabulary, phrases, avoid)
        options = options | ({"avoid": True} if "avoid" in told else {})
        generator = self.generator(method, options, frame.start)
        masks = generator.config.language_mask or generator.config.language_bias > 0
        languages = self.language_ids(to, len(sources), masks) if languages is None else languages
        numbers = range(len(sources)) if ids is None else ids
        return Asked(self, generator, frame, to, from_, language_token, sources, numbers, languages, told, other)

    def answer(self, asked: Asked) -> list[list[Hypothesis]]:
        """The results of each source, best first."""
        decoded = asked.generator(
            self.params,
            asked.sources,
            prompts=[asked.frame.prompt] * len(asked.sources) if asked.frame.prompt else None,
            ids=asked.ids,
            languages=asked.languages,
            given={**asked.given, **by_language(self, asked.generator.config, asked.languages)},
            against=asked.against,
            **self.others(asked.generator),
        )

        def text(tokens: np.ndarray) -> str:
            return self.text(tokens[: len(tokens) - stop_size(tokens, asked.generator.config.stop)])

        return [
            [
                Hypothesis(text(tokens[skip:length]), float(score), tokens[:length].tolist(), int(passes), skip)
                for tokens, score, length in zip(*row, strict=True)
                if length
            ]
            for skip, passes, *row in zip(
                asked.skips, decoded.passes, decoded.tokens, decoded.scores, decoded.lengths, strict=True
            )
        ]

    def fill(
        self,
        templates: str | Sequence[str],
        sources: str | Sequence[str] | None = None,
        to: str | None = None,
        *,
        from_: str | None = None,
        language_token: str | None = None,
        mask_token: int | str | None = None,
        ids: Sequence[int] | None = None,
        **options: Any,
    ) -> list[FilledText]:
        """Templates with a token in place of each blank, by a run that learned to write in any order (train.any_order).

            run.fill("Le <extra_id_0><extra_id_0> dort.", "The cat sleeps.", to="fr")[0].text

        A blank is the run's mask token (mask_token: its name or id, where the run does not say). sources: what the
        encoder reads, a text for each template. options: block, temperature and seed of `decoding.any_subset.Filler`.
        Raises ValueError for a template without a blank or longer than the run's targets, and for another kind of run.
        """
        from mlm.session.masks import fill

        blanks = [templates] if isinstance(templates, str) else templates
        texts = [sources] if isinstance(sources, str) else sources
        frame = self.frame(to, from_, language_token)
        read = None if texts is None else self._encode(texts, to, frame)
        return fill(self, frame, blanks, read, mask_token, self.language_ids(to, len(blanks)), ids, **options)

    def filler(self, mask_token: int, **options: Any) -> Filler:
        """What fills this token. options: see `fill`. Raises ValueError for an unknown one, or one out of range."""
        known = ("block", "temperature", "seed")
        if wrong := next((name for name in options if name not in known), None):
            raise ValueError(f"no option {wrong!r} of filling; {nearest(wrong, known)}")
        key = (mask_token, *sorted(options.items()))
        if key not in self._fillers:
            made = {"rows": self.rows, "batch_size": self._batch_size, **options}
            self._fillers[key] = Filler(self._starting_with(None), mask_token=mask_token, **made)
        return self._fillers[key]

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        to: str | None = None,
        *,
        from_: str | None = None,
        language_token: str | None = None,
        empty: bool = False,
    ) -> np.ndarray:
        """log P(target, EOS | source) of (source, target) texts, in nats; float32 [pairs]. `to` as in `generate`.

        empty: texts may be empty, as a source is where the target itself is asked for: the model as a language model.
        Raises ValueError for an empty source or target otherwise.
        """
        frame, pairs = self.frame(to, from_, language_token), list(pairs)
        sources = [s.tokens for s in self._encode([source for source, _ in pairs], to, frame, empty)]
        targets = [[*frame.prompt, *self._tokens(i, "target", t, to, empty), EOS_ID] for i, (_, t) in enumerate(pairs)]
        return self.log_probs(frame, sources, targets, self.language_ids(to, len(sources)))

    def log_probs(
        self,
        frame: Frame,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        languages: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> np.ndarray:
        """log P(target | source) of tokens in their frame, of which the prompt is given and costs nothing; nats."""
        found = self._scores(sources, targets, languages, frame.start, temperature)
        return found.totals - found.tokens[:, : len(frame.prompt)].sum(1)

    def embed(self, texts: Sequence[str], to: str | None = None) -> np.ndarray:
        """Mean of the encoder's states over each text's tokens, EOS included; float32 [texts, D]. A text may be empty.

        to: the language to be written, which the encoder of a language-aware model is told.
        """
        sources = [s.tokens for s in self._encode(texts, to, self.frame(to), empty=True)]
        return self._embedder(self.params, sources, self.language_ids(to, len(sources)))

    def companion(self, run_dir: str) -> "Session":
        """Another run, loaded once onto the same devices: its latest checkpoint."""
        if run_dir not in self._companions:
            from mlm.parallel import MeshConfig
            from mlm.session.loading import load

            grid = self.rows.mesh
            devices = list(grid.devices.flat)
            mesh = MeshConfig(**dict(grid.shape))
            self._companions[run_dir] = load(run_dir, mesh=mesh, devices=devices, batch_size=self._batch_size)
        return self._companions[run_dir]

    def few_shot(
        self,
        queries: str | Sequence[str],
        examples: Pool | Iterable[tuple[str, str]],
        shots: int = 4,
        choice: str = "fixed",
        *,
        form: Format = USUAL_FORM,
        to: str | None = None,
        from_: str | None = None,
        language_token: str | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        budget: int | None = None,
    ) -> list[str]:
        """Texts for `generate`, `decode` and `score`: examples, then the query.

        examples: (source, target) texts, or a `Pool` that is kept. choice: "fixed", the first `shots`; "retrieved", the
        nearest by character n-grams, the nearest last; "random", by seed and the query's id. None has the query itself
        as its source. form: how they are written. to, from_, language_token: as in the call that takes the texts.
        budget: tokens (default: what the model reads); examples that do not fit are dropped, the furthest from the
        query first. ids: numbers of the queries (default: their places).
        Raises ValueError for an empty query, one that does not fit alone, or more shots than examples, UnknownName for
        another choice.
        """
        from mlm.session.prompting import few_shot

        asked = [queries] if isinstance(queries, str) else queries
        languages = {"to": to, "from_": from_, "language_token": language_token}
        return few_shot(
            self, asked, examples, shots, choice, form=form, languages=languages, seed=seed, ids=ids, budget=budget
        )

    def synthesise(
        self,
        texts: Mapping[str, Sequence[str]],
        to: str,
        *,
        backwards: bool = False,
        language_token: str | None = None,
        **options: Any,
    ) -> list[Example]:
        """Examples for `few_shot` from unlabelled sentences by language, each translated into `to` by this model.

        backwards: its translations are the sources. options: method and others, as in `decode`. Source: linguistically
        diverse prompts, Nguyen et al. 2023 (arXiv:2306.11372).
        """
        from mlm.session.prompting import synthesise

        return synthesise(self, texts, to, backwards=backwards, language_token=language_token, **options)

    def query_likelihood(
        self,
        query: str,
        passages: Sequence[str],
        to: str | None = None,
        *,
        form: str = "{passage}",
        from_: str | None = None,
        language_token: str | None = None,
    ) -> list[Ranked]:
        """Passages by log P(query, EOS | passage) in nats, the best first, of equals the first; for reranking.

        form: what the model reads of a passage, e.g. "Passage: {passage} Question:". to: language of the query.
        Sources: Sachan et al. 2022 (arXiv:2204.07496); UMR, Huang et al. 2024 (arXiv:2403.03516), across languages.
        Raises ValueError for an empty query or passage.
        """
        from mlm.session.prompting import query_likelihood

        languages = {"to": to, "from_": from_, "language_token": language_token}
        return query_likelihood(self, query, passages, form=form, languages=languages)

    def score_tokens(
        self,
        sources: Sequence,
        targets: Sequence,
        languages: Sequence[int] | None = None,
        start: int | None = None,
    ) -> np.ndarray:
        """log P(target | source) of token lists as they stand, in nats; float32 [pairs].

        languages: ids of the targets' languages, which a language-aware model asks for. start: what the decoder reads
        first, where not the model's own.
        """
        return self._scores(sources, targets, languages, start).totals

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
        return {**self.about(name, split), **totals(table), "languages": table, "tasks": results}

    def evaluate_each(
        self,
        tasks: Sequence[str],
        split: str = "validation",
        num_examples: int | None = None,
        method: str = "greedy",
        **options: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(task, what `evaluate` says of it), one by one; of tasks, not mixtures."""
        from mlm.session.evaluating import evaluate_each

        self._load_tasks()
        return evaluate_each(self, tasks, split, num_examples, self.generator(method, options))

    def tasks(self, name: str | None = None, split: str = "validation") -> list[str]:
        """The tasks of a mixture (default: the run's) that have the split."""
        from mlm.data.evaluator import task_names

        self._load_tasks()
        return task_names(name or self.data["mixture"], split)

    def language_losses(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        params: Params | None = None,
        languages: int | None = None,
        by: str = "decoder_language_ids",
    ) -> LanguageLosses:
        """Sums by language id over rows (`mlm.types.ROW_FEATURES`).

        params: others than its own, e.g. `untrained()`. by: another feature of ids to sum by, then below `languages`.
        """
        from mlm.data.languages import LANGUAGES

        def nll(batch: Mapping[str, np.ndarray]) -> np.ndarray:
            if params is not None:
                return self._token_losses(params, batch)
            return -mean_probability([-m._token_losses(m.params, batch) for m in (self, *self.ensemble)])

        return language_losses(nll, batches, self.spelling, languages=languages or len(LANGUAGES), by=by)

    @cached_property
    def spelling(self) -> Spelling:
        """What each id writes, over all rows of the model's table."""
        from mlm.data.spelling import spelled_bytes

        spare = self.config.vocab_size - self.vocabulary.vocab_size
        return Spelling(*(np.pad(values, (0, spare)) for values in spelled_bytes(self.vocabulary)))

    def untrained(self, seed: int = 0) -> Params:
        """Fresh parameters of the same model, split over the devices like the trained ones."""
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.params)

        def fresh(key: Key[Array, ""]) -> Params:
            params = self.model.init(key)
            return params if self.quantise is None else quantised(params, self.quantise)

        return jax.jit(fresh, out_shardings=placed)(jax.random.key(seed))

    def language_ids(self, to: str | None, count: int, asked: bool = False) -> list[int] | None:
        """The id of the language to be written, once per text; None where none is named, or no model asks."""
        from mlm.data.languages import language_id

        return [language_id(to)] * count if (asked or self.asks_language) and to is not None else None

    @property
    def asks_language(self) -> bool:
        """Whether one of its models is language-aware."""
        models = (self, *self.ensemble, self.draft, self.contrast)
        return any(model.config.languages for model in models if model)

    def generator(self, method: str, options: Mapping[str, Any], start: int | None = None) -> Generator:
        """start: what the decoder reads first, where not the model's own. Raises ValueError for an encoder alone."""
        from mlm.session.masks import decided
        from mlm.session.phrases import spellings

        heads = None if self.config.chimera is None else self.config.chimera.heads
        options = decided(method, options, self.data, None if self.draft is None else self.draft.data, heads)
        if isinstance(name := options.get("mask_token"), str):
            options["mask_token"] = self.vocabulary.special(name)
        told = {name: spellings(self.vocabulary, name, options[name]) for name in PHRASES if name in options}
        try:
            config = DecodeConfig(**{"method": method, "max_length": self.data["targets_length"], **options, **told})
        except TypeError:
            known = DecodeConfig.__dataclass_fields__
            wrong = next(name for name in options if name not in known)
            raise ValueError(f"no decoding option {wrong!r}; {nearest(wrong, known)}") from None
        return self._generator(config, start)

    def beginning(self, generator: Generator, start: int | None) -> Generator:
        """What decodes as this one of the session's, but that its decoder reads another token first."""
        return self._generator(generator.config, start)

    def _generator(self, config: DecodeConfig, start: int | None) -> Generator:
        if (config, start) not in self._generators:
            self._generators[config, start] = Generator(
                self._starting_with(start),
                config,
                rows=self.rows,
                batch_size=self._batch_size,
                ensemble=[member._starting_with(start) for member in self.ensemble],
                draft=self._other("draft", PROPOSERS[config.proposer].drafts, f"proposer={config.proposer!r}", start),
                contrast=self._other("contrast", config.contrast == "model", "contrast='model'", start),
            )
        return self._generators[config, start]

    def others(self, generator: Generator) -> dict[str, Any]:
        """What the generator asks beside the parameters: those of other models, trigrams; by its names for them."""
        found = {name: getattr(self, name).params for name in ("draft", "contrast") if getattr(generator, name)}
        return {**found, "ensemble": [member.params for member in self.ensemble], "table": self.table}

    @cached_property
    def token_counts(self) -> Mapping[int, np.ndarray]:
        """Language id -> how often each token stands in its training text."""
        return token_counts(self)

    def _other(self, name: str, asked: bool, by: str, start: int | None) -> Transformer | None:
        if not asked:
            return None
        if getattr(self, name) is None:
            raise ValueError(
                f"{by} asks a smaller model: name its run, by {name}= where this one is loaded, or by --{name} in a "
                "command"
            )
        return getattr(self, name)._starting_with(start)

    def _scorer(self, start: int | None = None, temperature: float = 1.0) -> Scorer:
        if (start, temperature) not in self._scorers:
            model = self._starting_with(start)
            self._scorers[start, temperature] = Scorer(
                model, rows=self.rows, batch_size=self._batch_size, temperature=temperature
            )
        return self._scorers[start, temperature]

    def _scores(
        self,
        sources: Sequence,
        targets: Sequence,
        languages: Sequence[int] | None,
        start: int | None = None,
        temperature: float = 1.0,
    ) -> Scores:
        """Of all models together."""
        if self.ensemble and temperature != 1.0:
            raise ValueError(f"temperature={temperature}: an ensemble is scored at temperature 1 only")
        members = (self, *self.ensemble)
        found = [m._scorer(start, temperature)(m.params, sources, targets, languages) for m in members]
        return together(found)

    def _starting_with(self, start: int | None) -> Transformer:
        if self.config.decoder is None:
            raise ValueError(f"{self.run.path} holds an encoder alone: it takes a decoder to write or to score")
        return self.model if start is None else self.model.starting_with(start)

    def _load_tasks(self) -> None:
        from mlm.data.registration import load_tasks

        load_tasks(*self.data.get("task_modules", ()))

    def about(self, name: str, split: str) -> dict[str, Any]:
        """What a result must say of where it comes from."""
        return {"task": name, "split": split, **self.origin}

    @property
    def origin(self) -> dict[str, Any]:
        """The models that speak: what two results must share to be one's."""
        return {
            "run": str(self.run.path),
            "step": self.step,
            "parameters": self.parameters,
            "quantise": self.quantise,
            "ensemble": [member.name for member in self.ensemble],
            "contrasted_with": self.contrast.name if self.contrast else None,
            "vocabulary": self.vocabulary.digest,
        }
