"""Embeddings are means over a text's own tokens, whoever stands beside it and wherever it is computed."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.evaluation.embedding import Embedder
from mlm.models.families import llama_style, t5_style
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer

SOURCES = [[5, 6, 7, 1], [9, 1], [3, 3, 8, 2, 4, 11, 10, 9, 8, 7, 1], [1]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(t5_style(vocab_size=12, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 1)))


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_it_is_the_mean_of_the_encoders_states(model, params):
    encode = jax.jit(model.encode)
    want = [np.asarray(encode(params, jax.numpy.array([source])))[0].mean(0) for source in SOURCES]
    np.testing.assert_allclose(Embedder(model)(params, SOURCES), want, atol=1e-5)


def test_batches_and_devices_change_nothing(model, params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = Embedder(model)(params, SOURCES)
    np.testing.assert_allclose(Embedder(model, batch_size=1)(params, SOURCES), whole, atol=1e-5)
    np.testing.assert_allclose(Embedder(model, rows=NamedSharding(mesh, P("data")))(params, SOURCES), whole, atol=1e-5)
    assert Embedder(model)(params, []).shape == (0, 16)


def test_bad_input_is_refused(model, params):
    with pytest.raises(ValueError, match="source 0 holds token 12, outside"):
        Embedder(model)(params, [[12]])
    config = llama_style(
        vocab_size=12, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=1, rope=PositionSpec(kind="rope")
    )
    with pytest.raises(ValueError, match="a decoder alone"):
        Embedder(Transformer(config))({}, SOURCES)
