"""One attention core: queries look at keys where the mask allows, under an additive bias.

What is looked at comes in pieces (own keys, the encoder's keys, both), so that self-, cross- and joint attention,
grouped heads and beams that share a source are one function with other data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.layers import Norm, Pass, Sublayer, cap, dropout, parameter, product, unit_rows, zeros
from mlm.models.positions import rotate
from mlm.models.sight import Drawn, Sight
from mlm.models.specs import AttentionSpec, NormSpec
from mlm.models.view import Attend, View
from mlm.types import Hidden, PyTree, SourceHidden

# Finite, so that a row with nothing to look at (padding) gives a mean instead of NaN.
MASKED = -1e10


@dataclass(frozen=True)
class Keys:
    """Keys and values, and how they are seen. Fewer rows than the queries: each serves the same number of them, in
    order (beams of one source); fewer heads: likewise.
    """

    key: Float[Array, "B G S K"]
    value: Float[Array, "B G S K"]
    sight: Sight | Drawn


def attend(
    query: Float[Array, "R H T K"],
    seen: Sequence[Keys],
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    show: Callable[[Float[Array, "R H T M"]], None] = lambda probabilities: None,
) -> Float[Array, "R H T K"]:
    """softmax(cap(scale q k^T) + bias) v over all keys that the masks allow, under one softmax in float32.

    scale None: 1, as T5 folds 1/sqrt(K) into the initial query weights. cap(z) = softcap tanh(z / softcap). show: is
    given the softmax, of the pieces one after another, before dropout.
    """
    logits = jnp.concatenate([logits_of(query, piece, scale, softcap) for piece in seen], axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)
    show(probs)
    probs = dropout(probs, rate, dropout_key, broadcast=(2,))
    ends = np.cumsum([piece.key.shape[2] for piece in seen])[:-1]
    parts = zip(jnp.split(probs, ends, axis=-1), seen, strict=True)
    return reduce(jnp.add, (mean_values(query, mine, piece.value) for mine, piece in parts))


def mean_values(
    query: Float[Array, "R H T K"],
    probs: Float[Array, "R H T S"],
    value: Float[Array, "B G S K"],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "R H T K"]:
    """sum_s probs value, in the shape of the queries. dtype: of the sum; None: that of the values."""
    folded = _fold(probs.astype(value.dtype), value)
    return _unfold(jnp.einsum("BGQS,BGSK->BGQK", folded, value, preferred_element_type=dtype), query)


def logits_of(
    query: Float[Array, "R H T K"], piece: Keys, scale: float | Array | None, softcap: float | None
) -> Float[Array, "R H T S"]:
    """cap(scale q k^T) + bias in float32; `MASKED` where the piece is not seen."""
    logits = _unfold(_scores(_fold(query, piece.key), piece.key), query)
    if scale is not None:
        logits = logits * scale
    logits = cap(logits, softcap)
    drawn = piece.sight.drawn()
    if drawn.bias is not None:
        logits = _add_bias(drawn.bias.shape[0] == 1, logits, drawn.bias)
    mask = drawn.mask
    if mask.shape[0] not in (1, logits.shape[0]):
        mask = jnp.repeat(mask, logits.shape[0] // mask.shape[0], axis=0)
    return jnp.where(mask, logits, MASKED)


@jax.custom_vjp
def _scores(query: Float[Array, "B G Q K"], key: Float[Array, "B G S K"]) -> Float[Array, "B G Q S"]:
    """q k^T in float32, whose gradient is rounded to the type of the operands before it meets them, as
    probabilities are before they meet the values: else bfloat16 trains at the speed of float32 products.
    """
    return jnp.einsum("BGQK,BGSK->BGQS", query, key, preferred_element_type=jnp.float32)


def _scores_forward(query, key):
    return jnp.einsum("BGQK,BGSK->BGQS", query, key, preferred_element_type=jnp.float32), (query, key)


def _scores_backward(saved, g):
    query, key = saved
    g = g.astype(query.dtype)
    return jnp.einsum("BGQS,BGSK->BGQK", g, key), jnp.einsum("BGQS,BGQK->BGSK", g, query)


_scores.defvjp(_scores_forward, _scores_backward)


def _fold(x: Float[Array, "R H T X"], keys: Float[Array, "B G S K"]) -> Float[Array, "B G Q X"]:
    """Queries that share keys, be it as rows or as heads, as one longer list of queries: Q = R/B x H/G x T."""
    rows, heads, length, size = x.shape
    batch, groups = keys.shape[:2]
    if rows != batch:
        x = jnp.swapaxes(x.reshape(batch, rows // batch, groups, heads // groups * length, size), 1, 2)
    return x.reshape(batch, groups, -1, size)


def _unfold(x: Float[Array, "B G Q X"], query: Float[Array, "R H T K"]) -> Float[Array, "R H T X"]:
    rows, heads, length, _ = query.shape
    batch, groups, _, size = x.shape
    if rows != batch:
        x = jnp.swapaxes(x.reshape(batch, groups, rows // batch, heads // groups * length, size), 1, 2)
    return x.reshape(rows, heads, length, size)


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


class Attention(Sublayer):
    """Projections around `attend`, and what belongs to one layer: norms of queries and keys, an own position table.

    memory_width: width of the states that cross-attention reads. Initial std: query (D K)^-1/2, or D^-1/2 where logits
    are scaled; key D^-1/2; value gain D^-1/2; output gain (H K)^-1/2 (T5X).
    """

    def __init__(
        self, d_model: int, memory_width: int, spec: AttentionSpec, norm: NormSpec, gain: float, rngs: nnx.Rngs
    ):
        self.spec = spec
        heads, groups, size = spec.heads, spec.key_heads, spec.head_dim
        folded = spec.scale is None and spec.qk_norm == "none"
        width = memory_width if spec.source == "cross" else d_model
        self.query = parameter(
            rngs, (d_model, heads, size), (d_model * (size if folded else 1)) ** -0.5, ("embed", "heads", "head_dim")
        )
        # Grouped heads are few: every device has them all, where whole ones are split like the queries'.
        kv_heads = "heads" if groups == heads else "kv_heads"
        axes = ("embed", kv_heads, "head_dim")
        self.key = parameter(rngs, (width, groups, size), width**-0.5, axes)
        self.value = parameter(rngs, (width, groups, size), gain * width**-0.5, axes)
        self.out = parameter(
            rngs, (heads, size, d_model), gain * (heads * size) ** -0.5, ("heads", "head_dim", "embed")
        )
        if spec.bias:
            self.query_bias = zeros((heads, size), ("heads", "head_dim"))
            self.key_bias = zeros((groups, size), axes[1:])
            self.value_bias = zeros((groups, size), axes[1:])
            self.out_bias = zeros((d_model,), ("embed",))
        if spec.qk_norm == "rms":
            head_norm = replace(norm, kind="rms", languages=None)
            self.query_norm, self.key_norm = (Norm(size, head_norm, ("head_dim",)) for _ in range(2))
        elif spec.qk_norm == "l2_scalar":
            self.gain = nnx.Param(jnp.asarray(spec.qk_gain, jnp.float32), axes=())
        if spec.position.table() == "layer":
            self.position = position_table(heads, spec, rngs)

    def whole(self, h: Hidden, view: View, its: Pass, key: Key[Array, ""] | None) -> tuple[Hidden, None]:
        seen = []
        if self.spec.reads_itself:
            k, v = self.keys_values(h, view.positions)
            seen.append(Keys(k, v, self._sight(view)))
        if self.spec.reads_memory:
            k, v = self.keys_values(view.memory)
            seen.append(Keys(k, v, view.memory_sight()))
        return self.attended(self.queries(h, view.positions), seen, its.rate, key, _path(view, its)), None

    def block(
        self, h: Float[Array, "R Q D"], slots: PyTree, kept: PyTree, view: View, its: Pass
    ) -> tuple[Float[Array, "R Q D"], PyTree]:
        seen = []
        if self.spec.reads_itself:
            k, v = self.keys_values(h, view.positions)
            slots = view.written(slots, {"key": k, "value": v}, ring=self.spec.window is not None)
            seen.append(Keys(slots["key"], slots["value"], self._sight(view)))
        if self.spec.reads_memory:
            seen.append(Keys(kept["key"], kept["value"], view.memory_sight()))
        return self.attended(self.queries(h, view.positions), seen, 0.0, None, _path(view, its)), slots

    def kept(self, memory: SourceHidden | None, real: Bool[Array, "B S"] | None) -> PyTree:
        return dict(zip(("key", "value"), self.keys_values(memory), strict=True)) if self.spec.reads_memory else {}

    def slots(self, rows: int, length: int, block: int, dtype: jnp.dtype) -> PyTree:
        # A window moves over a ring, which holds what the first of a block sees and the block, so that a block may be
        # read again from any place in it.
        length = min(length, self.spec.window + block - 1) if self.spec.window else length
        shape = (rows, self.spec.key_heads, length, self.spec.head_dim)
        return {kind: jnp.zeros(shape, dtype) for kind in ("key", "value")} if self.spec.reads_itself else {}

    def _sight(self, view: View) -> Sight | Drawn:
        owner = self.spec.position.table() == "layer"
        return view.sight(self.spec, self.position[...] if owner else None)

    def queries(self, x: Hidden, positions: Int[Array, "#B T"] | None = None) -> Float[Array, "B H T K"]:
        """positions: where in their example the tokens stand; read only by attention that rotates."""
        return self._turned(self._normed(self._project(x, "query"), "query_norm"), positions)

    def keys_values(
        self, states: Float[Array, "B S _"], positions: Int[Array, "#B S"] | None = None
    ) -> tuple[Float[Array, "B G S K"], Float[Array, "B G S K"]]:
        """Keys and values of the states to be looked at. positions None: they are not turned (encoder states)."""
        key = self._turned(self._normed(self._project(states, "key"), "key_norm"), positions)
        return key, self._project(states, "value")

    def attended(
        self,
        query: Float[Array, "R H T K"],
        seen: Sequence[Keys],
        rate: float,
        key: Key[Array, ""] | None,
        by: Attend = attend,
    ) -> Float[Array, "R T D"]:
        """Looks at `seen` by a path of attention and projects back to the model's width."""
        spec = self.spec
        scale = self.gain[...] if spec.qk_norm == "l2_scalar" else spec.scale
        y = by(query, seen, scale=scale, softcap=spec.softcap, rate=rate, dropout_key=key)
        flat = jnp.swapaxes(y, 1, 2)
        flat = flat.reshape(*flat.shape[:2], -1)
        y = product(flat, self.out[...].astype(flat.dtype).reshape(flat.shape[-1], -1))
        return y + self.out_bias[...].astype(y.dtype) if spec.bias else y

    def _project(self, x: Float[Array, "B L _"], name: str) -> Float[Array, "B _ L K"]:
        """x W, heads before positions: each head's matrix products then read consecutive memory."""
        weights = getattr(self, name)[...].astype(x.dtype)
        y = product(x, weights.reshape(x.shape[-1], -1)).reshape(*x.shape[:2], *weights.shape[1:])
        if self.spec.bias:
            y = y + getattr(self, f"{name}_bias")[...].astype(x.dtype)
        return jnp.swapaxes(y, 1, 2)

    def _normed(self, x: Float[Array, "B _ L K"], name: str) -> Float[Array, "B _ L K"]:
        if self.spec.qk_norm == "rms":
            return getattr(self, name)(x)
        if self.spec.qk_norm == "l2_scalar":
            return unit_rows(x)
        return x

    def _turned(self, x: Float[Array, "B _ L K"], positions: Int[Array, "#B L"] | None) -> Float[Array, "B _ L K"]:
        position = self.spec.position
        if position.kind != "rope" or positions is None:
            return x
        return rotate(x, positions, position)


def _path(view: View, its: Pass) -> Attend:
    """How this pass attends: where its weights are to be shown, by the plain path, as no other ever holds them."""
    return partial(attend, show=partial(its.tap, "probabilities")) if "probabilities" in its.taps else view.attend


def position_table(heads: int, spec: AttentionSpec, rngs: nnx.Rngs) -> nnx.Param:
    """Biases of T5's distance buckets, in nats; initial std sqrt(2 / (heads + buckets)) (T5X)."""
    buckets = spec.position.buckets
    return parameter(rngs, (heads, buckets), (2.0 / (heads + buckets)) ** 0.5, ("heads", "buckets"))
