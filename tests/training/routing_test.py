"""Mixtures of experts in a step: the same update on any mesh and in any parts; what is reported; what is exchanged."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models import families
from mlm.models.specs import RouterSpec
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer
from tests.training.step_test import assert_same, one_step, sgd
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of

E, D = 8, MODEL.d_model


def sparse(router, **change):
    """The toy, one layer a stack, with mixtures in place of its feed-forward networks."""
    config = families.sparse(MODEL, router, every=1)
    stacks = {name: dataclasses.replace(own, repeats=1, **change) for name, own in config.stacks().items()}
    return dataclasses.replace(config, **stacks)


DROPLESS = RouterSpec(experts=E, k=2, gates="chosen", balance=0.05, z=0.01, bias_rate=0.01)
CAPACITY = RouterSpec(experts=E, k=2, capacity=1.25, min_capacity=1, balance=0.05, z=0.01)
ROUTERS = {"dropless": DROPLESS, "capacity": CAPACITY}
BATCH = rows_of([[e] for e in examples(16)])


@pytest.fixture(scope="module", params=ROUTERS)
def alone(request):
    """(model, its step on one device)."""
    model = sparse(ROUTERS[request.param])
    return model, one_step(BATCH, model)


MESHES = [
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in (
            {"data": 2, "expert": 4},
            {"data": 2, "fsdp": 2, "tensor": 2},
            {"replica": 2, "data": 1, "expert": 4},
        )
    ),
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))
def test_any_mesh_gives_the_update_and_the_metrics_of_one_device(alone, sizes):
    model, (want, want_metrics) = alone
    got, metrics = one_step(BATCH, model, make_mesh(MeshConfig(**sizes)))
    assert_same(got.params, want.params)
    assert_same(metrics, want_metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"microbatches": 4}, {"remat": "full"}], ids=str)
def test_parts_and_rematerialisation_change_nothing(alone, change):
    model, (want, want_metrics) = alone
    config = {name: change[name] for name in change if name == "microbatches"}
    stacks = {name: change[name] for name in change if name != "microbatches"}
    router = next(r for r in ROUTERS.values() if r in model.encoder.routers())
    got, metrics = one_step(BATCH, sparse(router, **stacks), **config)
    assert_same(got.params, want.params)
    assert_same(metrics, want_metrics, rtol=1e-4, atol=1e-5)


def test_what_is_reported_adds_up(alone):
    """Two choices a token; every layer's load by expert and by language counts the same choices."""
    _, (_, metrics) = alone
    tokens = {"encoder": (BATCH["encoder_segment_ids"] > 0).sum(), "decoder": (BATCH["decoder_segment_ids"] > 0).sum()}
    ids = {name: BATCH[f"{name}_language_ids"][BATCH[f"{name}_segment_ids"] > 0] for name in tokens}
    for stack, count in tokens.items():
        load, choices = metrics[f"routing/{stack}/expert_load"]
        assert load.shape == (1, E)
        assert load.sum() == 2 * count == choices.sum()
        table = metrics[f"routing/{stack}/experts_by_language"][0]
        assert table.shape == (1, LANGUAGES, E)
        np.testing.assert_array_equal(table[0].sum(1), 2 * np.bincount(ids[stack], minlength=LANGUAGES))
        np.testing.assert_array_equal(table.sum(1), load)
        entropy, weight = metrics[f"routing/{stack}/entropy"]
        assert weight == count
        assert 0 < entropy / weight <= np.log(E)
        assert 0 <= metrics[f"routing/{stack}/dropped"][0] < choices.sum()
    total, weight = metrics["router_loss"]
    assert weight == BATCH["decoder_loss_weights"].sum()
    np.testing.assert_allclose(metrics["loss"][0], metrics["nll"][0] + metrics["z_loss"][0] + total, rtol=1e-5)


def test_drops_are_reported_where_slots_are_few():
    router = dataclasses.replace(CAPACITY, capacity=0.25)
    _, metrics = one_step(BATCH, sparse(router))
    dropped, choices = metrics["routing/encoder/dropped"]
    assert 0.3 < dropped[0] / choices[0] < 1


def test_balancing_biases_move_by_their_rate_and_nothing_else_moves_them():
    """AdamW's decay leaves them alone; a loaded expert's falls, a spared one's rises."""
    model = sparse(DROPLESS)
    optimizer = make_optimizer("adamw", learning_rate=0.1, weight_decay=0.5)
    state, metrics = one_step(BATCH, model, optimizer=optimizer)
    load = metrics["routing/decoder/expert_load"][0][0]
    bias = state.params["decoder"]["layers"]["0"]["moe"]["router_bias"][0]
    np.testing.assert_allclose(bias, 0.01 * np.sign(load.mean() - load), atol=1e-7)


def compiled(router, **sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    trainer = Trainer(sparse(router), TrainConfig(steps=1), sgd, mesh, LANGUAGES)
    return trainer.step.lower(trainer.abstract, global_batch(BATCH, mesh)).compile().as_text()


def exchanged(hlo, kind):
    """Bytes of float32 that the operations of a kind give each device, one entry per operation."""
    found = []
    for line in hlo.splitlines():
        if match := re.search(rf"= (.*?) {kind}(-start)?\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]", match[1])
            found.append(sum(4 * int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes))
    return [size for size in found if size]


def test_slots_travel_by_all_to_all():
    """Encoder rows of a device: 16 rows / 8, E x C x D floats each, C = 1.25 x 16 / 8 = 2 (rounded to even)."""
    sizes = exchanged(compiled(CAPACITY, data=2, expert=4), "all-to-all")
    encoder = 4 * 2 * E * 2 * D
    assert len(sizes) >= 8  # there and back, forward and backward, in both stacks
    assert sizes.count(encoder) >= 4


def test_dropless_tokens_travel_in_a_ring():
    """A turn gives each device its neighbour's 2 rows of 16 states and as many results."""
    hlo = compiled(DROPLESS, data=2, expert=4)
    assert exchanged(hlo, "collective-permute").count(4 * 2 * 16 * D) >= 2
    assert not exchanged(hlo, "all-gather")  # neither experts nor the batch ever meet on one device


def test_experts_that_do_not_divide_the_mesh_are_refused():
    with pytest.raises(ValueError, match=r"moe/down: experts=6 does not divide over expert=4"):
        compiled(dataclasses.replace(DROPLESS, experts=6), data=2, expert=4)


def test_a_few_steps_lower_the_loss_and_even_the_load():
    model = sparse(dataclasses.replace(CAPACITY, capacity=None, balance=0.1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(model, TrainConfig(steps=60), make_optimizer("adamw", learning_rate=3e-3), mesh, LANGUAGES)
    state, batch = trainer.init(), global_batch(BATCH, mesh)
    history = []
    for _ in range(60):
        state, metrics = trainer.step(state, batch)
        history.append(jax.device_get(metrics))
    assert history[-1]["loss"][0] < 0.5 * history[0]["loss"][0]
    spread = [
        float(jnp.max(m["routing/encoder/expert_load"][0]) / jnp.mean(m["routing/encoder/expert_load"][0]))
        for m in history
    ]
    assert np.mean(spread[-10:]) < np.mean(spread[:10])
