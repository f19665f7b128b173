"""The transformer: pure functions of a nested dict of arrays, built from a `ModelConfig`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.config import ModelConfig
from mlm.models.functional import Template
from mlm.models.layers import parameter
from mlm.models.stack import Stack
from mlm.types import Batch, Constrain, Hidden, Logits, Params, PyTree, SourceHidden, SourceSegments, SourceTokens


class Output(NamedTuple):
    """hidden: decoder states after the final norm, what the head reads. encoded: the encoder's."""

    hidden: Hidden
    encoded: SourceHidden


class Ends(nnx.Module):
    """The input table and, unless tied, the output matrix. Initial std: 1 and D^-1/2 (T5 1.1)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, width = config.vocab_size, config.d_model
        self.embedding = parameter(rngs, (size, width), 1.0, ("vocab", "embed"))
        if config.head == "linear":
            self.head = parameter(rngs, (width, size), width**-0.5, ("embed", "vocab"))


class Transformer:
    """An encoder-decoder. Holds no arrays: `init` makes them, every other method takes them.

    constrain(x, logical axes) pins activations to a mesh; the default leaves them alone.
    """

    def __init__(self, config: ModelConfig, constrain: Constrain = lambda x, axes: x):
        self.config = config
        self._constrain = constrain
        self._dtype = jnp.dtype(config.dtype)
        self._ends = Template(partial(Ends, config))
        self._encoder = Stack(config.d_model, config.encoder)
        self._decoder = Stack(config.d_model, config.decoder)

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters: {"embedding", "head", "encoder": {...}, "decoder": {...}}."""
        ends, encoder, decoder = jax.random.split(key, 3)
        return {
            **self._ends.init(ends),
            "encoder": self._encoder.init(encoder),
            "decoder": self._decoder.init(decoder),
        }

    def axes(self) -> PyTree:
        """Logical axis names of every parameter, a tuple per leaf."""
        return {**self._ends.axes(), "encoder": self._encoder.axes(), "decoder": self._decoder.axes()}

    def shapes(self) -> PyTree:
        """Shape and dtype of every parameter; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def __call__(self, params: Params, batch: Batch, key: Key[Array, ""] | None = None) -> Output:
        """Teacher-forced decoder states of a text-to-text batch (`mlm.types.ROW_FEATURES`), packed or not.

        key: dropout key, or None for evaluation.
        """
        source, target = (None, None) if key is None else jax.random.split(key)
        segments = batch["encoder_segment_ids"]
        encoded = self.encode(params, batch["encoder_input_tokens"], segments, source)
        hidden = self._decoder.forward(
            params["decoder"],
            self._embed(params, batch["decoder_input_tokens"]),
            batch["decoder_segment_ids"],
            encoded,
            segments,
            target,
            self._constrain,
        )
        return Output(hidden, encoded)

    def encode(
        self,
        params: Params,
        tokens: SourceTokens,
        segments: SourceSegments | None = None,
        key: Key[Array, ""] | None = None,
    ) -> SourceHidden:
        """Encoder states after the final norm. Without segments every token but padding (id 0) is one example."""
        if segments is None:
            segments = (tokens != 0).astype(jnp.int32)
        x = self._embed(params, tokens)
        return self._encoder.forward(params["encoder"], x, segments, None, None, key, self._constrain)

    def head(self, params: Params) -> Float[Array, "D V"]:
        """The output matrix. Tied: the input table, scaled by D^-1/2 (Raffel et al. 2020)."""
        if self.config.head == "linear":
            return params["head"]
        return params["embedding"].T * self.config.d_model**-0.5

    def logits(self, params: Params, hidden: Hidden) -> Logits:
        """Float32 logits over the vocabulary, in nats."""
        kernel = self.head(params).astype(self._dtype)
        return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)

    def unrolled(self, params: Params) -> Params:
        """Parameters for `step` in a loop: without the stacking, whose slices would be copied at every pass."""
        return {**params, "decoder": self._decoder.unrolled(params["decoder"])}

    def init_cache(
        self, params: Params, encoded: SourceHidden, source_mask: Bool[Array, "B S"], rows: int, length: int
    ) -> PyTree:
        """The decoding state of `rows` rows (batch x beams) with `length` slots each.

        {"length": [R] slots in use, "self": per layer, name, key|value [R, H, length, K],
         "cross": per layer the source's keys and values, computed once and kept at B rows, "source_mask": [B, S]}.
        A permutation of beams gathers axis 0 of "length" and of every leaf of "self"; the rest is shared.
        """
        if rows % encoded.shape[0]:
            raise ValueError(f"rows={rows} must be a multiple of the {encoded.shape[0]} sources: rows = batch x beams")
        cross, own = self._decoder.init_cache(params["decoder"], encoded, rows, length)
        return {"length": jnp.zeros(rows, jnp.int32), "self": own, "cross": cross, "source_mask": source_mask}

    def step(
        self, params: Params, tokens: Int[Array, "R Q"], cache: PyTree
    ) -> tuple[Float[Array, "R Q V"], Float[Array, "R Q D"], PyTree]:
        """(logits, states, cache) of the next Q tokens of every row, causal inside the block.

        Their keys stand in slots length, length + 1, …; "length" itself is not advanced, so a caller commits n of the
        Q tokens by adding n to it, and rolls back by not adding. length + Q must not exceed the slots.
        """
        hidden, own = self._decoder.step(params["decoder"], self._embed(params, tokens), cache)
        return self.logits(params, hidden), hidden, {**cache, "self": own}

    def _embed(self, params: Params, tokens: Int[Array, "B T"]) -> Hidden:
        return params["embedding"].astype(self._dtype)[tokens]
