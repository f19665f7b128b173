"""Sources in, decoded tokens out: batches, pads to few shapes, compiles once per shape, returns host arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mlm.decoding.buckets import Ints, TokenLists, batches, bucket, check_tokens, fill, pad, shards, target_languages
from mlm.decoding.config import METHODS, PHRASES, DecodeConfig
from mlm.decoding.loop import NOTHING, decode
from mlm.decoding.members import Opened, averaged, contrasted, told
from mlm.decoding.ngrams import Trigrams
from mlm.decoding.phrases import check_given
from mlm.decoding.proposers import PROPOSERS, Inputs
from mlm.decoding.ranking import cut
from mlm.decoding.state import NEG_INF, Decoded, Proposer, Read, Seen
from mlm.models.specs import RecurrentSpec
from mlm.models.transformer import Transformer
from mlm.models.tree import Tree
from mlm.types import EOS_ID, PAD_ID, Params, PyTree


class Reading(NamedTuple):
    """What a model is given of each example, beside its number and its limit. start: what the decoder reads first,
    where that is not the model's own start token.
    """

    sources: TokenLists
    prompts: TokenLists | None = None
    languages: Ints | None = None
    start: int | None = None


class Generator:
    """Decodes token sequences with one model and one config; keep it, so that what it compiled is reused.

    rows: sharding of an array's first axis over the mesh, e.g. NamedSharding(mesh, P("data")); parameters stay where
    their own shardings put them. batch_size: examples per device call at most. draft: the smaller model that
    some proposers ask. ensemble: models that decode together with this one, as if they were one. contrast: the weaker
    model that contrast="model" asks. All have one vocabulary.
    """

    def __init__(
        self,
        model: Transformer,
        config: DecodeConfig,
        *,
        rows: NamedSharding | None = None,
        batch_size: int = 64,
        draft: Transformer | None = None,
        ensemble: Sequence[Transformer] = (),
        contrast: Transformer | None = None,
    ):
        _check_models(model, config, draft, ensemble, contrast)
        for name in PHRASES:
            check_tokens(f"phrase of {name}", getattr(config, name), model.config.vocab_size)
        if config.mask_token is not None:
            check_tokens("mask_token", [[config.mask_token]], model.config.vocab_size)
        self.model, self.config = model, config
        self.draft, self.ensemble, self.contrast = draft, tuple(ensemble), contrast
        self.compilations = 0  # shapes seen so far; each costs seconds once
        self._rows = rows
        self._shards = shards(rows)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._run = jax.jit(self._decode)

    def __call__(
        self,
        params: Params,
        sources: TokenLists,
        *,
        prompts: TokenLists | None = None,
        limits: Ints | None = None,
        ids: Ints | None = None,
        languages: Ints | None = None,
        given: Mapping[str, np.ndarray] = NOTHING,
        against: Reading | None = None,
        draft: Params | None = None,
        ensemble: Sequence[Params] = (),
        contrast: Params | None = None,
        table: Trigrams | None = None,
    ) -> Decoded:
        """Results in the order of `sources`, as NumPy arrays; see `Decoded`, and `decode` for the options.

        languages: target language id of each source, which a language-aware model asks for. draft, ensemble, contrast:
        parameters of the other models. table: trigrams for the proposers that look them up. against: what the model
        reads where contrast="language" contrasts it with itself, prompts as long as its own. given: arrays of one row
        per source, see `decode`; language_mask=True reads "language_mask", bool [N, V], and language_bias
        "language_bias", float [N, V]. A decoder alone goes on from its sources: they are the beginnings of its results.
        Raises ValueError for an empty source, a token outside the vocabulary, a prompt that leaves no room below its
        limit, or anything of these that is missing or too much.
        """
        count, width = len(sources), self.config.max_length
        reading = self._checked(Reading(sources, prompts, languages))
        limits = np.full(count, width) if limits is None else np.minimum(limits, width)
        ids = np.arange(count) if ids is None else np.asarray(ids)
        for name, values in (("limits", limits), ("ids", ids), *given.items()):
            if len(values) != count:
                raise ValueError(f"{len(values)} {name} for {count} sources: give one per source")
        lengths = _lengths(reading.prompts, count)
        for index, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
            if length >= limit:
                raise ValueError(
                    f"source {index}: a prompt of {length} tokens leaves no room under the limit of {limit} tokens; "
                    "shorten it or raise max_length or its limit"
                )
        check_given(self.config, given, np.asarray(limits) - lengths, self.model.config.vocab_size)
        self._check_given(given, count)
        against = self._checked_against(against, lengths)
        for name, value in (("draft", draft), ("contrast", contrast)):
            if (value is None) != (getattr(self, name) is None):
                raise ValueError(f"the {name} model and its parameters belong together: give both, or neither")
        if len(ensemble) != len(self.ensemble):
            raise ValueError(f"parameters of {len(ensemble)} members for an ensemble with {len(self.ensemble)} others")

        best = self.config.n_best
        tokens = np.zeros((count, best, width), np.int32)
        scores = np.full((count, best), NEG_INF, np.float32)
        found = np.zeros((count, best), np.int32)
        passes = np.zeros(count, np.int32)
        sizes = [len(s) + n for s, n in zip(reading.sources, lengths, strict=True)]
        for chosen in batches(sizes, self._batch_size):
            inputs = jax.device_put(self._inputs(chosen, reading, against, limits, ids, given), self._rows)
            out = jax.device_get(self._run((params, *ensemble), inputs, draft, contrast, table))
            tokens[chosen], scores[chosen], found[chosen], passes[chosen] = (x[: len(chosen)] for x in out)
        return Decoded(tokens, scores, found, passes)

    def _checked(self, reading: Reading) -> Reading:
        """As the models take it."""
        sources, prompts, languages, _ = reading
        count, vocab = len(sources), self.model.config.vocab_size
        check_tokens("source", sources, vocab)
        if reading.start is not None:
            check_tokens("start", [[reading.start]], vocab)
        if prompts is not None:
            if len(prompts) != count:
                raise ValueError(f"{len(prompts)} prompts for {count} sources: give one per source")
            check_tokens("prompt", [p for p in prompts if len(p)], vocab)
        if self.model.config.encoder is None:
            beginnings = [[]] * count if prompts is None else prompts
            sources, prompts = [[EOS_ID]] * count, [[*s, *p] for s, p in zip(sources, beginnings, strict=True)]
        models = (self.model, *self.ensemble, self.draft, self.contrast)
        known = [model.config.languages for model in models if model and model.config.languages]
        return reading._replace(
            sources=sources, prompts=prompts, languages=target_languages(languages, count, min(known, default=None))
        )

    def _checked_against(self, against: Reading | None, lengths: list[int]) -> Reading | None:
        if (against is None) == (self.config.contrast == "language"):
            raise ValueError(
                f"contrast={self.config.contrast!r} {'asks' if against is None else 'does not ask'} what the model "
                "reads against its own sources: give `against` together with contrast='language'; in a session, "
                'contrast_to="de"'
            )
        if against is None:
            return None
        against = self._checked(against)
        other = _lengths(against.prompts, len(against.sources))
        if other != lengths:
            raise ValueError(
                f"prompts of {lengths[:8]} tokens against prompts of {other[:8]}: both readings need as many, equally "
                "long ones, since what is written stands at the same places in both. Where a language token is forced "
                "first, name another language, not none"
            )
        return against

    def _check_given(self, given: Mapping[str, np.ndarray], count: int) -> None:
        shape = (count, self.model.config.vocab_size)
        masks = [name for name in ("language_mask", "language_bias") if getattr(self.config, name)]
        if unread := sorted(set(given) - {"phrases", "avoid", *masks}):
            raise ValueError(f"given holds {unread}, which nothing in this config reads")
        for name in ("language_mask", "language_bias"):
            if not getattr(self.config, name):
                continue
            if name not in given or given[name].shape != shape:
                what = f"has the shape {given[name].shape}" if name in given else "is missing"
                raise ValueError(f"{name} reads given[{name!r}], an array of the shape {shape}, which {what}")
        if self.config.language_mask and not given["language_mask"][:, EOS_ID].all():
            raise ValueError(f"a language_mask must allow the end of sequence, token {EOS_ID}")

    def _inputs(self, chosen, reading, against, limits, ids, given) -> dict[str, Any]:
        rows = min(bucket(-(-len(chosen) // self._shards), 1) * self._shards, self._batch_size)
        spare = rows - len(chosen)
        readings = [reading] if against is None else [reading, against]
        width = bucket(max(len(r.sources[i]) for r in readings for i in chosen))
        inputs: dict[str, Any] = {
            **self._read(reading, chosen, rows, width),
            "limits": fill(limits[chosen], rows, 0),
            "ids": fill(ids[chosen], rows, 0),
            "given": {n: np.pad(x[chosen], [(0, spare), *[(0, 0)] * (x.ndim - 1)]) for n, x in given.items()},
        }
        if against is not None:
            inputs["against"] = self._read(against, chosen, rows, width)
            inputs["against"]["start"] = fill([against.start or PAD_ID] * len(chosen), rows, PAD_ID)
        return inputs

    def _read(self, reading: Reading, chosen: np.ndarray, rows: int, width: int) -> dict[str, np.ndarray]:
        picked = [reading.sources[i] for i in chosen]
        inputs = {"sources": pad(picked, rows, width), "source_lengths": fill([len(s) for s in picked], rows, 1)}
        if reading.languages is not None:
            inputs["languages"] = fill(np.asarray(reading.languages)[chosen], rows, 0)
        if reading.prompts is not None and any(len(reading.prompts[i]) for i in chosen):
            beginnings = [reading.prompts[i] for i in chosen]
            longest = min(bucket(max(map(len, beginnings)), 1), self.config.max_length)
            inputs["prompts"] = pad(beginnings, rows, longest)
            inputs["prompt_lengths"] = fill([len(p) for p in beginnings], rows, 0)
        return inputs

    def _decode(
        self,
        params: tuple[Params, ...],
        inputs: Mapping[str, Any],
        draft: Params | None,
        contrast: Params | None,
        table: Trigrams | None,
    ) -> Decoded:
        self.compilations += 1  # runs while tracing only
        models = list(zip((self.model, *self.ensemble), params, strict=True))
        mean, group = self.config.ensemble_mean, self.config.selector().group
        step, cache = averaged([self._opened(*each, inputs) for each in models], mean)
        if self.contrast is not None and contrast is not None:
            step, cache = contrasted((step, cache), self._opened(self.contrast, contrast, inputs))
        if "against" in inputs:
            other = averaged([self._opened(*each, inputs["against"]) for each in models], mean)
            beginning, ends = inputs["against"]["start"][:, None], jnp.zeros_like(inputs["ids"])
            if "prompts" in inputs:
                beginning = jnp.concatenate([beginning, inputs["against"]["prompts"]], axis=1)
                ends = inputs["prompt_lengths"]
            beginning, ends = (jnp.repeat(x, group, axis=0) for x in (beginning, ends))
            step, cache = contrasted((step, cache), told(other, beginning, ends))
        drafting = None if self.draft is None or draft is None else self._opened(self.draft, draft, inputs)
        sources, lengths = (jnp.repeat(inputs[name], group, axis=0) for name in ("sources", "source_lengths"))
        proposer = PROPOSERS[self.config.proposer]
        heads = self._heads(params[0], inputs) if proposer.heads else None
        with cut(self.model.placement.pieces("vocab")):
            return decode(
                step,
                cache,
                self.config,
                ids=inputs["ids"],
                limits=inputs["limits"],
                prompts=inputs.get("prompts"),
                prompt_lengths=inputs.get("prompt_lengths"),
                given=inputs.get("given", NOTHING),
                proposer=proposer.make(
                    Inputs(sources, lengths, drafting, table, self.config.mask_token, heads),
                    self.config.guesses,
                    self.config.branches,
                ),
            )

    def _opened(self, model: Transformer, params: Params, inputs: Mapping[str, Any]) -> Opened:
        """A model's step over the sources it has read, and its empty cache."""
        params, sources, to = model.unrolled(params), inputs["sources"], inputs.get("languages")
        rows = sources.shape[0] * self.config.selector().group
        encoded = real = None
        if model.config.encoder is not None:
            real = jnp.arange(sources.shape[1])[None] < inputs["source_lengths"][:, None]
            encoded = model.encode(params, sources, real.astype(jnp.int32), languages=to)
        elif to is not None:
            to = jnp.repeat(to, rows // to.shape[0])
        block = max(self.config.block, inputs["prompts"].shape[1] if "prompts" in inputs else 1)
        cache = model.init_cache(params, encoded, real, rows, self.config.slots, to, block)
        early, looks = self.config.dola_layers, self.config.coverage > 0

        def step(
            tokens: Array, cache: PyTree, *, tree: Tree | None = None, prefix: Array | None = None
        ) -> tuple[Read, PyTree]:
            said = model.block(params, tokens, cache, prefix, tree, early, attention=looks)
            logits, *others = said.logits
            attention = said.attention
            if attention is not None and real is not None:
                attention = jnp.where(jnp.repeat(real, rows // len(real), axis=0)[:, None], attention, 1.0)
            return Read(logits, Seen(said.hidden, tuple(others), attention=attention)), said.cache

        return step, self._shard(cache)

    def _heads(self, params: Params, inputs: Mapping[str, Any]) -> tuple[Transformer, Params, PyTree]:
        """What guesses by the model's own heads; of an ensemble, the first one's, whose states are those of all."""
        rows = inputs["sources"].shape[0] * self.config.selector().group
        dtype = jnp.dtype(self.model.config.dtype)
        return self.model, params, self._shard(self.model.chimera(params).empty(rows, self.config.slots, dtype))

    def _shard(self, cache: PyTree) -> PyTree:
        """Fresh cache slots know no mesh yet; without this every device would hold all rows."""
        rows = self._rows
        if rows is None:
            return cache
        free = PartitionSpec.UNCONSTRAINED

        def place(x: Array) -> Array:
            spec = PartitionSpec(*rows.spec[:1], *(free,) * (x.ndim - 1))
            return jax.lax.with_sharding_constraint(x, NamedSharding(rows.mesh, spec))

        return jax.tree.map(place, cache)


def _lengths(prompts: TokenLists | None, count: int) -> list[int]:
    return [0] * count if prompts is None else [len(p) for p in prompts]


def _check_models(
    model: Transformer,
    config: DecodeConfig,
    draft: Transformer | None,
    members: Sequence[Transformer],
    contrast: Transformer | None,
) -> None:
    """Raises ValueError where a model is missing, not asked for, or of another vocabulary or kind."""
    drafting = [name for name, kind in PROPOSERS.items() if kind.drafts]
    for name, option, values, other in (
        ("draft", "proposer", drafting, draft),
        ("contrast", "contrast", ["model"], contrast),
    ):
        value = getattr(config, option)
        if (value in values) != (other is not None):
            said = f"needs a {name} model and got none" if other is None else f"asks no {name} model"
            raise ValueError(f"{option}={value!r} {said}: give {name} together with {option}, one of {values}")
    if config.ensemble_mean != type(config).ensemble_mean and not members:
        raise ValueError(f"ensemble_mean={config.ensemble_mean!r} means nothing to one model; give an ensemble")
    named = [("draft", draft), ("contrast", contrast), *(("ensemble", member) for member in members)]
    for name, other in named:
        if other is not None:
            _check_pair(model, other, f"the {name} model")
    _check_layers(model, config.dola_layers, members)
    _check_shapes(model, config, draft, [other for _, other in named if other is not None])


def _check_pair(model: Transformer, other: Transformer, name: str) -> None:
    if other.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {other.config.vocab_size} ids and the model one of "
            f"{model.config.vocab_size}: a token must mean the same to both"
        )
    if (other.config.encoder is None) != (model.config.encoder is None):
        raise ValueError(f"{name} must have an encoder where the model has one, and none where it has none")


def _check_layers(model: Transformer, layers: tuple[int, ...], members: Sequence[Transformer]) -> None:
    if not layers:
        return
    if members:
        raise ValueError(f"dola_layers={layers}: the models of an ensemble have no layers in common")
    decoder = model.config.stacks()["decoder"]
    if max(layers) >= decoder.layers:
        raise ValueError(
            f"dola_layers={layers}: the decoder has {decoder.layers} layers, so the numbers must be below it (0: what "
            "enters the first one)"
        )


def _check_shapes(
    model: Transformer, config: DecodeConfig, draft: Transformer | None, others: Sequence[Transformer]
) -> None:
    """Raises ValueError for guesses and candidates that these models cannot read or give."""
    selector = config.selector()
    branching = config.branches > 1 or (isinstance(selector, Proposer) and not selector.tree.is_chain)
    for each in (model, *others) if branching else ():
        if not each.config.stacks()["decoder"].branches():
            raise ValueError(
                "a decoder with recurrent units, or whose positions are read as digits, takes chains of guesses only: "
                f"with it, branches={config.branches} must be 1, and method={config.method!r} one that looks at one "
                "token at a time"
            )
    if config.coverage and model.config.encoder is None:
        raise ValueError(f"coverage={config.coverage} is of a source, and a decoder alone reads none; leave it at 0")
    if "candidates" in METHODS[config.method].options and config.candidates > model.config.vocab_size:
        raise ValueError(f"candidates={config.candidates} exceeds the vocabulary of {model.config.vocab_size} tokens")
    if PROPOSERS[config.proposer].heads:
        heads = 0 if model.config.chimera is None else model.config.chimera.heads
        if not heads:
            raise ValueError(
                f"proposer={config.proposer!r} asks heads that this model has not: train them on its run with "
                "gin/objectives/chimera.gin and run.initial, and decode with that run"
            )
        if config.guesses > heads:
            raise ValueError(
                f"guesses={config.guesses}: each is another head's, and the model has {heads}; set guesses={heads}, or "
                "fewer"
            )
    if config.proposer == "input_copy" and model.config.encoder is None:
        raise ValueError("proposer='input_copy' copies what an encoder reads; a decoder alone takes 'ngram_table'")
    drafting = () if draft is None else draft.config.stacks()["decoder"].sublayers()
    if config.mask_token is not None and any(isinstance(spec, RecurrentSpec) for spec in drafting):
        raise ValueError("proposer='mask_block': a recurrent drafter cannot see its masks both ways")
