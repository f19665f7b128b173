"""Lexical units: what trains a model that writes several tokens a pass where it is sure, by method `lexical_units`.

    unit: a maximal span of targets of one example with p(y_t | x, y_{<t}) >= threshold each, by the model as it stands
    of a unit y_u, …, y_{u+m-1}, cut to `block` targets, the decoder reads y_{u-1} as usual, then m - 1 mask tokens [M]
    loss = - sum_{t < u} log p(y_t | x, y_{<t}) - sum_{j < m} log p(y_{u+j} | x, y_{<u}, [M] · j)            in nats

Everything stays causal and in its place. Source: Sun et al. 2024 (arXiv:2405.15208), who find the units once, by a
model that was fine-tuned before. Here they are found in every step, by the model that learns: it should be trained
already (`run.initial`), since one that is never sure finds none, and learns as with text_to_text.
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
    that are predicted from a mask token.
    """
    loss = text_to_text(hidden, kernel, batch, **options)
    share = jnp.sum(batch["decoder_loss_weights"] * batch[FLAGS]), loss.weight
    return loss._replace(metrics={**loss.metrics, "placeholders": share})


def with_units(
    batch: Batch, nll: Float[Array, "B T"], key: Key[Array, ""], threshold: float, block: int, mask_token: int
) -> dict[str, Array]:
    """The batch where half of the examples that have a unit of two targets or more show one of these, drawn by the key,
    as masks. nll: -log p of every target in nats, given the targets before it. Packed or not.

    Targets behind the unit lose their weight, as the decoder would read masks before them. FLAGS says where masks are.
    """
    weights, segments = batch["decoder_loss_weights"], batch["decoder_segment_ids"]
    length = weights.shape[1]
    place = jnp.arange(length)[None]
    sure = (jnp.exp(-nll) >= threshold) & (weights > 0)
    goes_on = sure & _earlier(sure) & (segments == _earlier(segments))
    breaks = jax.lax.cummin(jnp.where(goes_on, length, place), axis=1, reverse=True)
    end = jnp.pad(breaks[:, 1:], ((0, 0), (0, 1)), constant_values=length)  # of the unit that a target stands in
    first = sure & ~goes_on & (end - place >= 2)

    of_units, of_examples = jax.random.split(key)
    noise = jnp.where(first, jax.random.uniform(of_units, weights.shape), -1.0)
    drawn = first & (noise == _of_example(jax.ops.segment_max, noise, segments))
    start = _of_example(jax.ops.segment_min, jnp.where(drawn, place, length), segments)
    plain = jax.random.bernoulli(of_examples, PLAIN, (weights.shape[0], length + 1))
    start = jnp.where(jnp.take_along_axis(plain, segments, axis=1), length, start)
    size = jnp.minimum(jnp.take_along_axis(end, jnp.minimum(start, length - 1), axis=1) - start, block)
    ahead = place - start
    hidden = (ahead > 0) & (ahead < size)
    return {
        **batch,
        "decoder_input_tokens": jnp.where(hidden, mask_token, batch["decoder_input_tokens"]),
        "decoder_loss_weights": jnp.where((ahead > 0) & (ahead >= size), 0.0, weights),
        FLAGS: hidden.astype(jnp.int32),
    }


def _earlier(x: Array) -> Array:
    """What stands one place before; False or 0 in front."""
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _of_example(reduce: Callable[..., Array], x: Array, segments: Segments) -> Array:
    """For every position the reduction of x over its example, [B, T]."""
    examples = segments.shape[1] + 1  # at most, padding included
    return jax.vmap(lambda row, own: reduce(row, own, num_segments=examples)[own])(x, segments)
