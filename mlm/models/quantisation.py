"""Weight-only quantisation: matrices of the layers as small integers, turned back into numbers where they are used.

    s_o = max_i |W_io| / (2^(bits - 1) - 1),   Q = round(W / s),   W' = s Q,   |W - W'| <= s / 2

One scale for each output channel o, shared by its inputs i. Embeddings, norms, biases, routers, recurrent units and the
head stay as they are. Source: Zeng et al. 2022 (GLM-130B), section 3.4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mlm.models.specs import check_choice
from mlm.trees import map_named
from mlm.types import Params, PyTree

BITS = {"int8": 8, "int4": 4}

# Matrix by the end of its path -> its input axes, counted from the end: absmax runs over them.
_INPUTS: Mapping[str, tuple[int, ...]] = {
    r".*_attention(_\d+)?/(query|key|value)": (-3,),
    r".*_attention(_\d+)?/out": (-3, -2),
    r".*(ffn|moe)(_\d+)?(/shared)?/(gate|up|down)": (-2,),
}


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("axis",))
@dataclass(frozen=True)
class Quantised:
    """A matrix, or a stack of them, that modules read as they read an array: `x[...]`, then `x.astype(dtype)`.

    values: int8 [..., inputs, ..., outputs]. scale: float32, 1 along inputs. axis: None, or that axis, from the end,
    along which a byte holds two 4-bit values, the first in its lower half.
    """

    values: PyTree
    scale: PyTree
    axis: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix it stands for."""
        shape = list(self.values.shape)
        if self.axis is not None:
            shape[self.axis] *= 2
        return tuple(shape)

    def __getitem__(self, index: object) -> "Quantised":
        if index is not Ellipsis:
            raise IndexError(f"a quantised matrix is read whole, by [...], not by [{index!r}]")
        return self

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The numbers it stands for."""
        values = self.values if self.axis is None else unpacked(self.values, self.axis)
        return (values.astype(jnp.float32) * self.scale).astype(dtype)


def quantised(params: Params, kind: str) -> Params:
    """The parameters of a model with the matrices of its layers as `Quantised`; kind: "int8" or "int4".

    They decode, score and evaluate as before; they cannot be trained. Raises ValueError for an unknown kind, and for
    4 bits where a matrix has an odd number of inputs.
    """
    check_choice("quantised", "kind", kind, tuple(BITS))

    def leaf(name: str, weights: Array) -> Array | Quantised:
        inputs = next((axes for pattern, axes in _INPUTS.items() if re.fullmatch(pattern, name)), None)
        return weights if inputs is None else _matrix(name, weights, inputs, BITS[kind])

    return map_named(leaf, params)


def _matrix(name: str, weights: Float[Array, "..."], inputs: tuple[int, ...], bits: int) -> Quantised:
    largest = jnp.max(jnp.abs(weights.astype(jnp.float32)), axis=inputs, keepdims=True)
    steps = 2 ** (bits - 1) - 1
    scale = jnp.where(largest > 0, largest, 1.0) / steps
    values = jnp.round(weights / scale).astype(jnp.int8)
    if bits == 8:
        return Quantised(values, scale)
    axis = inputs[-1]
    if values.shape[axis] % 2:
        raise ValueError(
            f"int4 puts two values of a matrix into a byte, and {name} has {values.shape[axis]} inputs, an odd number; "
            "use int8"
        )
    return Quantised(packed(values, axis), scale, axis)


def packed(values: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """Neighbours along the axis, each in -8 … 7, as the lower and the upper half of one byte."""
    low, high = (jax.lax.slice_in_dim(values, start, None, 2, axis) for start in (0, 1))
    return (low & 15) | (high << 4)


def unpacked(values: Int[Array, "..."], axis: int) -> Int[Array, "..."]:
    """What `packed` packed."""
    position = values.ndim + axis
    both = jnp.stack([(values << 4) >> 4, values >> 4], axis=position + 1)
    return both.reshape(*values.shape[:position], 2 * values.shape[position], *values.shape[position + 1 :])
