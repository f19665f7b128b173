"""Gated recurrent units, and additive attention over the encoder's states: the encoder-decoder before transformers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mlm.models.attention import MASKED
from mlm.models.layers import Pass, Sublayer, dropout, parameter, product, zeros
from mlm.models.specs import RecurrentSpec
from mlm.models.view import View
from mlm.types import Hidden, PyTree, SourceHidden

_GATES = ("reset", "update", "candidate")


class Recurrent(Sublayer):
    """States s_t of gated recurrent units in one direction, or in both of a stack that is not causal, projected back.

    With `RecurrentSpec.attends`, s_{t-1} first looks at the encoder's states m_j of its own example: with e_j =
    v tanh(s_{t-1} W_a + m_j U_a), the context c_t = sum_j softmax(e)_j m_j enters the gates and the output, and the
    state of an example begins as tanh(m_1 W_s), else at zero. States are float32 whatever the model's type.

    Between decoding steps every slot of the cache keeps the state after its token, as attention keeps its key: a block
    goes on from the slot before its own, so one that is rolled back leaves nothing to undo, and rows stand anywhere.

    Sources: Cho et al. 2014; Bahdanau, Cho & Bengio 2015, appendix A (with m_1 in place of its backward half).
    """

    def __init__(self, d_model: int, memory_width: int, spec: RecurrentSpec, causal: bool, gain: float, rngs: nnx.Rngs):
        self.spec, self.ways = spec, ("forward",) if causal else ("forward", "backward")
        width, units = spec.width, spec.alignment or spec.width
        for way in self.ways:
            setattr(self, way, Unit(d_model, memory_width if spec.attends else None, width, rngs))
        self.out = parameter(
            rngs, (len(self.ways) * width, d_model), gain * (len(self.ways) * width) ** -0.5, ("mlp", "embed")
        )
        if spec.attends:
            self.query = parameter(rngs, (width, units), width**-0.5, ("embed", "mlp"))
            self.key = parameter(rngs, (memory_width, units), memory_width**-0.5, ("embed", "mlp"))
            self.score = parameter(rngs, (units,), units**-0.5, ("mlp",))
            self.start = parameter(rngs, (memory_width, width), memory_width**-0.5, ("embed", "mlp"))
            self.context_out = parameter(rngs, (memory_width, d_model), gain * memory_width**-0.5, ("mlp", "embed"))

    def whole(self, h: Hidden, view: View, its: Pass, key: Key[Array, ""] | None) -> tuple[Hidden, None]:
        self._check(view)
        assert view.own.segments is not None
        segments = view.own.segments[0]
        changes = segments[:, 1:] != segments[:, :-1]
        resets = [jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1))]
        kept, mask, starts = {}, None, None
        if self.spec.attends:
            assert view.memory is not None
            mask = view.memory_sight().drawn().mask[:, 0]
            kept = self._aligned(view.memory)
            first = jnp.argmax(mask, axis=-1)[..., None]  # of the example's source
            starts = self._started(jnp.take_along_axis(view.memory, first, axis=1))
        zero = jnp.zeros((len(self.ways), h.shape[0], self.spec.width))
        states, contexts, weights = self._run(h, zero, kept, mask, resets, starts, show="probabilities" in its.taps)
        if weights is not None:
            its.tap("probabilities", weights[:, None])
        y = self._projected(dropout(states.astype(h.dtype), its.rate, key), contexts)
        return jnp.where(its.real[..., None], y, 0), None

    def block(
        self, h: Float[Array, "R Q D"], slots: PyTree, kept: PyTree, view: View, its: Pass
    ) -> tuple[Float[Array, "R Q D"], PyTree]:
        self._check(view)
        start = view.positions[:, :1, None]
        first, mask = jnp.zeros((h.shape[0], self.spec.width)), None
        if self.spec.attends:
            first = jnp.repeat(kept["start"], h.shape[0] // kept["start"].shape[0], axis=0)
            mask = jnp.broadcast_to(
                view.memory_sight().drawn().mask[:, 0], (kept["key"].shape[0], h.shape[1], kept["key"].shape[1])
            )
        before = jnp.take_along_axis(slots["state"][:, 0], jnp.maximum(start - 1, 0), axis=1)
        first = jnp.where(start == 0, first[:, None], before)[:, 0]
        states, contexts, weights = self._run(h, first[None], kept, mask, show="probabilities" in its.taps)
        if weights is not None:
            its.tap("probabilities", weights[:, None])
        return self._projected(states.astype(h.dtype), contexts), view.written(slots, {"state": states[:, None]})

    def kept(self, memory: SourceHidden | None, real: Bool[Array, "B S"] | None) -> PyTree:
        if not self.spec.attends:
            return {}
        assert memory is not None
        assert real is not None
        first = jnp.take_along_axis(memory, jnp.argmax(real, axis=1)[:, None, None], axis=1)
        return {**self._aligned(memory), "start": self._started(first)[:, 0]}

    def slots(self, rows: int, length: int, block: int, dtype: jnp.dtype) -> PyTree:
        return {"state": jnp.zeros((rows, 1, length, self.spec.width))}

    def _check(self, view: View) -> None:
        if view.own.prefix is not None:
            raise ValueError(
                "a recurrent decoder reads from left to right alone, and a prefix is read both ways: leave out "
                "decoder_causal_attention, or use attention"
            )

    def _aligned(self, memory: SourceHidden) -> PyTree:
        """The encoder's states, and their half of the hidden units that score them."""
        return {"key": product(memory, self.key[...].astype(memory.dtype)), "states": memory}

    def _started(self, firsts: Float[Array, "B T W"]) -> Float[Array, "B T H"]:
        return jnp.tanh(product(firsts, self.start[...].astype(firsts.dtype)).astype(jnp.float32))

    def _run(
        self,
        h: Float[Array, "R T D"],
        first: Float[Array, "ways R H"],
        kept: PyTree,
        mask: Bool[Array, "B T S"] | None,
        resets: list[Bool[Array, "R T"]] | None = None,
        starts: Float[Array, "R T H"] | None = None,
        show: bool = False,
    ) -> tuple[Float[Array, "R T _"], Float[Array, "R T W"] | None, Float[Array, "R T S"] | None]:
        """(states of all ways, contexts, their weights if they are to be shown), from `first` on.

        resets: for each way where an example begins, from `starts` there, or zero.
        """
        units = [getattr(self, way) for way in self.ways]
        back = [slice(None, None, step) for step in (1, -1)]
        inputs = jnp.stack([unit.inputs(h)[:, order] for unit, order in zip(units, back)])
        fresh = None if resets is None else jnp.stack([r[:, order] for _, r, order in zip(units, resets, back)])
        gates, candidates, contexts = (
            None if ws[0] is None else jnp.stack(ws) for ws in zip(*(unit.weights(h.dtype) for unit in units))
        )

        def body(state: Float[Array, "ways R H"], now: Any) -> tuple[Array, tuple[Array, Any, Any]]:
            inputs, fresh, start, mask = now
            if fresh is not None:
                state = jnp.where(fresh[..., None], 0.0 if start is None else start, state)
            context = weights = None
            if mask is not None:
                context, weights = self._look(state[0], kept, mask)
                inputs = inputs + _dot("BW,nWGH->nBGH", context, contexts)
            mixed = jax.nn.sigmoid(inputs[..., :2, :] + _dot("nBH,nHGF->nBGF", state, gates))
            reset, update = mixed[..., 0, :], mixed[..., 1, :]
            new = jnp.tanh(inputs[..., 2, :] + _dot("nBH,nHF->nBF", reset * state, candidates))
            state = (1 - update) * state + update * new
            return state, (state, context, weights if show else None)

        if mask is not None:  # nothing of size T x S x alignment is kept for the gradient
            body = jax.checkpoint(body, prevent_cse=False)
        steps = tuple(
            None if x is None else jnp.moveaxis(x, axis, 0)
            for x, axis in ((inputs, 2), (fresh, 2), (starts, 1), (mask, 1))
        )
        _, (states, seen, weights) = jax.lax.scan(body, first, steps)
        ways = [jnp.moveaxis(states[:, i], 0, 1)[:, order] for i, order in zip(range(len(units)), back)]
        seen, weights = (None if x is None else jnp.moveaxis(x, 0, 1) for x in (seen, weights))
        return jnp.concatenate(ways, axis=-1), None if seen is None else seen.astype(h.dtype), weights

    def _look(
        self, state: Float[Array, "R H"], kept: PyTree, mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "R W"], Float[Array, "R S"]]:
        """Context and weights of every row, in float32; rows of one source, its beams, stand side by side."""
        key, states = kept["key"], kept["states"]
        query = _dot("RH,HA->RA", state, self.query[...].astype(states.dtype))
        query = query.reshape(key.shape[0], -1, 1, query.shape[-1])
        energy = jnp.sum(jnp.tanh(query + key[:, None]) * self.score[...], axis=-1)
        weights = jax.nn.softmax(jnp.where(mask[:, None], energy, MASKED), axis=-1)
        context = _dot("BGS,BSW->BGW", weights, states)
        return context.reshape(state.shape[0], -1), weights.reshape(state.shape[0], -1)

    def _projected(self, states: Float[Array, "R T _"], contexts: Float[Array, "R T W"] | None) -> Hidden:
        y = product(states, self.out[...].astype(states.dtype))
        if contexts is None:
            return y
        return y + product(contexts, self.context_out[...].astype(states.dtype))


