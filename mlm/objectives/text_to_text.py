"""Text to text: predict every target token from the source and the targets before it. Any row task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from mlm.objectives.cross_entropy import head_cross_entropy
from mlm.types import Batch, Hidden


class Loss(NamedTuple):
    """What an objective returns. Everything adds up over microbatches; the one division is by the global weight.

    sum: nats, weighted, with z-loss and smoothing: what is differentiated. weight: sum of the loss weights, in tokens.
    metrics: name -> (sum, weight), scalars or one entry per language [L]; the metric is sum / weight.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, tuple[Array, Array]]


def text_to_text(
    hidden: Hidden,
    kernel: Float[Array, "D V"],
    batch: Batch,
    *,
    num_languages: int,
    bias: Float[Array, "V"] | None = None,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    within: tuple[Float[Array, "B T"], Bool[Array, "B T"]] | None = None,
) -> Loss:
    """Cross-entropy of the decoder's final states against the target tokens. Options as in `head_cross_entropy`.

    within: where targets are clusters of tokens, what each token costs within its own, in nats, and whether it is first
    there; z-loss and smoothing are those of the clusters.

    Metrics, each (sum, weight): nll and z_loss in nats per token, accuracy, padding (share of target positions without
    weight), and per language id language_nll, language_target_tokens, language_source_tokens, language_examples. The
    last three are counts: their weight is the count, their sum too. A target counts for its own language, a source
    token for its own, an example for the language of its first target.
    """
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    total, stats = head_cross_entropy(
        hidden,
        kernel,
        batch["decoder_target_tokens"],
        weights,
        bias=bias,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
        chunk=chunk,
        mesh=mesh,
    )
    if within is not None:
        total = total + jnp.sum(within[0] * weights)
        more, correct = jax.lax.stop_gradient(within)
        stats = stats._replace(nll=stats.nll + more, correct=stats.correct & correct)
    weight = jnp.sum(weights)
    targets = batch["decoder_language_ids"]
    firsts = (batch["decoder_positions"] == 0) & (batch["decoder_segment_ids"] > 0)

    def by_language(values: Array, languages: Int[Array, "B T"]) -> Float[Array, " L"]:
        values = values.reshape(-1).astype(jnp.float32)
        return jax.ops.segment_sum(values, languages.reshape(-1), num_segments=num_languages)

    target_tokens = by_language(weights, targets)
    source_tokens = by_language(batch["encoder_segment_ids"] > 0, batch["encoder_language_ids"])
    examples = by_language(firsts, targets)
    metrics = {
        "nll": (jnp.sum(stats.nll * weights), weight),
        "z_loss": (jnp.sum(z_loss * stats.log_z**2 * weights), weight),
        "accuracy": (jnp.sum(stats.correct * weights), weight),
        "padding": (jnp.sum(weights == 0.0).astype(jnp.float32), jnp.asarray(weights.size, jnp.float32)),
        "language_nll": (by_language(stats.nll * weights, targets), target_tokens),
        "language_target_tokens": (target_tokens, target_tokens),
        "language_source_tokens": (source_tokens, source_tokens),
        "language_examples": (examples, examples),
    }
    return Loss(total, weight, metrics)
