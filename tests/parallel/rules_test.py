"""Logical axes to mesh axes: one table, no silent replica, sizes checked before anything exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlm.parallel import MeshConfig, check_sizes, constrain, make_mesh, parameter_table, shardings
from mlm.parallel.rules import RULES, spec

SHAPES = {
    "embed": {"table": jax.ShapeDtypeStruct((64, 16), jnp.float32)},
    "layers": {
        "query": jax.ShapeDtypeStruct((3, 16, 4, 8), jnp.float32),
        "scale": jax.ShapeDtypeStruct((3, 16), jnp.float32),
        "wi": jax.ShapeDtypeStruct((3, 16, 32), jnp.float32),
    },
}
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "scale": ("layers", "embed"),
        "wi": ("layers", "embed", "mlp"),
    },
}


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), P(None, "fsdp", "tensor", None)),
        (("batch", "length", "embed"), P(("data", "fsdp"), None, None)),  # fsdp already splits the rows
        (("batch", "length", "heads", "head_dim"), P(("data", "fsdp"), None, "tensor", None)),
        (("embed", "embed"), P("fsdp", None)),  # an axis of the mesh serves an array once
        (("buckets", None), P(None, None)),
        ((), P()),
    ],
)
def test_rules_give_these_partitions(mesh, axes, expected):
    assert spec(axes, mesh) == expected


def test_rows_are_split_over_all_but_tensor():
    assert spec(("batch",), make_mesh(MeshConfig(replica=2, expert=2, tensor=2))) == P(("replica", "expert"))


def test_an_earlier_rule_chooses_first(mesh):
    assert spec(("vocab", "embed"), mesh, (("embed", "tensor"), *RULES)) == P(None, "tensor")


def test_placed_parameters_are_what_they_were(mesh):
    params = jax.tree.map(lambda s: np.arange(np.prod(s.shape), dtype=np.float32).reshape(s.shape), SHAPES)
    placed = jax.device_put(params, shardings(SHAPES, AXES, mesh))
    assert placed["layers"]["wi"].addressable_shards[0].data.shape == (3, 8, 16)
    assert placed["embed"]["table"].addressable_shards[0].data.shape == (32, 8)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_a_name_without_rule_is_an_error_with_the_parameter(mesh):
    axes = {**AXES, "embed": {"table": ("vocabulary", "embed")}}
    with pytest.raises(ValueError, match=r"embed/table: no partition rule for logical axis 'vocabulary'.*'vocab'"):
        shardings(SHAPES, axes, mesh)


def test_a_size_that_does_not_divide_is_an_error_with_the_nearest(mesh):
    shapes = {"wi": jax.ShapeDtypeStruct((16, 33), jnp.float32)}
    with pytest.raises(ValueError, match=r"wi: mlp=33 does not divide over tensor=2 \(2 parts\); .* 32 or 34"):
        shardings(shapes, {"wi": ("embed", "mlp")}, mesh)


def test_trees_that_differ_are_an_error_with_the_paths(mesh):
    axes = {"embed": AXES["embed"], "layers": {k: v for k, v in AXES["layers"].items() if k != "wi"}}
    with pytest.raises(ValueError, match=r"without axes: \['layers/wi'\]"):
        shardings(SHAPES, axes, mesh)
    with pytest.raises(ValueError, match=r"layers/scale: shape \(3, 16\) has 2 dimensions"):
        shardings(SHAPES, {**AXES, "layers": {**AXES["layers"], "scale": ("embed",)}}, mesh)


def test_sizes_are_checked_before_anything_exists(mesh):
    check_sizes(mesh, batch=8, heads=6, vocab=64)
    with pytest.raises(ValueError, match=r"batch=6 does not divide over data=2 × fsdp=2 \(4 parts\).* 4 or 8") as info:
        check_sizes(mesh, batch=6, heads=3)
    assert "heads=3 does not divide over tensor=2 (2 parts); nearest sizes that do: 2 or 4" in str(info.value)


def test_constrained_activations_keep_values_and_take_the_sharding(mesh):
    x = jnp.arange(8 * 4 * 16, dtype=jnp.float32).reshape(8, 4, 16)
    pin = constrain(mesh)
    y = jax.jit(lambda x: pin(x, ("batch", "length", "embed")))(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"))), 3)
    with pytest.raises(ValueError, match=r"activation: no partition rule for logical axis 'lenght'.*'length'"):
        pin(x, ("batch", "lenght", "embed"))
    with pytest.raises(ValueError, match="has 3 dimensions"):
        pin(x, ("batch", "embed"))


def test_on_one_device_nothing_is_constrained():
    pin = constrain(make_mesh(MeshConfig(), jax.devices()[:1]))
    x = jnp.ones((2, 3))
    assert pin(x, ("batch", "embed")) is x


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_a_sharded_computation_gives_the_numbers_of_one_device(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    params = jax.tree.map(
        lambda s: jax.random.normal(jax.random.key(len(s.shape)), s.shape) / 8, {k: SHAPES[k] for k in ("embed",)}
    )
    tokens = np.arange(16).reshape(8, 2) % 64

    def loss(params, tokens, pin):
        hidden = pin(params["embed"]["table"][tokens], ("batch", "length", "embed"))
        logits = pin(hidden @ params["embed"]["table"].T, ("batch", "length", "vocab"))
        return jax.nn.logsumexp(logits, -1).sum()

    placed = jax.device_put(params, shardings({"embed": SHAPES["embed"]}, {"embed": AXES["embed"]}, mesh))
    sharded = jax.jit(jax.value_and_grad(lambda p, t: loss(p, t, constrain(mesh))))(placed, tokens)
    plain = jax.jit(jax.value_and_grad(lambda p, t: loss(p, t, lambda x, axes: x)))(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sharded, plain)


def test_parameter_table_lists_every_parameter_and_the_total(mesh):
    lines = parameter_table(SHAPES, AXES, shardings(SHAPES, AXES, mesh))
    assert len(lines) == 1 + 4 + 1
    query = next(line for line in lines if line.startswith("layers/query"))
    assert [c.strip() for c in query.split("  ") if c.strip()] == [
        "layers/query",
        "3 × 16 × 4 × 8",
        "layers, embed, heads, head_dim",
        "-, fsdp, tensor, -",
        "1,536",
    ]
    # 64·16 + 3·16·4·8 + 3·16 + 3·16·32 = 1024 + 1536 + 48 + 1536
    assert lines[-1].split() == ["total", "4,144"]
    assert len({len(line) for line in lines}) == 1