class Unit(nnx.Module):
    """What gated recurrent units of one direction own: of each gate a matrix for the input, for the state and, where
    there is one, for the context, and a bias.

    r = sigmoid(x W_r + s U_r + c C_r + b_r), z likewise; s' = (1 - z) s + z tanh(x W + (r s) U + c C + b). Initial std:
    D^-1/2 and W^-1/2; the states' matrices are orthogonal.
    """

    def __init__(self, d_model: int, memory_width: int | None, width: int, rngs: nnx.Rngs):
        orthogonal = jax.nn.initializers.orthogonal()
        for gate in _GATES:
            setattr(self, gate, parameter(rngs, (d_model, width), d_model**-0.5, ("embed", "mlp")))
            own = nnx.Param(orthogonal(rngs.params(), (width, width), jnp.float32), axes=("embed", "mlp"))
            setattr(self, f"{gate}_state", own)
            setattr(self, f"{gate}_bias", zeros((width,), ("mlp",)))
            if memory_width:
                context = parameter(rngs, (memory_width, width), memory_width**-0.5, ("embed", "mlp"))
                setattr(self, f"{gate}_context", context)

    def inputs(self, x: Float[Array, "R T D"]) -> Float[Array, "R T 3 H"]:
        """What the input adds to each gate, in float32."""
        given = [product(x, getattr(self, gate)[...].astype(x.dtype)).astype(jnp.float32) for gate in _GATES]
        return jnp.stack([y + getattr(self, f"{gate}_bias")[...] for y, gate in zip(given, _GATES)], axis=-2)

    def weights(self, dtype: jnp.dtype) -> tuple[Array, Array, Array | None]:
        """The states' matrices of both gates [H, 2, H] and of the candidate [H, H], the context's of all [W, 3, H]."""

        def stacked(names: list[str]) -> Array:
            return jnp.stack([getattr(self, name)[...].astype(dtype) for name in names], axis=1)

        reset, update, candidate = (f"{gate}_state" for gate in _GATES)
        contexts = [f"{gate}_context" for gate in _GATES]
        return (
            stacked([reset, update]),
            getattr(self, candidate)[...].astype(dtype),
            stacked(contexts) if hasattr(self, contexts[0]) else None,
        )


def _dot(letters: str, x: Array, weights: Array) -> Array:
    """A product in the weights' type, summed in float32."""
    return jnp.einsum(letters, x.astype(weights.dtype), weights, preferred_element_type=jnp.float32)
