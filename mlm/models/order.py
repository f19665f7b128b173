"""Any order of writing: a decoder that predicts any of its positions from any others.

Its row is read twice over, as two streams of the same weights: contents, the tokens themselves, and queries, which
stand at the same places, hold a mask token and are asked for the token there. Nobody else sees a query. Sources: Yang
et al. 2019 (XLNet's two streams); Guo & Ermon 2025, arXiv:2504.20456 (any-subset autoregressive models).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mlm.models.config import StackConfig
from mlm.models.positions import segment_positions
from mlm.models.specs import RecurrentSpec
from mlm.types import Batch

UNSEEN = np.iinfo(np.int32).max  # the rank of a query: no token reads as far


class Order(NamedTuple):
    """A token sees itself and the keys whose rank is below what it `reads`. positions: places inside the example."""

    positions: Int[Array, "R T"]
    ranks: Int[Array, "R T"]
    reads: Int[Array, "R T"]

    def mask(self) -> Bool[Array, "R T T"]:
        return (self.ranks[:, None, :] < self.reads[:, :, None]) | jnp.eye(self.ranks.shape[1], dtype=bool)


def doubled(batch: Batch) -> tuple[dict[str, Array], Order]:
    """The batch whose decoder rows are contents [B, T], then queries [B, T], and their order.

    Contents of rank 0, those that are given, see each other; others see all of lower rank. A query sees what
    "decoder_reads" says, its own rank for an exact prediction. The other features of the decoder are those of both.
    """
    ranks, segments = batch["decoder_ranks"], batch["decoder_segment_ids"]
    both = {name: x for name, x in batch.items() if name.startswith("decoder_") and name != "decoder_query_tokens"}
    second = {**both, "decoder_input_tokens": batch["decoder_query_tokens"]}
    joined = {name: jnp.concatenate([x, second[name]], axis=1) for name, x in both.items()}
    positions = segment_positions(segments)
    order = Order(
        jnp.concatenate([positions, positions], axis=1),
        jnp.concatenate([ranks, jnp.full_like(ranks, UNSEEN)], axis=1),
        jnp.concatenate([jnp.maximum(ranks, 1), batch["decoder_reads"]], axis=1),
    )
    return {**batch, **joined}, order


def check_any_order(stack: StackConfig) -> None:
    """Raises ValueError for parts that would let a token learn of later ones, or that know no order but the row's."""
    units = [spec for spec in stack.sublayers() if isinstance(spec, RecurrentSpec)]
    found = [f"recurrence of width={s.width} reads left to right" for s in units]
    found += [f"window={s.window} is counted along the row" for s in stack.attentions() if s.window]
    found += [
        f"experts of capacity={r.capacity} and eval_capacity={r.eval_capacity} drop tokens by their place in the row"
        for r in stack.routers()
        if (r.capacity, r.eval_capacity) != (None, None)
    ]
    if found:
        raise ValueError(
            f"a decoder that writes in any order: {'; '.join(dict.fromkeys(found))}. Use attention without windows "
            "and experts that drop nothing"
        )
