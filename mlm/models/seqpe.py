"""Positions spelled in digits and read by a small transformer (SeqPE), and the two losses that give them a metric.

Source: Li et al. 2025, SeqPE: Transformer with Sequential Position Encoding, in its form for attention scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mlm.models.attention import attend
from mlm.models.config import StackConfig
from mlm.models.layer import Layer
from mlm.models.layers import Norm, Pass, parameter, product, zeros
from mlm.models.sight import Sight
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec, NormSpec, SeqPESpec
from mlm.models.view import View

_RANDOM, _EDITED = 0.4, 0.25  # shares of pivots with random candidates, and of the others' that differ in a digit
_NEAR = 256  # tokens: how far the rest of those lie from their pivot


class Reading(NamedTuple):
    """What P positions are to the queries and to the keys of every head: its logits grow by query . key / sqrt(K)."""

    query: Float[Array, "P H K"]
    key: Float[Array, "P H K"]


class PositionReader(nnx.Module):
    """e(p) of the digits of p: a causal pre-norm transformer reads them, then one row more whose last state, projected,
    it is. One map per head makes queries of it, another keys, for all layers of the stack. All of it is float32.
    """

    def __init__(self, spec: AttentionSpec, rngs: nnx.Rngs):
        assert spec.position.seqpe is not None
        self.spec = own = spec.position.seqpe
        width, head_dim = own.width, own.width // own.heads
        self.digit = parameter(rngs, (10, width), 1.0, ("positions", "embed"))
        self.place = parameter(rngs, (own.digits, width), 1.0, ("positions", "embed"))
        self.last = parameter(rngs, (width,), 1.0, ("embed",))
        self.attention = AttentionSpec(
            source="self", heads=own.heads, head_dim=head_dim, scale=head_dim**-0.5, bias=True
        )
        layer = LayerSpec(sublayers=(self.attention, FFNSpec(d_ff=4 * width, activation="gelu", bias=True)))
        stack = StackConfig(group=(layer,), repeats=own.layers, causal=True, norm=NormSpec(kind="layer", eps=1e-5))
        for index in range(own.layers):
            setattr(self, f"layer_{index}", Layer(width, width, stack, layer, rngs))
        self.final_norm = Norm(width, stack.norm)
        self.out = parameter(rngs, (width, width), width**-0.5, ("embed", "mlp"))
        self.out_bias = zeros((width,), ("mlp",))
        for name in ("query", "key"):
            shape = (width, spec.heads, spec.head_dim)
            setattr(self, name, parameter(rngs, shape, width**-0.5, ("embed", "heads", "head_dim")))

    def __call__(
        self, positions: Int[Array, "P"], rate: float = 0.0, key: Key[Array, ""] | None = None
    ) -> Float[Array, "P E"]:
        """rate: dropout."""
        x = self.digit[...][spelled(positions, self.spec.digits)] + self.place[...]
        x = jnp.concatenate([x, jnp.broadcast_to(self.last[...], (x.shape[0], 1, x.shape[2]))], axis=1)
        length = x.shape[1]
        view = View(
            own=Sight(shape=(length, length), causal=True),
            positions=jnp.arange(length)[None],
            memory=None,
            memory_sight=None,
            specs=[self.attention],
            table=None,
            attend=attend,
            draws=True,
        )
        its = Pass(real=jnp.ones(x.shape[:2], bool), rate=rate)
        for index in range(self.spec.layers):
            own = None if key is None else jax.random.fold_in(key, index)
            x, _ = getattr(self, f"layer_{index}").forward(x, view, its, own)
        return product(self.final_norm(x[:, -1:]), self.out[...])[:, 0] + self.out_bias[...]

    def reading(self, positions: Int[Array, "P"], rate: float = 0.0, key: Key[Array, ""] | None = None) -> Reading:
        read = self(positions, rate, key)
        return Reading(*(jnp.einsum("PE,EHK->PHK", read, getattr(self, name)[...]) for name in Reading._fields))

    def loss(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """Both losses by their weights, in nats, on positions drawn anew."""
        spec = self.spec
        total = jnp.zeros(())
        if spec.contrast:
            pivots, candidates = draw_candidates(key, spec)
            read = self(jnp.concatenate([pivots, candidates.reshape(-1)]))
            mine, others = read[: pivots.size], read[pivots.size :].reshape(*candidates.shape, -1)
            total = total + spec.contrast * contrast_loss(pivots, candidates, mine, others)
        if spec.transfer:
            ends = jnp.array([max(spec.trained, spec.window), spec.limit])
            starts = jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, ends - spec.window + 1)
            windows = starts[:, None] + jnp.arange(spec.window)
            teacher, student = jnp.split(self(windows.reshape(-1)), 2)
            total = total + spec.transfer * transfer_loss(teacher, student)
        return total


def spelled(positions: Int[Array, "*P"], digits: int) -> Int[Array, "*P {digits}"]:
    """Decimal digits, the first that of the highest power: 42 in three digits is 0, 4, 2."""
    return positions[..., None] // 10 ** jnp.arange(digits - 1, -1, -1) % 10


def bias(query: Float[Array, "R T H K"], key: Float[Array, "*rows S H K"]) -> Float[Array, "R H T S"]:
    """What positions add to the logits, in nats: query . key / sqrt(K). key: of each row, or the same for all."""
    letters = "RTHK,SHK->RHTS" if key.ndim == 3 else "RTHK,RSHK->RHTS"
    return jnp.einsum(letters, query, key) * query.shape[-1] ** -0.5


def draw_candidates(key: Key[Array, ""], spec: SeqPESpec) -> tuple[Int[Array, "N"], Int[Array, "N C"]]:
    """(pivots, candidates for their nearest, never themselves), below `spec.limit`.

    Of a share of the pivots all candidates are random; of the others each differs from the pivot in one digit, or lies
    within 256 tokens of it.
    """
    limit, shape = spec.limit, (spec.pivots, spec.candidates)
    bits = jax.random.bits(key, (6, *shape))  # all at once: each draw of its own would be compiled

    def below(number: int, bound: int | Int[Array, "N 1"]) -> Int[Array, "N C"]:
        return (bits[number] % jnp.asarray(bound).astype(jnp.uint32)).astype(jnp.int32)

    pivot = below(0, limit)[:, :1]
    power = 10 ** below(1, spec.digits)
    edited = pivot + (below(2, 10) - pivot // power % 10) * power
    least, most = jnp.maximum(pivot - _NEAR, 0), jnp.minimum(pivot + _NEAR, limit - 1)
    hard = jnp.where(below(3, 1000) < 1000 * _EDITED, edited, least + below(4, most - least + 1))
    drawn = jnp.where(below(5, 1000)[:, :1] < 1000 * _RANDOM, below(4, limit), hard)
    return pivot[:, 0], jnp.where(drawn == pivot, jnp.where(pivot == limit - 1, pivot - 1, pivot + 1), drawn)


def contrast_loss(
    pivots: Int[Array, "N"],
    candidates: Int[Array, "N C"],
    mine: Float[Array, "N E"],
    others: Float[Array, "N C E"],
) -> Float[Array, ""]:
    """mean -log softmax_c(e(p) . e(c)) of the candidate nearest to p, in nats; of several as near, their sum counts."""
    logits = jnp.einsum("NE,NCE->NC", mine, others)
    distance = jnp.abs(candidates - pivots[:, None])
    nearest = distance == jnp.min(distance, axis=1, keepdims=True)
    right = jax.nn.logsumexp(jnp.where(nearest, logits, -jnp.inf), axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - right)


def transfer_loss(teacher: Float[Array, "P E"], student: Float[Array, "P E"]) -> Float[Array, ""]:
    """KL of the rows of softmax(E E^T) of positions out of the trained range, `student`, from those of as many within,
    which get no gradient: sum student (log student - log teacher), a mean over rows, in nats.
    """
    known, other = (jax.nn.log_softmax(e @ e.T, axis=-1) for e in (jax.lax.stop_gradient(teacher), student))
    return jnp.mean(jnp.sum(jnp.exp(other) * (other - known), axis=-1))
