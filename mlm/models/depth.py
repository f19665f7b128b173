"""A stack's parameters layer by layer, first to last, and stacked again: for surgery, where groups are in the way."""

import jax
import jax.numpy as jnp

from mlm.models.config import StackConfig
from mlm.types import Params


def split_layers(params: Params, config: StackConfig) -> list[Params]:
    """{sublayer name: its parameters} of every layer."""

    def one(repeat: int, place: int) -> Params:
        return jax.tree.map(lambda leaf: leaf[repeat], params["layers"][str(place)])

    layers = [one(repeat, place) for repeat in range(config.repeats) for place in range(len(config.group))]
    return layers + [params["rest"][str(place)] for place in range(config.rest)]


def join_layers(params: Params, layers: list[Params], config: StackConfig) -> Params:
    """The stack with these layers; what it owns once (norms, position tables) is taken from `params`."""
    size = len(config.group)
    groups = {
        str(place): jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[place : config.repeats * size : size])
        for place in range(size)
    }
    joined = {name: own for name, own in params.items() if name not in ("layers", "rest")} | {"layers": groups}
    if config.rest:
        joined["rest"] = {str(place): layer for place, layer in enumerate(layers[config.repeats * size :])}
    return joined
