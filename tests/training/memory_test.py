"""Memory told from shapes is what arrays on devices really take."""

import jax
import pytest

from mlm.models.presets import preset
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, abstract_mesh, make_mesh, stand_ins
from mlm.training.memory import abstract_batch, device_bytes, state_memory, step_memory
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer

MESH = MeshConfig(data=1, fsdp=4, tensor=2)
CONFIG = preset("tiny", dropout=0.1)
ADAMW = make_optimizer("adamw", learning_rate=1e-3)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(CONFIG, TrainConfig(steps=1), ADAMW, make_mesh(MESH, stand_ins(8)), languages=1)


def held(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_a_state_takes_what_was_told_without_devices(trainer):
    state = trainer.init()
    told = state_memory(Transformer(CONFIG), ADAMW, abstract_mesh(MESH, 8))
    assert told == (held(state.params), held(state.optimizer), held(state.params))
    # Split over 8 devices, but for norms (over 4) and position tables: a little more than an eighth.
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert whole / 8 < told.parameters < whole / 7


def test_a_compiled_step_takes_state_and_batch_and_more(trainer):
    batch = abstract_batch(8, 16, 8, trainer.mesh)
    memory = step_memory(trainer, batch)
    read = {name: x for name, x in batch.items() if name not in ("encoder_positions", "decoder_task_ids")}
    assert memory.arguments == device_bytes(trainer.abstract) + device_bytes(read)
    assert memory.temporaries > device_bytes(trainer.abstract.params)  # the gradients, at least


def test_a_mesh_larger_than_this_machine_needs_a_new_process():
    with pytest.raises(ValueError, match=r"jax has started with 8 devices, and 9 are asked for"):
        stand_ins(9)
