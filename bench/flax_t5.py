"""The Flax peer: Hugging Face's Flax T5 (transformers 4.57.6 was the last to have it) with our weights."""

import sys
from collections.abc import Callable
from typing import Any

import hugging_face
import jax
import jax.numpy as jnp
import numpy as np
import plain_port

from mlm.models.config import ModelConfig

Batch = dict[str, np.ndarray]  # mlm.types.ROW_FEATURES, one example a row


def load(folder: str) -> None:
    """Makes `transformers` that of `folder`, and mends the one call that newer JAX refuses. Call before any import."""
    sys.path.insert(0, folder)
    clip = jnp.clip
    jnp.clip = lambda x, *bounds, a_max=None, **named: clip(
        x, *bounds, **named, **({} if a_max is None else {"max": a_max})
    )


def t5(config: ModelConfig, params: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any, Batch], jax.Array]]:
    """(parameters, loss(parameters, batch)): mean loss per target token in nats; one-hot as in its training script."""
    from transformers import FlaxT5ForConditionalGeneration

    model = FlaxT5ForConditionalGeneration(hugging_face.t5_config(config), input_shape=(1, 2))
    theirs = {}
    for name, matrix in hugging_face.weights(config, params):
        *path, last = name.split(".")
        if "relative_attention_bias" in path or path == ["shared"]:
            last = "embedding"
        elif matrix.ndim == 2:
            last, matrix = "kernel", np.ascontiguousarray(matrix.T)
        place = theirs
        for key in path:
            place = place.setdefault(key, {})
        place[last] = jnp.asarray(matrix)
    if jax.tree.map(jnp.shape, theirs) != jax.tree.map(jnp.shape, dict(model.params)):
        raise ValueError("Hugging Face's Flax T5 has other parameters than ours")

    def loss(params, batch):
        logits = model(
            input_ids=batch["encoder_input_tokens"],
            attention_mask=batch["encoder_segment_ids"] > 0,
            decoder_input_ids=batch["decoder_input_tokens"],
            params=params,
            train=True,
            dropout_rng=jax.random.key(0),
        ).logits
        return plain_port.one_hot_loss(logits, batch)

    return theirs, loss
