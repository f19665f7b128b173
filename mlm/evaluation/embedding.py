"""Texts as vectors: the mean of a model's encoder states."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from mlm.decoding.buckets import Ints, TokenLists, batches, bucket, check_tokens, fill, pad, shards, target_languages
from mlm.models.transformer import Transformer
from mlm.types import Params


class Embedder:
    """Σ_t h_t / T over the T tokens of a text, h the encoder's final states. Keep it: what it compiled is reused.

    rows: sharding of an array's first axis over the mesh. batch_size: texts per device call.
    """

    def __init__(self, model: Transformer, *, rows: NamedSharding | None = None, batch_size: int = 64):
        self.model, self._rows, self._shards = model, rows, shards(rows)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._run = jax.jit(self._mean)

    def __call__(self, params: Params, sources: TokenLists, languages: Ints | None = None) -> Float[np.ndarray, "N D"]:
        """Float32, in the order given. languages: to be written, which a language-aware model asks for.

        Raises ValueError for a model without an encoder, an empty sequence or a token outside the vocabulary.
        """
        config = self.model.config
        if config.encoder is None:
            raise ValueError("this model is a decoder alone, and embeddings are means of an encoder's states")
        check_tokens("source", sources, config.vocab_size)
        to = target_languages(languages, len(sources), config.languages)
        vectors = np.zeros((len(sources), config.memory_width), np.float32)
        for chosen in batches([len(s) for s in sources], self._batch_size):
            rows = min(bucket(-(-len(chosen) // self._shards), 1) * self._shards, self._batch_size)
            picked = [sources[i] for i in chosen]
            inputs = {
                "sources": pad(picked, rows, bucket(max(map(len, picked)))),
                "lengths": fill([len(s) for s in picked], rows, 1),
            }
            if to is not None:
                inputs["languages"] = fill(to[chosen], rows, 0)
            vectors[chosen] = jax.device_get(self._run(params, jax.device_put(inputs, self._rows)))[: len(chosen)]
        return vectors

    def _mean(self, params: Params, inputs: dict[str, Array]) -> Float[Array, "B D"]:
        real = jnp.arange(inputs["sources"].shape[1])[None] < inputs["lengths"][:, None]
        segments = real.astype(jnp.int32)
        states = self.model.encode(params, inputs["sources"], segments, languages=inputs.get("languages"))
        total = jnp.sum(jnp.where(real[..., None], states.astype(jnp.float32), 0.0), axis=1)
        return total / inputs["lengths"][:, None]
