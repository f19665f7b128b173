"""A softmax over some of the vocabulary: the targets of a batch and the tokens that are most easily taken for them.

    C = {targets} and their nearest tokens by inner product of output columns, as many as there is room for
    loss = -log softmax over C of the target's logit                                             in nats

C holds every target, so the loss is at most that of the whole vocabulary, and equal to it where C is all of it. It is
for training: evaluation and decoding normalise over all tokens. Sources: Jean et al. 2015; Zheng et al. 2021 (k-NN
target sampling, whose lists of neighbours are made less often).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.types import Tokens

BLOCK = 256  # targets whose products with all columns are held at a time


def narrowed(
    kernel: Float[Array, "K V"], bias: Float[Array, "V"] | None, targets: Tokens, candidates: int, neighbours: int
) -> tuple[Float[Array, "K C"], Float[Array, "C"] | None, Tokens]:
    """The head's matrix and bias of the candidates alone, and the targets by their places among these.

    The candidates are chosen anew from the present matrix: at most one product of every target with every column, where
    the whole softmax takes three with its gradients. Raises ValueError when there may be more targets than candidates.
    """
    ids = chosen(kernel, targets, candidates, neighbours)
    places = jnp.zeros(kernel.shape[1], jnp.int32).at[ids].set(jnp.arange(ids.size, dtype=jnp.int32))
    return kernel[:, ids], None if bias is None else bias[ids], places[targets]


def chosen(kernel: Float[Array, "K V"], targets: Tokens, candidates: int, neighbours: int) -> Int[Array, "C"]:
    """Ids of the candidates, each once: all targets; then the tokens that are near to most of them, a bias left aside;
    then, in what room is left, the lowest ids.
    """
    vocab = kernel.shape[1]
    candidates = min(candidates, vocab)
    most = min(targets.size, vocab)
    if candidates < most:
        raise ValueError(
            f"candidates={candidates} cannot hold the {most} targets that {targets.size} positions may have, and every "
            "target must be among them: raise candidates, or microbatches"
        )
    kernel = jax.lax.stop_gradient(kernel)
    distinct = jnp.unique(targets, size=most, fill_value=vocab)
    real = distinct < vocab

    def near(token: Int[Array, ""]) -> Int[Array, "k"]:
        return jax.lax.top_k(kernel[:, jnp.minimum(token, vocab - 1)] @ kernel, min(neighbours, vocab))[1]

    found = jax.lax.map(near, distinct, batch_size=BLOCK)
    votes = jnp.zeros(vocab).at[found].add(real[:, None].astype(jnp.float32))
    votes = votes.at[distinct].set(jnp.inf, mode="drop")
    return jax.lax.top_k(votes, candidates)[1]
