"""Training of Chimera heads: the rest of the model stays; the numbers are those of one device and of single rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.models.families import sparse
from mlm.models.specs import ChimeraSpec, RouterSpec
from mlm.objectives import text_to_text
from mlm.objectives.any_order import AnyOrder
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer
from mlm.trees import named_leaves
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of, with_dropout

SPEC = ChimeraSpec(heads=2, attention_heads=4, head_dim=4, d_ff=16)
CONFIG = dataclasses.replace(MODEL, chimera=SPEC)


def sgd(axes, shapes):
    return optax.sgd(0.1)


def taken(batch, model=CONFIG, mesh=None, optimizer=sgd, steps=1, **config):
    """(parameters before, state and metrics after some steps on the batch)."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    train = TrainConfig(steps=10, objective="chimera", **config)
    trainer = Trainer(model, train, optimizer, mesh, LANGUAGES)
    state = trainer.init()
    before = jax.device_get(state.params)
    for _ in range(steps):
        state, metrics = trainer.step(state, global_batch(batch, mesh))
    return before, jax.device_get(state), jax.device_get(metrics)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_all_but_the_heads_stay_bit_for_bit_and_take_no_memory():
    """Under dropout, decay, clipping, balanced routers, a running mean, and a part of the heads that is frozen too."""
    experts = sparse(with_dropout(0.3), RouterSpec(experts=4, k=2, gates="chosen", bias_rate=0.1), every=1)
    model = dataclasses.replace(experts, chimera=SPEC)
    optimizer = make_optimizer("adamw", learning_rate=0.1, clip_norm=1.0, weight_decay=0.5, freeze=["chimera/ffn/.*"])
    batch = rows_of([[e] for e in examples(4)])
    before, state, metrics = taken(batch, model, optimizer=optimizer, steps=3, ema_decay=0.9)
    for (name, old), (_, new), (_, mean) in zip(*map(named_leaves, (before, state.params, state.ema)), strict=True):
        stays = not name.startswith("chimera/") or name.startswith("chimera/ffn/")
        assert (new.tobytes() == old.tobytes()) == stays, name
        assert np.array_equal(mean, old) == stays, name
    moments = [name for name, _ in named_leaves(state.optimizer) if "/mu/" in name]
    assert moments
    assert all("/mu/chimera/" in name and "/ffn/" not in name for name in moments)
    assert metrics["finite"]


def test_a_loss_is_the_mean_over_heads_of_targets_and_states():
    """Against the plain loss of each head's logits; head k has nothing to say of the first k targets."""
    rows = [[e] for e in examples(4)]
    batch = {name: jnp.asarray(x) for name, x in rows_of(rows).items()}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(CONFIG, TrainConfig(steps=1, objective="chimera", z_loss=0.0), sgd, mesh, LANGUAGES)
    model, params = trainer.model, trainer.init().params
    metrics = trainer.evaluate_batch(params, batch)
    hidden = model(params, batch).hidden
    drafted = model.chimera(params).whole(
        model.decoder_rows(params, batch["decoder_input_tokens"]), hidden, batch["decoder_segment_ids"]
    )
    total, error, weight = 0.0, 0.0, 0
    for k in (1, 2):
        log_probs = np.asarray(jax.nn.log_softmax(model.logits(params, drafted.mixed[k - 1])))
        for row, [(_, targets, _)] in enumerate(rows):
            for place in range(k, len(targets)):
                total -= log_probs[row, place, targets[place]]
                error += np.mean((drafted.states[k - 1, row, place] - hidden[row, place]) ** 2)
                weight += 1
    np.testing.assert_allclose(metrics["loss"], (total + error, weight), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], (total, weight), rtol=1e-5)
    np.testing.assert_allclose(metrics["state_error"], (error, weight), rtol=1e-5)
    counts = [float(metrics[f"nll_head_{k}"][1]) for k in (1, 2)]
    assert counts == [sum(max(len(e[0][1]) - k, 0) for e in rows) for k in (1, 2)]
    assert float(metrics["language_target_tokens"][0].sum()) == counts[0]
    own = text_to_text(  # a head for itself is text to text
        drafted.mixed[0],
        params["head"],
        {**batch, "decoder_loss_weights": batch["decoder_loss_weights"] * drafted.known[0]},
        num_languages=LANGUAGES,
        z_loss=0.0,
    )
    np.testing.assert_allclose(metrics["nll_head_1"], own.metrics["nll"], rtol=1e-5)


def test_microbatches_packing_and_eight_devices_change_nothing():
    chosen = examples(16)
    batch = rows_of([[e] for e in chosen])
    before, want, metrics = taken(batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    packed = rows_of([chosen[i : i + 2] for i in range(0, 16, 2)])
    for other, options in ((batch, {"microbatches": 2}), (packed, {}), (batch, {"mesh": mesh})):
        _, got, numbers = taken(other, **options)
        assert_same(got.params, want.params)
        assert_same(numbers["loss"], metrics["loss"])
        assert_same(numbers["state_error"], metrics["state_error"])
    assert not np.array_equal(want.params["chimera"]["mix"], before["chimera"]["mix"])


def test_a_run_begins_with_a_model_that_has_no_heads():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    base = Trainer(MODEL, TrainConfig(steps=1, seed=3), sgd, mesh, LANGUAGES).init().params
    kept = jax.device_get(base)
    trainer = Trainer(CONFIG, TrainConfig(steps=1, objective="chimera"), sgd, mesh, LANGUAGES)
    params, fresh = trainer.init(base).params, trainer.init().params
    jax.tree.map(np.testing.assert_array_equal, params, {**kept, "chimera": fresh["chimera"]})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MODEL, {"objective": "chimera"}, r"trains heads that this model has not: set preset.chimera=@chimera\(\)"),
        (CONFIG, {}, "objective='text_to_text' moves the states that the model's chimera heads read"),
        (CONFIG, {"objective": "chimera", "any_order": AnyOrder(mask_token=63)}, "leave any_order out"),
    ],
)
def test_what_does_not_fit_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(model, TrainConfig(steps=1, **options), sgd, make_mesh(MeshConfig()), LANGUAGES)
