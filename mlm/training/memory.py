"""What a training step takes of one device's memory, from shapes and a compilation: no array is made."""

import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from mlm.models.transformer import Transformer
from mlm.parallel import batch_sharding
from mlm.training.trainer import OptimizerFactory, Trainer, abstract_state
from mlm.types import ROW_FEATURES, PyTree


class StateMemory(NamedTuple):
    """Bytes on one device, exact. Gradients are as large as the parameters, held from the backward pass to the update;
    a compiler counts them among its temporaries.
    """

    parameters: int
    optimizer: int
    gradients: int


class StepMemory(NamedTuple):
    """Bytes on one device as the compiler lays them out: state and batch that go in, and all that it holds on the way
    (gradients and activations).
    """

    arguments: int
    temporaries: int


def state_memory(model: Transformer, optimizer: OptimizerFactory, mesh: Mesh | AbstractMesh) -> StateMemory:
    """Of the state of a training run on that mesh, whose devices need not exist.

    Raises ValueError when a dimension of a parameter does not divide over the mesh.
    """
    state = abstract_state(model, optimizer(model.axes(), model.shapes()), mesh, ema=False)
    parameters = device_bytes(state.params)
    return StateMemory(parameters, device_bytes(state.optimizer), parameters)


def device_bytes(abstract: PyTree) -> int:
    """Bytes on one device of arrays that are shapes, types and shardings."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def step_memory(trainer: Trainer, batch: PyTree) -> StepMemory | None:
    """Compiles the step for a batch of arrays or their shapes. None where the compiler does not say."""
    analysis = trainer.step.lower(trainer.abstract, batch).compile().memory_analysis()
    if analysis is None:
        return None
    return StepMemory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)


def abstract_batch(rows: int, source: int, target: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A text-to-text batch of that many rows, in shapes; lengths in tokens."""
    return {
        name: jax.ShapeDtypeStruct(
            (rows, source if name.startswith("encoder") else target),
            "float32" if name == "decoder_loss_weights" else "int32",
            sharding=batch_sharding(mesh),
        )
        for name in ROW_FEATURES
    }
