"""Checkpoints come back bit by bit, on any mesh; damage of any kind is noticed, and the one before it is used."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.checkpoints import CheckpointConfig, Checkpointer, CheckpointError, CorruptCheckpoint
from mlm.parallel import MeshConfig, make_mesh, shardings


class State(NamedTuple):
    step: jax.Array
    params: dict
    moments: tuple


AXES = {"table": ("vocab", "embed"), "layers": {"wi": ("layers", "embed", "mlp")}}


def make_state(seed: int, mesh=None) -> State:
    """Parameters in f32, first moments in bf16, on a mesh or on the first device."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "table": jax.random.normal(keys[0], (32, 8)),
        "layers": {"wi": jax.random.normal(keys[1], (3, 8, 16))},
    }
    state = State(jnp.int32(seed), params, (jax.tree.map(lambda x: (x / 3).astype(jnp.bfloat16), params), ()))
    if mesh is None:
        return jax.device_put(state, jax.devices()[0])
    return jax.device_put(state, placed(state, mesh))


def placed(state: State, mesh) -> State:
    parts = shardings(state.params, AXES, mesh)
    return State(NamedSharding(mesh, P()), parts, (parts, ()))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_identical(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, made by make_state(step)."""
    with Checkpointer(str(tmp_path), CheckpointConfig(keep=5)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {0: b"zero", 1: bytes([step])}, extra={"epoch": step})
    return tmp_path


def largest_array_file(directory: Path) -> Path:
    return max((p for p in (directory / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_everything_comes_back_bit_by_bit(tmp_path):
    state = make_state(7)
    extra = {"tokens": np.array([2**40, 5]), "count": np.int64(2**50), "rate": np.float32(0.1), "name": "x", "n": [1]}
    with Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.save(7, state, {0: b"\x00\xff", 3: b""}, {"loss": 1.5}, extra)
        assert not checkpoints.save(7, state)  # already there
        restored = checkpoints.restore(None, abstract(state))
    assert restored.step == 7
    assert_identical(restored.state, state)
    assert restored.data_states == {0: b"\x00\xff", 3: b""}
    assert restored.skipped == ()
    assert restored.extra["tokens"].dtype == np.int64
    np.testing.assert_array_equal(restored.extra["tokens"], extra["tokens"])
    assert restored.extra["count"] == np.int64(2**50)
    assert isinstance(restored.extra["count"], np.int64)
    assert restored.extra["rate"] == np.float32(0.1)
    assert (restored.extra["name"], restored.extra["n"]) == ("x", [1])
    assert checkpoints.record(7)["metrics"] == {"loss": 1.5}
    assert checkpoints.record()["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("sizes", [None, {"data": 8}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_saved_on_one_mesh_restored_on_another(tmp_path, sizes):
    state = make_state(1, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        target = make_state(2, sizes and make_mesh(MeshConfig(**sizes)))
        restored = checkpoints.restore(None, abstract(target)).state
    assert_identical(restored, state)
    assert restored.params["table"].sharding == target.params["table"].sharding


def test_training_goes_on_while_the_checkpoint_is_written(tmp_path):
    """The step donates its buffers; the checkpoint must hold the values of the moment of saving."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + x.dtype.type(1), state), donate_argnums=0)
    state = {"params": jax.device_put({"w": jnp.arange(2**20, dtype=jnp.float32)}, jax.devices()[0])}
    target = abstract(state)
    with Checkpointer(str(tmp_path)) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state)
            for _ in range(5):
                state = step(state)
        for number, added in ((1, 0), (2, 5)):
            found = checkpoints.restore(number, target).state["params"]["w"]
            np.testing.assert_array_equal(found, np.arange(2**20, dtype=np.float32) + added)


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    config = CheckpointConfig(keep=2, keep_every_steps=4, best_metric="loss", best_mode="min")
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.0, 6: 9.0, 7: 8.0}
    with Checkpointer(str(tmp_path), config) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), metrics={"loss": loss})
        checkpoints.wait()
        # newest two: 6, 7; multiples of 4: 4; lowest loss: 2
        assert checkpoints.steps() == [2, 4, 6, 7]
        assert checkpoints.best() == 2
    with Checkpointer(str(tmp_path), config) as again:  # the metrics are in the checkpoints
        assert again.best() == 2
        again.save(8, make_state(8))  # without metrics: kept for its age only
        again.wait()
        assert again.steps() == [2, 4, 7, 8]
        with pytest.raises(CheckpointError, match="best_metric='loss' is not among the metrics; known: accuracy"):
            again.save(9, make_state(9), metrics={"accuracy": 1.0})
    assert (
        Checkpointer(str(tmp_path), CheckpointConfig(best_metric="loss", best_mode="max"), read_only=True).best() == 7
    )


