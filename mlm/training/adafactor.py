"""Adafactor as T5X trains with it, on stacked layers: what is per layer in an unstacked model stays per layer here."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mlm.types import Axes, PyTree

STACKED = ("layers", "experts")  # leading axes that number equal weights; no statistic crosses them

FindAxes = Callable[[PyTree], list[Axes]]  # parameters -> logical axes of every leaf, in tree order


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Dimensions of a weight read as a stack of matrices. rows and columns are empty when it is not one.

    One side of the matrix is the "embed" dimension, the other is all the rest: an attention kernel [D, H, K] is the
    D x (H K) matrix it multiplies with, as under T5X's logical factor rules.
    """

    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    each: tuple[int, ...]  # all dimensions of one weight of the stack


def matrix_view(axes: Axes) -> MatrixView:
    """How to read a weight with these logical axes. ("layers", "embed", "heads", "head_dim") -> (0,), (1,), (2, 3)."""
    depth = 0
    while depth < len(axes) and axes[depth] in STACKED:
        depth += 1
    each = tuple(range(depth, len(axes)))
    embed = tuple(i for i in each if axes[i] == "embed")[:1]
    rest = tuple(i for i in each if i not in embed)
    if not embed or not rest:
        embed = rest = ()
    rows, columns = (embed, rest) if embed < rest else (rest, embed)
    return MatrixView(tuple(range(depth)), rows, columns, each)


def root_mean_square(x: Array, view: MatrixView) -> Array:
    """sqrt(mean x^2) of each weight of the stack, with x's number of dimensions."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=view.each, keepdims=True))


class AdafactorState(NamedTuple):
    """Second moments. A factored parameter has row and column, any other has full; momentum is empty without beta1."""

    count: Array
    row: PyTree  # mean of g^2 over the columns: the shape of the parameter without its columns
    column: PyTree
    full: PyTree
    momentum: PyTree


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    find_axes: FindAxes,
    *,
    decay_exponent: float = 0.8,
    beta1: float | None = None,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    factored: bool = True,
    weight_decay: float = 0.0,
    min_dim_size_to_factor: int = 128,
    step_offset: int = 0,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
) -> optax.GradientTransformation:
    """Adafactor with T5X's rules.

        beta2_t = 1 - t^-decay_exponent;   V_t = beta2_t V_{t-1} + (1 - beta2_t) (g^2 + epsilon1)
        factored: V = row column^T / mean(row);   u = g / sqrt(V);   u /= max(1, rms(u) / clipping_threshold)
        update = -(learning_rate max(rms(p), epsilon2) u), smoothed by beta1 if given, - weight_decay p

    t counts updates from 1, less step_offset. A weight is factored when both sides of its matrix (`matrix_view`) have
    at least min_dim_size_to_factor entries; T5X skips this check for weights of three dimensions and more. weight_decay
    is not multiplied by the learning rate. Sources: Shazeer & Stern 2018; T5X `adafactor.py`.
    """

    def is_factored(shape: tuple[int, ...], view: MatrixView) -> bool:
        sides = [math.prod(shape[i] for i in side) for side in (view.rows, view.columns) if side]
        return factored and bool(sides) and min(sides) >= min_dim_size_to_factor

    def init(params: PyTree) -> AdafactorState:
        leaves, tree = jax.tree.flatten(params)
        row, column, full = [], [], []
        for leaf, axes in zip(leaves, find_axes(params), strict=True):
            view = matrix_view(axes)
            if is_factored(leaf.shape, view):
                row.append(jnp.zeros(_without(leaf.shape, view.columns), jnp.float32))
                column.append(jnp.zeros(_without(leaf.shape, view.rows), jnp.float32))
                full.append(None)
            else:
                row.append(None)
                column.append(None)
                full.append(jnp.zeros(leaf.shape, jnp.float32))
        momentum = None if beta1 is None else jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        rows, columns, fulls = (tree.unflatten(x) for x in (row, column, full))
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns, fulls, momentum)

    def update(gradients: PyTree, state: AdafactorState, params: PyTree = None) -> tuple[PyTree, AdafactorState]:
        if params is None:
            raise ValueError("adafactor needs the parameters: call update(gradients, state, params)")
        leaves, tree = jax.tree.flatten(params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        beta2 = 1.0 - (state.count - step_offset + 1).astype(jnp.float32) ** -decay_exponent

        def mix(old: Array, new: Array) -> Array:
            return beta2 * old + (1.0 - beta2) * new

        gradients, row, column, full = (tree.flatten_up_to(x) for x in (gradients, state.row, state.column, state.full))
        momentum: list[Any] = [None] * len(leaves) if beta1 is None else tree.flatten_up_to(state.momentum)
        updates = []
        for i, (p, axes) in enumerate(zip(leaves, find_axes(params), strict=True)):
            view = matrix_view(axes)
            g = gradients[i].astype(jnp.float32)
            p32 = p.astype(jnp.float32)
            square = jnp.square(g) + epsilon1
            if full[i] is None:
                wide = jnp.expand_dims(row[i], view.columns), jnp.expand_dims(column[i], view.rows)
                wide_row = mix(wide[0], jnp.mean(square, axis=view.columns, keepdims=True))
                wide_column = mix(wide[1], jnp.mean(square, axis=view.rows, keepdims=True))
                row[i] = jnp.squeeze(wide_row, view.columns)
                column[i] = jnp.squeeze(wide_column, view.rows)
                mean = jnp.mean(wide_row, axis=view.rows, keepdims=True)
                u = g * jax.lax.rsqrt(wide_row / mean) * jax.lax.rsqrt(wide_column)
            else:
                full[i] = mix(full[i], square)
                u = g * jax.lax.rsqrt(full[i])
            if clipping_threshold is not None:
                u = u / jnp.maximum(1.0, root_mean_square(u, view) / clipping_threshold)
            u = rate * u
            if multiply_by_parameter_scale:
                u = u * jnp.maximum(root_mean_square(p32, view), epsilon2)
            if beta1 is not None:
                u = momentum[i] = beta1 * momentum[i] + (1.0 - beta1) * u
            updates.append((-u - weight_decay * p32 if weight_decay else -u).astype(p.dtype))
        rows, columns, fulls = (tree.unflatten(x) for x in (row, column, full))
        kept = None if beta1 is None else tree.unflatten(momentum)
        return tree.unflatten(updates), AdafactorState(state.count + 1, rows, columns, fulls, kept)

    return optax.GradientTransformation(init, update)


def _without(shape: tuple[int, ...], dimensions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i not in dimensions)
