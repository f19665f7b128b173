"""Routers against worked examples and a serving line written as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models import routing
from mlm.models.specs import RouterSpec

# The worked example: 4 tokens, 3 experts; softmax rows (.6652 .2447 .0900), (.6652 .0900 .2447), (.5465 .3315 .1220),
# (.0900 .2447 .6652).
LOGITS = jnp.array([[[2.0, 1, 0], [2, 0, 1], [1.5, 1, 0], [0, 1, 2]]])
PROBS = jax.nn.softmax(LOGITS)
REAL = jnp.ones((1, 4), bool)


def planned(choice, experts, slots, priority, gated="raw"):
    place = routing.places(choice, experts, priority)
    kept = (place < slots) & (choice.experts < experts)
    choice = choice._replace(gates=routing.kept_gates(choice.gates, kept, gated))
    return routing.plan(choice, place, experts, slots), kept


def combined(plan, tokens):
    """{token: {expert: gate}} of the first group."""
    found = {t: {} for t in range(tokens)}
    for expert, (at, gates) in enumerate(zip(plan.tokens[0], plan.gates[0], strict=True)):
        for token, gate in zip(at, gates, strict=True):
            if token < tokens:
                found[int(token)][expert] = round(float(gate), 4)
    return found


def test_worked_example_of_two_choices_and_two_slots():
    """First choices go first: expert 0 is full when token 2 asks, expert 1 when token 3's second choice does."""
    choice = routing.choose(PROBS, REAL, k=2)
    plan, kept = planned(choice, 3, 2, "choice")
    assert combined(plan, 4) == {0: {0: 0.6652, 1: 0.2447}, 1: {0: 0.6652, 2: 0.2447}, 2: {1: 0.3315}, 3: {2: 0.6652}}
    np.testing.assert_array_equal(kept[0], [[1, 1], [1, 1], [0, 1], [1, 0]])


def test_gates_of_the_kept_sum_to_one():
    """.6652 / (.6652 + .2447) = .7311; a lone survivor gets 1."""
    plan, _ = planned(routing.choose(PROBS, REAL, k=2), 3, 2, "choice", "kept")
    assert combined(plan, 4) == {0: {0: 0.7311, 1: 0.2689}, 1: {0: 0.7311, 2: 0.2689}, 2: {1: 1.0}, 3: {2: 1.0}}


def test_balance_and_z_of_the_worked_example():
    """f of first choices (3/4, 0, 1/4), mean p (.4917, .2277, .2805): 3 (.3688 + .0701) = 1.3168."""
    choice = routing.choose(PROBS, REAL, k=2)
    first, both = routing.counts(choice.experts[..., :1], 3), routing.counts(choice.experts, 3)
    np.testing.assert_allclose(routing.balance_loss(PROBS, first, REAL), [1.3168], atol=1e-4)
    np.testing.assert_allclose(routing.balance_loss(PROBS, both, REAL), [2.0396], atol=1e-4)
    np.testing.assert_allclose(routing.z_loss(LOGITS, REAL), [5.4543], atol=1e-4)


def test_balance_is_four_times_the_products_of_shares_and_probabilities():
    """f = (.5, .25, .25, 0), P = (.4, .3, .2, .1): 4 (.2 + .075 + .05) = 1.3."""
    probs = jnp.broadcast_to(jnp.array([0.4, 0.3, 0.2, 0.1]), (1, 4, 4))
    chosen = jax.nn.one_hot(jnp.array([[0, 0, 1, 2]]), 4)
    np.testing.assert_allclose(routing.balance_loss(probs, chosen, jnp.ones((1, 4), bool)), [1.3], rtol=1e-6)


def test_experts_choose():
    """Columns of p: expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 0, expert 2 tokens 3 and 1."""
    plan = routing.expert_choice(PROBS, REAL, 2)
    assert [set(map(int, at)) for at in plan.tokens[0]] == [{0, 1}, {2, 0}, {3, 1}]
    np.testing.assert_allclose(plan.gates[0, 1], [0.3315, 0.2447], atol=1e-4)


def test_experts_never_choose_padding():
    plan = routing.expert_choice(PROBS, jnp.array([[True, False, True, False]]), 3)
    assert [sorted(map(int, at)) for at in plan.tokens[0]] == [[0, 2, 4]] * 3  # 4: an empty slot
    assert float(plan.gates[plan.tokens == 4].sum()) == 0.0


def serve(experts, gates, count, slots, priority):
    """The line at the experts' doors, one choice after another: which choices find a slot."""
    tokens, k = experts.shape
    if priority == "token":
        line = [(t, j) for t in range(tokens) for j in range(k)]
    elif priority == "choice":
        line = [(t, j) for j in range(k) for t in range(tokens)]
    else:
        ranked = sorted(range(tokens), key=lambda t: (-gates[t, 0], t))
        line = [(t, j) for j in range(k) for t in ranked]
    free, kept = [slots] * count, np.zeros((tokens, k), bool)
    for t, j in line:
        if experts[t, j] < count and free[experts[t, j]]:
            free[experts[t, j]] -= 1
            kept[t, j] = True
    return kept


