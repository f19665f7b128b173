"""Several real processes, started as a user would start them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm.checkpoints import Checkpointer

ROOT = Path(__file__).parents[2]
LAUNCH = str(ROOT / "launch" / "local" / "run.sh")
TOY = str(Path(__file__).with_name("toy_run.py"))


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLM_", "JAX_", "SLURM_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def launch(processes: int, devices: int, logs: Path, *command: str, timeout: int = 120) -> subprocess.CompletedProcess:
    arguments = [LAUNCH, str(processes), "-d", str(devices), "-l", str(logs), *command]
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Parameters and output of 1 process with 4 devices."""
    directory = tmp_path_factory.mktemp("alone")
    done = launch(1, 4, directory / "logs", sys.executable, TOY, str(directory / "run"), "2", "2", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "4 cpu devices in 1 process: data=1 fsdp=2 expert=1 tensor=2 rows 0 of 1"
    return restored(directory / "run")


def restored(directory: Path) -> dict:
    found = Checkpointer(str(directory), read_only=True).restore_params()
    assert found.step == 3
    return jax.tree.map(np.asarray, found.state)


# fsdp and tensor of 2 processes × 2 devices: parameters split over processes, and tensors split over processes
@pytest.mark.parametrize(("fsdp", "tensor", "blocks"), [("2", "2", 2), ("1", "4", 1)])
def test_two_processes_give_the_parameters_of_one(alone, tmp_path, fsdp, tensor, blocks):
    done = launch(2, 2, tmp_path / "logs", sys.executable, TOY, str(tmp_path / "run"), fsdp, tensor, "3")
    assert done.returncode == 0, done.stderr + (tmp_path / "logs" / "process_1.log").read_text()
    assert "in 2 processes" in done.stdout
    assert f"rows 0 of {blocks}" in done.stdout
    assert f"rows {blocks - 1} of {blocks}" in (tmp_path / "logs" / "process_1.log").read_text()
    assert not re.search("error|traceback|warning", done.stderr, re.IGNORECASE), done.stderr
    # what two processes saved, one process restores
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), restored(tmp_path / "run"), alone)
    wanted = {"params": {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one()) for n, x in alone.items()}}
    found = Checkpointer(str(tmp_path / "run"), read_only=True).restore(None, wanted)
    assert found.data_states == dict.fromkeys(range(blocks), b"after 3")


def one():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_sigterm_to_the_launcher_stops_all_processes_at_one_step(tmp_path):
    arguments = [LAUNCH, "2", "-d", "2", "-l", str(tmp_path / "logs"), sys.executable, TOY, str(tmp_path / "run")]
    process = subprocess.Popen(
        [*arguments, "2", "2", "100000", "--slowly"], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3"):
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate(timeout=60)
    stopped = re.findall(r"stopped at (\d+)", output + (tmp_path / "logs" / "process_1.log").read_text())
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]
    assert process.returncode == 0
    assert Checkpointer(str(tmp_path / "run"), read_only=True).latest() == int(stopped[0])


def test_a_failing_process_ends_the_others_and_gives_its_exit_code(tmp_path):
    script = 'if [ "$MLM_PROCESS_ID" = 1 ]; then exit 7; fi; sleep 60'
    done = launch(2, 1, tmp_path, "bash", "-c", script, timeout=20)
    assert done.returncode == 7
    assert "a process ended with code 7" in done.stderr


def test_the_launcher_explains_itself(tmp_path):
    done = launch(2, 1, tmp_path)
    assert done.returncode == 2
    assert "launch/local/run.sh N [-d DEVICES]" in done.stderr
