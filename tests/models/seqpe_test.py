"""Positions read as digits: what reads them, what they add, their losses, and what these losses make of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm.models.config import from_json, to_json
from mlm.models.flops import training_flops
from mlm.models.functional import Template
from mlm.models.seqpe import PositionReader, bias, contrast_loss, draw_candidates, spelled, transfer_loss
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec, PositionSpec, SeqPESpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, make_mesh
from mlm.training.trainer import TrainConfig, make_loss
from tests.training.step_test import assert_same, one_step
from tests.training.toy import MODEL, examples, rows_of

SPEC = SeqPESpec(digits=2, width=16, heads=2, layers=2, trained=40, pivots=16, candidates=8, window=8)
OWN = AttentionSpec(source="self", heads=4, head_dim=4, position=PositionSpec(kind="seqpe", seqpe=SPEC))
READER = Template(lambda rngs: PositionReader(OWN, rngs))
CONFIG = dataclasses.replace(
    MODEL,
    **{
        name: dataclasses.replace(stack, repeats=1, group=(LayerSpec(sublayers=(OWN, *stack.group[0].sublayers[1:])),))
        for name, stack in MODEL.stacks().items()
    },
)
ROWS = rows_of([[e] for e in examples(8)])
BATCH = jax.tree.map(jnp.asarray, ROWS)


@pytest.fixture(scope="module")
def params():
    return READER.init(jax.random.key(0))


@jax.jit
def read(params, positions):
    return READER.bind(params)(positions)


def test_digits_golden():
    assert spelled(jnp.array([0, 7, 42, 1999]), 4).tolist() == [[0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 4, 2], [1, 9, 9, 9]]


def test_a_vector_depends_on_its_digits_alone(params):
    """Read once and looked up is read anew; without one of the digits' rows only the positions with it change."""
    every = read(params, jnp.arange(40))
    asked = jnp.array([7, 31, 7, 39, 0])
    np.testing.assert_allclose(read(params, asked), every[asked], rtol=1e-5, atol=1e-5)
    assert len({tuple(np.round(row, 3).tolist()) for row in every}) == 40
    other = {**params, "digit": params["digit"].at[3].multiply(2.0)}
    moved = jnp.abs(read(other, jnp.arange(40)) - every).max(-1) > 1e-4
    np.testing.assert_array_equal(moved, ["3" in f"{p:02}" for p in range(40)])


