"""Masked blocks: what trains a drafter that guesses several tokens in one pass, for the proposer `mask_block`.

    cut U uniform over the targets; the decoder reads y_{U-1} and all before it as usual, then `block` - 1 mask tokens,
    which see each other both ways: they are flagged in "decoder_causal_attention"
    loss = - sum_{t = U}^{U + block - 1} log p(y_t | x, y_{<U})                                            in nats

The real tokens stay causal, so a drafter may keep what it made of them once more of them are known. Source: Xia et al.
2022 (arXiv:2203.16487), generalized aggressive decoding, without its glancing (a second pass that shows some targets).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mlm.types import Batch

FLAGS = "decoder_causal_attention"
_OF_EXAMPLE = ("decoder_segment_ids", "decoder_language_ids", "decoder_task_ids")


def masked(batch: Batch, key: Key[Array, ""], block: int, mask_token: int) -> dict[str, Array]:
    """The batch with one block in every row, behind a cut drawn by the key; only the block's targets keep weight.

    Masks go on behind the end of their example, where there is no target: how many there are must not tell where it
    ends. So what follows in a packed row gives way to them, and such a row trains one block, not one for each of its
    examples; a row of its own for each trains more of them. Only the end of the row cuts a block off, and tells: rows
    are best `block` tokens longer than their targets. Raises ValueError for a batch that has a prefix already.
    """
    if FLAGS in batch:
        raise ValueError(f"{FLAGS} says which tokens are masks here, and this batch has a prefix of its own")
    weights = batch["decoder_loss_weights"]
    noise = jnp.where(weights > 0, jax.random.uniform(key, weights.shape), -1.0)
    cut = jnp.argmax(noise, axis=1, keepdims=True)
    ahead = jnp.arange(weights.shape[1])[None] - cut
    inside = (ahead >= 0) & (ahead < block)
    hidden = inside & (ahead > 0)

    def at_cut(name: str) -> Array:
        return jnp.take_along_axis(batch[name], cut, axis=1)

    counted = inside & (batch["decoder_segment_ids"] == at_cut("decoder_segment_ids"))
    return {
        **batch,
        **{name: jnp.where(inside, at_cut(name), batch[name]) for name in _OF_EXAMPLE},
        "decoder_positions": jnp.where(inside, at_cut("decoder_positions") + ahead, batch["decoder_positions"]),
        "decoder_input_tokens": jnp.where(hidden, mask_token, batch["decoder_input_tokens"]),
        "decoder_loss_weights": jnp.where(counted, weights, 0.0),
        FLAGS: hidden.astype(jnp.int32),
    }
