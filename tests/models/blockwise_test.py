"""Blockwise attention gives the numbers of plain attention, gradients too, and never holds T x S numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models import blockwise
from mlm.models.attention import Keys, attend
from mlm.models.blockwise import attend_blockwise
from mlm.models.sight import Sight
from mlm.models.specs import NO_POSITION, PositionSpec

B, H, G, T, S, K = 2, 4, 2, 40, 23, 8
SEGMENTS = jnp.array([[1] * 15 + [2] * 20 + [0] * 5, [1] * T])
SOURCE_SEGMENTS = jnp.array([[1] * 10 + [2] * 10 + [0] * 3, [1] * 20 + [0] * 3])
PREFIX = jnp.array([[True] * 6 + [False] * 9 + [True] * 8 + [False] * 17, [True] * 20 + [False] * 20])
REAL = (SEGMENTS > 0)[:, None, :, None]
CASES = {
    "t5, causal": {"causal": True, "position": PositionSpec()},
    "t5, both ways, dropout": {"causal": False, "position": PositionSpec(), "rate": 0.3},
    "alibi, window both ways, cap": {
        "causal": False,
        "position": PositionSpec(kind="alibi"),
        "window": 9,
        "softcap": 2.0,
    },
    "no bias, causal window": {"causal": True, "position": NO_POSITION, "window": 10},
    "t5, prefix, window, cap": {
        "causal": True,
        "position": PositionSpec(),
        "window": 9,
        "softcap": 2.0,
        "prefix": (PREFIX, PREFIX),
    },
}


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def arrays(dtype=jnp.float32):
    """Queries, own keys and values, the source's, a table of buckets, a learned scale."""
    shapes = [(B, H, T, K), *[(B, G, T, K)] * 2, *[(B, G, S, K)] * 2]
    return *(random(*s, seed=i).astype(dtype) for i, s in enumerate(shapes)), random(H, 32, seed=9), jnp.float32(0.7)


