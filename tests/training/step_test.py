"""One update: same numbers for any microbatching, packing, mesh; fresh dropout; bad batches leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.models.families import t5_style
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import OPTIMIZERS, make_optimizer
from mlm.training.state import init_state
from mlm.training.step import accumulate, train_step
from mlm.training.trainer import TrainConfig, Trainer, make_loss
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of, with_dropout


def sgd(axes, shapes):
    return optax.sgd(0.1)


def one_step(batch, model=MODEL, mesh=None, optimizer=sgd, **config):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(model, TrainConfig(steps=10, **config), optimizer, mesh, LANGUAGES)
    state, metrics = trainer.step(trainer.init(), global_batch(batch, mesh))
    return jax.device_get(state), jax.device_get(metrics)


def assert_same(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_do_not_change_the_update(microbatches):
    """Rows of very different lengths: dividing per microbatch instead of once would weight them differently."""
    batch = rows_of([[e] for e in examples(8)])
    want, want_metrics = one_step(batch)
    got, metrics = one_step(batch, microbatches=microbatches)
    assert_same(got.params, want.params)
    assert_same(metrics["loss"], want_metrics["loss"])
    assert_same(metrics["language_nll"], want_metrics["language_nll"])


def test_packing_does_not_change_the_update():
    chosen = examples(8)
    want, _ = one_step(rows_of([[e] for e in chosen]))
    got, _ = one_step(rows_of([chosen[i : i + 2] for i in range(0, 8, 2)]))
    assert_same(got.params, want.params)


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 2, "fsdp": 2},
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in (
            {"data": 8},
            {"data": 1, "fsdp": 8},
            {"data": 2, "tensor": 4},
            {"replica": 2, "data": 2, "tensor": 2},
        )
    ),
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))
def test_any_mesh_gives_the_numbers_of_one_device(sizes):
    batch = rows_of([[e] for e in examples(16)])
    want, want_metrics = one_step(batch)
    assert len(jax.devices()) == 8
    got, metrics = one_step(batch, mesh=make_mesh(MeshConfig(**sizes)))
    assert_same(got.params, want.params)
    assert_same(metrics["loss"], want_metrics["loss"])


@pytest.mark.parametrize(
    "name", [n if n == "adafactor" else pytest.param(n, marks=pytest.mark.slow) for n in sorted(OPTIMIZERS)]
)
def test_every_optimizer_gives_the_numbers_of_one_device(name):
    """Statistics over whole matrices must not become statistics over a device's part of them."""
    optimizer = make_optimizer(name, learning_rate=0.05)
    batch = rows_of([[e] for e in examples(8)])
    want, _ = one_step(batch, optimizer=optimizer)
    got, _ = one_step(batch, optimizer=optimizer, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert_same(got.params, want.params, rtol=1e-4, atol=1e-5)


def test_parameters_and_moments_are_split_over_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    adam = lambda axes, shapes: optax.adam(1e-3)  # noqa: E731
    trainer = Trainer(MODEL, TrainConfig(steps=1, ema_decay=0.9), adam, mesh, LANGUAGES)
    state = trainer.init()
    table = state.params["embedding"]
    assert table.addressable_shards[0].data.size * 4 == table.size
    assert state.optimizer[0].mu["embedding"].sharding == table.sharding == state.ema["embedding"].sharding


def test_every_microbatch_draws_its_own_dropout():
    """Equal rows in every microbatch: with one shared key the parts' losses would be equal (a T5X defect)."""
    model = Transformer(with_dropout(0.5))
    loss_fn = make_loss(model, TrainConfig(steps=1), LANGUAGES)
    params = model.init(jax.random.key(0))
    batch = {k: jnp.asarray(np.repeat(v, 2, 0)) for k, v in rows_of([examples(1)]).items()}
    half = {k: v[:1] for k, v in batch.items()}
    key = jax.random.key(7)
    total, _ = jax.jit(accumulate, static_argnums=(0, 4))(loss_fn, params, batch, key, 2)
    loss = jax.jit(loss_fn)
    parts = [loss(params, half, jax.random.fold_in(key, i)).sum for i in range(2)]
    assert abs(parts[0] - parts[1]) > 1e-3
    np.testing.assert_allclose(total.sum, sum(parts), rtol=1e-5)


def test_dropout_depends_on_the_step_alone():
    batch = rows_of([[e] for e in examples(4)])
    model = with_dropout(0.3)
    _, first = one_step(batch, model)
    _, again = one_step(batch, model)
    assert first["loss"][0] == again["loss"][0]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(model, TrainConfig(steps=9), lambda a, s: optax.sgd(0.0), mesh, LANGUAGES)
    state, one = trainer.step(trainer.init(), global_batch(batch, mesh))
    _, two = trainer.step(state, global_batch(batch, mesh))
    assert one["loss"][0] != two["loss"][0]


def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters():
    model = Transformer(MODEL)
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(0.1)
    loss_fn = make_loss(model, TrainConfig(steps=1), LANGUAGES)

    def poisoned(params, batch, key):
        loss = loss_fn(params, batch, key)
        return loss._replace(sum=loss.sum * jnp.where(batch["poison"][0] > 0, jnp.nan, 1.0))

    batch = {k: jnp.asarray(v) for k, v in rows_of([[e] for e in examples(2)]).items()}
    step = jax.jit(
        lambda s, b: train_step(s, b, loss_fn=poisoned, optimizer=optimizer, key=jax.random.key(0), ema_decay=0.5)
    )
    state = init_state(params, optimizer, ema=True)
    bad, metrics = step(state, batch | {"poison": jnp.ones(2)})
    assert int(bad.step) == 1
    assert int(bad.skipped) == 1
    assert not metrics["finite"]
    for name in ("params", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(bad, name), getattr(state, name))
    good, metrics = step(bad, batch | {"poison": jnp.zeros(2)})
    assert int(good.step) == 2
    assert int(good.skipped) == 1
    assert metrics["finite"]
    assert not np.array_equal(good.params["embedding"], state.params["embedding"])


def test_ema_follows_the_parameters():
    batch = rows_of([[e] for e in examples(4)])
    state, _ = one_step(batch, ema_decay=0.75)
    plain, _ = one_step(batch)
    start = jax.device_get(Transformer(MODEL).init(jax.random.key(0)))
    want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, plain.params)
    assert_same(state.ema, want)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_few_steps_learn_a_batch_by_heart(name):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    optimizer = lambda axes, shapes: make_optimizer(name, learning_rate=0.03)(axes, shapes)  # noqa: E731
    trainer = Trainer(MODEL, TrainConfig(steps=60), optimizer, mesh, LANGUAGES)
    batch, state = global_batch(rows_of([[e] for e in examples(4)]), mesh), trainer.init()
    losses = []
    for _ in range(60):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"TrainConfig.steps=0 must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \[0, 1\)"),
        ({"on_nonfinite": "stopp"}, r"did you mean 'stop'"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 1, **change})


def test_sizes_that_do_not_divide_are_refused_before_compiling():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    trainer = Trainer(MODEL, TrainConfig(steps=1, microbatches=2), sgd, mesh, LANGUAGES)
    with pytest.raises(ValueError, match=r"batch_size=7 does not divide into microbatches=2"):
        trainer.check_batch(7)
    with pytest.raises(ValueError, match=r"batch.*3.*nearest"):
        trainer.check_batch(6)
    odd = t5_style(vocab_size=64, d_model=16, d_ff=16, heads=3, head_dim=4, layers=(1, 1))
    with pytest.raises(ValueError, match=r"heads.*3|3.*heads"):
        Trainer(odd, TrainConfig(steps=1), sgd, mesh, LANGUAGES)
