"""How long a person waits before anything happens: `import mlm`, `mlm --help`, the first step of the tiny model.

    python bench/startup.py [--repeats 5] [--json FILE]

Every sample is a whole fresh process, timed from its start to its end (the first step: to the moment its loss is on
the host), with nothing compiled before. The median counts. Exit code 1 when a target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FIRST_STEP = """
import jax, numpy as np, optax
from mlm.models.presets import preset
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.trainer import TrainConfig, Trainer
from mlm.types import ROW_FEATURES

mesh = make_mesh(MeshConfig())
trainer = Trainer(preset("tiny"), TrainConfig(steps=1), lambda axes, shapes: optax.adam(1e-3), mesh, languages=4)
batch = {name: np.ones((8, 64), np.float32 if name.endswith("weights") else np.int32) for name in ROW_FEATURES}
state, metrics = trainer.step(trainer.init(), global_batch(batch, mesh))
jax.block_until_ready(metrics)
"""
# name -> (command, target in seconds)
MEASURED = {
    "python, nothing imported": ([sys.executable, "-c", ""], None),
    "import mlm": ([sys.executable, "-c", "import mlm"], 0.3),
    "mlm --help": ([sys.executable, "-m", "mlm", "--help"], 0.5),
    "first step of tiny": ([sys.executable, "-c", FIRST_STEP], 20.0),
}


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command. Raises RuntimeError with its last lines when it fails."""
    # Two threads, the machine of every number in this folder; no cache of compiled programs.
    environment = os.environ | {"OMP_NUM_THREADS": "2", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[:3]} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each command, at least 1")
    parser.add_argument("--json", type=Path, help="write the samples to this file")
    options = parser.parse_args()

    result, missed = {}, False
    print(f"{'seconds':28} {'median':>8} {'fastest':>8} {'slowest':>8} {'target':>8}")
    for name, (command, target) in MEASURED.items():
        seconds(command)  # fills the file cache
        samples = [seconds(command) for _ in range(options.repeats)]
        median = statistics.median(samples)
        verdict = "" if target is None else "met" if median <= target else "MISSED"
        missed |= verdict == "MISSED"
        shown = "" if target is None else f"{target:.1f}"
        print(f"{name:28} {median:8.3f} {min(samples):8.3f} {max(samples):8.3f} {shown:>8} {verdict}", flush=True)
        result[name] = {"median": median, "target": target, "samples": samples}
    text = json.dumps({"startup_seconds": result}, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
