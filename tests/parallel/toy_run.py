"""A small sharded training run: `toy_run.py DIRECTORY FSDP TENSOR STEPS [--slowly]`. Used with 1 and 2 processes.

Writes a checkpoint of its last step, and prints the mesh, the block of rows it feeds, and where it stopped.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mlm.checkpoints import Checkpointer
from mlm.parallel import (
    MeshConfig,
    batch_sharding,
    constrain,
    data_layout,
    describe,
    global_batch,
    initialize_distributed,
    make_mesh,
    preempted,
    shardings,
)

ROWS, VOCAB, WIDTH = 8, 16, 8
AXES = {"table": ("vocab", "embed"), "wi": ("embed", "mlp"), "wo": ("mlp", "embed")}
SHAPES = {
    "table": jax.ShapeDtypeStruct((VOCAB, WIDTH), jnp.float32),
    "wi": jax.ShapeDtypeStruct((WIDTH, 4 * WIDTH), jnp.float32),
    "wo": jax.ShapeDtypeStruct((4 * WIDTH, WIDTH), jnp.float32),
}


def rows(step: int, index: int, count: int) -> dict[str, np.ndarray]:
    """This process's block of the global batch of a step."""
    tokens = np.random.default_rng(step).integers(0, VOCAB, (ROWS, 6), dtype=np.int32)
    return {"tokens": np.split(tokens, count)[index]}


def main(directory: str, fsdp: str, tensor: str, steps: str, *options: str) -> None:
    initialize_distributed(timeout=60)
    mesh = make_mesh(MeshConfig(fsdp=int(fsdp), tensor=int(tensor)))
    layout = data_layout(mesh)
    print(describe(mesh)["summary"], f"rows {layout.index} of {layout.count}", flush=True)
    placed = shardings(SHAPES, AXES, mesh)
    pin = constrain(mesh)

    def init():
        keys = jax.random.split(jax.random.key(0), len(SHAPES))
        return {n: jax.random.normal(k, s.shape) / 4 for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}

    def loss(params, tokens):
        hidden = pin(params["table"][tokens], ("batch", "length", "embed"))
        hidden = hidden + pin(jax.nn.relu(hidden @ params["wi"]), ("batch", "length", "mlp")) @ params["wo"]
        logits = pin(hidden @ params["table"].T, ("batch", "length", "vocab"))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

    def step(params, batch):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, batch["tokens"]))

    run = jax.jit(step, in_shardings=(placed, batch_sharding(mesh)), out_shardings=placed, donate_argnums=0)
    params = jax.jit(init, out_shardings=placed)()
    number = 0
    with Checkpointer(directory) as checkpoints:
        while number < int(steps):
            number += 1
            params = run(params, global_batch(rows(number, layout.index, layout.count), mesh))
            if preempted(number):
                break
            if options:
                time.sleep(0.05)
                print(f"step {number}", flush=True)
        checkpoints.save(number, {"params": params}, {layout.index: f"after {number}".encode()})
    print(f"stopped at {number}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
