"""Saves one checkpoint after the other until killed: `endless_saves.py DIRECTORY`. Prints each step before saving.

State of step n: every element of `params/w` is n, so that a mixture of two checkpoints would show.
"""

import sys

import jax
import jax.numpy as jnp

from mlm.checkpoints import CheckpointConfig, Checkpointer


def state(step: int) -> dict:
    return {"params": {"w": jnp.full((512, 512), step, jnp.float32), "b": jnp.full((7,), step, jnp.int32)}}


def target() -> dict:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))


def main(directory: str) -> None:
    with Checkpointer(directory, CheckpointConfig(keep=2)) as checkpoints:
        step = checkpoints.restore(None, target()).step if checkpoints.latest() else 0
        while True:
            step += 1
            print(step, flush=True)
            checkpoints.save(step, state(step), {0: str(step).encode()}, extra={"step": step})


if __name__ == "__main__":
    main(sys.argv[1])
