"""Lexical units: what trains a model that writes several tokens a pass where it is sure, by method `lexical_units`.

    unit: a maximal span of targets of one example with p(y_t | x, y_{<t}) >= threshold each, by the model as it stands
    of a unit that begins with y_u the decoder reads y_{u-1} as usual, then `block` - 1 mask tokens [M]
    loss = - sum_{t < u} log p(y_t | x, y_{<t}) - sum_{j < block} log p(y_{u+j} | x, y_{<u}, [M] · j)        in nats

Everything stays causal and in its place. Source: Sun et al. 2024 (arXiv:2405.15208). Not as published:

- Masks go on behind the unit, to the end of the block or of the example, not just to the unit's own end. A decoder does
  not know where a unit ends, and one that has seen masks in units alone is sure behind all of them: in the toy of
  `tests/decoding/lexical_units_test.py` it spells a third of the words wrongly at a threshold of 0.9, and none so.
- Units are found in every step, by the model that learns, not once by another. It should be trained already
  (`run.initial`): while it is sure of nothing there are no units, and it learns as with text_to_text.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mlm.objectives.text_to_text import Loss, text_to_text
from mlm.types import Batch, Hidden, Segments

PLAIN = 0.5  # share of the examples that stay as they are
FLAGS = "decoder_placeholders"


def lexical_units(hidden: Hidden, kernel: Float[Array, "D V"], batch: Batch, **options: Any) -> Loss:
    """`text_to_text` of a batch that `with_units` has prepared. One metric more, placeholders: the share of the targets
    that are predicted from a mask token; 0 of any other batch.
    """
    loss, weights = text_to_text(hidden, kernel, batch, **options), batch["decoder_loss_weights"]
    masked = jnp.sum(weights * batch[FLAGS]) if FLAGS in batch else jnp.zeros(())
    return loss._replace(metrics={**loss.metrics, "placeholders": (masked, loss.weight)})


def with_units(
    batch: Batch, nll: Float[Array, "B T"], key: Key[Array, ""], threshold: float, block: int, mask_token: int
) -> dict[str, Array]:
    """The batch where half of the examples that have a unit of two targets or more are masked from one of these on,
    drawn by the key. nll: -log p of every target in nats, given the targets before it. Packed or not.

    Targets behind the block lose their weight, as the decoder would read masks before them. FLAGS says where masks are.
    """
    weights, segments = batch["decoder_loss_weights"], batch["decoder_segment_ids"]
    length = weights.shape[1]
    place = jnp.arange(length)[None]
    sure = (jnp.exp(-nll) >= threshold) & (weights > 0)
    goes_on = sure & _earlier(sure) & (segments == _earlier(segments))
    first = sure & ~goes_on & jnp.pad(goes_on[:, 1:], ((0, 0), (0, 1)))

    of_units, of_examples = jax.random.split(key)
    noise = jnp.where(first, jax.random.uniform(of_units, weights.shape), -1.0)
    drawn = first & (noise == _of_example(jax.ops.segment_max, noise, segments))
    start = _of_example(jax.ops.segment_min, jnp.where(drawn, place, length), segments)
    plain = jax.random.bernoulli(of_examples, PLAIN, (weights.shape[0], length + 1))
    ahead = place - jnp.where(jnp.take_along_axis(plain, segments, axis=1), length, start)
    hidden = (ahead > 0) & (ahead < block)
    return {
        **batch,
        "decoder_input_tokens": jnp.where(hidden, mask_token, batch["decoder_input_tokens"]),
        "decoder_loss_weights": jnp.where(ahead >= block, 0.0, weights),
        FLAGS: hidden.astype(jnp.int32),
    }


def _earlier(x: Array) -> Array:
    """What stands one place before; False or 0 in front."""
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _of_example(reduce: Callable[..., Array], x: Array, segments: Segments) -> Array:
    """For every position the reduction of x over its example, [B, T]."""
    examples = segments.shape[1] + 1  # at most, padding included
    return jax.vmap(lambda row, own: reduce(row, own, num_segments=examples)[own])(x, segments)
