"""Routers as mathematics: which experts serve which tokens, what that costs, and what came of it.

Arrays are [G, N, …]: routing groups (a row, or `group_rows` of them) and the tokens of a group. Probabilities, gates
and losses are float32. Padding is never routed and never counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.specs import RouterSpec

Probabilities = Float[Array, "G N E"]
Real = Bool[Array, "G N"]
FORBIDDEN = -1e10  # a logit that leaves no probability


class Choice(NamedTuple):
    """Token's view: its k experts (E where there is none: padding) and what their outputs are multiplied by."""

    experts: Int[Array, "G N k"]
    gates: Float[Array, "G N k"]


class Plan(NamedTuple):
    """Expert's view: the tokens in its C slots (N where a slot is empty) and their gates."""

    tokens: Int[Array, "G E C"]
    gates: Float[Array, "G E C"]


class Routed(NamedTuple):
    """What one mixture did with a batch, in sums over its real tokens, so that parts of a batch add up.

    loss: router losses of every row, weighted, in nats; the only entry that gradients pass through. load: tokens that
    chose each expert. dropped: choices that found no slot (expert choice: tokens that no expert took). choices: load's
    total. entropy: of p, in nats. z: logsumexp^2. languages: load by language id.
    """

    loss: Float[Array, "*n B"]
    tokens: Float[Array, "*n"]
    choices: Float[Array, "*n"]
    dropped: Float[Array, "*n"]
    load: Float[Array, "*n E"]
    entropy: Float[Array, "*n"]
    z: Float[Array, "*n"]
    languages: Float[Array, "*n L E"]


def choose(
    probs: Probabilities, real: Real, k: int, gates: str = "raw", bias: Float[Array, "E"] | None = None
) -> Choice:
    """The k experts of largest p (+ bias, which the gates do not see). gates: see `RouterSpec`; "kept" renormalises
    once more where it is known what was kept, in `kept_gates`.
    """
    scores, picks = probs if bias is None else probs + bias, []
    for _ in range(k):  # `lax.top_k` would gather the whole batch on every device of a mesh
        picks.append(jnp.argmax(scores, axis=-1))
        scores = jnp.where(picks[-1][..., None] == jnp.arange(probs.shape[-1]), -jnp.inf, scores)
    experts = jnp.stack(picks, axis=-1)
    chosen = jnp.take_along_axis(probs, experts, axis=-1)
    if gates != "raw":
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    return Choice(
        jnp.where(real[..., None], experts, probs.shape[-1]).astype(jnp.int32), jnp.where(real[..., None], chosen, 0.0)
    )


def places(choice: Choice, experts: int, priority: str = "token") -> Int[Array, "G N k"]:
    """The slot that every choice gets at its expert, served in order of `RouterSpec.priority`: with C slots, those
    below C are kept.
    """
    return jax.vmap(lambda e, turn: _place(e, turn, experts))(choice.experts, _turns(choice, priority))


def kept_gates(gates: Float[Array, "G N k"], kept: Bool[Array, "G N k"], gated: str) -> Float[Array, "G N k"]:
    """Gates of the choices that were kept, 0 of the others; gated "kept": they sum to 1 for every token served."""
    gates = jnp.where(kept, gates, 0.0)
    return gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-9) if gated == "kept" else gates


def plan(choice: Choice, place: Int[Array, "G N k"], experts: int, slots: int) -> Plan:
    """Who stands in the slots of every expert, from where every choice stands."""
    groups, tokens, _ = choice.experts.shape
    at = jnp.broadcast_to(jnp.arange(tokens)[None, :, None], place.shape)

    def fill(empty: Array, expert: Array, place: Array, value: Array) -> Array:
        return empty.at[expert, place].set(value, mode="drop")  # no such expert, or no such slot

    table = jax.vmap(fill)(jnp.full((groups, experts, slots), tokens), choice.experts, place, at)
    gates = jax.vmap(fill)(jnp.zeros((groups, experts, slots)), choice.experts, place, choice.gates)
    return Plan(table.astype(jnp.int32), gates)


