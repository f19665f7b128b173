"""Saves that end badly: killed processes, and file systems that refuse."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from mlm.checkpoints import Checkpointer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
PROGRAM = str(Path(__file__).with_name("endless_saves.py"))


def run_until_killed(directory: Path, first: int, seconds: float) -> tuple[int, str]:
    """kill -9 some time after the save of step `first` began. The last step begun, and what stood on stderr."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, str(directory)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(first):
            break
    time.sleep(seconds)
    process.kill()
    output, errors = process.communicate(timeout=60)
    return max([first, *map(int, output.split())]), errors


def test_kill_9_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path):
    moments = random.Random(0)
    good = 0
    for _ in range(5):
        begun, errors = run_until_killed(tmp_path, good + 3, moments.uniform(0.0, 0.5))
        assert errors == ""
        checkpoints = Checkpointer(str(tmp_path), read_only=True)
        known = checkpoints.steps()
        # `begun` is printed before its save waits for the one before, which waited for the one before that
        assert begun - 2 <= known[-1] <= begun
        assert known[-1] > good
        for step in known:
            found = checkpoints.restore(step, {"params": shapes()})
            assert found.skipped == ()
            assert all((np.asarray(x) == step).all() for x in jax.tree.leaves(found.state))
            assert found.data_states == {0: str(step).encode()}
            assert found.extra == {"step": step}
        good = known[-1]
    with Checkpointer(str(tmp_path)) as again:  # a run that goes on removes what the killed one left behind
        again.save(good + 100, {"params": jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes())})
    assert all(path.name.isdigit() for path in tmp_path.iterdir()), list(tmp_path.iterdir())


def shapes() -> dict:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        "w": jax.ShapeDtypeStruct((512, 512), np.float32, sharding=one),
        "b": jax.ShapeDtypeStruct((7,), np.int32, sharding=one),
    }


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from mlm.checkpoints import Checkpointer, CheckpointError

with Checkpointer(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"params": {"w": jnp.ones((8, 8))}})
    checkpoints.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limit[1]))
    try:
        checkpoints.save(2, {"params": {"w": jnp.ones((1024, 1024))}})
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
    print(checkpoints.steps(), checkpoints.latest())
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints.save(3, {"params": {"w": jnp.ones((1024, 1024))}})
    checkpoints.wait()
    print(checkpoints.steps())
"""


def test_a_save_that_the_file_system_refuses_is_one_error_and_costs_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: both make writes fail half-way."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    message, after, later = done.stdout.splitlines()
    assert message == (
        f"{tmp_path}: checkpoint of step 2 could not be written, the disk is full: free some space or lower `keep` "
        "(File too large). Earlier checkpoints there are untouched"
    )
    assert after == "[1] 1"
    assert later == "[1, 3]"
    assert done.stderr == ""  # Orbax's own account of the failure stays off the screen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
