"""What training carries from step to step: one pytree, saved and sharded as a whole."""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from mlm.types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: updates tried so far. skipped: those left out because loss or gradients were not finite.

    ema: running mean of the parameters, None when not asked for. The fields hold arrays, or their shapes or shardings.
    """

    step: PyTree
    skipped: PyTree
    params: PyTree
    optimizer: PyTree
    ema: PyTree


def init_state(params: Params, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(zero, zero, params, optimizer.init(params), mean)


def stream(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The random stream of that name: a new stream never moves the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
