"""Batches of a few rows, and the logits that a model gives them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np


def batch_of(rows, source_length, target_length):
    """Unpacked batch from (source, target) token lists; what is shorter than its length leaves padding.

    Row i writes language i + 1.
    """
    source = np.zeros((len(rows), source_length), np.int32)
    target = np.zeros((len(rows), target_length), np.int32)
    for i, (a, b) in enumerate(rows):
        source[i, : len(a)], target[i, : len(b)] = a, b
    language = np.arange(1, len(rows) + 1, dtype=np.int32)[:, None]
    shifted = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    return {
        "encoder_input_tokens": jnp.asarray(source),
        "encoder_segment_ids": jnp.asarray((source > 0).astype(np.int32)),
        "encoder_language_ids": jnp.asarray(language * (source > 0)),
        "decoder_input_tokens": jnp.asarray(shifted),
        "decoder_segment_ids": jnp.asarray((target > 0).astype(np.int32)),
        "decoder_language_ids": jnp.asarray(language * (target > 0)),
    }


def logits_of(model, params, batch):
    return _compiled(model)(params, {name: jnp.asarray(x) for name, x in batch.items()})


@lru_cache(maxsize=4)
def _compiled(model):
    return jax.jit(lambda params, batch: model.logits(params, model(params, batch).hidden))
