"""Quantised layers stand within half a step of their matrices, and run as the numbers they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.models.families import sparse, t5_style
from mlm.models.quantisation import Quantised, packed, quantised, unpacked
from mlm.models.specs import AttentionSpec, LayerSpec, RecurrentSpec, RouterSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, MeshPlacement, batch_sharding, make_mesh, shardings
from mlm.session.loading import quantised_in_place
from mlm.trees import named_leaves
from tests.models.rows import batch_of, logits_of

V = 32
T5 = t5_style(vocab_size=V, d_model=12, d_ff=16, heads=2, head_dim=4, layers=(2, 2))
MOE = sparse(T5, RouterSpec(experts=4, k=2, gates="chosen"), every=2)
BATCH = batch_of([([5, 6, 7, 1], [8, 9, 1]), ([9, 3, 1], [4, 1])] * 2, 6, 5)
KINDS = {"int8": 127, "int4": 7}
is_quantised = lambda leaf: isinstance(leaf, Quantised)  # noqa: E731


def made(config, seed=0):
    model = Transformer(config)
    return model, model.init(jax.random.key(seed))


def dense(params):
    """The numbers that the integers stand for."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_quantised(x) else x, params, is_leaf=is_quantised)


@pytest.mark.parametrize(
    ("kind", "scale", "integers", "error"),
    [("int8", 1.4 / 127, (68, -127, 32), 2.8e-3), ("int4", 1.4 / 7, (4, -7, 2), 0.0501)],
)
def test_a_row_in_numbers(kind, scale, integers, error):
    """.75, -1.4, .35 over 1.4/127 are 68.04, -127, 31.75; over 1.4/7 they are 3.75, -7, 1.75."""
    column = np.array([0.75, -1.4, 0.35, 0.0], np.float32)
    matrix = np.stack([column, np.zeros(4)], axis=1)  # a second output, of nothing but zeros
    found = quantised({"encoder": {"ffn": {"up": jnp.asarray(matrix)}}}, kind)["encoder"]["ffn"]["up"]
    values = found.values if kind == "int8" else unpacked(found.values, found.axis)
    np.testing.assert_array_equal(values[:, 0], (*integers, 0))
    np.testing.assert_allclose(found.scale[0, 0], scale, rtol=1e-6)
    assert np.abs(np.asarray(found.astype(jnp.float32)) - matrix).max() < error
    assert not np.asarray(found.astype(jnp.float32))[:, 1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [T5, MOE], ids=["dense", "mixture"])
def test_every_matrix_of_the_layers_and_nothing_else(config, kind):
    """Half a step from the matrix at most; one scale per output; a quarter of float32's bytes, or an eighth."""
    _, params = made(config)
    found = quantised(params, kind)
    for name, leaf in named_leaves(found, is_leaf=is_quantised):
        original = params
        for part in name.split("/"):
            original = original[part]
        inside = name.startswith(("encoder/", "decoder/")) and original.ndim - name.startswith("layers") >= 3
        matrix = inside and not name.endswith("router")
        assert is_quantised(leaf) == matrix, name
        if not matrix:
            continue
        assert leaf.shape == original.shape
        error = np.abs(np.asarray(leaf.astype(jnp.float32)) - np.asarray(original))
        assert (error <= 0.5001 * np.broadcast_to(leaf.scale, original.shape)).all(), name
        assert leaf.values.nbytes * {"int8": 4, "int4": 8}[kind] == original.nbytes
        part = name.rpartition("/")[2]
        outputs = original.shape[-2:] if part in ("query", "key", "value") else original.shape[-1:]
        copies = original.shape[: 2 if "/moe/" in name else 1]
        assert leaf.scale.size == np.prod((*copies, *outputs)), name


def test_a_layer_of_recurrent_units_stays_as_it_is():
    """Its matrices have the names of attention's, and other axes."""
    own = AttentionSpec(source="self", heads=2, head_dim=4)
    recurrent = RecurrentSpec(width=6, attends=True, alignment=4)
    stack = dataclasses.replace(T5.decoder, group=(LayerSpec(sublayers=(own, recurrent)),), repeats=2)
    model, params = made(dataclasses.replace(T5, decoder=stack))
    found = quantised(params, "int8")
    layer = found["decoder"]["layers"]["0"]
    assert all(not is_quantised(leaf) for leaf in jax.tree.leaves(layer["recurrent"], is_leaf=is_quantised))
    assert is_quantised(layer["self_attention"]["query"])
    np.testing.assert_array_equal(logits_of(model, found, BATCH), logits_of(model, dense(found), BATCH))


def test_two_values_share_a_byte():
    values = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 4, 6)), jnp.int8)
    for axis in (-3 + 1, -1):
        halves = packed(values, axis)
        assert halves.size * 2 == values.size
        np.testing.assert_array_equal(unpacked(halves, axis), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [T5, dataclasses.replace(MOE, dtype="bfloat16")], ids=["dense", "mixture"])
def test_it_runs_as_the_numbers_it_stands_for(config, kind):
    model, params = made(config)
    small = quantised(params, kind)
    plain = dense(small)
    np.testing.assert_array_equal(logits_of(model, small, BATCH), logits_of(model, plain, BATCH))
    decode = Generator(model, DecodeConfig(max_length=6, method="beam", beams=2))
    for mine, theirs in zip(decode(small, [[5, 6, 1], [7, 1]]), decode(plain, [[5, 6, 1], [7, 1]]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_equal_one(kind):
    """Experts, their hidden width and rows are split; scales have no inputs to split."""
    model, params = made(MOE)
    expected = logits_of(model, quantised(params, kind), BATCH)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    spread = Transformer(MOE, MeshPlacement(mesh))
    placed = jax.device_put(params, shardings(spread.shapes(), spread.axes(), mesh))
    small = quantised_in_place(placed, kind)
    up = small["encoder"]["layers"]["1"]["moe"]["up"]
    assert up.values.sharding.spec == placed["encoder"]["layers"]["1"]["moe"]["up"].sharding.spec
    batch = jax.device_put(BATCH, batch_sharding(mesh))
    np.testing.assert_allclose(logits_of(spread, small, batch), expected, rtol=1e-5, atol=1e-5)


def test_refusals():
    _, params = made(T5)
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        quantised(params, "int9")
    odd = {"encoder": {"ffn": {"up": jnp.ones((3, 2))}}}
    with pytest.raises(ValueError, match="encoder/ffn/up has 3 inputs, an odd number; use int8"):
        quantised(odd, "int4")
    leaf = quantised(params, "int8")["encoder"]["layers"]["0"]["ffn"]["up"]
    with pytest.raises(IndexError, match="read whole"):
        leaf[0]
