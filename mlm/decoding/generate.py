"""Sources in, decoded tokens out: batches, pads to few shapes, compiles once per shape, returns host arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mlm.decoding.buckets import Ints, TokenLists, batches, bucket, check_tokens, fill, pad, shards, target_languages
from mlm.decoding.config import PHRASES, DecodeConfig
from mlm.decoding.loop import NOTHING, decode
from mlm.decoding.ngrams import Trigrams
from mlm.decoding.phrases import check_given
from mlm.decoding.proposers import PROPOSERS, Inputs
from mlm.decoding.ranking import cut
from mlm.decoding.state import NEG_INF, Decoded, Read, Seen, Step
from mlm.models.transformer import Transformer
from mlm.models.tree import Tree
from mlm.types import EOS_ID, Params, PyTree


class Generator:
    """Decodes token sequences with one model and one config; keep it, so that what it compiled is reused.

    rows: sharding of an array's first axis over the mesh, e.g. NamedSharding(mesh, P("data")); parameters stay where
    their own shardings put them. batch_size: examples per device call at most. draft: the smaller model that
    proposer="draft_model" asks.
    """

    def __init__(
        self,
        model: Transformer,
        config: DecodeConfig,
        *,
        rows: NamedSharding | None = None,
        batch_size: int = 64,
        draft: Transformer | None = None,
    ):
        _check_draft(model, config, draft)
        for name in PHRASES:
            check_tokens(f"phrase of {name}", getattr(config, name), model.config.vocab_size)
        self.model, self.config, self.draft = model, config, draft
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
        draft: Params | None = None,
        table: Trigrams | None = None,
    ) -> Decoded:
        """Results in the order of `sources`, as NumPy arrays; see `Decoded`, and `decode` for the options.

        languages: target language id of each source, which a language-aware model asks for. draft: parameters of the
        smaller model. table: trigrams for the proposers that look them up. given: arrays of one row per source, see
        `decode`. A decoder alone goes on from its sources: they
        are the beginnings of its results. Raises ValueError for an empty source, a token outside the vocabulary, or a
        prompt that leaves no room below its limit.
        """
        count, width = len(sources), self.config.max_length
        check_tokens("source", sources, self.model.config.vocab_size)
        if self.model.config.encoder is None:
            told = [[]] * count if prompts is None else prompts
            sources, prompts = [[EOS_ID]] * count, [[*s, *p] for s, p in zip(sources, told, strict=True)]
        limits = np.full(count, width) if limits is None else np.minimum(limits, width)
        ids = np.arange(count) if ids is None else np.asarray(ids)
        for name, values in (("prompts", prompts), ("limits", limits), ("ids", ids), *given.items()):
            if values is not None and len(values) != count:
                raise ValueError(f"{len(values)} {name} for {count} sources: give one per source")
        lengths = [0] * count if prompts is None else [len(p) for p in prompts]
        for index, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
            if length >= limit:
                raise ValueError(
                    f"source {index}: a prompt of {length} tokens leaves no room under the limit of {limit} tokens; "
                    "shorten it or raise max_length or its limit"
                )
        if prompts is not None:
            check_tokens("prompt", [p for p in prompts if len(p)], self.model.config.vocab_size)
        check_given(self.config, given, np.asarray(limits) - lengths, self.model.config.vocab_size)
        if (draft is None) != (self.draft is None):
            raise ValueError("the draft model and its parameters belong together: give both, or neither")

        to = target_languages(languages, count, self.model.config.languages)

        best = self.config.n_best
        tokens = np.zeros((count, best, width), np.int32)
        scores = np.full((count, best), NEG_INF, np.float32)
        found = np.zeros((count, best), np.int32)
        passes = np.zeros(count, np.int32)
        for chosen in batches([len(s) + n for s, n in zip(sources, lengths, strict=True)], self._batch_size):
            inputs = jax.device_put(self._inputs(chosen, sources, prompts, limits, ids, to, given), self._rows)
            out = jax.device_get(self._run(params, inputs, draft, table))
            tokens[chosen], scores[chosen], found[chosen], passes[chosen] = (x[: len(chosen)] for x in out)
        return Decoded(tokens, scores, found, passes)

    def _inputs(self, chosen, sources, prompts, limits, ids, languages, given) -> dict[str, Any]:
        rows = min(bucket(-(-len(chosen) // self._shards), 1) * self._shards, self._batch_size)
        picked = [sources[i] for i in chosen]
        spare = rows - len(chosen)
        inputs = {
            "sources": pad(picked, rows, bucket(max(map(len, picked)))),
            "source_lengths": fill([len(s) for s in picked], rows, 1),
            "limits": fill(limits[chosen], rows, 0),
            "ids": fill(ids[chosen], rows, 0),
            "given": {n: np.pad(x[chosen], [(0, spare), *[(0, 0)] * (x.ndim - 1)]) for n, x in given.items()},
        }
        if languages is not None:
            inputs["languages"] = fill(languages[chosen], rows, 0)
        if prompts is not None and any(len(prompts[i]) for i in chosen):
            told = [prompts[i] for i in chosen]
            longest = min(bucket(max(map(len, told)), 1), self.config.max_length)
            inputs["prompts"] = pad(told, rows, longest)
            inputs["prompt_lengths"] = fill([len(p) for p in told], rows, 0)
        return inputs

    def _decode(
        self, params: Params, inputs: Mapping[str, Any], draft: Params | None = None, table: Trigrams | None = None
    ) -> Decoded:
        self.compilations += 1  # runs while tracing only
        step, cache = self._opened(self.model, params, inputs)
        drafting = None if self.draft is None or draft is None else self._opened(self.draft, draft, inputs)
        group = self.config.selector().group
        sources, lengths = (jnp.repeat(inputs[name], group, axis=0) for name in ("sources", "source_lengths"))
        proposer = PROPOSERS[self.config.proposer]
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
                    Inputs(sources, lengths, drafting, table), self.config.guesses, self.config.branches
                ),
            )

    def _opened(self, model: Transformer, params: Params, inputs: Mapping[str, Any]) -> tuple[Step, PyTree]:
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

        def step(tokens: Array, cache: PyTree, tree: Tree | None = None) -> tuple[Read, PyTree]:
            logits, hidden, cache = model.step(params, tokens, cache, tree=tree)
            return Read(logits, Seen(hidden)), cache

        return step, self._shard(cache)

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


def _check_draft(model: Transformer, config: DecodeConfig, draft: Transformer | None) -> None:
    """Raises ValueError where the draft model is missing, not asked for, or of another vocabulary or kind."""
    wanted = PROPOSERS[config.proposer].drafts
    if wanted != (draft is not None):
        raise ValueError(
            f"proposer={config.proposer!r} {'needs a draft model and got none' if wanted else 'asks no draft model'}: "
            f"give draft together with one of {[name for name, kind in PROPOSERS.items() if kind.drafts]}"
        )
    if draft is None:
        return
    if draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} ids and the model one of "
            f"{model.config.vocab_size}: a guess must mean the same token to both"
        )
    if (draft.config.encoder is None) != (model.config.encoder is None):
        raise ValueError("the draft model must have an encoder where the model has one, and none where it has none")
