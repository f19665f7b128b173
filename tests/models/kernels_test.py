"""Vendors' kernels: what does not fit is refused by name, and what fits reaches them whole. It takes no accelerator."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.attention import Keys, attend
from mlm.models.config import ATTENTION_PATHS
from mlm.models.kernels import attend_cudnn, attend_splash
from mlm.models.paths import PATHS
from mlm.models.presets import preset
from mlm.models.sight import Sight
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_every_name_is_a_path():
    assert tuple(PATHS) == ATTENTION_PATHS


@pytest.mark.parametrize(
    ("name", "attention", "changes", "message"),
    [
        (
            "t5_1_1_small",
            "splash",
            {"dtype": "bfloat16"},
            r"attention='splash' does not fit: position='t5_bucket': the kernel adds no bias. "
            r"What fits: 'plain', 'blockwise', 'cudnn'$",
        ),
        (
            "t5gemma_s_s",
            "cudnn",
            {},
            r"softcap=50.0: cuDNN has no soft cap; dtype='float32': cuDNN takes bfloat16. "
            r"What fits: 'plain', 'blockwise', 'splash'$",
        ),
        ("t5gemma2_270m", "splash", {}, r"joint attention.* What fits: 'plain', 'blockwise'"),
        ("gemma_3_270m", "cudnn", {"dropout": 0.1, "dtype": "bfloat16"}, r"dropout=0.1: the kernel drops no prob"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_runs(name, attention, changes, message):
    with pytest.raises(ValueError, match=message):
        Transformer(preset(name, attention=attention, **changes))


@pytest.mark.parametrize(
    ("attention", "length", "message"),
    [
        ("cudnn", 7, r"kind 'cpu', not 'gpu'; length 7: cuDNN takes even lengths. What fits: 'plain', 'blockwise'"),
        ("splash", 128, r"kind 'cpu', not 'tpu'; 8 devices: the kernel is not split over a mesh. What fits: 'plain', "),
        ("splash", 64, r"length 64: the kernel takes multiples of 128"),
    ],
)
def test_devices_and_batches_that_do_not_fit_are_refused(attention, length, message):
    model = Transformer(preset("gemma_3_270m", vocab_size=32, dtype="bfloat16", attention=attention))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_segment_ids": tokens}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model, model.shapes(), batch)


def test_a_prefix_is_refused_by_a_kernel_that_knows_none():
    model = Transformer(preset("gemma_3_270m", vocab_size=32, attention="splash"))
    batch = {f"decoder_{n}": jnp.ones((1, 128), jnp.int32) for n in ("input_tokens", "segment_ids", "causal_attention")}
    with pytest.raises(ValueError, match=r"decoder_causal_attention: the kernel knows no prefix"):
        jax.eval_shape(model, model.shapes(), batch)


def test_cudnn_is_told_all_that_plain_attention_knows(monkeypatch):
    """Joint attention of grouped heads with a bias, packed, a learned scale; XLA's program in the kernel's place."""
    kernel = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **rest):
        assert implementation == "cudnn"
        return kernel(*arrays, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    segments, source = jnp.array([[1] * 4 + [2] * 4, [1] * 8]), jnp.array([[1] * 3 + [2] * 3, [1] * 6])
    q, k, v = random(2, 4, 8, 4), random(2, 2, 8, 4, seed=1), random(2, 2, 8, 4, seed=2)
    source_k, source_v, table = random(2, 2, 6, 4, seed=3), random(2, 2, 6, 4, seed=4), random(4, 32, seed=5)

    def run(path, table, scale):
        own = Sight(
            shape=(8, 8), causal=True, segments=(segments, segments), position=PositionSpec(), heads=4, table=table
        )
        seen = [Keys(k, v, own), Keys(source_k, source_v, Sight(shape=(8, 6), segments=(segments, source)))]
        values = path(q, seen, scale=scale)
        return jnp.sum(values**2), values

    want, got = (
        jax.jit(jax.grad(partial(run, path), (0, 1), has_aux=True))(table, jnp.float32(0.7))
        for path in (attend, attend_cudnn)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


SEGMENTS = jnp.array([[1] * 100 + [2] * 80 + [0] * 76, [1] * 256])
SPLASH = {
    "causal window, grouped": ({"causal": True, "window": 50}, None),
    "window both ways, cap": ({"causal": False, "window": 91}, 3.0),
    "all": ({"causal": None}, None),
}


def splashed(case, path, q, k, v):
    sight, softcap = SPLASH[case]
    seen = [Keys(k, v, Sight(shape=(256, 256), segments=(SEGMENTS, SEGMENTS), **sight))]
    values = jnp.where((SEGMENTS > 0)[:, None, :, None], path(q, seen, scale=0.5, softcap=softcap), 0)
    return jnp.sum(values**2), values


@pytest.mark.parametrize("case", SPLASH)
def test_splash_attention_equals_plain(case):
    inputs = random(2, 4, 256, 16), random(2, 2, 256, 16, seed=1), random(2, 2, 256, 16, seed=2)
    want, got = (
        jax.jit(jax.grad(partial(splashed, case, path), (0, 1, 2), has_aux=True))(*inputs)
        for path in (attend, partial(attend_splash, interpret=True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_splash_attention_compiles_for_a_tpu_as_far_as_a_cpu_can_tell():
    q, k = (jax.ShapeDtypeStruct((2, heads, 256, 128), jnp.bfloat16) for heads in (4, 2))
    gradient = jax.jit(jax.grad(partial(splashed, "causal window, grouped", attend_splash), (0, 1, 2), has_aux=True))
    module = jax.export.export(gradient, platforms=["tpu"])(q, k, k).mlir_module()
    assert module.count("tpu_custom_call") == 3  # values, then the gradients of queries and of keys and values