def test_attention_adds_what_its_positions_are_to_each_other():
    """softmax(q k + q_pe(i) k_pe(j) / sqrt(K)), positions counted inside each example of a packed row."""
    model = Transformer(CONFIG)
    params = model.init(jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, rows_of([examples(2)]))
    name = "decoder/self_attention/probabilities"
    weights = np.asarray(jax.jit(lambda p: model(p, batch, taps=[name]).taps[name])(params))[0, 0]
    decoder = params["decoder"]
    reader = decoder["seqpe"]
    e = np.asarray(read(reader, jnp.asarray(batch["decoder_positions"][0])))
    own = jax.tree.map(lambda x: x[0], decoder["layers"]["0"]["self_attention"])
    x = np.asarray(params["embedding"])[batch["decoder_input_tokens"][0]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    logits = np.einsum("td,dhk,se,ehk->hts", x, own["query"], x, own["key"])
    logits += np.einsum("td,dhk,se,ehk->hts", e, reader["query"], e, reader["key"]) / 2.0  # heads of 4
    segments = batch["decoder_segment_ids"][0]
    seen = (segments[:, None] == segments) & np.tril(np.ones((12, 12), bool))
    want = np.exp(logits) * seen
    real = segments > 0
    np.testing.assert_allclose(weights[:, real], (want / want.sum(-1, keepdims=True))[:, real], rtol=1e-4, atol=1e-6)


def test_losses_golden():
    """Pivot 5 and candidates 4, 9, 6: 4 and 6 are as near. Two equal rows are as similar as e to e."""
    mine, others = jnp.array([[1.0, 0.0]]), jnp.array([[[2.0, 5.0], [1.0, 0.0], [0.0, 1.0]]])
    got = contrast_loss(jnp.array([5]), jnp.array([[4, 9, 6]]), mine, others)
    np.testing.assert_allclose(got, -np.log((np.exp(2) + 1) / (np.exp(2) + np.e + 1)), rtol=1e-6)
    teacher, student = np.array([[0.0], [1.0]]), np.array([[0.0], [0.0]])
    # Rows of softmax(E E^T): teacher (1/2, 1/2), (1/(1+e), e/(1+e)); student (1/2, 1/2) twice.
    second = 0.5 * (np.log(0.5 * (1 + np.e)) + np.log(0.5 * (1 + np.e) / np.e))
    np.testing.assert_allclose(transfer_loss(jnp.asarray(teacher), jnp.asarray(student)), second / 2, rtol=1e-6)
    assert (jax.grad(transfer_loss)(jnp.asarray(teacher), jnp.asarray(student + 0.5)) == 0).all()
    assert transfer_loss(jnp.asarray(teacher), jnp.asarray(teacher)) == 0


def test_candidates_are_others_in_reach_and_some_differ_in_a_digit():
    spec = SeqPESpec(digits=4, pivots=400, candidates=20)
    drawn = draw_candidates(jax.random.key(0), spec)
    pivots, candidates = map(np.asarray, drawn)
    assert candidates.shape == (400, 20)
    assert 0 <= candidates.min() <= candidates.max() < 10_000
    assert (candidates != pivots[:, None]).all()
    near = np.abs(candidates - pivots[:, None]) <= 256
    assert 0.3 < (near.mean(1) < 0.4).mean() < 0.5  # pivots whose candidates are anywhere
    digits, others = (np.asarray(spelled(x, 4)) for x in drawn)
    edited = (digits[:, None] != others).sum(-1) == 1
    assert 0.05 < (edited & ~near).mean() < 0.15  # 0.6 x 0.25 edits, of which about half are far


def test_the_contrast_alone_makes_neighbours_of_neighbours():
    """After it, the most similar vector to that of p, of all of 0 … 99, is that of p - 1 or p + 1."""
    spec = dataclasses.replace(SPEC, width=32, transfer=0.0, contrast=1.0, pivots=32, candidates=32)
    own = dataclasses.replace(OWN, position=PositionSpec(kind="seqpe", seqpe=spec))
    reader = Template(lambda rngs: PositionReader(own, rngs))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 250))

    def right(params):
        e = reader.bind(params)(jnp.arange(100))
        similar = jnp.where(jnp.eye(100, dtype=bool), -jnp.inf, e @ e.T)
        return jnp.mean(jnp.abs(jnp.argmax(similar, -1) - jnp.arange(100)) == 1)

    @jax.jit
    def train(params):
        def step(state, key):
            params, moments = state
            gradients = jax.grad(lambda p: reader.bind(p).loss(key))(params)
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(params, updates), moments), None

        keys = jax.random.split(jax.random.key(1), 250)
        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return right(params), right(after)

    before, after = train(reader.init(jax.random.key(0)))
    assert before < 0.5
    assert after > 0.9


