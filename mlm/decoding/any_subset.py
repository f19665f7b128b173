"""Infilling by a model that writes in any order, several tokens for two passes, exactly as if one after another.

Ranks 1 … m number the blanks of a row from left to right; those below n are filled. One round:

    guess    one pass in which each of the ranks n … n+k-1 reads what is given or filled -> q; all are drawn from it
    check    one pass in which each reads the guesses of lower rank too -> p
    keep     guess i while u_i < p_i(guess) / q_i(guess); the first always, as p = q there
    mend     the rank after the last one kept is drawn from norm(max(0, p - q)), behind the block from p

A round that checks fills at least two blanks, and for the last one there is nothing to check: never more passes than
blanks. The law of the result is that of drawing rank by rank, which block=1 does. Sources: Guo & Ermon 2025,
arXiv:2504.20456 (any-subset speculative decoding); Leviathan et al. 2023 (acceptance).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.decoding.buckets import Ints, TokenLists, batches, bucket, check_tokens, fill, pad, shards, target_languages
from mlm.decoding.ranking import first_max
from mlm.models.order import check_any_order
from mlm.models.transformer import Transformer
from mlm.types import EOS_ID, Params


class Filled(NamedTuple):
    """Results in the order of the templates, host arrays."""

    tokens: Int[Array, "N T"]  # the template with its blanks filled; 0 beyond its length
    lengths: Int[Array, "N"]  # tokens
    passes: Int[Array, "N"]  # decoder passes made for the row, at most one a blank


class _State(NamedTuple):
    tokens: Int[Array, "B T"]
    rank: Int[Array, "B"]  # the next to be filled; 1 + the row's blanks: done
    passes: Int[Array, "B"]


class Filler:
    """Fills the blanks of token sequences with one model trained by `objectives.any_order`; keep it, so that what it
    compiled is reused.

        fill = Filler(model, mask_token=32_099)
        fill(params, [[7, 32_099, 32_099, 1]], sources=[[5, 6, 1]]).tokens  # e.g. [[7, 12, 9, 1]]

    mask_token: the blank, which the model was trained with. block: ranks guessed at once; 1 draws one after another.
    temperature: tokens come from softmax(logits / temperature). seed, and a row's id, decide what is drawn: neither
    neighbours nor the number of devices. rows: sharding of an array's first axis over the mesh. Nothing is cached: a
    pass reads the rows twice over (`models.order`).
    Raises ValueError for options out of range and for a model that cannot write in any order.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mask_token: int,
        block: int = 8,
        temperature: float = 1.0,
        seed: int = 0,
        rows: NamedSharding | None = None,
        batch_size: int = 64,
    ):
        if model.config.decoder is None:
            raise ValueError("blanks are filled by a decoder, and this model has none")
        check_any_order(model.config.decoder)
        check_tokens("mask_token", [[mask_token]], model.config.vocab_size)
        if block < 1:
            raise ValueError(f"block={block} ranks must be at least 1; 1 draws one token after another")
        if not temperature > 0.0:
            raise ValueError(f"temperature={temperature} must be above 0; near 0 is nearly the most probable token")
        self.model = model
        self.compilations = 0  # shapes seen so far; each costs seconds once
        self._mask, self._block, self._temperature, self._seed = mask_token, block, temperature, seed
        self._rows = rows
        self._shards = shards(rows)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._run = jax.jit(self._fill)

    def __call__(
        self,
        params: Params,
        templates: TokenLists,
        sources: TokenLists | None = None,
        *,
        ids: Ints | None = None,
        languages: Ints | None = None,
    ) -> Filled:
        """Every template with a token in place of each mask token. sources: what the encoder reads, where there is one.

        ids: number of each row, the source of its randomness (None: 0, 1, …). languages: target language ids, which a
        language-aware model asks for. Raises ValueError for unequal counts, an empty sequence, a token outside the
        vocabulary, and for sources of a model without an encoder.
        """
        count = len(templates)
        check_tokens("template", templates, self.model.config.vocab_size)
        if (sources is None) != (self.model.config.encoder is None):
            raise ValueError("sources are for a model with an encoder, which needs them; a decoder alone takes none")
        sources = [[EOS_ID]] * count if sources is None else sources
        check_tokens("source", sources, self.model.config.vocab_size)
        ids = np.arange(count) if ids is None else np.asarray(ids)
        for name, values in (("sources", sources), ("ids", ids)):
            if len(values) != count:
                raise ValueError(f"{len(values)} {name} for {count} templates: give one per template")
        to = target_languages(languages, count, self.model.config.languages)
        lengths = np.array([len(t) for t in templates], np.int32)
        tokens = np.zeros((count, int(lengths.max(initial=0))), np.int32)
        passes = np.zeros(count, np.int32)
        for chosen in batches(lengths + np.array([len(s) for s in sources], np.int32), self._batch_size):
            rows = min(bucket(-(-len(chosen) // self._shards), 1) * self._shards, self._batch_size)
            source, template = ([sequences[i] for i in chosen] for sequences in (sources, templates))
            inputs = {
                "sources": pad(source, rows, bucket(max(map(len, source)))),
                "source_lengths": fill([len(s) for s in source], rows, 1),
                "templates": pad(template, rows, bucket(max(map(len, template)))),
                "lengths": fill(lengths[chosen], rows, 0),
                "ids": fill(ids[chosen], rows, 0),
            }
            if to is not None:
                inputs["languages"] = fill(to[chosen], rows, 0)
            found = jax.device_get(self._run(params, jax.device_put(inputs, self._rows)))
            width = int(lengths[chosen].max())
            told = np.arange(width) < lengths[chosen, None]
            tokens[chosen, :width] = np.where(told, found.tokens[: len(chosen), :width], 0)
            passes[chosen] = found.passes[: len(chosen)]
        return Filled(tokens, lengths, passes)

    def _fill(self, params: Params, inputs: dict[str, Array]) -> _State:
        self.compilations += 1  # runs while tracing only
        template = inputs["templates"]
        told = jnp.arange(template.shape[1])[None] < inputs["lengths"][:, None]
        blank = told & (template == self._mask)
        ranks = jnp.where(blank, jnp.cumsum(blank, axis=1, dtype=jnp.int32), 0)
        batch: dict[str, Array] = {
            "decoder_query_tokens": jnp.full_like(template, self._mask),
            "decoder_segment_ids": told.astype(jnp.int32),
            "decoder_ranks": ranks,
        }
        to, encoded = inputs.get("languages"), None
        if to is not None:
            batch["decoder_language_ids"] = to[:, None] * told
        if self.model.config.encoder is not None:
            read = jnp.arange(inputs["sources"].shape[1])[None] < inputs["source_lengths"][:, None]
            batch["encoder_segment_ids"] = read.astype(jnp.int32)
            encoded = self.model.encode(params, inputs["sources"], batch["encoder_segment_ids"], languages=to)

        def log_probs(tokens: Array, reads: Array, places: Int[Array, "B N"]) -> Float[Array, "B N V"]:
            row = {**batch, "decoder_input_tokens": tokens, "decoder_reads": reads}
            hidden = self.model(params, row, encoded=encoded).hidden
            asked = jnp.take_along_axis(hidden, places[..., None], axis=1)
            return jax.nn.log_softmax(self.model.logits(params, asked) / self._temperature)

        blanks = jnp.sum(blank, axis=1)
        in_order = jnp.argsort(~blank, axis=1, stable=True)  # places of the blanks, by rank
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self._seed), inputs["ids"])
        size = self._block

        def round_of(state: _State) -> _State:
            asked = state.rank[:, None] + jnp.arange(size + 1)
            real = asked <= blanks[:, None]
            places = jnp.take_along_axis(in_order, jnp.clip(asked - 1, 0, template.shape[1] - 1), axis=1)
            q = log_probs(state.tokens, jnp.minimum(ranks, state.rank[:, None]), places[:, :size])
            noise = _noise(keys, asked)
            guesses = jax.vmap(_drawn, (1, 1), 1)(q, noise[:, :size, 0])
            guessed = _put(state.tokens, places[:, :size], guesses, real[:, :size])
            more = state.rank < blanks
            p = jax.lax.cond(
                jnp.any(more),
                lambda: log_probs(guessed, ranks, places),
                lambda: jnp.zeros((*asked.shape, q.shape[-1])),
            )
            chances = jax.vmap(jax.vmap(jax.random.uniform))(noise[:, :size, 1])
            kept = accepted(p[:, :size], q, guesses, chances) & real[:, :size]
            count = jnp.sum(jnp.cumprod(kept, axis=1), axis=1)  # of guesses kept
            mended = _drawn(residual(p, q, count), jnp.take_along_axis(noise[..., 2], count[:, None], axis=1)[:, 0])
            new = jnp.where(jnp.arange(size + 1) < count[:, None], jnp.pad(guesses, ((0, 0), (0, 1))), mended[:, None])
            written = real & (jnp.arange(size + 1) <= count[:, None])
            return _State(
                _put(state.tokens, places, new, written),
                state.rank + jnp.sum(written, axis=1),
                state.passes + real[:, 0] + more,
            )

        start = _State(template, jnp.ones_like(blanks), jnp.zeros_like(blanks))
        return jax.lax.while_loop(lambda state: jnp.any(state.rank <= blanks), round_of, start)


def accepted(
    p: Float[Array, "B k V"], q: Float[Array, "B k V"], guesses: Int[Array, "B k"], chances: Float[Array, "B k"]
) -> Bool[Array, "B k"]:
    """chance < p(guess) / q(guess), of log-probabilities in nats. The first: always, as p and q are one there."""
    gain = jnp.take_along_axis(p - q, guesses[..., None], axis=-1)[..., 0]
    return (jnp.log(chances) < gain) | (jnp.arange(guesses.shape[1]) == 0)


def residual(p: Float[Array, "B N V"], q: Float[Array, "B k V"], at: Int[Array, "B"]) -> Float[Array, "B V"]:
    """log max(0, p - q) at one place of each row, up to a constant; log p behind the block, and where none is left."""
    p, q = (jnp.take_along_axis(x, at[:, None, None], axis=1, mode="fill", fill_value=-jnp.inf)[:, 0] for x in (p, q))
    left = jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0)
    return jnp.where(jnp.any(left > 0.0, axis=-1, keepdims=True), jnp.log(left), p)


def _noise(keys: Key[Array, "B"], ranks: Int[Array, "B N"]) -> Key[Array, "B N 3"]:
    """Keys of guess, chance and mending at every rank. A rank guessed again meets its noise again: what was guessed
    there before was thrown away unread, so nothing that is kept depends on it.
    """
    return jax.vmap(jax.vmap(lambda key, rank: jax.random.split(jax.random.fold_in(key, rank), 3), (None, 0)))(
        keys, ranks
    )


def _drawn(log_probs: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """One token a row, by Gumbel-max."""
    return first_max(log_probs + jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys))


def _put(
    tokens: Int[Array, "B T"], places: Int[Array, "B N"], new: Int[Array, "B N"], where: Bool[Array, "B N"]
) -> Int[Array, "B T"]:
    """The rows with new tokens at those of the places that are to be written."""
    outside = jnp.where(where, places, tokens.shape[1])
    return jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(tokens, outside, new)
