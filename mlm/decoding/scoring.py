"""Exact log-probabilities of given targets: one teacher-forced pass, the vocabulary in chunks of positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from mlm.decoding.buckets import Ints, TokenLists, batches, bucket, check_tokens, fill, pad, shards, target_languages
from mlm.decoding.state import token_log_prob
from mlm.models.transformer import Transformer
from mlm.types import PAD_ID, Hidden, Params, Tokens


class Scores(NamedTuple):
    """Model log-probabilities in nats, host arrays."""

    tokens: Float[Array, "N T"]  # log P(y_t | y_<t, x); 0 beyond the target's length
    totals: Float[Array, "N"]  # log P(y | x), summed over the target's tokens
    lengths: Int[Array, "N"]


class Scorer:
    """log P(target | source) for token sequences; keep it, so that what it compiled is reused.

    rows: sharding of an array's first axis over the mesh. chunk: tokens whose logits exist at a time, so that memory is
    chunk · V and not B · T · V. temperature: of the distribution softmax(logits / temperature) that is asked.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: NamedSharding | None = None,
        batch_size: int = 64,
        chunk: int = 512,
        temperature: float = 1.0,
    ):
        self.model = model
        self._temperature = temperature
        self.compilations = 0  # shapes seen so far; each costs seconds once
        self._rows = rows
        self._shards = shards(rows)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._chunk = chunk
        self._run = jax.jit(self._score)

    def __call__(
        self, params: Params, sources: TokenLists, targets: TokenLists, languages: Ints | None = None
    ) -> Scores:
        """Scores in the order given. A target is scored as it stands: append EOS for the probability of ending there.
        languages: target language id of each source, which a language-aware model asks for.

        Raises ValueError for unequal counts, an empty sequence or a token outside the vocabulary.
        """
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources but {len(targets)} targets: give one target per source")
        check_tokens("source", sources, self.model.config.vocab_size)
        check_tokens("target", targets, self.model.config.vocab_size)
        to = target_languages(languages, len(sources), self.model.config.languages)
        lengths = np.array([len(t) for t in targets], np.int32)
        scores = np.zeros((len(targets), int(lengths.max(initial=0))), np.float32)
        for chosen in batches([len(s) + len(t) for s, t in zip(sources, targets, strict=True)], self._batch_size):
            rows = min(bucket(-(-len(chosen) // self._shards), 1) * self._shards, self._batch_size)
            source, target = ([sequences[i] for i in chosen] for sequences in (sources, targets))
            inputs = {
                "source": pad(source, rows, bucket(max(map(len, source)))),
                "source_lengths": fill([len(s) for s in source], rows, 1),
                "target": pad(target, rows, bucket(max(map(len, target)))),
                "target_lengths": fill([len(t) for t in target], rows, 1),
            }
            if to is not None:
                inputs["languages"] = fill(to[chosen], rows, 0)
            found = jax.device_get(self._run(params, jax.device_put(inputs, self._rows)))
            width = int(lengths[chosen].max())
            scores[chosen, :width] = found[: len(chosen), :width]
        return Scores(scores, scores.astype(np.float64).sum(1).astype(np.float32), lengths)

    def _score(self, params: Params, inputs: dict[str, Array]) -> Float[Array, "B T"]:
        self.compilations += 1  # runs while tracing only
        source, target = inputs["source"], inputs["target"]
        read = jnp.arange(source.shape[1])[None] < inputs["source_lengths"][:, None]
        told = jnp.arange(target.shape[1])[None] < inputs["target_lengths"][:, None]
        batch = {
            "encoder_input_tokens": source,
            "encoder_segment_ids": read.astype(jnp.int32),
            "decoder_input_tokens": jnp.pad(target, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1],
            "decoder_segment_ids": told.astype(jnp.int32),
        }
        if "languages" in inputs:
            batch["decoder_language_ids"] = inputs["languages"][:, None] * told
        hidden = self.model(params, batch).hidden
        return jnp.where(told, self._log_probs(params, hidden, target), 0.0)

    def _log_probs(self, params: Params, hidden: Hidden, target: Tokens) -> Float[Array, "B T"]:
        """log softmax(logits)[target], a few positions of every row at a time."""
        batch, length, width = hidden.shape
        step = min(length, max(1, self._chunk * self._shards // batch))
        parts = -(-length // step)
        spare = ((0, 0), (0, parts * step - length))
        hidden = jnp.pad(hidden, (*spare, (0, 0))).reshape(batch, parts, step, width).swapaxes(0, 1)
        target = jnp.pad(target, spare).reshape(batch, parts, step).swapaxes(0, 1)

        def part(states_and_tokens: tuple[Array, Array]) -> Float[Array, "B C"]:
            states, tokens = states_and_tokens
            return jax.vmap(token_log_prob)(self.model.logits(params, states) / self._temperature, tokens)

        return jax.lax.map(part, (hidden, target)).swapaxes(0, 1).reshape(batch, -1)[:, :length]
