"""One layer: sublayers of any registered kind, each with its norm and its residual."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from mlm.models.attention import Attention
from mlm.models.config import StackConfig
from mlm.models.experts import MixtureOfExperts
from mlm.models.layers import FeedForward, Norm, Pass, Sublayer, dropout
from mlm.models.recurrent import Recurrent
from mlm.models.routing import Routed
from mlm.models.specs import AttentionSpec, FFNSpec, LayerSpec, RecurrentSpec
from mlm.models.view import View
from mlm.types import Hidden, PyTree, SourceHidden

STATES = ("batch", "length", "embed")  # logical axes of activations between sublayers


def _attention(d_model: int, memory_width: int, spec: AttentionSpec, stack: StackConfig, rngs: nnx.Rngs) -> Sublayer:
    return Attention(d_model, memory_width, spec, stack.norm, stack.residual.gain, rngs)


def _network(d_model: int, memory_width: int, spec: FFNSpec, stack: StackConfig, rngs: nnx.Rngs) -> Sublayer:
    return (MixtureOfExperts if spec.router else FeedForward)(d_model, spec, stack.residual.gain, rngs)


def _recurrent(d_model: int, memory_width: int, spec: RecurrentSpec, stack: StackConfig, rngs: nnx.Rngs) -> Sublayer:
    return Recurrent(d_model, memory_width, spec, stack.causal, stack.residual.gain, rngs)


# Kind of spec -> its module, made from (model width, encoder width, spec, stack, random streams).
SUBLAYERS: dict[type, Callable[[int, int, Any, StackConfig, nnx.Rngs], Sublayer]] = {
    AttentionSpec: _attention,
    FFNSpec: _network,
    RecurrentSpec: _recurrent,
}


class Notes(NamedTuple):
    """What a layer, or by depth a stack, says beside its states: its mixtures' records, and what was asked for."""

    routed: list[Routed]
    taps: dict[str, Array]


class Layer(nnx.Module):
    """Sublayers in order, each with its norm and residual."""

    def __init__(self, d_model: int, memory_width: int, config: StackConfig, spec: LayerSpec, rngs: nnx.Rngs):
        self.names = spec.names()
        self.residual = config.residual
        for name, sublayer in zip(self.names, spec.sublayers, strict=True):
            body: Any = SUBLAYERS[type(sublayer)](d_model, memory_width, sublayer, config, rngs)
            body.norm = Norm(d_model, config.norm)
            if config.residual.order == "sandwich":
                body.post_norm = Norm(d_model, config.norm)
            setattr(self, name, body)

    def forward(
        self,
        x: Hidden,
        view: View,
        its: Pass,
        key: Key[Array, ""] | None,
        steering: Float[Array, "n _ _ E"] | None = None,
    ) -> tuple[Hidden, Notes]:
        """All positions of a sequence at once. steering: added to the router logits of this layer's n mixtures."""
        notes = Notes([], {})
        for name in self.names:
            body = getattr(self, name)
            own = _named(its, name, notes.taps)
            if steering is not None:
                own = replace(own, steering=steering[len(notes.routed) :])
            inner = outer = None
            if key is not None:
                key, inner, outer = jax.random.split(key, 3)

            def run(h, body=body, inner=inner, own=own):
                y, routed = body.whole(h, view, own, inner)
                notes.routed.extend([] if routed is None else [routed])
                return y

            x = self._around(x, body, run, partial(dropout, rate=its.rate, key=outer), its)
            x = its.placement.constrain(x, STATES)
        if "hidden" in its.taps:
            notes.taps["hidden"] = x
        return x, notes

    def step(
        self, x: Float[Array, "R Q D"], cache: PyTree, view: View, its: Pass
    ) -> tuple[Float[Array, "R Q D"], PyTree, dict[str, Array]]:
        """A block of Q new positions per row against the cache; returns the own slots with it written, and taps."""
        written: dict[str, PyTree] = {}
        taps: dict[str, Array] = {}
        for name in self.names:
            body = getattr(self, name)

            def run(h, body=body, name=name):
                mine = _named(its, name, taps)
                y, own = body.block(h, cache["self"].get(name, {}), cache["cross"].get(name, {}), view, mine)
                written.update({name: own} if own else {})
                return y

            x = self._around(x, body, run, lambda y: y, its)
        return x, written, taps

    def init_cache(
        self, memory: SourceHidden | None, real: Array | None, rows: int, length: int, block: int, dtype: Any
    ) -> tuple[PyTree, PyTree]:
        """(what is kept of the encoder's states, empty slots), of the sublayers that have any."""
        bodies = {name: getattr(self, name) for name in self.names}
        kept = {name: body.kept(memory, real) for name, body in bodies.items()}
        slots = {name: body.slots(rows, length, block, dtype) for name, body in bodies.items()}
        return {name: x for name, x in kept.items() if x}, {name: x for name, x in slots.items() if x}

    def _around(
        self, x: Hidden, body: Any, run: Callable[[Hidden], Hidden], drop: Callable[[Hidden], Hidden], its: Pass
    ) -> Hidden:
        order, alpha, to = self.residual.order, self.residual.alpha, its.target_languages
        if order == "post":
            return body.norm(alpha * x + drop(run(x)), to)
        y = run(body.norm(x, to))
        return x + drop(body.post_norm(y, to) if order == "sandwich" else y)


def _named(its: Pass, sublayer: str, taken: dict[str, Array]) -> Pass:
    """The pass as one sublayer sees it, which knows its taps by their short names."""
    prefix = f"{sublayer}/"
    asked = frozenset(name.removeprefix(prefix) for name in its.taps if name.startswith(prefix))

    def tap(name: str, value: Array) -> None:
        if name in asked:
            taken[prefix + name] = value

    return replace(its, taps=asked, tap=tap)
