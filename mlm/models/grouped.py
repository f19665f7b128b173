"""Grouped matrix product: sorted rows, each times the matrix of its group; without padding, without dropping.

On a CPU the loop below goes group by group, in blocks of rows; accelerators have `jax.lax.ragged_dot`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mlm.models.quantisation import Quantised

# Rows of a block: few enough that a small group wastes little, enough that a block is worth its overhead. Measured.
PRODUCT_ROWS, TRANSPOSED_ROWS, GRADIENT_ROWS = 16, 64, 64

Rows = Float[Array, "N D"]
Sizes = Int[Array, "E"]
Matrices = Float[Array, "E D F"] | Quantised


def grouped_matmul(x: Rows, weights: Matrices, sizes: Sizes) -> Float[Array, "N F"]:
    """y_n = x_n W_e for the rows n of group e: the first sizes[0] rows, then the next sizes[1], …

    The matrices are cast to the rows' type. Rows beyond the sum of sizes give zeros. Work and memory do not depend on
    how uneven the groups are.
    """

    def ragged(x: Rows, weights: Matrices, sizes: Sizes) -> Array:
        return lax.ragged_dot(x, weights.astype(x.dtype), sizes)

    return lax.platform_dependent(x, weights, sizes, cpu=blocked_matmul, default=ragged)


@jax.custom_vjp
def blocked_matmul(x: Rows, weights: Matrices, sizes: Sizes) -> Float[Array, "N F"]:
    """`grouped_matmul` as a loop over groups and, within one, over blocks of rows.

    A block may reach into the next group: the rows it spoils there are written again by that group's own blocks.
    """
    return _product(x, weights, sizes, PRODUCT_ROWS, transposed=False)


def _forward(x, weights, sizes):
    return blocked_matmul(x, weights, sizes), (x, weights, sizes)


def _backward(saved, g):
    x, weights, sizes = saved
    return (
        _product(g, weights, sizes, TRANSPOSED_ROWS, transposed=True),
        _weight_gradient(x, g, sizes, weights.dtype),
        None,
    )


blocked_matmul.defvjp(_forward, _backward)


def _product(x: Array, weights: Matrices, sizes: Sizes, rows: int, *, transposed: bool) -> Array:
    """x_n W_e, or x_n W_e^T, group by group."""
    padded = jnp.pad(x, ((0, rows), (0, 0)))
    out = jnp.zeros((padded.shape[0], weights.shape[1 if transposed else 2]), x.dtype)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(out: Array, its: tuple) -> tuple[Array, None]:
        matrix, start, end = its
        own = matrix.astype(x.dtype)  # here, so that no second copy of all matrices is ever made

        def block(at: Array, out: Array) -> Array:
            y = lax.dot_general(_slice(padded, at, rows), own, contract, preferred_element_type=x.dtype)
            return lax.dynamic_update_slice(out, jnp.where(_within(at, rows, end), y, 0), (at, 0))

        return _blocks(start, end, rows, block, out), None

    ends = jnp.cumsum(sizes)
    return lax.scan(group, out, (weights, ends - sizes, ends))[0][: x.shape[0]]


def _weight_gradient(x: Array, g: Array, sizes: Sizes, dtype: jnp.dtype) -> Array:
    """x^T g of every group, summed in float32."""
    rows = GRADIENT_ROWS
    x_padded, g_padded = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x, g))

    def group(_: None, its: tuple) -> tuple[None, Array]:
        start, end = its

        def product(at: Array) -> Array:
            own = jnp.where(_within(at, rows, end), _slice(g_padded, at, rows), 0)
            contract = (((0,), (0,)), ((), ()))
            return lax.dot_general(_slice(x_padded, at, rows), own, contract, preferred_element_type=jnp.float32)

        total = _blocks(start + rows, end, rows, lambda at, total: total + product(at), product(start))
        return None, total.astype(dtype)

    ends = jnp.cumsum(sizes)
    return lax.scan(group, None, (ends - sizes, ends))[1]


def _blocks(start: Array, end: Array, rows: int, body: Callable[[Array, Array], Array], carry: Array) -> Array:
    """carry after `body(first row, carry)` of every block from start to end."""

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + rows, body(*state)

    return lax.while_loop(lambda state: state[0] < end, step, (start, carry))[1]


def _slice(x: Array, at: Array, rows: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, rows)


def _within(at: Array, rows: int, end: Array) -> Array:
    return (at + jnp.arange(rows) < end)[:, None]


@jax.custom_vjp
def permute(x: Rows, order: Int[Array, "N"], inverse: Int[Array, "N"]) -> Rows:
    """x[order]; its gradient is g[inverse], a gather where JAX's own rule would scatter."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))


def by_group(groups: Int[Array, "N"], count: int) -> tuple[Int[Array, "N"], Int[Array, "N"], Sizes]:
    """(order, inverse, sizes): the stable sort by group, what undoes it, and the rows of each group.

    Rows of group `count` belong to none; they come last.
    """
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32), unique_indices=True)
    return order, inverse, jnp.bincount(groups, length=count + 1)[:count].astype(jnp.int32)