@pytest.mark.slow
def test_losses_join_the_training_loss_and_a_mesh_gives_the_numbers_of_one_device():
    config = alone(layers=1)
    want, metrics = one_step(ROWS, config)
    assert float(metrics["position_loss"][0]) > 0
    got, others = one_step(ROWS, config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert_same(got.params, want.params)
    assert_same(others, metrics, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_task_s_and_that_of_each_stack_s_reader():
    model = Transformer(CONFIG)
    params = model.init(jax.random.key(0))
    loss_of = make_loss(model, TrainConfig(steps=1), 5)

    @jax.jit
    def both(key):
        return loss_of(params, BATCH, key), model(params, BATCH, key).positions

    (loss, positions), (_, others) = (both(jax.random.key(i)) for i in (3, 4))
    added, weight = loss.metrics["position_loss"]
    assert set(positions) == {"encoder", "decoder"}
    np.testing.assert_allclose(sum(positions.values()) * weight, added, rtol=1e-5)
    np.testing.assert_allclose(loss.sum - added, loss.metrics["nll"][0] + loss.metrics["z_loss"][0], rtol=1e-5)
    assert weight == loss.weight
    assert positions != others
    assert "position_loss" not in jax.eval_shape(loss_of, params, BATCH, None).metrics


def test_training_begins_elsewhere_now_and_then():
    """With probability `shift`, and evaluation never does."""
    model = Transformer(alone(shift=0.5))
    params = model.init(jax.random.key(0))
    run = jax.jit(lambda key: model(params, BATCH, key).hidden)
    plain = model(params, BATCH).hidden
    same = [bool(jnp.allclose(run(jax.random.key(i)), plain, atol=1e-6)) for i in range(12)]
    assert 2 < sum(same) < 10


def alone(**change):
    """A decoder alone, whose reader differs so much from the others'."""
    position = PositionSpec(kind="seqpe", seqpe=dataclasses.replace(SPEC, **change))
    layer = LayerSpec(sublayers=(dataclasses.replace(OWN, position=position), FFNSpec(d_ff=4)))
    return dataclasses.replace(CONFIG, encoder=None, decoder=dataclasses.replace(CONFIG.decoder, group=(layer,)))


def test_flops_count_the_reader_once():
    """5 source positions, 3 target ones, 16 x 9 + 16 of losses: 2 digits and a row more, 2 layers of 12 E^2."""
    reader = 6 * (2 * 12 * 3 + 1) * 16**2 + 12 * 2 * 16 * 4.5
    maps = 6 * 2 * 16 * 16
    rows = [training_flops(CONFIG, n, 5, 3) for n in (1, 2)]
    assert 2 * rows[0] - rows[1] == (5 + 3 + 2 * (16 * 9 + 16)) * reader + (5 + 3) * maps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PositionSpec(kind="seqpe"), "kind='seqpe', and no other, needs the SeqPESpec"),
        (lambda: PositionSpec(kind="rope", seqpe=SPEC), "kind='seqpe', and no other"),
        (lambda: SeqPESpec(width=10, heads=4), "heads=4 must divide width=10"),
        (lambda: SeqPESpec(digits=2, trained=101), r"spell 100 positions, which must hold trained=101"),
        (lambda: SeqPESpec(contrast=-1.0), "contrast=-1.0 must not be negative"),
        (lambda: SeqPESpec(shift=1.0), r"shift=1.0 must be in \[0, 1\)"),
        (
            lambda: Transformer(on("blockwise")),
            r"attention='blockwise' does not fit: position='seqpe': .* What fits: 'plain'$",
        ),
        (
            lambda: dataclasses.replace(
                CONFIG.decoder, group=(*CONFIG.decoder.group, *on("plain", heads=2).decoder.group)
            ),
            r"one reader of positions serves all layers.*found heads of \['2x4', '4x4'\]",
        ),
        (lambda: Transformer(CONFIG).init_cache(*CACHE), "101 positions do not fit digits=2, which spell 100"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def on(attention, **change):
    stack = CONFIG.decoder
    own = dataclasses.replace(OWN, **change)
    group = (LayerSpec(sublayers=(own, *stack.group[0].sublayers[1:])),)
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(stack, group=group, attention=attention))


CACHE = (
    jax.tree.map(lambda x: jnp.zeros(x.shape), Transformer(CONFIG).shapes()),
    jnp.zeros((1, 3, 16)),
    jnp.ones((1, 3), bool),
    1,
    101,
)


def test_a_config_survives_json():
    assert from_json(to_json(CONFIG)) == CONFIG


def test_keys_of_all_rows_or_of_each_are_the_same():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4, 5), (6, 4, 5)))
    np.testing.assert_allclose(bias(query, key), bias(query, jnp.stack([key, key])), rtol=1e-6)
    np.testing.assert_allclose(bias(query, key)[1, 2, 0, 3], query[1, 0, 2] @ key[3, 2] / 5**0.5, rtol=1e-5)
