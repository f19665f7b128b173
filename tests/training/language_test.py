"""What is kept by target language, in a step: the same update on any mesh; each language its own."""

import dataclasses

import jax
import numpy as np
import pytest

from mlm.models.families import language_aware
from mlm.parallel import MeshConfig, make_mesh
from mlm.training.trainer import TrainConfig, Trainer
from tests.training.step_test import assert_same, one_step, sgd
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of

ONE_LAYER = {name: dataclasses.replace(stack, repeats=1) for name, stack in MODEL.stacks().items()}
AWARE = language_aware(
    dataclasses.replace(MODEL, **ONE_LAYER), languages=LANGUAGES, norms=True, bridge=True, offsets=("language",)
)
BATCH = rows_of([[a, b] for a, b in zip(examples(8), examples(8, seed=1), strict=True)])


@pytest.fixture(scope="module")
def alone():
    return one_step(BATCH, AWARE)


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"data": 4, "expert": 2}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_any_mesh_gives_the_numbers_of_one_device(alone, sizes):
    got, metrics = one_step(BATCH, AWARE, make_mesh(MeshConfig(**sizes)))
    assert_same(got.params, alone[0].params)
    assert_same(metrics, alone[1], rtol=1e-4, atol=1e-5)


def test_a_step_moves_the_matrices_of_the_languages_it_saw(alone):
    """Identities at first; language 0 is no target's."""
    moved = np.abs(alone[0].params["bridge"]["matrices"] - np.eye(MODEL.d_model)).max((1, 2)) > 1e-5
    assert np.flatnonzero(moved).tolist() == sorted(set(BATCH["decoder_language_ids"].ravel()) - {0})


def test_data_with_more_languages_than_the_model_is_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match=f"languages={LANGUAGES} language ids, but the data has 9: set languages=9"):
        Trainer(AWARE, TrainConfig(steps=1), sgd, mesh, 9)
