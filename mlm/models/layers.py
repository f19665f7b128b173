"""Parameters with logical axes, norms, dropout, feed-forward."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.routing import Routed
from mlm.models.specs import FFNSpec, NormSpec
from mlm.models.view import View
from mlm.types import ONE_DEVICE, Axes, Hidden, Placement, PyTree, SourceHidden


@dataclass(frozen=True)
class Pass:
    """One run over a batch, but for who sees whom (`View`).

    rate: dropout. real: False at padding. cached: a block of a decoding step. languages: id of every token, below
    `language_count`. target_languages: what a token's example writes, where something is kept by language. taps: names
    of what the caller wants to see; tap(name, value) hands it out. steering: added to router logits, of the mixtures
    that are still to come.
    """

    real: Bool[Array, "B T"]
    rate: float = 0.0
    placement: Placement = ONE_DEVICE
    cached: bool = False
    languages: Int[Array, "B T"] | None = None
    language_count: int = 0
    target_languages: Int[Array, "B #T"] | None = None
    taps: frozenset[str] = frozenset()
    tap: Callable[[str, Array], None] = lambda name, value: None
    steering: Float[Array, "n #B #T E"] | None = None


class Sublayer(nnx.Module):
    """What a layer asks of each of its parts, whatever the kind; this one keeps nothing between decoding steps."""

    def whole(self, h: Hidden, view: View, its: Pass, key: Key[Array, ""] | None) -> tuple[Hidden, Routed | None]:
        """All positions of whole sequences, and a mixture's record. key: for dropout; None: evaluation."""
        raise NotImplementedError

    def block(
        self, h: Float[Array, "R Q D"], slots: PyTree, kept: PyTree, view: View, its: Pass
    ) -> tuple[Float[Array, "R Q D"], PyTree]:
        """Q new positions of every row against its cache, and the slots with what is to be known of them later.

        Whoever calls may go back: slots at and after a row's length are stale until they are written again.
        """
        return self.whole(h, view, its, None)[0], slots

    def kept(self, memory: SourceHidden | None, real: Bool[Array, "B S"] | None) -> PyTree:
        """What decoding steps read of the encoder's states, computed once. real: False at their padding."""
        return {}

    def slots(self, rows: int, length: int, block: int, dtype: jnp.dtype) -> PyTree:
        """Empty arrays [rows, …, slots, …], the rows' axis 0 and the slots' axis 2, for rows of `length` positions that
        are read in blocks of at most `block`.
        """
        return {}


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: Axes) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), carrying its logical axis names."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def zeros(shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 parameter that starts at zero."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


@jax.custom_vjp
def product(x: Float[Array, "B L D"], weights: Float[Array, "D F"]) -> Float[Array, "B L F"]:
    """x W, whose gradient of W is x^T g: in JAX's own rule, (g^T x)^T, XLA:CPU fuses all that made g into the
    transposition, which then takes several times as long as the product.
    """
    return jnp.einsum("BLD,DF->BLF", x, weights)


def _product_forward(x, weights):
    # Not product(x, weights): a policy of rematerialisation goes by operations, and that call would hide this one.
    return jnp.einsum("BLD,DF->BLF", x, weights), (x, weights)


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


def cap(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """softcap * tanh(logits / softcap); None: as they are."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def unit_rows(table: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows divided by their Euclidean lengths, in float32."""
    x = table.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)).astype(table.dtype)


class Norm(nnx.Module):
    """What a `NormSpec` says, over the last axis, statistics in float32; at first it scales by 1.

    By language, scale and bias are rows of tables [languages, width].

    Sources: Zhang & Sennrich 2019 (rms), Ba et al. 2016 (layer).
    """

    def __init__(self, width: int, spec: NormSpec, axes: Axes = ("embed",)):
        self.spec = spec
        shape: tuple[int, ...] = (width,)
        if spec.languages:
            shape, axes = (spec.languages, width), ("languages", *axes)
        self.scale = nnx.Param(jnp.full(shape, 0.0 if spec.offset_one else 1.0, jnp.float32), axes=axes)
        if spec.kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "... K"], languages: Int[Array, "B #T"] | None = None) -> Float[Array, "... K"]:
        def own(table: Float[Array, "... K"]) -> Float[Array, "... K"]:
            return table[languages] if self.spec.languages else table

        x32, scale = x.astype(jnp.float32), own(self.scale[...]) + float(self.spec.offset_one)
        if self.spec.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.spec.eps) * scale
        return (y + own(self.bias[...]) if self.spec.kind == "layer" else y).astype(x.dtype)


_NONLINEARITIES: dict[str, Callable] = {
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "geglu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "swiglu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class FeedForward(Sublayer):
    """(act(x W_gate) * (x W_up)) W_down, or act(x W_up) W_down when not gated; biases added where the spec has them.

    Initial std: gain D^-1/2 and gain F^-1/2. Source: Shazeer 2020.
    """

    def __init__(self, d_model: int, spec: FFNSpec, gain: float, rngs: nnx.Rngs):
        self.spec = spec
        if spec.gated:
            self.gate = parameter(rngs, (d_model, spec.d_ff), gain * d_model**-0.5, ("embed", "mlp"))
        self.up = parameter(rngs, (d_model, spec.d_ff), gain * d_model**-0.5, ("embed", "mlp"))
        self.down = parameter(rngs, (spec.d_ff, d_model), gain * spec.d_ff**-0.5, ("mlp", "embed"))
        if spec.bias:
            self.up_bias = zeros((spec.d_ff,), ("mlp",))
            self.down_bias = zeros((d_model,), ("embed",))
            if spec.gated:
                self.gate_bias = zeros((spec.d_ff,), ("mlp",))

    def whole(self, h: Hidden, view: View, its: Pass, key: Key[Array, ""] | None) -> tuple[Hidden, None]:
        return self(h, its, key), None

    def __call__(self, x: Hidden, its: Pass, key: Key[Array, ""] | None) -> Hidden:
        def inner(h: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
            its.tap("activations", h)
            return dropout(h, its.rate, key)

        return feed_forward(self.spec, self._project, x, inner)

    def _project(self, x: Float[Array, "B T _"], name: str) -> Float[Array, "B T _"]:
        y = product(x, getattr(self, name)[...].astype(x.dtype))
        return y + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.spec.bias else y


def feed_forward(
    spec: FFNSpec, project: Callable[[Array, str], Array], x: Float[Array, "... D"], inner: Callable[[Array], Array]
) -> Float[Array, "... D"]:
    """The network's formula over `project(x, "gate" | "up" | "down")`; inner: what is done to its hidden units."""
    activation = _NONLINEARITIES[spec.activation]
    if spec.gated:
        h = activation(project(x, "gate")) * project(x, "up")
    else:
        h = activation(project(x, "up"))
    return project(inner(h), "down")
