"""Checkpoints written in blocks are those that `Checkpointer` writes, and blocks are read from either."""

import numpy as np
import pytest

from mlm.checkpoints import Checkpointer, CheckpointError, CorruptCheckpoint
from mlm.checkpoints.content import block_sum, sums
from mlm.checkpoints.streaming import Layout, StoredParams, write_params

TABLE = np.arange(60, dtype=np.float32).reshape(5, 4, 3) - 7
NORM = np.array([1.0, -0.0, 1e-30], np.float32)
LAYOUTS = {"a/table": Layout((5, 4, 3), (1, 2, 3)), "norm": Layout((3,), (3,))}


def blocks():
    for layer in range(5):
        for start in (0, 2):
            index = (layer, slice(start, start + 2), slice(0, 3))
            yield "a/table", index, TABLE[index]
    yield "norm", (slice(0, 3),), NORM


def read(stored: StoredParams, leaf: str) -> list[np.ndarray]:
    found = [stored.read(leaf, index) for name, index, _ in blocks() if name == leaf]
    stored.finish(leaf)
    return found


def test_blocks_make_the_checkpoint_that_is_saved_whole(tmp_path):
    write_params(tmp_path / "blocks", 0, LAYOUTS, blocks(), {"note": 1})
    with Checkpointer(str(tmp_path / "whole")) as whole:
        whole.save(0, {"params": {"a": {"table": TABLE}, "norm": NORM}})
        whole.wait()
        want = whole.record()["leaves"]
    with Checkpointer(str(tmp_path / "blocks")) as checkpoints:
        restored = checkpoints.restore_params()
        assert checkpoints.record()["leaves"] == want
        assert (restored.step, restored.extra, checkpoints.steps()) == (0, {"note": 1}, [0])
        np.testing.assert_array_equal(restored.state["a"]["table"], TABLE)
        assert restored.state["norm"].tobytes() == NORM.tobytes()
    for folder in ("blocks", "whole"):
        stored = StoredParams(tmp_path / folder)
        assert stored.leaves == {"a/table": (5, 4, 3), "norm": (3,)}
        for got, (_, _, values) in zip(read(stored, "a/table"), blocks(), strict=False):
            np.testing.assert_array_equal(got, values)


def test_sums_of_blocks_add_up_to_that_of_the_array():
    whole = int(sums({"x": TABLE})["x"])
    parts = [block_sum(TABLE[i : i + 1, s : s + 2], (i, s, 0), TABLE.shape) for i in range(5) for s in (0, 2)]
    assert sum(parts) % 2**32 == whole


def test_what_was_not_written_whole_is_no_checkpoint(tmp_path):
    def dies():
        yield next(blocks())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_params(tmp_path, 0, LAYOUTS, dies())
    assert Checkpointer(str(tmp_path), read_only=True).steps() == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        StoredParams(tmp_path)
    write_params(tmp_path, 0, LAYOUTS, blocks())
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_blocks_that_are_not_what_was_saved_are_refused(tmp_path):
    write_params(tmp_path, 0, LAYOUTS, blocks())
    stored = StoredParams(tmp_path)
    stored.read("norm", (slice(0, 3),))
    stored._saved["norm"][2] ^= 1
    with pytest.raises(CorruptCheckpoint, match="norm differs from what was saved"):
        stored.finish("norm")
    with pytest.raises(CheckpointError, match=r"holds no 'ema'; known: params"):
        StoredParams(tmp_path, subtree="ema")
    with pytest.raises(CheckpointError, match="complete checkpoints: 0"):
        StoredParams(tmp_path, 3)
    largest = max((p for p in (tmp_path / "0").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match="bytes instead of"):
        StoredParams(tmp_path)
