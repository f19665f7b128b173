"""Experts made from a dense network, and fewer experts from many: functions of parameter trees."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mlm.models.config import ModelConfig, StackConfig
from mlm.models.depth import join_layers, split_layers
from mlm.models.experts import WEIGHTS
from mlm.models.specs import FFNSpec, LayerSpec
from mlm.models.transformer import Transformer
from mlm.trees import named_leaves
from mlm.types import Params

ROUTER = ("router", "router_bias")  # arrays [… E]


def upcycle(
    params: Params, dense: ModelConfig, sparse: ModelConfig, key: Key[Array, ""], *, noise: float = 0.0
) -> Params:
    """The dense model's parameters as those of a sparse one: every expert a copy of the layer's network.

    Routers, and what else the dense model has not, are fresh. noise: relative std of what is added to each copy, so
    that copies part sooner. With gates that sum to 1 over the chosen experts (`RouterSpec.gates` "chosen") and no
    noise, the new model's outputs are the old one's; with raw gates they start multiplied by p, about 1 / E.

    Raises ValueError when the models differ in anything but mixtures. Source: Komatsuzaki et al. 2023.
    """
    fresh = Transformer(sparse).init(key)
    upcycled = dict(params)
    for name, stack in sparse.stacks().items():
        old = _stack(dense, name)
        plan = list(zip(old.layer_specs(), stack.layer_specs(), strict=True)) if old.layers == stack.layers else []
        if not plan:
            raise ValueError(f"{name}: {old.layers} dense layers cannot become {stack.layers} sparse ones")
        olds, news = split_layers(params[name], old), split_layers(fresh[name], stack)
        layers = []
        for number, (was, new, (before, after)) in enumerate(zip(olds, news, plan, strict=True)):
            draw = jax.random.fold_in(jax.random.fold_in(key, number), len(name))
            layers.append(_upcycled(was, new, before, after, f"{name} layer {number}", draw, noise))
        upcycled[name] = join_layers(params[name], layers, stack)
    _same_shapes(upcycled, sparse)
    return upcycled


def _upcycled(
    was: Params, new: Params, before: LayerSpec, after: LayerSpec, where: str, key: Key[Array, ""], noise: float
) -> Params:
    layer = {}
    for name, spec in zip(after.names(), after.sublayers, strict=True):
        if name in was:
            layer[name] = was[name]
        elif isinstance(spec, FFNSpec) and spec.router and "ffn" in was:
            copies = {}
            for leaf in (leaf for leaf in WEIGHTS if leaf in new[name]):
                source, shape = was["ffn"].get(leaf), new[name][leaf].shape
                if source is None or source.shape != shape[1:]:
                    have = None if source is None else source.shape
                    raise ValueError(f"{where}: the dense network's {leaf} is {have}, an expert's {shape[1:]}")
                key, draw = jax.random.split(key)
                parted = 1.0 + noise * jax.random.normal(draw, shape) if noise else 1.0
                copies[leaf] = jnp.broadcast_to(source, shape) * parted
            norms = {n: was["ffn"][n] for n in ("norm", "post_norm") if n in was["ffn"]}
            layer[name] = new[name] | copies | norms
        elif name.startswith("ffn"):
            layer[name] = new[name]
        else:
            raise ValueError(f"{where} needs {name}, which the dense model's has not: {list(before.names())}")
    return layer


def keep_most_used(usage: Mapping[str, np.ndarray], keep: int) -> dict[str, np.ndarray]:
    """stack -> indices [n, keep] of the experts with the most choices, rising. usage: stack -> choices [n, L, E]."""
    return {
        stack: np.sort(np.argsort(-table.sum(axis=1), axis=-1, kind="stable")[:, :keep])
        for stack, table in usage.items()
    }


def prune(params: Params, config: ModelConfig, kept: Mapping[str, np.ndarray]) -> tuple[Params, ModelConfig]:
    """The model with only the experts kept[stack] [n mixtures, keep], whose routers choose among them.

    Raises ValueError when there are fewer than k, or an index is out of range.
    """
    return _with_experts(params, config, kept, lambda table, row, _: table[jnp.asarray(row)])


def merge(
    params: Params, config: ModelConfig, kept: Mapping[str, np.ndarray], usage: Mapping[str, np.ndarray]
) -> tuple[Params, ModelConfig]:
    """As `prune`, and every expert that goes is averaged into the kept one whose router column is most like its own
    (cosine), weighted by how often each was chosen.
    """

    def average(table: Array, row: np.ndarray, weights: np.ndarray) -> Array:
        return jnp.einsum("ke,e...->k...", jnp.asarray(weights, table.dtype), table)

    return _with_experts(params, config, kept, average, usage)


def _with_experts(
    params: Params,
    config: ModelConfig,
    kept: Mapping[str, np.ndarray],
    fewer: Callable[[Array, np.ndarray, Any], Array],
    usage: Mapping[str, np.ndarray] | None = None,
) -> tuple[Params, ModelConfig]:
    """fewer(table [E, …], indices kept, weights [keep, E] or None) -> [keep, …], for every array of every mixture."""
    changed = dict(params)
    stacks: dict[str, Any] = {}
    for name, stack in config.stacks().items():
        if not stack.routers():
            continue
        rows, number = _checked(kept, name, stack), 0
        layers = split_layers(params[name], stack)
        for index, spec in enumerate(stack.layer_specs()):
            for sublayer in (n for n in spec.names() if n.startswith("moe")):
                body, row = layers[index][sublayer], rows[number]
                weights = None if usage is None else _weights(np.asarray(body["router"]), row, usage[name][number])
                arrays = {n: fewer(body[n], row, weights) for n in WEIGHTS if n in body}
                routers = {n: body[n][..., jnp.asarray(row)] for n in ROUTER if n in body}
                layers[index] = {**layers[index], sublayer: {**body, **arrays, **routers}}
                number += 1
        stacks[name] = _fewer(stack, rows.shape[1])
        changed[name] = join_layers(params[name], layers, stack)
    pruned = replace(config, **stacks)
    _same_shapes(changed, pruned)
    return changed, pruned


def _weights(router: np.ndarray, row: np.ndarray, usage: np.ndarray) -> np.ndarray:
    """Shares [keep, E] of every expert in the one that it goes into; rows sum to 1."""
    columns = router / np.maximum(np.linalg.norm(router, axis=0), 1e-9)
    home = np.argmax(columns[:, row].T @ columns, axis=0)
    home[row] = np.arange(len(row))
    counts = usage.sum(axis=0) + 1e-6  # an expert that nobody chose still is itself
    shares = (home == np.arange(len(row))[:, None]) * counts
    return shares / shares.sum(axis=1, keepdims=True)


def _checked(kept: Mapping[str, np.ndarray], name: str, stack: StackConfig) -> np.ndarray:
    mixtures = sum(n.startswith("moe") for spec in stack.layer_specs() for n in spec.names())
    rows = np.asarray(kept.get(name, np.zeros((0, 0), int)))
    router = stack.routers()[0]
    if rows.ndim != 2 or rows.shape[0] != mixtures:
        raise ValueError(
            f"{name} has {mixtures} mixtures; experts to keep are {list(rows.shape)}, not [{mixtures}, keep]"
        )
    least = max(r.k for r in stack.routers())
    if not least <= rows.shape[1] <= router.experts or rows.min() < 0 or rows.max() >= router.experts:
        raise ValueError(
            f"{name}: keep={rows.shape[1]} must be between k={least} and {router.experts}, of experts 0 to "
            f"{router.experts - 1}"
        )
    return rows


def _fewer(stack: StackConfig, experts: int) -> StackConfig:
    def sublayer(spec: Any) -> Any:
        if not isinstance(spec, FFNSpec) or not spec.router:
            return spec
        return replace(spec, router=replace(spec.router, experts=experts))

    return stack.mapped(sublayer)


def _stack(config: ModelConfig, name: str) -> StackConfig:
    if name not in config.stacks():
        raise ValueError(f"the sparse model has a stack {name!r} and the dense one none: {list(config.stacks())}")
    return config.stacks()[name]


def _same_shapes(params: Params, config: ModelConfig) -> None:
    """Raises ValueError, naming the first parameter that is not what the model's config asks for."""
    want = {name: leaf.shape for name, leaf in named_leaves(Transformer(config).shapes())}
    have = {name: leaf.shape for name, leaf in named_leaves(params)}
    wrong = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    if wrong:
        raise ValueError(f"{wrong[0]} is {have.get(wrong[0])} and should be {want.get(wrong[0])}: other models")
