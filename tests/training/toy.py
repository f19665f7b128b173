"""A model of a few hundred parameters and rows of random examples for it."""

import dataclasses

import numpy as np

from mlm.models.families import t5_style

MODEL = t5_style(vocab_size=64, d_model=16, d_ff=16, heads=4, head_dim=4, layers=(2, 2))
LANGUAGES = 5


def with_dropout(rate):
    return dataclasses.replace(
        MODEL,
        encoder=dataclasses.replace(MODEL.encoder, dropout=rate),
        decoder=dataclasses.replace(MODEL.decoder, dropout=rate),
    )


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(3, 64, rng.integers(2, 8)),
            rng.integers(3, 64, rng.integers(2, 6)),
            int(rng.integers(1, LANGUAGES)),
        )
        for _ in range(count)
    ]


def rows_of(groups, source=16, target=12):
    """Batch whose rows hold the given groups of examples, one segment each."""
    shape = {"encoder": (len(groups), source), "decoder": (len(groups), target)}
    batch = {
        f"{side}_{name}": np.zeros(shape[side], np.int32)
        for side, names in {
            "encoder": ("input_tokens", "segment_ids", "positions", "language_ids"),
            "decoder": ("input_tokens", "target_tokens", "segment_ids", "positions", "language_ids", "task_ids"),
        }.items()
        for name in names
    }
    batch["decoder_loss_weights"] = np.zeros(shape["decoder"], np.float32)
    for row, group in enumerate(groups):
        s = t = 0
        for number, (inputs, targets, language) in enumerate(group, start=1):
            n, m = len(inputs), len(targets)
            e, d = np.s_[row, s : s + n], np.s_[row, t : t + m]
            batch["encoder_input_tokens"][e], batch["encoder_segment_ids"][e] = inputs, number
            batch["encoder_positions"][e], batch["encoder_language_ids"][e] = np.arange(n), language
            batch["decoder_target_tokens"][d], batch["decoder_segment_ids"][d] = targets, number
            batch["decoder_input_tokens"][d] = np.concatenate([[0], targets[:-1]])
            batch["decoder_positions"][d], batch["decoder_language_ids"][d] = np.arange(m), language
            batch["decoder_loss_weights"][d] = 1.0
            s, t = s + n, t + m
    return batch
