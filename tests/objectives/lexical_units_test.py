"""Lexical units against a plain loop, and what the loss of a batch makes of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.models.transformer import Transformer
from mlm.objectives import OBJECTIVES
from mlm.objectives.lexical_units import FLAGS, with_units
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.step import evaluation_step
from mlm.training.trainer import TrainConfig, Trainer, _masking, make_loss
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of

MASK, SURE = 2, 0.5  # no token of the batch
PACKED = jax.tree.map(jnp.asarray, rows_of([examples(3, seed=seed) for seed in range(4)], source=24, target=16))
OPTIONS = {"objective": "lexical_units", "block": 3, "mask_token": MASK, "z_loss": 0.0}


def guessed(batch, seed):
    """-log p of every target, drawn: sure of two thirds."""
    return -np.log(np.random.default_rng(seed).uniform(0.25, 1.0, batch["decoder_target_tokens"].shape)).astype("f4")


def found(batch, nll):
    """(row, example) -> where its units of two or more targets begin."""
    units = {}
    for row, segments in enumerate(np.asarray(batch["decoder_segment_ids"])):
        t = 0
        while t < len(segments):
            end = t
            while (
                end < len(segments)
                and segments[end] == segments[t]
                and batch["decoder_loss_weights"][row, end] > 0
                and np.exp(-nll[row, end]) >= SURE
            ):
                end += 1
            if end - t >= 2:
                units.setdefault((row, int(segments[t])), []).append(t)
            t = max(end, t + 1)
    return units


def shown(batch, drawn, block):
    """The batch with masks from those units on, token by token."""
    out = {name: np.array(x) for name, x in batch.items()}
    out[FLAGS] = np.zeros_like(batch["decoder_input_tokens"])
    for (row, example), first in drawn.items():
        for t in range(first + 1, out["decoder_segment_ids"].shape[1]):
            if out["decoder_segment_ids"][row, t] != example:
                break
            if t < first + block:
                out["decoder_input_tokens"][row, t] = MASK
                out[FLAGS][row, t] = 1
            else:
                out["decoder_loss_weights"][row, t] = 0.0
    return out


@pytest.mark.parametrize("block", [2, 3, 30])
def test_units_are_those_of_a_plain_loop(block):
    """Whichever was drawn: it is one of the example's own, and all else is as it was."""
    run = jax.jit(with_units, static_argnums=(3, 4, 5))
    hidden = 0
    for seed in range(6):
        nll = guessed(PACKED, seed)
        got = jax.device_get(run(PACKED, nll, jax.random.key(seed), SURE, block, MASK))
        units, drawn = found(PACKED, nll), {}
        for (row, example), own in units.items():
            masks = np.flatnonzero(got[FLAGS][row] * (got["decoder_segment_ids"][row] == example))
            if masks.size:
                (drawn[row, example],) = [first for first in own if first == masks[0] - 1]
        want = shown(PACKED, drawn, block)
        assert got.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(got[name], x, err_msg=name)
        hidden += len(drawn)
    assert hidden > 8


def test_every_unit_is_drawn_as_often_and_half_of_the_examples_stay():
    """Units of 2, 3 and 2 targets: 3000 draws, 500 each, standard deviation 20; of the next example's one 1500, 27."""
    batch = jax.tree.map(jnp.asarray, rows_of([[([5], [4, 5, 6, 7, 8, 9, 10, 11, 12], 1), ([5], [7, 8, 9], 1)]]))
    nll = jnp.array([[0, 0, 9, 0, 0, 0, 9, 0, 0, 0, 0, 9]], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3000)
    flags = np.asarray(jax.vmap(lambda key: with_units(batch, nll, key, SURE, 2, MASK)[FLAGS][0])(keys))
    assert np.flatnonzero(flags.any(axis=0)).tolist() == [1, 4, 8, 10]
    assert all(abs(int(flags[:, place].sum()) - 500) < 4 * 20 for place in (1, 4, 8))
    assert abs(int(flags[:, 10].sum()) - 1500) < 4 * 27


