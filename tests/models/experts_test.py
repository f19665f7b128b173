"""A mixture equals a loop over tokens and their experts; both ways of running it agree; no token sees the future."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.experts import MixtureOfExperts
from mlm.models.functional import Template
from mlm.models.layers import FeedForward, Pass
from mlm.models.specs import FFNSpec, RouterSpec

D, F, E, B, T = 6, 5, 4, 3, 8
REAL = jnp.arange(T) < jnp.array([[8], [5], [7]])
X = jax.random.normal(jax.random.key(7), (B, T, D))


def mixture(router, activation="geglu", bias=False):
    """(function of (params, x, key, …) -> (y, record), parameters with a router that prefers)."""
    spec = FFNSpec(d_ff=F, activation=activation, bias=bias, router=router)
    template = Template(lambda rngs: MixtureOfExperts(D, spec, 1.0, rngs))
    params = template.init(jax.random.key(0))
    params["router"] = jax.random.normal(jax.random.key(1), params["router"].shape)
    if bias:
        names = [name for name in params if name.endswith("_bias")]
        params |= {n: jax.random.normal(jax.random.key(2), params[n].shape) for n in names}

    @partial(jax.jit, static_argnames=("cached", "rate"))
    def run(params, x, key=None, steering=None, cached=False, rate=0.0, real=REAL):
        return template.bind(params)(x, Pass(real=real, cached=cached, rate=rate), key, steering)

    return run, params


def expert(params, e, x, activation):
    """One expert in NumPy."""
    project = lambda name, h: h @ params[name][e] + params.get(f"{name}_bias", np.zeros(E))[e]  # noqa: E731
    act = {"geglu": lambda h: np.asarray(jax.nn.gelu(h, approximate=True)), "relu": lambda h: np.maximum(h, 0)}
    h = act[activation](project("gate" if activation == "geglu" else "up", x))
    return project("down", h * project("up", x) if activation == "geglu" else h)


def loop(params, x, k, gates, activation):
    params = {name: np.asarray(p) for name, p in params.items()}
    y = np.zeros_like(x)
    for b in range(B):
        for t in range(T):
            if not REAL[b, t]:
                continue
            logits = x[b, t] @ params["router"]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            chosen = np.argsort(-p)[:k]
            total = 1.0 if gates == "raw" else p[chosen].sum()
            y[b, t] = sum(p[e] / total * expert(params, e, x[b, t], activation) for e in chosen)
    return y


@pytest.mark.parametrize(
    ("k", "gates", "activation", "bias"),
    [(1, "raw", "relu", False), (2, "raw", "geglu", False), (2, "chosen", "relu", True), (3, "kept", "geglu", True)],
)
def test_equals_a_loop_over_tokens(k, gates, activation, bias):
    run, params = mixture(RouterSpec(experts=E, k=k, gates=gates), activation, bias)
    if gates == "kept":  # nothing is dropped, so that the kept ones are the chosen ones
        run, params = mixture(
            RouterSpec(experts=E, k=k, gates=gates, capacity=float(E), eval_capacity=float(E)), activation, bias
        )
    want = loop(params, np.asarray(X), k, gates, activation)
    np.testing.assert_allclose(run(params, X)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_capacity_with_room_for_all_equals_dropless_in_value_and_gradient(bias):
    """In training, dropout and all; the record too. Room for all: capacity E, so that C = n."""
    plain = RouterSpec(experts=E, k=2, gates="chosen", z=0.1, jitter=0.1, output_masking=0.3)
    results = []
    for router in (plain, dataclasses.replace(plain, capacity=float(E))):
        run, params = mixture(router, bias=bias)

        def loss(params, x, run=run):
            y, record = run(params, x, jax.random.key(3), rate=0.3)
            return jnp.sum(jnp.sin(y)) + jnp.sum(record.loss), (y, record)

        results.append(jax.value_and_grad(loss, (0, 1), has_aux=True)(params, X))
    compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, *results)


def test_an_expert_that_all_want_serves_as_many_as_it_has_slots():
    """Capacity 0.5 of 8 tokens over 4 experts: 1, raised to the 2 of min_capacity. The rest live on in the residual."""
    run, params = mixture(RouterSpec(experts=E, capacity=0.5, min_capacity=2))
    forced = jnp.zeros((B, 1, E)).at[..., 1].set(50.0)
    y, record = run(params, X, jax.random.key(0), forced)
    np.testing.assert_array_equal(jnp.any(y != 0, axis=-1), jnp.arange(T) < 2 * jnp.ones((B, 1)))
    np.testing.assert_array_equal(record.load, [0, REAL.sum(), 0, 0])
    assert float(record.dropped) == REAL.sum() - 2 * B
    for cached in (False, True):  # neither evaluation, by default, nor decoding drops
        y, record = run(params, X, None, forced, cached=cached)
        assert float(record.dropped) == 0.0
        np.testing.assert_array_equal(jnp.any(y != 0, axis=-1), REAL)


def test_one_expert_is_a_dense_network():
    run, params = mixture(RouterSpec(experts=1))
    dense = Template(lambda rngs: FeedForward(D, FFNSpec(d_ff=F), 1.0, rngs))
    alone = {name: params[name][0] for name in ("gate", "up", "down")}
    want = dense.bind(alone)(X, Pass(real=REAL), None)
    np.testing.assert_allclose(run(params, X)[0], jnp.where(REAL[..., None], want, 0.0), rtol=1e-5, atol=1e-6)


def test_numbering_of_experts_does_not_matter():
    run, params = mixture(RouterSpec(experts=E, k=2))
    order = jnp.array([2, 0, 3, 1])
    other = {name: p[:, order] if name == "router" else p[order] for name, p in params.items()}
    (want, first), (got, second) = run(params, X), run(other, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second.load, first.load[order])


@pytest.mark.parametrize(
    "router",
    [
        RouterSpec(experts=E, k=2, gates="chosen"),
        RouterSpec(experts=E, k=2, capacity=1.5, min_capacity=1),
        RouterSpec(experts=E, k=1, capacity=0.6, min_capacity=1),
    ],
    ids=["dropless", "two choices, tight", "one choice, tight"],
)
def test_no_output_depends_on_later_tokens(router):
    """Exactly zero gradients, and the same outputs whatever comes later."""
    run, params = mixture(router)
    real, key, t = jnp.ones((B, T), bool), jax.random.key(0), 3

    def output(x):
        return run(params, x, key, real=real)[0][:, t]

    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(output(x))))(X)
    assert float(jnp.abs(gradient[:, t + 1 :]).max()) == 0.0
    assert float(jnp.abs(gradient[:, t]).max()) > 0.0
    later = X.at[:, t + 1 :].set(jax.random.normal(jax.random.key(9), (B, T - t - 1, D)))
    np.testing.assert_array_equal(output(later), output(X))


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_rows_do_not_depend_on_each_other(capacity):
    run, params = mixture(RouterSpec(experts=E, k=2, capacity=capacity, eval_capacity=capacity))
    alone = run(params, X[:1], real=REAL[:1])[0]
    np.testing.assert_allclose(run(params, X)[0][:1], alone, rtol=1e-5, atol=1e-6)


def test_rows_of_a_group_share_the_slots():
    """Three rows of 8 as one group: C = 1.0 x 24 / 4 = 6 slots for whoever comes first, not 2 a row."""
    router = RouterSpec(experts=E, capacity=1.0, min_capacity=1, group_rows=3)
    run, params = mixture(router)
    forced = jnp.zeros((B, 1, E)).at[..., 0].set(50.0)
    y, _ = run(params, X, jax.random.key(0), forced)
    np.testing.assert_array_equal(jnp.any(y != 0, axis=-1).sum(1), [6, 0, 0])
    with pytest.raises(ValueError, match="2 rows does not divide into routing groups of group_rows=3"):
        run(params, X[:2], real=REAL[:2])


def test_expert_choice_fills_every_expert_and_looks_at_the_whole_row():
    """C = 2 x 8 / 4 = 4 tokens each, of 8 or 7 real ones; of 5 real ones too. What later tokens are like matters."""
    run, params = mixture(RouterSpec(experts=E, kind="expert_choice", capacity=2.0, balance=0.0))
    y, record = run(params, X)
    np.testing.assert_array_equal(record.load, [4 * B] * E)
    later = X.at[0, 4:].set(10.0)
    assert not np.allclose(run(params, later)[0][0, :4], y[0, :4])
    np.testing.assert_allclose(run(params, later)[0][1:], y[1:], rtol=1e-5, atol=1e-6)


def test_steering_forbids_and_forces_experts():
    run, params = mixture(RouterSpec(experts=E, k=2))
    _, record = run(params, X, None, jnp.full((1, 1, E), 0.0).at[..., 2].set(-1e10))
    assert float(record.load[2]) == 0.0
    assert float(record.choices) == 2 * float(REAL.sum())


def test_noise_is_for_training_only():
    router = RouterSpec(experts=E, k=2, jitter=0.5, gating_dropout=0.9, gating_block=2, output_masking=0.5)
    run, params = mixture(router)
    one, two = (run(params, X, key)[0] for key in jax.random.split(jax.random.key(0)))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(run(params, X)[0], run(params, X)[0])


def test_masked_outputs_in_evaluation_are_the_mean_of_training():
    """2,000 draws with p = 0.4: the mean's deviation is |y| (0.4 / 0.6 / 2000)^1/2 = 2% of a single expert's output."""
    run, params = mixture(RouterSpec(experts=E, output_masking=0.4))
    keys = jax.random.split(jax.random.key(0), 2000)
    mean = jnp.mean(jax.lax.map(lambda key: run(params, X, key)[0], keys), axis=0)
    np.testing.assert_allclose(mean, run(params, X)[0], atol=0.1 * float(jnp.abs(mean).max()))
    plain, _ = mixture(RouterSpec(experts=E))
    np.testing.assert_allclose(run(params, X)[0], 0.6 * plain(params, X)[0], rtol=1e-5, atol=1e-6)


def test_conditional_routing_goes_from_the_shared_network_to_the_experts():
    router = RouterSpec(experts=E, shared=7, budget=0.5, balance=0.0, budget_dropout=0.0)
    run, params = mixture(router)
    only, _ = mixture(RouterSpec(experts=E, balance=0.0))
    both, _ = mixture(RouterSpec(experts=E, shared=7, balance=0.0))
    closed, open_ = (dict(params, budget_bias=jnp.asarray(b)) for b in (-100.0, 100.0))
    experts = only({n: params[n] for n in ("router", "gate", "up", "down")}, X)[0]
    np.testing.assert_allclose(run(open_, X)[0], experts, rtol=1e-5, atol=1e-6)
    added = both({n: p for n, p in params.items() if not n.startswith("budget")}, X)[0]
    np.testing.assert_allclose(run(closed, X)[0], added - experts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(closed, X)[1].loss, 0.1 * 0.5, rtol=1e-5)  # 0.1 |0 - 0.5|
    above, below = (
        jax.grad(lambda b: run(dict(params, budget=jnp.zeros(D), budget_bias=b), X)[1].loss.sum())(jnp.asarray(at))
        for at in (1.0, -1.0)
    )
    assert float(above) > 0 > float(below)


def test_the_router_learns_from_a_single_choice():
    """Gates that are renormalised over one choice are constant; raw ones pass a gradient on."""
    run, params = mixture(RouterSpec(experts=E, balance=0.0))
    gradient = jax.grad(lambda p: jnp.sum(run(p, X)[0] ** 2))(params)
    assert float(jnp.abs(gradient["router"]).max()) > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": 5}, "k=5 of experts=4"),
        ({"gates": "chosen"}, "k=1 with gates='chosen' multiplies by 1"),
        ({"kind": "expert_choice", "balance": 0.0}, "takes capacity=None"),
        ({"kind": "expert_choice", "capacity": 2.0}, "set balance=0.01 to 0"),
        ({"kind": "expertchoice"}, "did you mean"),
        ({"group_rows": 2}, "say who is dropped, and nothing is"),
        ({"budget": 0.5}, "set shared"),
        ({"gating_dropout": 0.1, "gating_block": 3}, "must divide experts=4"),
        ({"output_masking": 1.0}, r"must be in \[0, 1\)"),
        ({"z": -1.0}, "must not be negative"),
        ({"capacity": 0.0}, "must be above 0"),
    ],
)
def test_refusals(fields, said):
    with pytest.raises(ValueError, match=said):
        RouterSpec(**{"experts": 4} | fields)
