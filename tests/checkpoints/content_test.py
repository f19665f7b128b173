"""Sums and descriptions of a checkpoint's arrays: the formula, on any device and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.checkpoints.content import differences, nest, sums
from mlm.parallel import MeshConfig, make_mesh


def reference(array) -> int:
    """Σ (2·i + 1)·word_i modulo 2^32 with Python integers."""
    array = np.ascontiguousarray(array)
    size = min(array.dtype.itemsize, 4)
    words = np.frombuffer(array.tobytes(), dtype=f"<u{size}")
    return sum((2 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32


ARRAYS = {
    "f32": np.random.default_rng(0).normal(size=(6, 4, 2)).astype(np.float32),
    "bf16": np.asarray(jnp.arange(24, dtype=jnp.bfloat16).reshape(8, 3) / 7),
    "i32": np.array(-5, np.int32),
    "u8": np.arange(300, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_sums_are_the_formula_on_host_and_device(name):
    wanted = reference(ARRAYS[name])
    assert int(sums({"x": ARRAYS[name]})["x"]) == wanted
    assert int(sums({"x": jnp.asarray(ARRAYS[name])})["x"]) == wanted


def test_eight_byte_numbers_are_summed_on_the_host():
    array = np.array([2**40 + 3, -1], np.int64)
    assert int(sums({"x": array})["x"]) == reference(array)


def test_sums_do_not_depend_on_the_sharding():
    x = ARRAYS["f32"].reshape(8, 6)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    for spec in (jax.P(), jax.P("data"), jax.P(("data", "fsdp"), "tensor"), jax.P(None, "tensor")):
        split = jax.device_put(x, jax.NamedSharding(mesh, spec))
        assert int(sums({"x": split})["x"]) == reference(x)


def test_one_changed_bit_or_two_exchanged_elements_change_the_sum():
    x = ARRAYS["f32"].copy()
    before = int(sums({"x": x})["x"])
    for bit in range(32):
        y = x.copy()
        y.reshape(-1).view(np.uint32)[11] ^= np.uint32(1 << bit)
        assert int(sums({"x": y})["x"]) != before
    y = x.copy()
    y[0, 0, 0], y[5, 3, 1] = x[5, 3, 1], x[0, 0, 0]
    assert int(sums({"x": y})["x"]) != before


def test_nest():
    assert nest({"a/b": 1, "a/c/d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_differences_are_cut_at_the_limit():
    saved = {f"p{i}": [[1], "float32"] for i in range(20)}
    lines = differences(saved, {}, limit=3)
    assert len(lines) == 4
    assert lines[-1] == "… and 17 more"
