"""Optimizers by name. `make_optimizer` describes one; the parameters' logical axes make it an optax transformation.

Layers are stacked on a leading axis, so shape alone does not tell a matrix from a stack of vectors. Every factory
therefore takes the logical axes: statistics, scales and orthogonalisation stay inside one layer, and stacked training
equals unstacked.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array

from mlm.registry import Registry, nearest
from mlm.training.adafactor import FindAxes, adafactor, matrix_view, root_mean_square
from mlm.trees import map_named, mask, named_leaves
from mlm.types import Axes, PyTree

Transformation: TypeAlias = optax.GradientTransformation
Factory = Callable[..., Transformation]  # (learning rate or schedule, FindAxes, **options)


def make_optimizer(
    name: str = "adafactor",
    *,
    learning_rate: optax.ScalarOrSchedule,
    clip_norm: float | None = None,
    freeze: Sequence[str] = (),
    **options: Any,
) -> Callable[[PyTree, PyTree], Transformation]:
    """A function (parameter axes, parameter shapes) -> optax transformation, for any entry of OPTIMIZERS.

    learning_rate: a number or a schedule update count -> rate. clip_norm: gradients are scaled so that their norm over
    all trained parameters is at most this. freeze: regular expressions on whole parameter paths; these parameters stay
    bit for bit what they are and take no optimizer memory. options: those of the factory.

    Raises KeyError for an unknown name and TypeError for an unknown option, with the nearest names; ValueError when the
    axes do not fit the shapes, or a pattern matches no parameter.
    """
    factory = OPTIMIZERS[name]
    known = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(f"optimizer {name!r} has no option {option!r}; {nearest(option, known)}")

    def build(axes: PyTree, shapes: PyTree) -> Transformation:
        find = axes_finder(axes, shapes)
        transformation = factory(learning_rate, find, **options)
        if clip_norm is not None:
            transformation = optax.chain(optax.clip_by_global_norm(clip_norm), transformation)
        return freezing(transformation, shapes, freeze) if freeze else transformation

    return build


def freezing(transformation: Transformation, shapes: PyTree, patterns: Sequence[str]) -> Transformation:
    """The optimizer for the parameters whose whole paths match none of the patterns; the others stay bit for bit what
    they are and take no memory. What is frozen may be frozen again.

    Raises ValueError when a pattern matches no parameter.
    """
    frozen = {name for name, found in named_leaves(mask(shapes, patterns)) if found}

    def those(stay: bool) -> Callable[[PyTree], PyTree]:  # by name, as an outer mask may hide some of the tree
        return lambda tree: map_named(lambda name, _: (name in frozen) == stay, tree)

    return optax.chain(optax.masked(transformation, those(False)), optax.masked(_stay(), those(True)))


def axes_finder(axes: PyTree, shapes: PyTree) -> FindAxes:
    """A function from parameters to the axes of their leaves: looked up by path, so that masks may hide some.

    Raises ValueError, naming the parameter, when one has no axes or not one name for each dimension.
    """
    known = dict(named_leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))
    for name, leaf in named_leaves(shapes):
        if name not in known:
            raise ValueError(f"parameter {name!r} has no logical axes; {nearest(name, known)}")
        if len(known[name]) != len(leaf.shape):
            raise ValueError(
                f"parameter {name!r} of shape {tuple(leaf.shape)} has axes {known[name]}: name every dimension"
            )
    return lambda params: [known[name] for name, _ in named_leaves(params)]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    find_axes: FindAxes,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Transformation:
    """AdamW; its decay, multiplied by the learning rate, is for matrices, not for scales. Loshchilov & Hutter 2019."""
    return optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=partial(_matrices, find_axes),
    )


def adamw_rms(
    learning_rate: optax.ScalarOrSchedule,
    find_axes: FindAxes,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    min_scale: float = 1e-3,
) -> Transformation:
    """AdamW whose step is proportional to the size of each weight, as Adafactor's is.

    update = -learning_rate (max(rms(p), min_scale) adam(g) + weight_decay p), the decay on matrices only.
    Source: nanoT5, Nawrot 2023.
    """

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(updates)
        scaled = [
            u * jnp.maximum(root_mean_square(p, matrix_view(axes)), min_scale)
            for u, p, axes in zip(leaves, jax.tree.leaves(params), find_axes(params), strict=True)
        ]
        return tree.unflatten(scaled)

    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.stateless(scale),
        optax.add_decayed_weights(weight_decay, mask=partial(_matrices, find_axes)),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    find_axes: FindAxes,
    *,
    beta: float = 0.95,
    weight_decay: float = 0.01,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> Transformation:
    """Muon on the matrices inside the layers, AdamW on embeddings, head, norms and position tables; both Nesterov.

    Each layer's momentum is orthogonalised on its own, attention kernels as the D x (H K) matrix they multiply with.
    consistent_rms scales updates to the size of AdamW's, so both parts share one learning rate (None: Jordan's scale).
    Sources: Jordan et al. 2024; Liu et al. 2025, Moonlight.
    """

    def dimension_numbers(params: PyTree) -> PyTree:
        numbers = []
        for axes in find_axes(params):
            view = matrix_view(axes)
            hidden = view.rows and not {"vocab", "buckets"} & set(axes)
            numbers.append(optax.contrib.MuonDimensionNumbers(view.rows, view.columns) if hidden else None)
        return jax.tree.unflatten(jax.tree.structure(params), numbers)

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=partial(_matrices, find_axes),
        ns_steps=ns_steps,
        consistent_rms=consistent_rms,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=dimension_numbers,
    )


OPTIMIZERS: Registry[Factory] = Registry("optimizer", adafactor=adafactor, adamw=adamw, adamw_rms=adamw_rms, muon=muon)


def ema(average: PyTree, params: PyTree, decay: float | Array) -> PyTree:
    """decay * average + (1 - decay) * params, leaf by leaf; start from a copy of the parameters.

    Computed as average + (1 - decay) (params - average), so that the mean of what never moves is that, and not rounded.
    """
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p.astype(a.dtype) - a), average, params)


def state_axes(optimizer: Transformation, shapes: PyTree, axes: PyTree) -> PyTree:
    """Logical axes of every leaf of the optimizer's state: the tree of `optimizer.init(shapes)` with tuples of names.

    A leaf belongs to the parameter whose path its own path contains. Which of the parameter's dimensions it kept is
    found by initialising once more on shapes whose dimensions all differ. Other leaves (counters) get None for every
    dimension. Raises ValueError when the form of the state changes with such a small change of sizes.
    """
    find = axes_finder(axes, shapes)
    owners = {tuple(path): i for i, (path, _) in enumerate(tree_flatten_with_path(shapes)[0])}
    leaves, tree = jax.tree.flatten(shapes)
    state = jax.eval_shape(optimizer.init, shapes)
    flat, state_tree = tree_flatten_with_path(state)
    for sign in (1, -1):  # grow the dimensions, or shrink them when growing takes one across a threshold
        tagged = [_distinct(leaf.shape, sign) for leaf in leaves]
        stand_ins = [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in zip(tagged, leaves)]
        probe = jax.eval_shape(optimizer.init, tree.unflatten(stand_ins))
        probed = jax.tree.leaves(probe)
        same = jax.tree.structure(probe) == state_tree
        if same and all(len(a.shape) == len(b.shape) for (_, a), b in zip(flat, probed)):
            break
    else:
        raise ValueError(
            "the optimizer's state changes its form with the sizes of the parameters; cannot name its axes"
        )
    names = find(shapes)
    result: list[Axes] = []
    for (path, leaf), like in zip(flat, probed, strict=True):
        owner = _owner(tuple(path), owners)
        if owner is None:
            result.append((None,) * len(leaf.shape))
        else:
            places = dict(zip(tagged[owner], names[owner]))
            result.append(tuple(places.get(size) for size in like.shape))
    return state_tree.unflatten(result)


def _distinct(shape: tuple[int, ...], sign: int) -> tuple[int, ...]:
    """Sizes moved apart as little as possible, order kept: (4, 8, 4) grows to (4, 10, 5), or shrinks to (2, 8, 3)."""
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    result = list(shape)
    for rank, i in enumerate(order):
        result[i] = shape[i] + (rank if sign > 0 else rank + 1 - len(shape))
    return tuple(result)


def _owner(path: tuple, owners: dict[tuple, int]) -> int | None:
    """The parameter with the longest path inside `path`."""
    runs = ((i, j) for i in range(len(path)) for j in range(len(path), i, -1))
    found = max((run for run in runs if path[slice(*run)] in owners), key=lambda run: run[1] - run[0], default=None)
    return None if found is None else owners[path[slice(*found)]]


def _matrices(find_axes: FindAxes, params: PyTree) -> PyTree:
    """True for weights with at least two dimensions inside one layer."""
    decayed = [len(matrix_view(axes).each) >= 2 for axes in find_axes(params)]
    return jax.tree.unflatten(jax.tree.structure(params), decayed)


def _stay() -> Transformation:
    """Updates of minus zero: x + (-0.0) is x for every x, while x + 0.0 turns -0.0 into 0.0."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))
