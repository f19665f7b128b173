"""A model's activations and experts on a mesh."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mlm.parallel.mesh import ROW_AXES
from mlm.parallel.rules import constrain, fitting, spec
from mlm.types import Axes, Params, Placement, PyTree


class MeshPlacement(Placement):
    """`Placement` on a mesh: activations pinned by the rule table, experts spread over the `expert` axis."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pin = constrain(mesh)

    def constrain(self, array: jax.Array, axes: Axes) -> jax.Array:
        """The activation, pinned by the rule table. Raises ValueError while tracing for a name without a rule."""
        return self._pin(array, axes)

    def pieces(self, axis: str) -> int:
        (names,) = spec((axis,), self._mesh)
        return math.prod(self._mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ()))

    def by_expert(self, body: Callable, rows: Params, weights: Params, axes: Mapping[str, Axes]) -> jax.Array:
        """Every device runs `body` on its own experts; rows and results go round the owners in a ring.

        A turn of the ring sends (rows + results) of one device to its neighbour; after as many turns as owners the
        results are home. Where the rows do not divide over devices (a few rows of a decoding step), every owner
        takes all of them instead and the results are summed.
        """
        mesh = self._mesh
        if mesh.size == 1:
            return super().by_expert(body, rows, weights, axes)
        over = tuple(axis for axis in ROW_AXES if mesh.shape.get(axis, 1) > 1)
        parts = math.prod(mesh.shape[axis] for axis in over)
        divides = next(iter(rows.values())).shape[0] % parts == 0
        # The width that all experts share arrives whole: fsdp gathers it, as it does for dense layers.
        whole = {"embed"} if divides else {"embed", "batch"}

        def specs(arrays: Params) -> dict[str, PyTree]:
            split = {n: spec(tuple(None if a in whole else a for a in axes[n]), mesh, name=n) for n in arrays}
            return {n: jax.tree.map(partial(fitting, split[n]), array) for n, array in arrays.items()}

        local = partial(_ring if divides else _all_rows, body, mesh)
        split = P(over) if divides and over else P()
        inputs = (specs(rows), specs(weights))
        return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=split, check_vma=False)(rows, weights)


def _ring(body: Callable, mesh: Mesh, rows: PyTree, weights: Params) -> jax.Array:
    owners = mesh.shape.get("expert", 1)
    first = _first(weights, owners)
    if owners == 1:
        return _summed(body(rows, weights, first), mesh)

    # Recomputed in the backward pass: what is kept would otherwise grow with the number of owners.
    serve = jax.checkpoint(lambda rows: body(rows, weights, first))
    neighbours = [(owner, (owner + 1) % owners) for owner in range(owners)]

    def turn(carry: PyTree, _: None) -> tuple[PyTree, None]:
        rows, y = carry
        return lax.ppermute((rows, y + serve(rows)), "expert", neighbours), None

    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(serve, rows))
    return _summed(lax.scan(turn, (rows, empty), length=owners)[0][1], mesh)


def _all_rows(body: Callable, mesh: Mesh, rows: PyTree, weights: Params) -> jax.Array:
    owners = mesh.shape.get("expert", 1)
    y = body(rows, weights, _first(weights, owners))
    return _summed(lax.psum(y, "expert") if owners > 1 else y, mesh)


def _first(weights: Params, owners: int) -> jax.Array:
    held = jax.tree.leaves(weights)[0].shape[0]
    return lax.axis_index("expert") * held if owners > 1 else jnp.int32(0)


def _summed(y: jax.Array, mesh: Mesh) -> jax.Array:
    """Devices of one tensor group hold parts of the experts' hidden width."""
    return lax.psum(y, "tensor") if mesh.shape.get("tensor", 1) > 1 else y
