"""One attention core: queries look at keys where the mask allows, under an additive bias."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.config import AttentionSpec
from mlm.models.layers import dropout, parameter, product
from mlm.types import Hidden, SourceHidden

# Finite, so that a row with nothing to look at (padding) gives a mean instead of NaN.
MASKED = -1e10


def attend(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H S K"],
    value: Float[Array, "B H S K"],
    mask: Bool[Array, "#B #H #T S"],
    bias: Float[Array, "#B H T S"] | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B H T K"]:
    """softmax(q k^T + bias) v over the keys that the mask allows; softmax in float32.

    No 1/sqrt(K): T5 folds it into the initial query weights.
    """
    logits = jnp.einsum("BHTK,BHSK->BHTS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = _add_bias(bias.shape[0] == 1, logits, bias)
    probs = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    probs = dropout(probs, rate, dropout_key, broadcast=(2,)).astype(value.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", probs, value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(shared: bool, logits: Float[Array, "B H T S"], bias: Float[Array, "#B H T S"]) -> Float[Array, "B H T S"]:
    """logits + bias. shared: one bias for all rows, so that its gradient sums over them."""
    return logits + bias


def _add_bias_backward(shared, _, g):
    def by_product(g):  # XLA:CPU merges the plain sums of all layers into one loop that one thread runs
        ones = jnp.ones(g.shape[0], g.dtype)
        return jnp.einsum("BHTS,B->HTS", g, ones, precision=jax.lax.Precision.HIGHEST)[None]

    def by_sum(g):
        return jnp.sum(g, axis=0, keepdims=True)

    return g, jax.lax.platform_dependent(g, cpu=by_product, default=by_sum) if shared else g


_add_bias.defvjp(lambda shared, logits, bias: (logits + bias, None), _add_bias_backward)


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

    def queries(self, x: Hidden) -> Float[Array, "B H T K"]:
        return _heads_first(x, self.query[...])

    def keys_values(self, states: SourceHidden) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S K"]]:
        """Keys and values of the states to be looked at."""
        return _heads_first(states, self.key[...]), _heads_first(states, self.value[...])

    def output(self, attended: Float[Array, "B H T K"]) -> Hidden:
        flat = jnp.swapaxes(attended, 1, 2)
        flat = flat.reshape(*flat.shape[:2], -1)
        return product(flat, self.out[...].astype(flat.dtype).reshape(flat.shape[-1], -1))


def _heads_first(x: Float[Array, "B L D"], weights: Float[Array, "D H K"]) -> Float[Array, "B H L K"]:
    """x W, heads before positions: each head's matrix products then read consecutive memory."""
    y = product(x, weights.astype(x.dtype).reshape(x.shape[-1], -1))
    return jnp.swapaxes(y.reshape(*x.shape[:2], *weights.shape[1:]), 1, 2)
