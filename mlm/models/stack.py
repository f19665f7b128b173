"""A stack of layers, run three ways from the same parameters: whole sequences, encoder memory, one cached block."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.attention import Attention, attend, segment_mask
from mlm.models.config import AttentionSpec, LayerSpec, StackConfig
from mlm.models.functional import Template
from mlm.models.layers import FeedForward, RMSNorm, dropout, parameter
from mlm.models.positions import relative_bias
from mlm.types import Constrain, Hidden, Params, PyTree, Segments, SourceHidden, SourceSegments

_STATES = ("batch", "length", "embed")  # logical axes of activations between sublayers
_SAVED = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class View:
    """What every layer of one forward pass looks at."""

    mask: Bool[Array, "B 1 T T"]
    bias: Float[Array, "1 H T T"]
    memory: SourceHidden | None = None
    memory_mask: Bool[Array, "B 1 T S"] | None = None


class Layer(nnx.Module):
    """Sublayers in order, each x + dropout(body(norm(x)))."""

    def __init__(self, d_model: int, spec: LayerSpec, rngs: nnx.Rngs):
        self.names = spec.names()
        for name, sublayer in zip(self.names, spec.sublayers, strict=True):
            body: Attention | FeedForward
            if isinstance(sublayer, AttentionSpec):
                body = Attention(d_model, sublayer, rngs)
            else:
                body = FeedForward(d_model, sublayer, rngs)
            body.norm = RMSNorm(d_model)
            setattr(self, name, body)

    def forward(self, x: Hidden, view: View, rate: float, key: Key[Array, ""] | None, constrain: Constrain) -> Hidden:
        """All positions of a sequence at once."""
        for name in self.names:
            body = getattr(self, name)
            inner = outer = None
            if key is not None:
                key, inner, outer = jax.random.split(key, 3)
            h = body.norm(x)
            if isinstance(body, FeedForward):
                y = body(h, rate, inner)
            else:
                own = body.source == "self"
                k, v = body.keys_values(h if own else view.memory)
                mask, bias = (view.mask, view.bias) if own else (view.memory_mask, None)
                y = body.output(attend(body.queries(h), k, v, mask, bias, rate, inner))
            x = constrain(x + dropout(y, rate, outer), _STATES)
        return x

    def step(self, x: Float[Array, "R Q D"], cache: PyTree, view: "StepView") -> tuple[Float[Array, "R Q D"], PyTree]:
        """A block of Q new positions per row against the cache; returns the cache with the block written."""
        cache = dict(cache)
        for name in self.names:
            body = getattr(self, name)
            h = body.norm(x)
            if isinstance(body, FeedForward):
                y = body(h, 0.0, None)
            elif body.source == "self":
                k, v = body.keys_values(h)
                keys = _write(cache[name]["key"], k, view.start)
                values = _write(cache[name]["value"], v, view.start)
                cache[name] = {"key": keys, "value": values}
                y = body.output(attend(body.queries(h), keys, values, view.mask, view.bias))
            else:
                # Beams of one source share its keys: fold them into the query axis instead of copying keys.
                k, v = cache[name]["key"], cache[name]["value"]
                q = body.queries(h)
                beams = q.reshape(k.shape[0], -1, *q.shape[1:])
                folded = jnp.swapaxes(beams, 1, 2).reshape(*k.shape[:2], -1, k.shape[3])
                attended = attend(folded, k, v, view.memory_mask).reshape(jnp.swapaxes(beams, 1, 2).shape)
                y = body.output(jnp.swapaxes(attended, 1, 2).reshape(q.shape))
            x = x + y
        return x, cache


@dataclass(frozen=True)
class StepView:
    """What every layer of one cached block looks at."""

    start: Int[Array, "R"]
    mask: Bool[Array, "R 1 Q M"]
    bias: Float[Array, "R H Q M"]
    memory_mask: Bool[Array, "B 1 1 S"]


def _write(slots: Float[Array, "R H M K"], block: Float[Array, "R H Q K"], start: Int[Array, "R"]) -> Array:
    """Rows of `block` stored at slots start[r], start[r] + 1, …"""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))(slots, block, start)


class Group(nnx.Module):
    """The smallest repeating pattern of layers."""

    def __init__(self, d_model: int, specs: tuple[LayerSpec, ...], rngs: nnx.Rngs):
        self.size = len(specs)
        for index, spec in enumerate(specs):
            setattr(self, str(index), Layer(d_model, spec, rngs))

    def layers(self) -> list[Layer]:
        return [getattr(self, str(index)) for index in range(self.size)]


class Frame(nnx.Module):
    """What a stack owns once: the relative-position table and the final norm."""

    def __init__(self, d_model: int, config: StackConfig, rngs: nnx.Rngs):
        buckets = config.position.buckets
        std = (2.0 / (config.heads + buckets)) ** 0.5
        self.position = parameter(rngs, (config.heads, buckets), std, ("heads", "buckets"))
        self.final_norm = RMSNorm(d_model)


class Stack:
    """Parameters: {"layers": stacked groups, "position", "final_norm"}."""

    def __init__(self, d_model: int, config: StackConfig):
        self.config = config
        self._frame = Template(partial(Frame, d_model, config))
        self._group = Template(partial(Group, d_model, config.group), config.repeats)

    def init(self, key: Key[Array, ""]) -> Params:
        frame, group = jax.random.split(key)
        return {**self._frame.init(frame), "layers": self._group.init(group)}

    def axes(self) -> PyTree:
        return {**self._frame.axes(), "layers": self._group.axes()}

    def _bind_frame(self, params: Params) -> Any:
        return self._frame.bind({name: params[name] for name in ("position", "final_norm")})

    def forward(
        self,
        params: Params,
        x: Hidden,
        segments: Segments,
        memory: SourceHidden | None,
        memory_segments: SourceSegments | None,
        key: Key[Array, ""] | None,
        constrain: Constrain,
    ) -> Hidden:
        """Final normed states of whole sequences. key: dropout key, or None for evaluation."""
        config, frame = self.config, self._bind_frame(params)
        at = jnp.arange(x.shape[1])
        bias = relative_bias(frame.position[...], at, at, causal=config.causal, spec=config.position)
        cross = None if memory is None else segment_mask(segments, memory_segments)
        view = View(segment_mask(segments, segments, causal=config.causal), bias[None], memory, cross)
        keys = None if key is None else jax.random.split(key, config.repeats + 2)
        rate = config.dropout

        def run_group(x: Hidden, group: tuple[Params, Any]) -> tuple[Hidden, None]:
            group_params, group_key = group
            for index, layer in enumerate(self._group.bind(group_params).layers()):
                layer_key = None if group_key is None else jax.random.fold_in(group_key, index)
                x = layer.forward(x, view, rate, layer_key, constrain)
            return x, None

        if config.remat != "none":
            run_group = jax.checkpoint(run_group, policy=_SAVED[config.remat], prevent_cse=not config.scan)
        x = constrain(dropout(x, rate, None if keys is None else keys[0]), _STATES)
        layers = (params["layers"], None if keys is None else keys[2:])
        if config.scan:
            x, _ = jax.lax.scan(run_group, x, layers)
        else:
            for index in range(config.repeats):
                x, _ = run_group(x, jax.tree.map(lambda leaf, i=index: leaf[i], layers))
        return dropout(frame.final_norm(x), rate, None if keys is None else keys[1])

    def layer_list(self, params: Params) -> list[Layer]:
        """Every layer with its own parameters, first to last."""
        return [layer for group in self.unrolled(params)["layers"] for layer in self._group.bind(group).layers()]

    def unrolled(self, params: Params) -> Params:
        """The parameters with a tuple of groups in place of the stacked ones. Does nothing to such parameters."""
        groups = params["layers"]
        if not isinstance(groups, tuple):
            groups = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(self.config.repeats))
        return {**params, "layers": groups}

    def init_cache(self, params: Params, memory: SourceHidden, rows: int, length: int) -> tuple[PyTree, tuple]:
        """(cross keys and values per layer, empty self slots per layer): see `Transformer.init_cache`."""
        cross, own = [], []
        for layer in self.layer_list(params):
            attentions = {n: getattr(layer, n) for n in layer.names if isinstance(getattr(layer, n), Attention)}
            cross.append(
                {
                    n: dict(zip(("key", "value"), a.keys_values(memory), strict=True))
                    for n, a in attentions.items()
                    if a.source == "cross"
                }
            )
            own.append(
                {
                    n: {kind: jnp.zeros((rows, heads, length, size), memory.dtype) for kind in ("key", "value")}
                    for n, a in attentions.items()
                    for _, heads, size in [a.query.shape]
                    if a.source == "self"
                }
            )
        return tuple(cross), tuple(own)

    def step(
        self, params: Params, x: Float[Array, "R Q D"], cache: PyTree
    ) -> tuple[Float[Array, "R Q D"], tuple[PyTree, ...]]:
        """Final normed states of a block of Q positions per row, and the self slots with the block written."""
        config, frame = self.config, self._bind_frame(params)
        slots = jax.tree.leaves(cache["self"])[0].shape[2]
        queries = cache["length"][:, None] + jnp.arange(x.shape[1])
        keys = jnp.arange(slots)
        view = StepView(
            start=cache["length"],
            mask=(keys[None, None, :] <= queries[:, :, None])[:, None],
            bias=relative_bias(frame.position[...], queries, keys, causal=config.causal, spec=config.position),
            memory_mask=cache["source_mask"][:, None, None, :],
        )
        written = []
        for layer, own, cross in zip(self.layer_list(params), cache["self"], cache["cross"], strict=True):
            x, updated = layer.step(x, {**own, **cross}, view)
            written.append({name: updated[name] for name in own})
        return frame.final_norm(x), tuple(written)