@pytest.mark.parametrize("priority", ["token", "choice", "score"])
@pytest.mark.parametrize("k", [1, 3])
def test_plans_equal_a_served_line(priority, k):
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 20, 5)) * jnp.array([3.0, 1, 1, 1, 1]))
    real = jax.random.bernoulli(jax.random.key(1), 0.8, (2, 20))
    choice = routing.choose(probs, real, k)
    plan, kept = planned(choice, 5, 3, priority)
    for group in range(2):
        want = serve(np.asarray(choice.experts[group]), np.asarray(choice.gates[group]), 5, 3, priority)
        np.testing.assert_array_equal(kept[group], want)
        for expert in range(5):
            at = [int(t) for t in plan.tokens[group, expert] if t < 20]
            assert sorted(at) == sorted(np.nonzero((choice.experts[group] == expert) & want)[0])
            for token, gate in zip(plan.tokens[group, expert], plan.gates[group, expert], strict=True):
                assert float(gate) == (0.0 if token == 20 else pytest.approx(float(probs[group, token, expert])))


def test_padding_chooses_nobody_and_counts_nowhere():
    real = jnp.array([[True, True, True, False]])
    choice = routing.choose(PROBS, real, k=2)
    np.testing.assert_array_equal(choice.experts[0, 3], [3, 3])
    np.testing.assert_array_equal(routing.counts(choice.experts, 3)[0, 3], [0, 0, 0])
    three = PROBS[:, :3], jnp.ones((1, 3), bool)
    chosen = routing.counts(choice.experts, 3)
    want = routing.balance_loss(three[0], chosen[:, :3], three[1])
    np.testing.assert_allclose(routing.balance_loss(PROBS, chosen, real), want, rtol=1e-6)
    np.testing.assert_allclose(routing.z_loss(LOGITS, real), routing.z_loss(LOGITS[:, :3], three[1]), rtol=1e-6)
    assert float(routing.z_loss(LOGITS, jnp.zeros((1, 4), bool))[0]) == 0.0


def test_token_priority_does_not_look_ahead_and_choice_priority_does():
    """Token 3 turns to expert 0 or 1 with its first choice; what tokens 0 to 2 keep may not depend on it, and does when
    first choices go first: with one slot, token 3's first choice displaces the second choice of token 0.
    """
    mine = jnp.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    for priority, leaks in (("token", False), ("choice", True)):
        kept = []
        for last in ([0.6, 0.3, 0.1], [0.2, 0.7, 0.1]):
            probs = jnp.concatenate([mine, jnp.array([last])])[None]
            kept.append(planned(routing.choose(probs, REAL, 2), 3, 1, priority)[1][0, :3])
        assert bool(jnp.any(kept[0] != kept[1])) == leaks


def test_a_bias_moves_the_choice_and_not_the_gates():
    bias = jnp.array([-1.0, 0.0, 0.0])
    choice = routing.choose(PROBS, REAL, k=1, bias=bias)
    np.testing.assert_array_equal(choice.experts[0, :, 0], [1, 2, 1, 2])
    np.testing.assert_allclose(choice.gates[0, :, 0], [0.2447, 0.2447, 0.3315, 0.6652], atol=1e-4)


def test_biases_even_out_a_skewed_router():
    """Expert 0 is favoured by 2 nats. After 200 moves of 0.01 the loads are within a tenth of even."""
    logits = jax.random.normal(jax.random.key(0), (1, 4000, 4)) + jnp.array([2.0, 0, 0, 0])
    probs, real, bias = jax.nn.softmax(logits), jnp.ones((1, 4000), bool), jnp.zeros(4)

    def load(bias):
        return routing.counts(routing.choose(probs, real, 1, bias=bias).experts, 4).sum((0, 1))

    assert float(load(bias)[0]) > 2500
    for _ in range(200):
        bias = routing.rebalanced(bias, load(bias), 0.01)
    np.testing.assert_allclose(load(bias), 1000, rtol=0.1)


def test_gating_dropout_keeps_to_one_block_for_all_or_for_none():
    spec = RouterSpec(experts=6, gating_dropout=0.5, gating_block=2)
    logits = jnp.zeros((3, 4, 6))
    results = [np.asarray(routing.one_block(logits, spec, jax.random.key(i))) for i in range(40)]
    whole = [bool(np.all(r == 0.0)) for r in results]
    assert 8 < sum(whole) < 32  # 40 coins: mean 20, deviation 3.2
    for r in (r for r, w in zip(results, whole, strict=True) if not w):
        open_ = (r == 0.0).reshape(3, 4, 3, 2)
        assert (open_.all(-1) == open_.any(-1)).all()  # whole blocks
        assert (open_.any(-1).sum(-1) == 1).all()  # exactly one
