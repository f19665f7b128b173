"""Parameters with logical axes, RMS norm, dropout, feed-forward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from mlm.models.config import FFNSpec
from mlm.types import Axes, Hidden

NORM_EPSILON = 1e-6


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: Axes) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), carrying its logical axis names."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


@jax.custom_vjp
def product(x: Float[Array, "B L D"], weights: Float[Array, "D F"]) -> Float[Array, "B L F"]:
    """x W, whose gradient of W is x^T g: in JAX's own rule, (g^T x)^T, XLA:CPU fuses all that made g into the
    transposition, which then takes several times as long as the product.
    """
    return jnp.einsum("BLD,DF->BLF", x, weights)


def _product_forward(x, weights):
    return product(x, weights), (x, weights)


def _product_backward(saved, g):
    x, weights = saved
    return jnp.einsum("BLF,DF->BLD", g, weights), jnp.einsum("BLD,BLF->DF", x, g)


product.defvjp(_product_forward, _product_backward)


def dropout(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None, broadcast: tuple[int, ...] = (1,)
) -> Float[Array, "..."]:
    """x scaled by 1/(1-rate) where kept, 0 where dropped; the mask is shared along `broadcast` axes (T5X: length).

    key None means evaluation: x unchanged.
    """
    if key is None or rate == 0.0:
        return x
    shape = tuple(1 if axis in broadcast else size for axis, size in enumerate(x.shape))
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean_D(x^2) + 1e-6), statistics in float32. Source: Zhang & Sennrich 2019."""

    def __init__(self, d_model: int):
        self.scale = nnx.Param(jnp.ones((d_model,), jnp.float32), axes=("embed",))

    def __call__(self, x: Hidden) -> Hidden:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


_NONLINEARITIES: dict[str, Callable] = {
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "swiglu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
    """(act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down when not gated. Source: Shazeer 2020."""

    def __init__(self, d_model: int, spec: FFNSpec, rngs: nnx.Rngs):
        self.activation = _NONLINEARITIES[spec.activation]
        if spec.gated:
            self.gate = parameter(rngs, (d_model, spec.d_ff), d_model**-0.5, ("embed", "mlp"))
        self.up = parameter(rngs, (d_model, spec.d_ff), d_model**-0.5, ("embed", "mlp"))
        self.down = parameter(rngs, (spec.d_ff, d_model), spec.d_ff**-0.5, ("mlp", "embed"))
        self.gated = spec.gated

    def __call__(self, x: Hidden, rate: float, key: Key[Array, ""] | None) -> Hidden:
        up = product(x, self.up[...].astype(x.dtype))
        if self.gated:
            inner = self.activation(product(x, self.gate[...].astype(x.dtype))) * up
        else:
            inner = self.activation(up)
        inner = dropout(inner, rate, key)
        return product(inner, self.down[...].astype(x.dtype))
