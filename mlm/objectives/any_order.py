"""Any order: some target tokens are given, the others are written one after another in the order of the row.

    r ~ U[low, high] for every row; a target token is masked with probability r
    loss = sum over masked tokens of -log p(token | given tokens, masked tokens before it, source)     in nats

One order for every subset, 2^T in place of T!. Source: Guo & Ermon 2025, arXiv:2504.20456.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mlm.types import Batch


@dataclass(frozen=True, kw_only=True)
class AnyOrder:
    """Which targets a step masks. mask_token: the id that stands where a token is asked for.

    Rates go from `first` at step 0 to between `low` and `high`, in equal steps over `warmup` of them.
    """

    mask_token: int
    first: float = 0.15
    low: float = 0.85
    high: float = 0.99
    warmup: int = 5000

    def __post_init__(self):
        if self.mask_token < 1:
            raise ValueError(
                f"AnyOrder.mask_token={self.mask_token} must be the id of a token, 1 or more: 0 is padding"
            )
        if not (0.0 < self.first <= 1.0 and 0.0 < self.low <= self.high <= 1.0):
            raise ValueError(
                f"AnyOrder: first={self.first}, low={self.low} and high={self.high} are shares of masked targets: "
                "each above 0 and at most 1, and low at most high"
            )
        if self.warmup < 1:
            raise ValueError(f"AnyOrder.warmup={self.warmup} steps must be at least 1, from where on the rates stay")

    def masked(self, batch: Batch, key: Key[Array, ""], step: int | Int[Array, ""]) -> Batch:
        """The batch as a model reads it that writes in any order; only masked tokens have loss weight.

        Packed or not. Tokens without loss weight are given.
        """
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        risen = jnp.minimum(step / self.warmup, 1.0)
        low, high = (self.first + risen * (end - self.first) for end in (self.low, self.high))
        of_rows, of_tokens = jax.random.split(key)
        rate = jax.random.uniform(of_rows, (targets.shape[0], 1), minval=low, maxval=high)
        masked = (jax.random.uniform(of_tokens, targets.shape) < rate) & (weights > 0)
        ranks = jnp.where(masked, jnp.cumsum(masked, axis=1, dtype=jnp.int32), 0)
        return {
            **batch,
            "decoder_input_tokens": targets,
            "decoder_query_tokens": jnp.full_like(targets, self.mask_token),
            "decoder_ranks": ranks,
            "decoder_reads": ranks,
            "decoder_loss_weights": weights * masked,
        }
