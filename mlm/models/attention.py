"""One attention core: queries look at keys where the mask allows, under an additive bias."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.config import AttentionSpec
from mlm.models.layers import dropout, parameter
from mlm.types import Hidden, SourceHidden

# Finite, so that a row with nothing to look at (padding) gives a mean instead of NaN.
MASKED = -1e10


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    mask: Bool[Array, "#B #H #T S"],
    bias: Float[Array, "#B H T S"] | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; softmax in float32.

    No 1/sqrt(K): T5 folds it into the initial query weights.
    """
    logits = jnp.einsum("BTHK,BHSK->BHTS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    probs = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    probs = dropout(probs, rate, dropout_key, broadcast=(2,)).astype(value.dtype)
    return jnp.einsum("BHTS,BHSK->BTHK", probs, value)


def segment_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, causal: bool = False
) -> Bool[Array, "B 1 T S"]:
    """True where query and key belong to the same example (segment 0, padding, belongs to none).

    Causal also demands that the key stands at or before the query; packed examples are contiguous, so indices decide.
    """
    same = (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] != 0)
    if causal:
        same &= jnp.arange(keys.shape[1])[None, :] <= jnp.arange(queries.shape[1])[:, None]
    return same[:, None]


class Attention(nnx.Module):
    """Projections around `attend`. Initial std: query (D K)^-1/2, key and value D^-1/2, output (H K)^-1/2 (T5X)."""

    def __init__(self, d_model: int, spec: AttentionSpec, rngs: nnx.Rngs):
        shape = (d_model, spec.heads, spec.head_dim)
        axes = ("embed", "heads", "head_dim")
        self.query = parameter(rngs, shape, (d_model * spec.head_dim) ** -0.5, axes)
        self.key = parameter(rngs, shape, d_model**-0.5, axes)
        self.value = parameter(rngs, shape, d_model**-0.5, axes)
        self.out = parameter(
            rngs,
            (spec.heads, spec.head_dim, d_model),
            (spec.heads * spec.head_dim) ** -0.5,
            ("heads", "head_dim", "embed"),
        )
        self.source = spec.source

    def queries(self, x: Hidden) -> Float[Array, "B T H K"]:
        return jnp.einsum("BTD,DHK->BTHK", x, self.query[...].astype(x.dtype))

    def keys_values(self, states: SourceHidden) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S K"]]:
        """Keys and values of the states to be looked at, heads first, as a matrix product per head reads them."""
        key = jnp.einsum("BSD,DHK->BHSK", states, self.key[...].astype(states.dtype))
        value = jnp.einsum("BSD,DHK->BHSK", states, self.value[...].astype(states.dtype))
        return key, value

    def output(self, attended: Float[Array, "B T H K"]) -> Hidden:
        return jnp.einsum("BTHK,HKD->BTD", attended, self.out[...].astype(attended.dtype))
