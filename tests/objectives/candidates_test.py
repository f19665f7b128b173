"""The softmax over candidates: a lower bound that holds every target, exact where it holds everything."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.transformer import Transformer
from mlm.objectives import token_cross_entropy
from mlm.objectives.candidates import chosen, narrowed
from mlm.training.trainer import TrainConfig, make_loss
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of

D, V = 6, 40
RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=V), jnp.float32)
STATES = jnp.asarray(RNG.normal(size=(2, 5, D)), jnp.float32)
TARGETS = jnp.asarray([[3, 3, 7, 38, 0], [7, 21, 3, 0, 0]])


def sampled(kernel, states, candidates, neighbours=3):
    some, bias, places = narrowed(kernel, BIAS, TARGETS, candidates, neighbours)
    return token_cross_entropy(states @ some + bias, places, jnp.ones(TARGETS.shape))[0]


def whole(kernel, states):
    return token_cross_entropy(states @ kernel + BIAS, TARGETS, jnp.ones(TARGETS.shape))[0]


def test_all_candidates_give_the_whole_loss_and_its_gradients():
    got, want = (jax.value_and_grad(f, argnums=(0, 1))(KERNEL, STATES) for f in (partial(sampled, candidates=V), whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("candidates", [10, 20, 30])
def test_fewer_give_a_lower_bound_and_leave_the_others_alone(candidates):
    value, gradient = jax.value_and_grad(sampled)(KERNEL, STATES, candidates)
    assert 0.0 < value < whole(KERNEL, STATES)
    touched = np.flatnonzero(jnp.abs(gradient).max(0))
    assert set(touched) == set(chosen(KERNEL, TARGETS, candidates, 3).tolist())


@pytest.mark.parametrize("neighbours", [1, 4, 100])
def test_every_target_is_a_candidate_and_each_candidate_stands_once(neighbours):
    ids = chosen(KERNEL, TARGETS, 10, neighbours).tolist()
    assert len(set(ids)) == 10
    assert {0, 3, 7, 21, 38} <= set(ids)
    _, _, places = narrowed(KERNEL, None, TARGETS, 10, neighbours)
    np.testing.assert_array_equal(np.array(ids)[places], TARGETS)


def test_the_others_are_those_nearest_to_most_targets():
    """By inner product in NumPy: 5 targets' lists of 4, counted."""
    kernel, targets = np.asarray(KERNEL), [0, 3, 7, 21, 38]
    votes = np.zeros(V)
    for target in targets:
        votes[np.argsort(-(kernel[:, target] @ kernel))[:4]] += 1
    votes[targets] = 0
    ids = chosen(KERNEL, TARGETS, 10, 4).tolist()
    others = [i for i in ids if i not in targets]
    left_out = [i for i in range(V) if i not in ids]
    assert len(others) == 5
    assert votes[others].min() >= votes[left_out].max()
    assert votes[others].max() > 0


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match="candidates=9 cannot hold the 10 targets that 10 positions may have"):
        chosen(KERNEL, TARGETS, 9, 3)


def test_training_samples_and_evaluation_does_not():
    """With a key the loss is the lower bound, without one that of the whole vocabulary; 60 positions, 64 tokens."""
    model = Transformer(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = rows_of([[e] for e in examples(5)])
    config = TrainConfig(steps=1, candidates=60, neighbours=4, z_loss=0.0)
    some, full = (make_loss(model, c, LANGUAGES) for c in (config, dataclasses.replace(config, candidates=None)))
    key = jax.random.key(1)
    trained, wanted = (jax.jit(f)(params, batch, key).sum for f in (some, full))
    assert 0.9 * wanted < trained < wanted
    np.testing.assert_allclose(jax.jit(some)(params, batch, None).sum, wanted, rtol=1e-5)


@pytest.mark.parametrize("change", [{"candidates": 0}, {"candidates": 9, "neighbours": 0}], ids=str)
def test_numbers_below_one_are_refused(change):
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        TrainConfig(steps=1, **change)
