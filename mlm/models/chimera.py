"""Chimera heads: guesses ahead, read from the decoder's own states and from the tokens behind the newest of them.

Place p of what the decoder reads holds the token x_p, embedded e_p (x_0: its start token); behind it stands its state
h_p, from which its head says x_{p+1}. Head k = 1, …, n says it too, of all states from h_{p-k} on backwards alone:

    z_p = res([e_{p-2} e_{p-1} e_p]) W2,   res(u) = u + silu(u W1),   W1 = 0 at first
    o_p = one layer's output for z_p, which looks at h_j, j <= p - k, and at itself; it stands for h_p
    logits = head([h_{p-k} o_p] M_k),   M_k = [I I]^T at first

So head k guesses the (k + 1)-th token behind a state, once the k tokens between are guessed or known. The first two
places of an example repeat its first embedding.

Source: Zeng et al. 2024 (arXiv:2402.15758), with two changes. Their heads are matrices [2 D, V], both halves the base's
own head at first; here each is the base's head behind a matrix M_k [2 D, D], which begins as the same logits and takes
less than a hundredth of the numbers at 250,000 tokens, and the head may be of any kind. And their later heads are
trained on states that do not exist yet where they guess; here training sees what guessing sees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlm.models.attention import Attention, Keys
from mlm.models.layers import FeedForward, Norm, Pass, parameter, product, zeros
from mlm.models.positions import segment_positions
from mlm.models.sight import Drawn, segment_mask
from mlm.models.specs import ChimeraSpec, NormSpec
from mlm.types import Hidden, PyTree, Segments


class Drafted(NamedTuple):
    """What n heads make of every place p. states: o_p. mixed: what the model's head reads to say what follows there.
    known: whether the example has the state that the head looks from; where it has none, the others say nothing.
    """

    states: Float[Array, "n B T D"]
    mixed: Float[Array, "n B T D"]
    known: Bool[Array, "n B T"]


class Chimera(nnx.Module):
    """The trigram encoder, the layer, and the matrices M of the heads, for states of `width` numbers."""

    def __init__(self, width: int, spec: ChimeraSpec, rngs: nnx.Rngs):
        self.spec = spec
        norm, both = NormSpec(), 2 * width
        self.between = zeros((3 * width, 3 * width), ("embed", "mlp"))
        self.down = parameter(rngs, (3 * width, width), (3 * width) ** -0.5, ("mlp", "embed"))
        self.attention_norm, self.ffn_norm = Norm(width, norm), Norm(width, norm)
        self.self_attention = Attention(width, width, spec.attention, norm, 1.0, rngs)
        self.ffn = FeedForward(width, spec.network, 1.0, rngs)
        twice = jnp.broadcast_to(jnp.tile(jnp.eye(width, dtype=jnp.float32), (2, 1)), (spec.heads, both, width))
        self.mix = nnx.Param(twice, axes=("layers", "mlp", "embed"))

    def whole(self, rows: Hidden, hidden: Hidden, segments: Segments) -> Drafted:
        """All heads at all places of whole sequences, packed or not. rows: e; hidden: h."""
        length, heads = rows.shape[1], range(1, self.spec.heads + 1)
        at = segment_positions(segments)
        before = [rows]
        for back in (1, 2):
            before.append(jnp.where((at >= back)[..., None], _later(rows, back), before[-1]))
        z = self._trigrams(jnp.stack(before[::-1], axis=2))
        ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
        reached = jnp.stack([ahead <= -k for k in heads])  # [n, T, S]
        sees = segment_mask(segments, segments)[:, None] & reached[None]
        many = lambda x: jnp.concatenate([x] * len(heads), axis=1)  # noqa: E731
        states = self._looked(many(z), many(at), *self._keys_values(hidden, at), sees.reshape(len(sees), -1, length))
        each = jnp.split(states, len(heads), axis=1)
        mixed = [self._mixed(_later(hidden, k), o, k) for k, o in zip(heads, each, strict=True)]
        known = [(at >= k) & (segments > 0) for k in heads]
        return Drafted(jnp.stack(each), jnp.stack(mixed), jnp.stack(known))

    def empty(self, rows: int, length: int, dtype: jnp.dtype) -> PyTree:
        """What is kept of `rows` rows while they are written, of at most `length` states: "length" [R], how many there
        are; their keys and values [R, H, M, K]; "state" [R, D], the newest.
        """
        spec = self.spec.attention
        slots = jnp.zeros((rows, spec.key_heads, length, spec.head_dim), dtype)
        state = jnp.zeros((rows, self.down.shape[1]), dtype)
        return {"length": jnp.zeros(rows, jnp.int32), "key": slots, "value": slots, "state": state}

    def read(self, hidden: Float[Array, "R Q D"], count: Int[Array, "R"], kept: PyTree) -> PyTree:
        """What is kept after Q states more, of which the first `count` of each row count. Those behind them stand in
        slots that are written again before they are read.
        """
        places = kept["length"][:, None] + jnp.arange(hidden.shape[1])
        key, value = self._keys_values(hidden, places)
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
        newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return {
            "length": kept["length"] + count,
            "key": write(kept["key"], key, kept["length"]),
            "value": write(kept["value"], value, kept["length"]),
            "state": jnp.where((count > 0)[:, None], newest, kept["state"]),
        }

    def ahead(self, rows: Float[Array, "R 3 D"], number: int, kept: PyTree) -> Float[Array, "R 1 D"]:
        """What the model's head reads to guess, by the head of this number k, the (k + 1)-th token behind the newest
        state. rows: e of the three places up to the k-th token.
        """
        z, at = self._trigrams(rows[:, None]), kept["length"][:, None] + number - 1
        sees = jnp.arange(kept["key"].shape[2]) < kept["length"][:, None, None]
        state = self._looked(z, at, kept["key"], kept["value"], sees)
        return self._mixed(kept["state"][:, None], state, number)

    def _trigrams(self, rows: Float[Array, "B Q 3 D"]) -> Float[Array, "B Q D"]:
        u = rows.reshape(*rows.shape[:2], -1)
        u = u + jax.nn.silu(product(u, self.between[...].astype(u.dtype)))
        return product(u, self.down[...].astype(u.dtype))

    def _keys_values(
        self, hidden: Float[Array, "B S D"], at: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S K"]]:
        return self.self_attention.keys_values(self.attention_norm(hidden), at)

    def _looked(
        self,
        z: Float[Array, "B Q D"],
        at: Int[Array, "B Q"],
        key: Float[Array, "B H S K"],
        value: Float[Array, "B H S K"],
        sees: Bool[Array, "B Q S"],
    ) -> Float[Array, "B Q D"]:
        """The layer's output for Q places, each of which looks at those states of its row that it sees, and at itself:
        a row of its own, therefore, of which Q share their keys.
        """
        h = self.attention_norm(z)
        alone = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1, x.shape[3])  # noqa: E731
        states = Keys(key, value, Drawn(sees.reshape(-1, 1, 1, sees.shape[2])))
        own_key, own_value = self.self_attention.keys_values(h, at)
        itself = Keys(alone(own_key), alone(own_value), Drawn(jnp.ones((1, 1, 1, 1), bool)))
        query = alone(self.self_attention.queries(h, at))
        z = z + self.self_attention.attended(query, [states, itself], 0.0, None).reshape(z.shape)
        return z + self.ffn(self.ffn_norm(z), Pass(real=jnp.ones(z.shape[:2], bool)), None)

    def _mixed(self, hidden: Hidden, states: Hidden, number: int) -> Hidden:
        both = jnp.concatenate([hidden, states], axis=-1)
        return product(both, self.mix[...][number - 1].astype(both.dtype))


def _later(x: Hidden, places: int) -> Hidden:
    """Each row so many places later, zeros in front."""
    return jnp.pad(x, ((0, 0), (places, 0), (0, 0)))[:, : x.shape[1]]
