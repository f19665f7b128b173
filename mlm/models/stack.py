"""A stack of layers, run three ways from the same parameters: whole sequences, encoder memory, one cached block."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models import blockwise
from mlm.models.attention import attend, position_table
from mlm.models.config import StackConfig
from mlm.models.functional import Template
from mlm.models.layer import STATES, Layer, Notes
from mlm.models.layers import Norm, Pass, dropout, parameter, unit_rows
from mlm.models.order import Order, check_any_order
from mlm.models.paths import PATHS, path_of
from mlm.models.positions import segment_positions, sinusoids
from mlm.models.routing import rebalanced
from mlm.models.seqpe import PositionReader, Reading, bias
from mlm.models.sight import Sight
from mlm.models.specs import FFNSpec, LayerSpec
from mlm.models.tree import Tree
from mlm.models.view import View, slots_of
from mlm.types import Hidden, Params, Placement, PyTree, Segments, SourceHidden, SourceSegments

_MATRICES = ("query", "key", "value", "out", "gate", "up", "down", "reset", "update", "candidate")
_POLICIES, _ATTENDED = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names(blockwise.SAVED)
_SAVED = {
    "minimal": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _ATTENDED),
    "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_saveable, _ATTENDED),
    "full": _POLICIES.nothing_saveable,
}


class Group(nnx.Module):
    """The smallest repeating pattern of layers, or the first `size` of them."""

    def __init__(self, d_model: int, memory_width: int, config: StackConfig, size: int, rngs: nnx.Rngs):
        self.size = size
        for index, spec in enumerate(config.group[:size]):
            setattr(self, str(index), Layer(d_model, memory_width, config, spec, rngs))

    def layers(self) -> list[Layer]:
        return [getattr(self, str(index)) for index in range(self.size)]


class Frame(nnx.Module):
    """What a stack owns once: a shared relative-position table or a reader of positions, what is added to tokens, norms
    before and after.
    """

    def __init__(self, d_model: int, config: StackConfig, rngs: nnx.Rngs):
        shared, embedding = config.shared_table(), config.embedding
        if shared:
            self.position = position_table(shared.heads, shared, rngs)
        if seqpe := config.seqpe():
            self.seqpe = PositionReader(seqpe, rngs)
        if embedding.positions == "learned":
            length = (embedding.length or 0) + embedding.offset
            self.absolute = parameter(rngs, (length, d_model), 0.02, ("positions", "embed"))
        if embedding.token_type:
            self.token_type = parameter(rngs, (d_model,), 0.02, ("embed",))
        if embedding.norm:
            self.embedding_norm = Norm(d_model, config.norm)
        if config.final_norm:
            self.final_norm = Norm(d_model, config.norm)


class Stack:
    """Parameters: {"layers": stacked groups, "rest": what is left of a group, and what `Frame` holds}."""

    def __init__(self, d_model: int, memory_width: int, config: StackConfig):
        self.config = config
        self._frame = Template(partial(Frame, d_model, config))
        group = partial(Group, d_model, memory_width, config)
        self._group = Template(partial(group, len(config.group)), config.repeats)
        self._rest = Template(partial(group, config.rest))  # of no layers, and then without parameters, for most

    def init(self, key: Key[Array, ""]) -> Params:
        frame, group = jax.random.split(key)
        config, size = self.config, len(self.config.group)
        params = {**self._frame.init(frame), "layers": self._group.init(group)}
        if config.rest:
            params["rest"] = self._rest.init(jax.random.fold_in(group, 1))
        if exponent := config.residual.depth_exponent:
            factors = np.arange(1.0, config.layers + 1) ** -exponent
            in_groups = config.repeats * size
            for place, layer in params["layers"].items():
                params["layers"][place] = _multiplied(layer, factors[int(place) : in_groups : size])
            for place, layer in params.get("rest", {}).items():
                params["rest"][place] = _multiplied(layer, factors[in_groups + int(place), None])
        return params

    def axes(self) -> PyTree:
        axes = {**self._frame.axes(), "layers": self._group.axes()}
        return {**axes, "rest": self._rest.axes()} if self.config.rest else axes

    def _bind_frame(self, params: Params) -> Any:
        return self._frame.bind({name: p for name, p in params.items() if name not in ("layers", "rest")})

    def scaled(self, rows: Hidden) -> Hidden:
        """Rows of the input table in their size, before positions and a norm."""
        spec = self.config.embedding
        rows = unit_rows(rows) if spec.fix_norm else rows
        x = rows if spec.gradient == 1.0 else spec.gradient * rows + (1 - spec.gradient) * jax.lax.stop_gradient(rows)
        return x if spec.multiply == 1.0 else x * jnp.asarray(spec.multiply, x.dtype)

    def enter(self, params: Params, rows: Hidden, positions: Int[Array, "#B T"], its: Pass) -> Hidden:
        """Rows of the input table as the first layer reads them."""
        spec, frame, x = self.config.embedding, self._bind_frame(params), self.scaled(rows)
        if spec.positions == "learned":
            x = x + frame.absolute[...].astype(x.dtype)[positions + spec.offset]
        elif spec.positions == "sinusoidal":
            x = x + sinusoids(positions + spec.offset, x.shape[-1]).astype(x.dtype)
        if spec.token_type:
            x = x + frame.token_type[...].astype(x.dtype)
        return frame.embedding_norm(x, its.target_languages) if spec.norm else x

    def forward(
        self,
        params: Params,
        rows: Hidden,
        segments: Segments,
        memory: Float[Array, "B S _"] | None,
        memory_segments: SourceSegments | None,
        key: Key[Array, ""] | None,
        its: Pass,
        steering: Float[Array, "n _ _ E"] | None = None,
        prefix: Bool[Array, "B T"] | None = None,
        order: Order | None = None,
    ) -> tuple[Hidden, Notes]:
        """Final normed states of whole sequences, from rows of the input table; notes of all layers, by depth.

        key: dropout key, or None for evaluation. steering: added to the router logits of the n mixtures. prefix:
        positions that see each other both ways, where the stack is causal. order: that of the row, in place of left to
        right; such a pass takes the plain path of attention, whatever the stack's.
        """
        config, frame = self.config, self._bind_frame(params)
        length = rows.shape[1]
        own = Sight(shape=(length, length), causal=config.causal, segments=(segments, segments))
        if order is None:
            lengths = {length, length if memory is None else memory.shape[1]}
            path = path_of(config, str(rows.dtype), sorted(lengths), prefix is not None)
            positions = segment_positions(segments)
        else:
            check_any_order(config)
            path, positions = PATHS["plain"], order.positions
            own = replace(own, causal=None, order=order)
        reading = self._read(frame, length if order is None else length // 2, its.rate, key)
        view = View(
            own=own if prefix is None else replace(own, prefix=(prefix, prefix)),
            positions=positions,
            memory=memory,
            memory_sight=None
            if memory_segments is None
            else Sight(shape=(length, memory_segments.shape[1]), segments=(segments, memory_segments)),
            specs=config.attentions(),
            table=frame.position[...] if config.shared_table() else None,
            attend=path.attend,
            draws=path.draws,
            spelled=None if reading is None else bias(reading.query[positions], reading.key[positions]),
        )
        keys = None if key is None else jax.random.split(key, config.repeats + 2)
        per_group = len(config.routers())

        def run_layers(
            x: Hidden, layers: list[Layer], key: Key[Array, ""] | None, steering: Array | None
        ) -> tuple[Hidden, list[Notes]]:
            notes: list[Notes] = []
            for index, layer in enumerate(layers):
                layer_key = None if key is None else jax.random.fold_in(key, index)
                steer = None if steering is None else steering[sum(len(n.routed) for n in notes) :]
                x, said = layer.forward(x, view, its, layer_key, steer)
                notes.append(said)
            return x, notes

        def run_group(x: Hidden, group: tuple[Params, Any, Any]) -> tuple[Hidden, list[Notes]]:
            return run_layers(x, self._group.bind(group[0]).layers(), *group[1:])

        def run_rest(x: Hidden, rest: tuple[Params, Any]) -> tuple[Hidden, list[Notes]]:
            key = None if keys is None else jax.random.fold_in(keys[1], 1)
            return run_layers(x, self._rest.bind(rest[0]).layers(), key, rest[1])

        if config.remat != "none":
            run_group = jax.checkpoint(run_group, policy=_SAVED[config.remat], prevent_cse=not config.scan)
            run_rest = jax.checkpoint(run_rest, policy=_SAVED[config.remat])
        x = self.enter(params, rows, view.positions, its)
        x = its.placement.constrain(dropout(x, its.rate, None if keys is None else keys[0]), STATES)
        in_groups = config.repeats * per_group
        steers = rest_steers = None
        if steering is not None:
            steers = steering[:in_groups].reshape(config.repeats, per_group, *steering.shape[1:])
            rest_steers = steering[in_groups:]
        groups = (params["layers"], None if keys is None else keys[2:], steers)
        if config.scan:
            x, notes = jax.lax.scan(run_group, x, groups)
        else:
            said = []
            for index in range(config.repeats):
                x, one = run_group(x, jax.tree.map(lambda leaf, i=index: leaf[i], groups))
                said.append(one)
            notes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *said)
        rest_notes: list[Notes] = []
        if config.rest:
            x, rest_notes = run_rest(x, (params["rest"], rest_steers))
        x = frame.final_norm(x, its.target_languages) if config.final_norm else x
        return dropout(x, its.rate, None if keys is None else keys[1]), _by_depth(notes, rest_notes)

    def _rings(self, params: Params, own: tuple[PyTree, ...], block: int) -> dict[int, int]:
        """window -> slots that the layers with such a window have. Raises ValueError for a block that is too long."""
        found = {}
        for layer, slots in zip(self.layer_list(params), own, strict=True):
            for name in slots:
                window = getattr(getattr(layer, name).spec, "window", None)
                if window is not None:
                    found[window] = slots[name]["key"].shape[2]
        whole = max(leaf.shape[2] for leaf in jax.tree.leaves(own))
        for window, ring in found.items():
            if block > ring or (ring < whole and block > ring - window + 1):
                raise ValueError(
                    f"a block of {block} tokens, where the ring of a window of {window} has {ring} slots: it takes "
                    f"blocks of {max(1, ring - window + 1)}; make the cache with init_cache(block={block})"
                )
        return found

    def read_positions(self, params: Params, length: int) -> Reading | None:
        """What queries and keys at the first `length` positions add to the logits; None if nobody reads positions.

        Raises ValueError for more positions than the digits spell.
        """
        return self._read(self._bind_frame(params), length, 0.0, None)

    def position_loss(self, params: Params, key: Key[Array, ""]) -> Float[Array, ""]:
        """The losses of the reader of positions by their weights, in nats."""
        return self._bind_frame(params).seqpe.loss(key)

    def _read(self, frame: Any, length: int, rate: float, key: Key[Array, ""] | None) -> Reading | None:
        own = self.config.seqpe()
        spec = own.position.seqpe if own else None
        if spec is None:
            return None
        if length > spec.limit:
            raise ValueError(f"{length} positions do not fit digits={spec.digits}, which spell {spec.limit}; raise it")
        first: int | Array = 0
        if key is not None:
            key, moves, place = jax.random.split(jax.random.fold_in(key, 1), 3)
            anywhere = jax.random.randint(place, (), 0, spec.limit - length + 1)
            first = jnp.where(jax.random.bernoulli(moves, spec.shift), anywhere, 0)
        return frame.seqpe.reading(first + jnp.arange(length), rate, key)

    def rebalanced(self, params: Params, load: Float[Array, "n E"]) -> Params:
        """The parameters after loss-free balancing: router biases of the n mixtures moved by their load."""
        per_group = len(self.config.routers())
        in_groups = self.config.repeats * per_group
        loads = load[:in_groups].reshape(self.config.repeats, per_group, -1)
        updated = {**params, "layers": _rebalanced(params["layers"], self.config.group, jnp.swapaxes(loads, 0, 1))}
        if self.config.rest:
            rest = self.config.group[: self.config.rest]
            updated["rest"] = _rebalanced(params["rest"], rest, load[in_groups:])
        return updated

    def layer_list(self, params: Params) -> list[Layer]:
        """Every layer with its own parameters, first to last."""
        layers = [layer for group in self.unrolled(params)["layers"] for layer in self._group.bind(group).layers()]
        return layers + (self._rest.bind(params["rest"]).layers() if self.config.rest else [])

    def unrolled(self, params: Params) -> Params:
        """The parameters with a tuple of groups in place of the stacked ones. Does nothing to such parameters."""
        groups = params["layers"]
        if not isinstance(groups, tuple):
            groups = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], groups) for i in range(self.config.repeats))
        return {**params, "layers": groups}

    def init_cache(
        self,
        params: Params,
        memory: SourceHidden | None,
        real: Bool[Array, "B S"] | None,
        rows: int,
        length: int,
        block: int,
        dtype: jnp.dtype,
    ) -> tuple[PyTree, PyTree]:
        """(what is kept of the encoder's states per layer, empty slots per layer): see `Transformer.init_cache`."""
        both = [layer.init_cache(memory, real, rows, length, block, dtype) for layer in self.layer_list(params)]
        return tuple(kept for kept, _ in both), tuple(own for _, own in both)

    def step(
        self,
        params: Params,
        rows: Float[Array, "R Q D"],
        cache: PyTree,
        placement: Placement,
        prefix: Bool[Array, "R Q"] | None = None,
        tree: Tree | None = None,
        early: tuple[int, ...] = (),
        attention: bool = False,
    ) -> tuple[tuple[Float[Array, "R Q D"], ...], Float[Array, "R Q S"] | None, tuple[PyTree, ...]]:
        """Final normed states of a block of Q positions per row, how they see the source, and the self slots with the
        block written.

        prefix: positions of the block that see each other both ways. tree: of its nodes, whose depths are their places.
        early: numbers of layers; behind the final states stand those after so many layers (0: none), normed as these.
        attention: whether to show how the last layer that reads the encoder's states sees them, mean of its heads.
        """
        config, frame = self.config, self._bind_frame(params)
        if tree is not None and not config.branches():
            raise ValueError(
                "a stack with recurrent units, or whose positions are read as digits, takes chains of guesses only: "
                "what it makes of a token depends on the slot before it"
            )
        slots = max(leaf.shape[2] for leaf in jax.tree.leaves(cache["self"]))
        start, block = cache["length"], rows.shape[1]
        at = start[:, None] + (jnp.arange(block) if tree is None else tree.depth)
        own = Sight(shape=(block, slots), start=start, causal=config.causal, tree=tree)
        if prefix is not None:
            own = replace(own, prefix=(prefix, slots_of(prefix, start, slots)))
        source = cache.get("source_mask")
        view = View(
            own=own,
            positions=at,
            memory=None,
            memory_sight=None
            if source is None
            else Sight(
                shape=(block, source.shape[1]),
                segments=(jnp.ones((1, block), jnp.int32), source.astype(jnp.int32)),
            ),
            specs=config.attentions(),
            table=frame.position[...] if config.shared_table() else None,
            rings=self._rings(params, cache["self"], block),
            attend=attend,  # a block against its cache is small: what plain attention makes of it is Q x M
            draws=True,
            spelled=bias(cache["positions"].query[at], cache["positions"].key) if config.seqpe() else None,
        )
        to = cache["languages"][:, None] if "languages" in cache else None
        its = Pass(real=jnp.ones(rows.shape[:2], bool), placement=placement, cached=True, target_languages=to)
        x, written = self.enter(params, rows, at, its), []
        after, taps = [x], {}
        reader, tap = config.last_reader() if attention else (-1, "")
        for number, layer in enumerate(self.layer_list(params)):
            mine = {"self": cache["self"][number], "cross": cache["cross"][number]}
            asked = frozenset({tap} if number == reader else ())
            x, updated, taken = layer.step(x, mine, view, replace(its, taps=asked))
            written.append(updated)
            taps |= taken
            after.append(x)
        # Under one softmax with the stack's own keys, the source's come last.
        shown = jnp.mean(taps[tap][..., -source.shape[1] :], axis=1) if attention else None
        states = (x, *(after[number] for number in early))
        return tuple(frame.final_norm(x, to) if config.final_norm else x for x in states), shown, tuple(written)


def _multiplied(layer: Params, factors: Float[np.ndarray, "copies"]) -> Params:
    """The parameters of a layer with its matrices times the factor, or of its copies, one factor each."""

    def scaled(path: tuple, leaf: Array) -> Array:
        if path[-1].key not in _MATRICES:
            return leaf
        return leaf * factors.astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(scaled, layer)


def _by_depth(groups: list[Notes], rest: list[Notes]) -> Notes:
    """Notes of every layer, first to last. groups: of the places in a group, their arrays [repeats, …]."""

    def ordered(of_group: list[PyTree], of_rest: list[PyTree]) -> PyTree:
        deep = jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(len(x) * x[0].shape[0], *x[0].shape[1:]), *of_group)
        if of_rest:
            deep = jax.tree.map(lambda many, *x: jnp.concatenate([many, jnp.stack(x)]), deep, *of_rest)
        return deep

    routed = [[one for layer in part for one in layer.routed] for part in (groups, rest)]
    names = {name for layer in groups for name in layer.taps}
    taps = {
        n: ordered(*([layer.taps[n] for layer in part if n in layer.taps] for part in (groups, rest))) for n in names
    }
    return Notes([ordered(*routed)] if routed[0] else [], taps)


def _rebalanced(params: Params, layers: tuple[LayerSpec, ...], loads: Float[Array, "m *n E"]) -> Params:
    """The layers' parameters with router biases moved, by the load of their m mixtures in order."""
    updated, number = dict(params), 0
    for index, layer in enumerate(layers):
        for name, spec in zip(layer.names(), layer.sublayers, strict=True):
            if not isinstance(spec, FFNSpec) or not spec.router:
                continue
            if spec.router.bias_rate:
                body = dict(updated[str(index)][name])
                body["router_bias"] = rebalanced(body["router_bias"], loads[number], spec.router.bias_rate)
                updated[str(index)] = {**updated[str(index)], name: body}
            number += 1
    return updated
