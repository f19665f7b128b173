"""NNX defines and initialises modules; plain nested dicts of arrays run them.

A `Template` is a module split once, without allocating, into its graph and its abstract parameters. Binding parameters
to it gives back a callable module: Python work at trace time only, so a compiled step never sees NNX.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Key

from mlm.types import Axes, Params, PyTree


class Template:
    """The module that `make(rngs)` builds, as functions of a plain dict. repeats: copies stacked on a leading axis."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], repeats: int | None = None):
        self._make = make
        self._repeats = repeats
        self._graph, self._abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters; stacked copies are drawn from independent keys."""

        def one(key: Key[Array, ""]) -> Params:
            return nnx.to_pure_dict(nnx.split(self._make(nnx.Rngs(key)), nnx.Param)[1])

        return one(key) if self._repeats is None else jax.vmap(one)(jax.random.split(key, self._repeats))

    def axes(self) -> PyTree:
        """Logical axis names of every parameter, in the tree of the parameters; stacked ones lead with "layers"."""
        lead: Axes = () if self._repeats is None else ("layers",)
        flat = nnx.to_flat_state(self._abstract)
        names = [lead + tuple(variable.get_metadata()["axes"]) for _, variable in flat]
        shapes = nnx.to_pure_dict(self._abstract)
        return jax.tree.unflatten(jax.tree.structure(shapes), names)

    def bind(self, params: Params) -> nnx.Module:
        """The module holding these parameters (one copy's slice when stacked)."""
        state = jax.tree.map(lambda x: x, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)