def test_an_old_checkpoint_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    from mlm.checkpoints import sidecar

    finalize, seen = sidecar.SidecarHandler.finalize, []

    def watched(self, directory):
        seen.append(sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()))
        finalize(self, directory)

    monkeypatch.setattr(sidecar.SidecarHandler, "finalize", watched)
    with Checkpointer(str(tmp_path), CheckpointConfig(keep=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    assert seen == [[], ["1"]]
    assert checkpoints.steps() == [2]


def truncate(directory: Path):
    path = largest_array_file(directory)
    path.write_bytes(path.read_bytes()[:-7])


def flip_bytes(directory: Path):
    """At three places: what stands between the arrays of a file may not matter."""
    path = largest_array_file(directory)
    content = bytearray(path.read_bytes())
    for quarter in (1, 2, 3):
        content[len(content) * quarter // 4] ^= 0x40
    path.write_bytes(bytes(content))


def remove_a_file(directory: Path):
    largest_array_file(directory).unlink()


def garble_a_position(directory: Path):
    (directory / "run" / "shard_00001.bin").write_bytes(b"?")


def cut_the_record(directory: Path):
    (directory / "run" / "files.json").write_text("{")


def empty_it(directory: Path):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes instead of"),
        (flip_bytes, "arrays differ from what was saved|arrays cannot be read"),
        (remove_a_file, "is missing"),
        (garble_a_position, r"run/shard_00001.bin differs from what was saved \(checksum\)"),
        (cut_the_record, r"run/files.json cannot be read \(JSONDecodeError"),
        (empty_it, r"run/files.json cannot be read \(FileNotFoundError"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(saved, caplog, damage, reason):
    damage(saved / "3")
    with Checkpointer(str(saved), CheckpointConfig(keep=5)) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match=r"checkpoint .*3 is damaged"):
            checkpoints.restore(3, abstract(make_state(0)))
        assert checkpoints.steps() == [1, 2, 3]  # asking for one by name moves nothing
        with caplog.at_level(logging.WARNING, "mlm"):
            restored = checkpoints.restore(None, abstract(make_state(0)))
        assert restored.step == 2
        assert_identical(restored.state, make_state(2))
        assert restored.extra == {"epoch": 2}
        ((step, why),) = restored.skipped
        assert step == 3
        assert re.search(reason, why)
        assert "3 is damaged" in caplog.text
        assert "using step 2" in caplog.text
        assert checkpoints.steps() == [1, 2]
        assert (saved / "3.corrupt").exists()
        assert checkpoints.save(3, make_state(3))  # the way is free
        checkpoints.wait()
        assert checkpoints.restore(None, abstract(make_state(0))).step == 3


def test_nothing_intact_is_an_error_and_nothing_is_moved(saved):
    for step in ("1", "2", "3"):
        truncate(saved / step)
    with Checkpointer(str(saved)) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match=r"every checkpoint in .* is damaged .*3: .*; 2: .*; 1: "):
            checkpoints.restore(None, abstract(make_state(0)))
        assert checkpoints.steps() == [1, 2, 3]


def test_another_model_is_an_error_and_no_damage(saved):
    state = make_state(0)
    wanted = abstract(state._replace(params={"table": state.params["table"].T, "new": state.params["table"]}))
    with Checkpointer(str(saved)) as checkpoints:
        with pytest.raises(CheckpointError, match="holds another state") as info:
            checkpoints.restore(None, wanted)
        assert checkpoints.steps() == [1, 2, 3]
    text = str(info.value)
    assert "params/new: wanted, but not in the checkpoint" in text
    assert "params/layers/wi: in the checkpoint, but not wanted" in text
    assert "params/table: saved as float32[32, 8], wanted as float32[8, 32]" in text


def test_parameters_alone_without_knowing_the_optimizer(saved):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    checkpoints = Checkpointer(str(saved), read_only=True)
    plain = checkpoints.restore_params()
    assert plain.step == 3
    assert_identical(plain.state, make_state(3).params)
    wanted = make_state(0, mesh).params
    sharded = checkpoints.restore_params(2, abstract(wanted)).state
    assert_identical(sharded, make_state(2).params)
    assert sharded["table"].sharding == wanted["table"].sharding
    with pytest.raises(CheckpointError, match="holds no 'ema'; known: moments, params, step"):
        checkpoints.restore_params(subtree="ema")
    with pytest.raises(CheckpointError, match="holds other parameters"):
        checkpoints.restore_params(2, {"table": abstract(wanted)["table"]})


def test_reading_beside_a_running_training_changes_nothing(saved):
    (saved / "4.orbax-checkpoint-tmp").mkdir()
    truncate(saved / "3")
    before = sorted(p.name for p in saved.iterdir())
    checkpoints = Checkpointer(str(saved), read_only=True)
    assert checkpoints.restore(None, abstract(make_state(0))).step == 2
    assert sorted(p.name for p in saved.iterdir()) == before
    with pytest.raises(CheckpointError, match="read_only"):
        checkpoints.save(9, make_state(9))


def test_leftovers_of_a_killed_save_are_ignored_and_removed(saved):
    leftover = saved / "4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", leftover)
    with Checkpointer(str(saved)) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(5, make_state(5))
    assert not leftover.exists()


def test_missing_checkpoints_are_clear_errors(saved, tmp_path_factory):
    checkpoints = Checkpointer(str(saved), read_only=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 in .*; complete checkpoints: 1, 2, 3"):
        checkpoints.restore(9, abstract(make_state(0)))
    empty = Checkpointer(str(tmp_path_factory.mktemp("empty")), read_only=True)
    assert empty.latest() is None
    assert empty.best() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        empty.restore(None, abstract(make_state(0)))


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="a file stands where a directory is needed"):
        Checkpointer(str(tmp_path / "file" / "checkpoints"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"params": {"n": 3}}, "params/n is a int: a state holds arrays; put the rest in `extra`"),
        ({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, "two arrays of the state share the path 'a/b'"),
        ({"key": jax.random.key(0)}, "store jax.random.key_data"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused(tmp_path, state, message):
    with Checkpointer(str(tmp_path)) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(1, state)


def test_nonsense_configurations_are_refused():
    with pytest.raises(ValueError, match="keep=0: must be at least 1"):
        CheckpointConfig(keep=0)
    with pytest.raises(ValueError, match="best_mode='lowest'"):
        CheckpointConfig(best_mode="lowest")
    assert [step for step in range(7) if Checkpointer.due(_config(3), step)] == [3, 6]


def _config(every):
    return type("Holder", (), {"config": CheckpointConfig(every_steps=every)})()


def test_files_are_plain(saved):
    """Nothing in a checkpoint needs Python objects to be read."""
    names = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert not names & {".pkl", ".pickle", ".npy"}
    record = json.loads((saved / "3" / "run" / "record.json").read_text())
    assert record["leaves"]["params/table"][:2] == [[32, 8], "float32"]