def _turns(choice: Choice, priority: str) -> Int[Array, "G N k"]:
    """The order in which choices are served, smaller first."""
    _, tokens, k = choice.experts.shape
    if priority == "token":
        turns = jnp.arange(tokens * k).reshape(tokens, k)
    else:
        turns = jnp.arange(tokens)[:, None] + tokens * jnp.arange(k)
    turns = jnp.broadcast_to(turns, choice.experts.shape)
    if priority == "score":
        rank = jnp.argsort(jnp.argsort(-choice.gates[..., 0], axis=-1, stable=True), axis=-1)
        turns = rank[..., None] + tokens * jnp.arange(k)
    return turns


def _place(experts: Int[Array, "N k"], turns: Int[Array, "N k"], count: int) -> Int[Array, "N k"]:
    """How many choices of the same expert are served before each choice."""
    flat = experts.reshape(-1)
    order = jnp.lexsort((turns.reshape(-1), flat))
    rank = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.shape[0]), unique_indices=True)
    sizes = jnp.bincount(flat, length=count + 1)
    return (rank - (jnp.cumsum(sizes) - sizes)[flat]).reshape(experts.shape)


def expert_choice(probs: Probabilities, real: Real, slots: int) -> Plan:
    """Every expert takes the C real tokens that give it the largest p; gates are p. Source: Zhou et al. 2022."""
    scores = jnp.swapaxes(jnp.where(real[..., None], probs, -1.0), 1, 2)
    tokens = jnp.argsort(-scores, axis=-1, stable=True)[..., :slots]
    gates = jnp.take_along_axis(scores, tokens, axis=-1)
    taken = gates >= 0.0
    return Plan(jnp.where(taken, tokens, probs.shape[1]).astype(jnp.int32), jnp.where(taken, gates, 0.0))


def counts(experts: Int[Array, "G N k"], count: int) -> Float[Array, "G N E"]:
    """How many of a token's choices are each expert: 0 or 1."""
    return jnp.sum(experts[..., None] == jnp.arange(count), axis=2, dtype=jnp.float32)


def balance_loss(probs: Probabilities, chosen: Float[Array, "G N E"], real: Real) -> Float[Array, "G"]:
    """E sum_e f_e P_e per group: f_e the choices of e per token, P_e the mean p; 1 per choice when all are even.

    Source: Fedus et al. 2021, eq. 4. No gradient passes through f.
    """
    tokens = _tokens(real)
    share = jnp.sum(chosen * real[..., None], axis=1) / tokens[:, None]
    mean = jnp.sum(probs * real[..., None], axis=1) / tokens[:, None]
    return probs.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * mean, axis=-1)


def z_loss(logits: Probabilities, real: Real) -> Float[Array, "G"]:
    """Mean over a group's tokens of logsumexp(logits)^2. Source: Zoph et al. 2022."""
    return jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real, axis=-1) / _tokens(real)


def budget_loss(share: Float[Array, "G N"], real: Real, budget: float) -> Float[Array, "G"]:
    """|mean g - budget| per group, g the share of a token's output that its experts make. Source: NLLB team 2022."""
    return jnp.abs(jnp.sum(share * real, axis=-1) / _tokens(real) - budget) * jnp.any(real, axis=-1)


def _tokens(real: Real) -> Float[Array, "G"]:
    return jnp.maximum(jnp.sum(real, axis=-1, dtype=jnp.float32), 1.0)


def one_block(logits: Probabilities, spec: RouterSpec, key: Key[Array, ""]) -> Probabilities:
    """Gating dropout: with probability `gating_dropout` all groups keep to one random block of experts each.

    Source: Liu et al. 2022, whose blocks are the experts of one machine.
    """
    coin, draw = jax.random.split(key)
    groups, _, experts = logits.shape
    block = spec.gating_block or experts
    chosen = jax.random.randint(draw, (groups, 1, 1), 0, experts // block)
    inside = jnp.arange(experts) // block == chosen
    return jnp.where(inside | ~jax.random.bernoulli(coin, spec.gating_dropout), logits, FORBIDDEN)


def rebalanced(bias: Float[Array, "*n E"], load: Float[Array, "*n E"], rate: float) -> Float[Array, "*n E"]:
    """bias + rate sign(mean load - load): what is chosen too little is chosen more. Source: Wang et al. 2024."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
