"""Heads and candidates in a step: the same update on a mesh that splits rows, parameters and vocabulary."""

import dataclasses

import pytest

from mlm.models.config import HeadSpec
from mlm.models.specs import EmbeddingSpec
from mlm.parallel import MeshConfig, make_mesh
from tests.training.step_test import assert_same, one_step
from tests.training.toy import MODEL, examples, rows_of

SMALL = {name: dataclasses.replace(stack, repeats=1) for name, stack in MODEL.stacks().items()}
RANKED = {name: dataclasses.replace(stack, embedding=EmbeddingSpec(rank=4)) for name, stack in SMALL.items()}
MODELS = {
    "factorised": dataclasses.replace(MODEL, **RANKED, head=HeadSpec(kind="tied")),
    "codes": dataclasses.replace(MODEL, **SMALL, head=HeadSpec(kind="codes", codes=8, groups=2, bias=True)),
    "two_level": dataclasses.replace(MODEL, **SMALL, head=HeadSpec(kind="two_level", codes=8, rank=4, bias=True)),
    "candidates": dataclasses.replace(MODEL, **SMALL),
}
BATCH = rows_of([[e] for e in examples(4)])


@pytest.mark.parametrize(
    "name", ["candidates", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "candidates")]
)
def test_a_mesh_gives_the_numbers_of_one_device(name):
    change = {"candidates": 56, "neighbours": 4} if name == "candidates" else {}
    want, want_metrics = one_step(BATCH, MODELS[name], **change)
    got, metrics = one_step(BATCH, MODELS[name], make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), **change)
    assert_same(got.params, want.params)
    assert_same(metrics, want_metrics, rtol=1e-4, atol=1e-5)
