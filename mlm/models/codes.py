"""Heads whose columns are fewer than the tokens: sums of shared columns, or a softmax over clusters and one within."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlm.models.config import HeadSpec
from mlm.models.layers import parameter
from mlm.types import Axes

_AXES: Axes = ("embed", "codes")
_NEVER = -1e10  # finite, so that its gradient is 0 and not NaN


def codes_of(head: HeadSpec, vocab_size: int) -> Int[np.ndarray, "groups V"]:
    """The columns, of groups x codes, that make up each token's: one in every group.

    One group: what `head.clusters` says, or runs of neighbouring ids, which are tokens of like frequency where a
    vocabulary is sorted by it. More groups: the digits of the id in base `codes`, the same for no two tokens.
    """
    ids = np.arange(vocab_size)
    if head.clusters:
        return np.array([head.clusters])
    if head.groups == 1:
        return (ids * head.codes // vocab_size)[None]
    return np.stack([group * head.codes + ids // head.codes**group % head.codes for group in range(head.groups)])


def floor(head: HeadSpec, vocab_size: int) -> float:
    """Mean of ln(number of tokens with the same column) over the vocabulary, in nats.

    Tokens of one column and no bias have one probability between them, so p(i) <= 1 / n_i whatever the states: targets
    that are spread evenly cost at least this much.
    """
    _, which, sizes = np.unique(codes_of(head, vocab_size), axis=1, return_inverse=True, return_counts=True)
    return float(np.mean(np.log(sizes[which.reshape(-1)])))


class Codebook(nnx.Module):
    """logit_i = sum over groups g of y C_g[M_g(i)]: V columns made of groups x codes ones.

    Initial std (D groups)^-1/2. Sources: VQ-Logits (one group); product quantisation, Jégou et al. 2011 (more).
    """

    def __init__(self, width: int, head: HeadSpec, vocab_size: int, rngs: nnx.Rngs):
        self.head, self.vocab_size = head, vocab_size
        std = (width * head.groups) ** -0.5
        self.columns = parameter(rngs, (width, head.groups * head.codes), std, _AXES)

    def matrix(self) -> Float[Array, "D V"]:
        """The columns of all tokens: for a loss by slices of positions, which wants them side by side."""
        return sum(self.columns[...][:, group] for group in codes_of(self.head, self.vocab_size))

    def products(self, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """states x matrix, in float32, by products with groups x codes columns only."""
        columns = self.columns[...].astype(states.dtype)
        few = jnp.einsum("BTD,DK->BTK", states, columns, preferred_element_type=jnp.float32)
        return sum(few[..., group] for group in codes_of(self.head, self.vocab_size))


class Within(NamedTuple):
    """What a target costs beyond the choice of its cluster: -log p(target | cluster) in nats; is it first there."""

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


class TwoLevel(nnx.Module):
    """log p(i) = log softmax(y C)[c_i] + log softmax over the tokens j of that cluster of (y U e_j + b_j), at i.

    U: [D, rank], e: [V, rank]. A loss needs the K columns and the target's own cluster only. Initial std: D^-1/2 of C
    and U, rank^-1/2 of e. Source: Goodman 2001 (class-based softmax).
    """

    def __init__(self, width: int, head: HeadSpec, vocab_size: int, rngs: nnx.Rngs):
        rank = head.rank or 0
        self.head, self.vocab_size = head, vocab_size
        self.columns = parameter(rngs, (width, head.codes), width**-0.5, _AXES)
        self.down = parameter(rngs, (width, rank), width**-0.5, ("embed", "rank"))
        self.tokens = parameter(rngs, (vocab_size, rank), rank**-0.5, ("vocab", "rank"))

    def clusters(self) -> Int[np.ndarray, "V"]:
        return codes_of(self.head, self.vocab_size)[0]

    def within(
        self, states: Float[Array, "B T D"], targets: Int[Array, "B T"], bias: Float[Array, "V"] | None
    ) -> Within:
        """Of the targets in their own clusters; the vectors of a cluster are gathered for each."""
        others = jnp.asarray(self._members())[jnp.asarray(self.clusters())[targets]]  # [B, T, n]
        real, at = others < self.vocab_size, jnp.minimum(others, self.vocab_size - 1)
        vectors = self.tokens[...].astype(states.dtype)[at]
        logits = jnp.einsum("BTr,BTnr->BTn", self._lowered(states), vectors, preferred_element_type=jnp.float32)
        logits = jnp.where(real, logits if bias is None else logits + bias[at], _NEVER)
        label = jnp.sum(jnp.where(others == targets[..., None], logits, 0.0), axis=-1)
        top = jnp.max(logits, axis=-1)
        alone = jnp.sum(logits == top[..., None], axis=-1) == 1
        return Within(jax.nn.logsumexp(logits, axis=-1) - label, (label == top) & alone)

    def log_probs(self, states: Float[Array, "B T D"], bias: Float[Array, "V"] | None) -> Float[Array, "B T V"]:
        """Of all tokens, exactly, in nats."""
        members, clusters = self._members(), self.clusters()
        columns = self.columns[...].astype(states.dtype)
        first = jax.nn.log_softmax(jnp.einsum("BTD,DK->BTK", states, columns, preferred_element_type=jnp.float32))
        vectors = self.tokens[...].astype(states.dtype)
        logits = jnp.einsum("BTr,Vr->BTV", self._lowered(states), vectors, preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias
        padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=_NEVER)
        return first[..., clusters] + logits - jax.nn.logsumexp(padded[..., members], axis=-1)[..., clusters]

    def _lowered(self, states: Float[Array, "B T D"]) -> Float[Array, "B T r"]:
        return jnp.einsum("BTD,Dr->BTr", states, self.down[...].astype(states.dtype))

    def _members(self) -> Int[np.ndarray, "K n"]:
        """The tokens of every cluster; V fills up."""
        clusters = self.clusters()
        sizes = np.bincount(clusters, minlength=self.head.codes)
        order = np.argsort(clusters, kind="stable")
        places = np.arange(self.vocab_size) - (np.cumsum(sizes) - sizes)[clusters[order]]
        members = np.full((self.head.codes, sizes.max()), self.vocab_size)
        members[clusters[order], places] = order
        return members
