"""Experts on a mesh, where a batch's rows do not divide over the devices: the rows of a decoding step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.families import sparse, t5_style
from mlm.models.specs import RouterSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, MeshPlacement, make_mesh, shardings
from tests.models.rows import batch_of

DENSE = t5_style(vocab_size=24, d_model=8, d_ff=8, heads=4, head_dim=2, layers=(1, 1))


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_three_rows_decode_on_eight_devices_as_on_one(sizes):
    config = sparse(DENSE, RouterSpec(experts=4, k=2, gates="chosen"), every=1)
    plain, mesh = Transformer(config), make_mesh(MeshConfig(**sizes))
    params = plain.init(jax.random.key(0))
    batch = batch_of([([5, 6, 1], [3, 1]), ([9, 1], [4, 1]), ([7, 8, 1], [5, 1])], 4, 2)
    encoded = plain.encode(params, batch["encoder_input_tokens"])
    tokens = jnp.array([[3], [4], [5]])

    def first_step(model, params):
        cache = model.init_cache(params, encoded, batch["encoder_segment_ids"] > 0, 3, 4)
        return model.step(params, tokens, cache)[0]

    want = jax.jit(lambda params: first_step(plain, params))(params)
    model = Transformer(config, MeshPlacement(mesh))
    placed = jax.device_put(params, shardings(model.shapes(), model.axes(), mesh))
    got = jax.jit(lambda params: first_step(model, params))(placed)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
