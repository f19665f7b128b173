"""The attention core against goldens worked by hand and against its own special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlm.models.attention import Attention, Keys, attend
from mlm.models.positions import rotate
from mlm.models.sight import Drawn, order_mask, reach
from mlm.models.specs import AttentionSpec, NormSpec, PositionSpec

ALL = Drawn(jnp.ones((1, 1, 1, 1), bool))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("source_mask", "want"),
    [
        ([True, True], [[1.5035, -0.2483], [0.4712, 0.5066], [0.6703, 0.8554]]),
        ([True, False], [[1.0, -0.5], [0.3139, 0.5587], [0.6428, 0.8730]]),
    ],
)
def test_joint_attention_golden(source_mask, want):
    """One head of size 2, identity projections, scale 2^-1/2; own keys turn by their position, the source's do not."""
    own = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[None, None]
    source = jnp.array([[1.0, -1.0], [2.0, 0.0]])[None, None]
    turned = rotate(own, jnp.arange(3)[None], PositionSpec(kind="rope"))
    causal = order_mask(jnp.arange(3), jnp.arange(3), reach(causal=True, window=None))[None, None]
    seen = [Keys(turned, own, Drawn(causal)), Keys(source, source, Drawn(jnp.array(source_mask)[None, None, None]))]
    got = attend(turned, seen, scale=2**-0.5)
    np.testing.assert_allclose(got[0, 0], want, atol=1e-4)


def test_joint_without_source_keys_is_self_attention_and_without_own_keys_cross_attention():
    q, k, v, m, n = (random(1, 2, 3, 4, seed=i) for i in range(5))
    none = Drawn(~ALL.mask)
    for kept, dropped in (((k, v), (m, n)), ((m, n), (k, v))):
        alone = attend(q, [Keys(*kept, ALL)])
        np.testing.assert_allclose(attend(q, [Keys(*kept, ALL), Keys(*dropped, none)]), alone, rtol=1e-6)


def test_grouped_heads_equal_repeated_keys():
    q, k, v = random(2, 6, 5, 4), random(2, 3, 7, 4, seed=1), random(2, 3, 7, 4, seed=2)
    mask = random(2, 1, 5, 7, seed=3) > 0
    bias = random(1, 6, 5, 7, seed=4)
    want = attend(q, [Keys(jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1), Drawn(mask, bias))])
    np.testing.assert_allclose(attend(q, [Keys(k, v, Drawn(mask, bias))]), want, rtol=1e-5, atol=1e-6)


def test_beams_that_share_a_source_equal_copies_of_it():
    q, k, v = random(6, 4, 2, 8), random(2, 2, 5, 8, seed=1), random(2, 2, 5, 8, seed=2)
    mask = jnp.arange(5)[None, None, None] < jnp.array([3, 5])[:, None, None, None]
    want = attend(q, [Keys(jnp.repeat(k, 3, 0), jnp.repeat(v, 3, 0), Drawn(jnp.repeat(mask, 3, 0)))])
    np.testing.assert_allclose(attend(q, [Keys(k, v, Drawn(mask))]), want, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_shared_bias_sums_over_rows():
    q, k, v = random(3, 2, 4, 8), random(3, 2, 4, 8, seed=1), random(3, 2, 4, 8, seed=2)

    def loss(bias):
        return jnp.sum(attend(q, [Keys(k, v, Drawn(ALL.mask, bias))]) ** 2)

    bias = random(1, 2, 4, 4, seed=3)
    each = jax.grad(loss)(jnp.repeat(bias, 3, 0))
    np.testing.assert_allclose(jax.grad(loss)(bias), each.sum(0, keepdims=True), rtol=1e-5, atol=1e-6)


def test_softcap_bounds_logits():
    q, v = 100 * random(1, 1, 3, 4), jnp.eye(3, 4)[None, None]
    weights = attend(q, [Keys(q, v, ALL)], softcap=1.0)[..., :3]
    # Logits within [-1, 1]: of one query, no weight is more than e^2 times another.
    assert float((weights.max(-1) / weights.min(-1)).max()) <= np.exp(2) * (1 + 1e-5)


def test_windows():
    at = jnp.arange(6)
    behind = order_mask(at, at, reach(causal=True, window=2))
    assert behind[3].tolist() == [False, False, True, True, False, False]
    both = order_mask(at, at, reach(causal=False, window=4))  # one back, two ahead
    assert both[2].tolist() == [False, True, True, True, True, False]
    assert both[0].tolist() == [True, True, True, False, False, False]


def module(**spec):
    return Attention(8, 8, AttentionSpec(source="self", heads=2, head_dim=4, **spec), NormSpec(), 1.0, nnx.Rngs(0))


def test_normed_queries_and_keys_do_not_care_for_the_size_of_weights():
    x = random(1, 5, 8)
    for kind in ("rms", "l2_scalar"):
        body = module(qk_norm=kind)
        before = body.attended(body.queries(x), [Keys(*body.keys_values(x), ALL)], 0.0, None)
        body.query[...] = body.query[...] * 10
        after = body.attended(body.queries(x), [Keys(*body.keys_values(x), ALL)], 0.0, None)
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-5)


def test_unit_vectors_bound_logits_by_the_learned_number():
    # log2(4^2 - 4) = 3.585: q = (2, 0), (3, 4) and k = (5, 0), (0, 7) give 3.585 [[1, 0], [.6, .8]].
    q, k = (jnp.array(x, jnp.float32)[None, None] for x in ([[2, 0], [3, 4]], [[5, 0], [0, 7]]))
    body = module(qk_norm="l2_scalar", qk_gain=3.585)
    logits = jnp.einsum("BHTK,BHSK->BHTS", body._normed(q, "query_norm"), body._normed(k, "key_norm")) * body.gain[...]
    np.testing.assert_allclose(logits[0, 0], [[3.585, 0], [2.151, 2.868]], atol=1e-3)
