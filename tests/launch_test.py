"""`launch/local/run.sh N … mlm train`: several processes train what one process trains, and only one of them talks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm.checkpoints import Checkpointer
from mlm.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch" / "local" / "run.sh"
STEPS = 4
OVERRIDES = {
    "MIXTURE": "tatoeba.denoise.fr",
    "run.report": "False",
    "run.evaluation_rows": "8",
    "data.inputs_length": "32",
    "data.targets_length": "16",
    "data.batch_size": "8",
    "data.shards": "2",  # at least one for each process
    "checkpoints.every_steps": "2",
    "loop.log_every": "1",
    "train.steps": str(STEPS),
    "schedule.warmup_steps": "1",  # so that four steps move the parameters far
}


def launch(processes: int, devices: int, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLM_", "JAX_", "XLA_", "SLURM_"))
    }
    values = [f"{name}={value}" for name, value in OVERRIDES.items()]
    return subprocess.run(
        [
            *[LAUNCH, str(processes), "-d", str(devices), "-l", folder / "logs", "--"],
            *[
                sys.executable,
                "-m",
                "mlm",
                "train",
                "--gin_file=gin/runs/quickstart.gin",
                f"--run_dir={folder / 'run'}",
            ],
            *[argument for value in (*values, *overrides) for argument in ("--set", value)],
        ],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def parameters(folder: Path, step: int = STEPS) -> dict:
    checkpoints = Checkpointer(str(folder / "run" / "checkpoints"), read_only=True)
    assert checkpoints.latest() == STEPS
    return jax.device_get(checkpoints.restore_params(step).state)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(1, 4, folder)
    assert done.returncode == 0, done.stderr
    assert "4 cpu devices in 1 process: data=4" in done.stderr
    moved = np.abs(parameters(folder)["head"] - parameters(folder, 2)["head"]).max()
    assert moved > 1e-3  # a thousand times the tolerance below
    return folder


@pytest.mark.parametrize("overrides", [(), ("mesh.fsdp=2", "mesh.tensor=2")])
def test_two_processes_train_the_parameters_of_one(alone, tmp_path, overrides):
    done = launch(2, 2, tmp_path, *overrides)
    other = (tmp_path / "logs" / "process_1.log").read_text()
    assert done.returncode == 0, done.stderr + other
    assert "4 cpu devices in 2 processes" in done.stderr
    got, want = parameters(tmp_path), parameters(alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    # One process talks and writes; the checkpoint is the work of both.
    assert f"complete: {STEPS} steps" in done.stderr
    assert not re.search("set |model:|data:|step|loss|complete", other), other  # Gloo greets from every process
    mine, theirs = (read_metrics(folder / "run") for folder in (tmp_path, alone))
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in theirs]
    np.testing.assert_allclose([r["loss"] for r in mine], [r["loss"] for r in theirs], rtol=1e-5)
    assert [r["languages"]["fr"]["tokens"] for r in mine] == [r["languages"]["fr"]["tokens"] for r in theirs]
