"""A run that learns to write in any order: steps draw their own masks, evaluations always the same."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from mlm.decoding.any_subset import Filler
from mlm.models.families import t5_style
from mlm.models.specs import AttentionSpec
from mlm.objectives.any_order import AnyOrder
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.trainer import TrainConfig, Trainer
from tests.training.toy import LANGUAGES, rows_of

MASK, LENGTH = 31, 6
MODEL = t5_style(vocab_size=32, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 1))
TRAIN = TrainConfig(steps=150, z_loss=0.0, any_order=AnyOrder(mask_token=MASK, low=0.4, high=0.6, warmup=20))


def runs(seed):
    """Examples whose target counts up by one from anywhere: any token that is given tells all others."""
    starts = np.random.default_rng(seed).integers(3, 24, 64)
    return rows_of([[(np.array([1]), np.arange(start, start + LENGTH), 1)] for start in starts], target=8)


def test_a_model_learns_to_fill_and_evaluates_the_same_every_time():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(MODEL, TRAIN, lambda axes, shapes: optax.adam(0.01), mesh, LANGUAGES)
    state, losses, weights = trainer.init(), [], []
    for step in range(TRAIN.steps):
        state, metrics = trainer.step(state, global_batch(runs(step), mesh))
        total, weight = metrics["nll"]
        losses.append(float(total / weight))
        weights.append(float(weight))
    # 384 targets: 58 at first, 192 from step 20 on.
    assert weights[0] < 100
    assert min(weights[20:]) > 140
    once, again = (trainer.evaluate_batch(state.params, global_batch(runs(99), mesh))["nll"] for _ in range(2))
    assert once == again
    assert float(once[1]) > 140
    # What stands before a given token is told by it too: reading left to right alone would get 9 of 12 at most.
    found = Filler(trainer.model, mask_token=MASK, block=4, temperature=0.1)(
        state.params, [[MASK, MASK, 10, MASK, MASK, MASK], [MASK, 20, MASK, MASK, MASK, MASK]], [[1], [1]]
    )
    right = found.tokens == np.array([np.arange(8, 14), np.arange(19, 25)])
    assert right.mean() > 0.8
    assert losses[-1] < losses[0] / 2


def test_what_does_not_fit_is_refused():
    train = dataclasses.replace(TRAIN, any_order=AnyOrder(mask_token=32))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match="mask_token=32 is outside the model's vocabulary"):
        Trainer(MODEL, train, lambda axes, shapes: optax.sgd(0.1), mesh, LANGUAGES)
    own = lambda s: isinstance(s, AttentionSpec) and s.source == "self"  # noqa: E731
    narrow = MODEL.decoder.mapped(lambda s: dataclasses.replace(s, window=3) if own(s) else s)
    with pytest.raises(ValueError, match="window"):
        Trainer(dataclasses.replace(MODEL, decoder=narrow), TRAIN, lambda axes, shapes: optax.sgd(0.1), mesh, LANGUAGES)
    with pytest.raises(ValueError, match="both say which targets are masked"):
        dataclasses.replace(TRAIN, objective="mask_block", block=2, mask_token=5)
