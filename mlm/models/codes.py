"""Output matrices made of a few shared columns: which columns each token of the vocabulary is the sum of."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mlm.models.config import HeadSpec
from mlm.models.layers import parameter
from mlm.types import Axes

_AXES: Axes = ("embed", "codes")


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
