"""Mixture of experts: a router, many feed-forward networks, and two ways to run them.

Capacity: every expert has C slots, filled by gathering; on a mesh the slots travel to the experts' owners by
all-to-all. Dropless: token-expert pairs are sorted by expert and multiplied by groups; on a mesh the tokens go round
the owners in a ring. Where nothing is dropped both give the same numbers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mlm.models import routing
from mlm.models.grouped import by_group, grouped_matmul, permute
from mlm.models.layers import FeedForward, Pass, Sublayer, feed_forward, parameter, zeros
from mlm.models.routing import Choice, Plan, Probabilities, Real, Routed
from mlm.models.specs import FFNSpec
from mlm.models.view import View
from mlm.types import Hidden, Params

WEIGHTS = {  # of all experts, and their logical axes
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
    "gate_bias": ("experts", "mlp"),
    "up_bias": ("experts", "mlp"),
    "down_bias": ("experts", "embed"),
}
_ROWS = {
    "states": ("batch", None, None),
    "experts": ("batch", None, None),
    "gates": ("batch", None, None),
    "drops": ("batch", "mlp"),
}


class MixtureOfExperts(Sublayer):
    """y = sum over a token's experts e of gate_e FFN_e(x), and the shared network where there is one (`RouterSpec`).

    Initial std: router 0.02, experts as `FeedForward` times `RouterSpec.init`.
    """

    def __init__(self, d_model: int, spec: FFNSpec, gain: float, rngs: nnx.Rngs):
        assert spec.router is not None
        self.spec, self.routes = spec, spec.router
        experts, width = self.routes.experts, spec.d_ff
        self.router = parameter(rngs, (d_model, experts), 0.02, ("embed", "routes"))
        if self.routes.bias_rate:
            self.router_bias = zeros((experts,), ("routes",))
        scale = gain * self.routes.init
        for name in ("gate", "up", "down") if spec.gated else ("up", "down"):
            read, written = (width, d_model) if name == "down" else (d_model, width)
            setattr(self, name, parameter(rngs, (experts, read, written), scale * read**-0.5, WEIGHTS[name]))
            if spec.bias:
                setattr(self, f"{name}_bias", zeros((experts, written), WEIGHTS[f"{name}_bias"]))
        if self.routes.shared:
            dense = FFNSpec(d_ff=self.routes.shared, activation=spec.activation, bias=spec.bias)
            self.shared = FeedForward(d_model, dense, gain, rngs)
        if self.routes.budget is not None:
            self.budget = parameter(rngs, (d_model,), 0.02, ("embed",))
            self.budget_bias = zeros((), ())

    def whole(self, h: Hidden, view: View, its: Pass, key: Key[Array, ""] | None) -> tuple[Hidden, Routed]:
        return self(h, its, key, None if its.steering is None else its.steering[0])

    def __call__(
        self, x: Hidden, its: Pass, key: Key[Array, ""] | None, steering: Float[Array, "#B #T E"] | None = None
    ) -> tuple[Hidden, Routed]:
        """(outputs, what was routed). steering is added to the router's logits."""
        spec = self.routes
        rows, length, _ = x.shape
        if rows % spec.group_rows:
            raise ValueError(
                f"a batch of {rows} rows does not divide into routing groups of group_rows={spec.group_rows}; "
                "use a multiple, or a divisor of the rows of a microbatch"
            )
        jitter, block, masking, drop, inside, skip = (None,) * 6 if key is None else jax.random.split(key, 6)

        def grouped(a: Array) -> Array:
            return a.reshape(rows // spec.group_rows, spec.group_rows * length, *a.shape[2:])

        real = grouped(its.real)
        logits = self._logits(x, jitter)
        if steering is not None:
            logits = logits + steering
        logits = grouped(logits)
        if spec.gating_dropout and block is not None:
            logits = routing.one_block(logits, spec, block)
        probs = jax.nn.softmax(logits, axis=-1)
        its.tap("probabilities", probs.reshape(rows, length, -1))

        bias = self.router_bias[...] if spec.bias_rate else None
        slots = None if its.cached else spec.slots(real.shape[1], training=key is not None)
        states = grouped(x)
        drops = self._drops(states.shape[0], its.rate, drop)
        mask = partial(_masked, rate=spec.output_masking, key=masking)
        if spec.kind == "expert_choice":
            plan = routing.expert_choice(probs, real, slots or real.shape[1])
            chosen = _taken(plan, real.shape[1])
            y = self._buffered(states, plan._replace(gates=mask(plan.gates)), drops, its)
            dropped = jnp.sum((jnp.sum(chosen, axis=-1) == 0) & real, dtype=jnp.float32)
            loss = jnp.zeros(real.shape[0])
        else:
            choice = routing.choose(probs, real, spec.k, spec.gates, bias)
            chosen = routing.counts(choice.experts, spec.experts)
            first = chosen if spec.balance_choices == "any" else routing.counts(choice.experts[..., :1], spec.experts)
            loss = spec.balance * routing.balance_loss(probs, first, real)
            dropped = jnp.zeros(())
            if slots is None:
                y = self._sorted(states, choice._replace(gates=mask(choice.gates)), drops, its)
            else:
                place = routing.places(choice, spec.experts, spec.priority)
                kept = (place < slots) & real[..., None]
                choice = choice._replace(gates=mask(routing.kept_gates(choice.gates, kept, spec.gates)))
                y = self._buffered(states, routing.plan(choice, place, spec.experts, slots), drops, its)
                dropped = jnp.sum(~kept & real[..., None], dtype=jnp.float32)
        loss = loss + spec.z * routing.z_loss(logits, real)
        y = y.reshape(x.shape)
        if spec.shared:
            y, budget = self._with_shared(x, y, its, inside, skip)
            loss = loss + budget.reshape(loss.shape[0], -1).mean(axis=-1)
        loss = jnp.repeat(loss, spec.group_rows)
        return y, _record(loss, logits, probs, chosen, dropped, real, its)

    def _logits(self, x: Hidden, jitter: Key[Array, ""] | None) -> Float[Array, "B T E"]:
        """In float32 whatever the model's type: near-ties decide (Fedus et al. 2021, selective precision)."""
        x32 = x.astype(jnp.float32)
        if self.routes.jitter and jitter is not None:
            size = self.routes.jitter
            x32 = x32 * jax.random.uniform(jitter, x.shape, jnp.float32, 1.0 - size, 1.0 + size)
        return jnp.einsum("BTD,DE->BTE", x32, self.router[...], precision=jax.lax.Precision.HIGHEST)

    def _drops(self, groups: int, rate: float, key: Key[Array, ""] | None) -> Float[Array, "G F"] | None:
        """Dropout inside the experts: factors shared by all tokens and experts of a group, whatever the layout. None:
        nothing is dropped.
        """
        rate = rate if self.routes.dropout is None else self.routes.dropout
        shape = (groups, self.spec.d_ff)
        if key is None or rate == 0.0:
            return None
        return jax.random.bernoulli(key, 1.0 - rate, shape) / (1.0 - rate)

    def _weights(self) -> Params:
        return {name: getattr(self, name)[...] for name in WEIGHTS if hasattr(self, name)}

    def _buffered(
        self, x: Float[Array, "G N D"], plan: Plan, drops: Float[Array, "G F"] | None, its: Pass
    ) -> Float[Array, "G N D"]:
        """The capacity path: gather the slots, run every expert on its own, add the results up at their tokens."""
        weights = self._weights()
        home, away = ("batch", "routes", "slots", "embed"), ("groups", "experts", "slots", "embed")
        padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        slots = its.placement.constrain(jax.vmap(lambda rows, at: rows[at])(padded, plan.tokens), home)

        def project(h: Array, name: str) -> Array:
            y = jnp.einsum("GECD,EDF->GECF", h, weights[name].astype(h.dtype))
            return y + weights[f"{name}_bias"].astype(h.dtype)[:, None] if self.spec.bias else y

        def drop(h: Array) -> Array:
            return h if drops is None else h * drops[:, None, None].astype(h.dtype)

        y = feed_forward(self.spec, project, its.placement.constrain(slots, away), drop)
        y = its.placement.constrain(its.placement.constrain(y, away), home) * plan.gates[..., None]
        add = jax.vmap(lambda empty, at, value: empty.at[at].add(value))
        return add(jnp.zeros(padded.shape), plan.tokens, y)[:, :-1].astype(x.dtype)

    def _sorted(
        self, x: Float[Array, "G N D"], choice: Choice, drops: Float[Array, "G F"] | None, its: Pass
    ) -> Float[Array, "G N D"]:
        """The dropless path, each owner of experts serving the tokens that chose them."""
        weights = self._weights()
        bias = weights.pop("down_bias", None)
        rows = {"states": x, "experts": choice.experts, "gates": choice.gates}
        if drops is not None:
            rows["drops"] = drops
        y = its.placement.by_expert(partial(_serve, self.spec), rows, weights, WEIGHTS | _ROWS)
        if bias is not None:  # here, because owners may hold only a part of the width that `down` sums over
            bias = jnp.pad(bias, ((0, 1), (0, 0)))[choice.experts]
            y = y + jnp.sum(bias * choice.gates[..., None], axis=2)
        return y.astype(x.dtype)

    def _with_shared(
        self, x: Hidden, y: Hidden, its: Pass, key: Key[Array, ""] | None, skip: Key[Array, ""] | None
    ) -> tuple[Hidden, Float[Array, "B"]]:
        """Outputs together with the shared network's, and the budget loss of every row."""
        shared, spec = self.shared(x, its, key), self.routes
        if spec.budget is None:
            return shared + y, jnp.zeros(x.shape[0])
        logits = jnp.einsum("BTD,D->BT", x.astype(jnp.float32), self.budget[...]) + self.budget_bias[...]
        share = jax.nn.sigmoid(logits)
        if skip is not None and spec.budget_dropout:
            share = share * ~jax.random.bernoulli(skip, spec.budget_dropout, share.shape)
        loss = spec.budget_weight * routing.budget_loss(share, its.real, spec.budget)
        share = share[..., None].astype(x.dtype)
        return (1 - share) * shared + share * y, loss


def _serve(spec: FFNSpec, rows: Params, weights: Params, first: int | Int[Array, ""]) -> Float[Array, "G N D"]:
    """What the experts first, first + 1, … of `weights` contribute to all tokens, in float32."""
    x, experts = rows["states"], rows["experts"]
    groups, tokens, k = experts.shape
    held = weights["down"].shape[0]
    own = (experts >= first) & (experts < first + held)
    order, inverse, sizes = by_group(jnp.where(own, experts - first, held).reshape(-1), held)
    expert = jnp.clip(experts.reshape(-1)[order] - first, 0, held - 1)

    def project(h: Array, name: str) -> Array:
        y = grouped_matmul(h, weights[name], sizes)
        return y + weights[f"{name}_bias"].astype(h.dtype)[expert] if f"{name}_bias" in weights else y

    def drop(h: Array) -> Array:
        return h * rows["drops"].astype(h.dtype)[order // (tokens * k)] if "drops" in rows else h

    pairs = permute(jnp.repeat(x.reshape(-1, x.shape[-1]), k, axis=0), order, inverse)
    y = feed_forward(spec, project, pairs, drop)
    y = permute(y, inverse, order).reshape(groups, tokens, k, -1)
    return jnp.einsum("GNKD,GNK->GND", y.astype(jnp.float32), jnp.where(own, rows["gates"], 0.0))


def _masked(gates: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Expert output masking, done to the gates: zeroed with probability `rate`, in evaluation its expectation."""
    if not rate:
        return gates
    return gates * (1.0 - rate if key is None else jax.random.bernoulli(key, 1.0 - rate, gates.shape))


def _taken(plan: Plan, tokens: int) -> Float[Array, "G N E"]:
    """1 where an expert took a token."""

    def one(at: Int[Array, "E C"]) -> Float[Array, "E N"]:
        return jax.vmap(lambda row: jnp.zeros(tokens).at[row].set(1.0, mode="drop"))(at)

    return jnp.swapaxes(jax.vmap(one)(plan.tokens), 1, 2)


def _record(
    loss: Float[Array, "B"],
    logits: Probabilities,
    probs: Probabilities,
    chosen: Float[Array, "G N E"],
    dropped: Float[Array, ""],
    real: Real,
    its: Pass,
) -> Routed:
    weight = jax.lax.stop_gradient(real[..., None].astype(jnp.float32))
    chosen, probs, logits = (jax.lax.stop_gradient(a) for a in (chosen, probs, logits))
    load = jnp.sum(chosen * weight, axis=(0, 1))
    by_language: Any = (chosen * weight).reshape(-1, chosen.shape[-1])
    languages = jnp.zeros((0, chosen.shape[-1]))
    if its.languages is not None:
        languages = jax.ops.segment_sum(by_language, its.languages.reshape(-1), num_segments=its.language_count)
    return Routed(
        loss=loss,
        tokens=jnp.sum(weight),
        choices=jnp.sum(load),
        dropped=dropped,
        load=load,
        entropy=jnp.sum(-probs * jnp.log(jnp.maximum(probs, 1e-20)) * weight),
        z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * weight[..., 0]),
        languages=languages,
    )
