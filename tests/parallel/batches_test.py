"""Rows of processes become global batches, in order, on time, and refused when they do not divide."""

import jax
import numpy as np
import pytest

from mlm.parallel import DataLayout, MeshConfig, batch_sharding, data_layout, global_batch, make_mesh, prefetch
from mlm.parallel.batches import layout_of


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}, {"expert": 4}, {"replica": 2, "tensor": 4}])
def test_global_batch_holds_the_rows_in_order(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    rows = {"tokens": np.arange(48, dtype=np.int32).reshape(8, 6), "weights": np.ones(8, np.float32)}
    batch = global_batch(rows, mesh)
    np.testing.assert_array_equal(batch["tokens"], rows["tokens"])
    assert batch["tokens"].dtype == np.int32
    parts = 8 // mesh.shape["tensor"]
    assert batch["tokens"].addressable_shards[0].data.shape == (8 // parts, 6)
    assert batch["weights"].sharding == batch_sharding(mesh)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"tokens has 6 rows .* its 8 row blocks; use a multiple of 8 \(nearest: 8\)"):
        global_batch({"tokens": np.zeros((6, 2), np.int32)}, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({0: {0, 1}, 1: {2, 3}, 2: {4, 5}, 3: {6, 7}}, [(0, 4), (1, 4), (2, 4), (3, 4)]),  # data=8
        ({0: {0}, 1: {1}}, [(0, 2), (1, 2)]),  # data=2, tensor=2: tensors inside a process
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor=4: two processes share rows
        ({0: {2, 3}, 1: {0, 1}}, [(1, 2), (0, 2)]),  # a pod whose topology turned the processes round
    ],
)
def test_processes_feed_blocks_in_row_order(rows, expected):
    assert [layout_of(rows, process) for process in sorted(rows)] == [DataLayout(*block) for block in expected]


def test_rows_shared_in_part_are_refused():
    with pytest.raises(ValueError, match=r"overlapping row blocks \[\(0, 1\), \(1, 2\)\]"):
        layout_of({0: {0, 1}, 1: {1, 2}}, 0)


def test_one_process_feeds_everything():
    assert data_layout(make_mesh(MeshConfig(fsdp=2, tensor=2))) == DataLayout(0, 1)


def test_prefetch_runs_ahead_and_reports_the_place_of_each_batch():
    drawn = []

    def rows():
        for i in range(5):
            drawn.append(i)
            yield {"tokens": np.full((8, 1), i, np.int32)}

    batches = prefetch(rows(), make_mesh(MeshConfig()), position=lambda: len(drawn), size=2)
    first, place = next(batches)
    assert len(drawn) == 3  # two are on their way
    assert place == 1
    assert int(first["tokens"][0, 0]) == 0
    assert [(int(b["tokens"][0, 0]), place) for b, place in batches] == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert all(isinstance(x, jax.Array) for x in first.values())