def joint(path, case, q, k, v, source_k, source_v, table, scale):
    """Self- and cross-attention under one softmax, two examples packed in the first row, its end padding."""
    case = dict(case)
    rate, softcap = case.pop("rate", 0.0), case.pop("softcap", None)
    table = table if case["position"].kind == "t5_bucket" else None
    own = Sight(shape=(T, T), segments=(SEGMENTS, SEGMENTS), heads=H, table=table, **case)
    seen = [Keys(k, v, own), Keys(source_k, source_v, Sight(shape=(T, S), segments=(SEGMENTS, SOURCE_SEGMENTS)))]
    return path(q, seen, scale=scale, softcap=softcap, rate=rate, dropout_key=jax.random.key(3) if rate else None)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_plain_attention_in_values_and_gradients(name):
    weights = random(B, H, T, K, seed=8) * REAL

    @partial(jax.jit, static_argnums=0)
    def run(path, *inputs):
        def loss(*inputs):
            values = joint(path, CASES[name], *inputs)
            return jnp.sum(weights * values), jnp.where(REAL, values, 0)

        return jax.grad(loss, tuple(range(7)), has_aux=True)(*inputs)

    want, got = (run(path, *arrays()) for path in (attend, partial(attend_blockwise, block=16)))
    *others, scale = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for a, b in others:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * float(jnp.abs(b).max()) + 1e-30)
    # The gradient of a scalar: a sum over all logits, of either sign.
    np.testing.assert_allclose(*scale, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_in_plain_attention():
    case = CASES["t5, causal"]
    plain, blocks = (jax.jit(partial(joint, path, case)) for path in (attend, partial(attend_blockwise, block=16)))
    exact = plain(*arrays())
    of_plain, of_blocks = (float(jnp.abs((run(*arrays(jnp.bfloat16)) - exact) * REAL).max()) for run in (plain, blocks))
    assert of_blocks <= 1.2 * of_plain < 0.1


def sizes(jaxpr):
    """Elements of every array that a program makes, in its loops and functions too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("prefix", [False, True])
def test_nothing_of_size_queries_times_keys_is_ever_held(prefix):
    length = 2048
    segments = jnp.ones((1, length), jnp.int32)

    def loss(path, q, k, v, table):
        flags = (segments > 0, segments > 0) if prefix else None
        sight = Sight(
            shape=(length, length),
            causal=True,
            segments=(segments, segments),
            prefix=flags,
            position=PositionSpec(),
            heads=2,
            table=table,
        )
        return jnp.sum(path(q, [Keys(k, v, sight)]) ** 2)

    inputs = *(random(1, 2, length, 4, seed=i) for i in range(3)), random(2, 32)
    largest = {
        path: max(sizes(jax.make_jaxpr(jax.grad(partial(loss, path), (0, 1, 2, 3)))(*inputs).jaxpr))
        for path in (attend, attend_blockwise)
    }
    assert largest[attend] >= 2 * length**2
    # A block of 256 x 256 of two heads; its bias takes twice as much on the way from the diagonals.
    assert largest[attend_blockwise] <= 4 * 256**2 + 2 * 512


@pytest.mark.parametrize(
    ("sight", "visited"),
    [
        # 4 x 4 blocks: all; the lower triangle, 4 * 5 / 2; the diagonal and the one below: 4 + 3.
        ({"causal": False}, 16),
        ({"causal": None}, 16),
        ({"causal": True}, 10),
        ({"causal": True, "window": 256}, 7),
        ({"causal": True, "window": 258}, 9),  # reaches from token 512 to 255, two blocks back: 7 + 2
        ({"causal": False, "window": 511}, 10),  # 255 to both sides: the diagonal and both neighbours
        ({"causal": False, "window": 3}, 10),  # one token to both sides is enough to touch them
        ({"causal": False, "window": 1}, 4),
        ({"causal": True, "window": 2}, 7),
        ({"causal": True, "prefix": (jnp.ones((1, 1024), bool),) * 2}, 16),
        ({"causal": True, "start": jnp.zeros((), jnp.int32)}, 16),  # known in the run alone
    ],
)
def test_blocks_out_of_reach_are_not_visited(sight, visited):
    assert len(blockwise._meetings(Sight(shape=(1024, 1024), **sight), 256, 256)) == visited


def test_a_query_that_sees_nothing_gives_zero_and_gradients_stay_finite():
    def loss(*inputs):
        values = joint(partial(attend_blockwise, block=16), CASES["t5, causal"], *inputs)
        return jnp.sum(values), values

    gradients, values = jax.jit(jax.grad(loss, tuple(range(7)), has_aux=True))(*arrays())
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    assert not values[0, :, 35:].any()
    assert values[0, :, :35].all()


def test_beams_share_a_source_and_queries_begin_anywhere():
    """A block of a decoding step: rows begin at slots of their own, three beams read one source."""
    q, own_k, own_v = random(6, H, 20, K), random(6, G, 40, K, seed=1), random(6, G, 40, K, seed=2)
    k, v = random(2, G, S, K, seed=3), random(2, G, S, K, seed=4)
    start = jnp.array([0, 3, 20, 7, 1, 12])
    sight = Sight(
        shape=(20, 40), start=start, causal=True, position=PositionSpec(), heads=H, table=random(H, 32, seed=5)
    )
    source = Sight(shape=(20, S), segments=(jnp.ones((1, 20), jnp.int32), (SOURCE_SEGMENTS > 0).astype(jnp.int32)))
    seen = [Keys(own_k, own_v, sight), Keys(k, v, source)]
    got, want = (
        jax.jit(lambda q, path=path: path(q, seen))(q) for path in (partial(attend_blockwise, block=16), attend)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_rows_and_heads_split_over_devices_need_no_more_than_a_sum_of_gradients():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    segments = jnp.array([[1] * 20 + [2] * 12] * 4)
    split = jax.NamedSharding(mesh, jax.P("data", "tensor"))

    def loss(q, k, v, table, segments):
        sight = Sight(
            shape=(32, 32), causal=True, segments=(segments, segments), position=PositionSpec(), heads=H, table=table
        )
        return jnp.sum(attend_blockwise(q, [Keys(k, v, sight)], block=8) ** 2)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    inputs = *(random(4, H, 32, K, seed=i) for i in range(3)), random(H, 32, seed=5), segments
    places = split, split, split, jax.NamedSharding(mesh, jax.P("tensor")), jax.NamedSharding(mesh, jax.P("data"))
    spread = [jax.device_put(x, place) for x, place in zip(inputs, places, strict=True)]
    program = gradients.lower(*spread).compile()
    assert "all-gather" not in program.as_text()
    assert "all-to-all" not in program.as_text()
    for got, want in zip(program(*spread), gradients(*inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