def test_a_loss_is_that_of_the_units_that_the_model_finds():
    """An evaluation draws the same every time; the units are those of the logits."""
    model = Transformer(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))
    train = TrainConfig(steps=1, unit_threshold=0.004, **OPTIONS)
    loss_of = make_loss(model, train, LANGUAGES)
    got = jax.jit(partial(evaluation_step, loss_fn=loss_of, prepare=_masking(model, train)))(params, PACKED)
    logits = model.logits(params, model(params, PACKED).hidden)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, PACKED["decoder_target_tokens"])
    batch = with_units(PACKED, nll, jax.random.key(0), 0.004, 3, MASK)
    assert batch[FLAGS].sum() > 2
    np.testing.assert_allclose(got["loss"][0], jax.jit(loss_of)(params, batch, None).sum, rtol=1e-5)
    assert float(got["loss"][1]) == float(batch["decoder_loss_weights"].sum())
    assert float(got["placeholders"][0]) == float(batch[FLAGS].sum())


def test_targets_before_a_unit_and_in_other_examples_see_what_they_saw():
    """Their states are the same, and their losses know nothing of the masks: the decoder stays causal."""
    model = Transformer(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = with_units(PACKED, jnp.asarray(guessed(PACKED, 16)), jax.random.key(16), SURE, 30, MASK)
    states, own = (jax.jit(model)(params, read).hidden for read in (batch, PACKED))
    masks, segments = np.asarray(batch[FLAGS]), np.asarray(PACKED["decoder_segment_ids"])
    began = np.zeros_like(masks, bool)
    for row in range(4):
        for example in range(1, 4):
            inside = segments[row] == example
            began[row] |= inside & (np.cumsum(masks[row] * inside) > 0)
    others = ~began & (segments > 0)
    assert masks.sum() == 14
    np.testing.assert_allclose(states[others], own[others], atol=1e-5)
    assert (np.abs(states - own).max(-1)[began] > 1e-3).all()

    def told(table, where):
        hidden = model(params | {"embedding": table}, batch).hidden
        return jnp.sum(jnp.where(where[..., None], hidden, 0.0) ** 2)

    gradient = jax.jit(jax.grad(told))
    assert not np.asarray(gradient(params["embedding"], others))[MASK].any()
    assert np.asarray(gradient(params["embedding"], began))[MASK].any()


def test_a_step_learns_the_units_of_its_own_parameters_on_any_mesh():
    """Two microbatches on eight devices make the step of one on one: units are found by all at once."""
    batch = rows_of([examples(3, seed=seed) for seed in range(8)], source=24, target=16)
    results = []
    for parts, sizes, devices in ((1, {}, 1), (2, {"data": 2, "fsdp": 2, "tensor": 2}, 8)):
        train = TrainConfig(steps=1, unit_threshold=0.004, microbatches=parts, **OPTIONS)
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
        trainer = Trainer(MODEL, train, lambda axes, shapes: optax.sgd(0.1), mesh, LANGUAGES)
        state, metrics = trainer.step(trainer.init(), global_batch(batch, mesh))
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    (one, said), (eight, told) = results
    assert said["placeholders"][0] == told["placeholders"][0] > 2
    np.testing.assert_allclose(said["loss"][0], told["loss"][0], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), one, eight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "lexical_units"}, "needs both"),
        ({"objective": "lexical_units", "mask_token": 4}, "needs both"),
        ({"objective": "lexical_units", "block": 1, "mask_token": 3}, "block=1 hides no target"),
        ({**OPTIONS, "unit_threshold": 1.0}, r"unit_threshold=1.0 must be in \(0, 1\)"),
        ({"unit_threshold": 0.5}, "unit_threshold=0.5 means nothing to objective='text_to_text'"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **options)


def test_a_mask_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="mask_token=64 is outside the model's vocabulary of 64"):
        _masking(Transformer(MODEL), TrainConfig(steps=1, **OPTIONS | {"mask_token": 64}))
    assert "lexical_units" in OBJECTIVES
