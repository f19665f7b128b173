"""A model passes through in blocks: peak memory is that of the largest tensor, not of the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MiB = 1 << 20
ROWS, WIDTH, LAYERS = 65_536, 512, 3  # the table: 128 MiB; every feed-forward matrix 32 MiB, 18 of them
SHARD = 160 * MiB
LARGEST = ROWS * WIDTH * 4
MODEL = 2 * LARGEST + LAYERS * 2 * 3 * 32 * MiB

SCRIPT = """
import sys, threading, time
from pathlib import Path
import numpy as np
from mlm.checkpoints.streaming import StoredParams
from mlm.interop import huggingface
from mlm.models.families import t5_style

folder, mode = Path(sys.argv[1]), sys.argv[2]
config = t5_style(vocab_size={rows}, d_model={width}, d_ff=16384, heads=2, head_dim=8, layers=({layers}, {layers}))
huggingface.plan(config, huggingface.FAMILIES["t5"].rules(config))

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

def start():  # the peak so far is that of the imports
    open("/proc/self/clear_refs", "w").write("5")
    return resident()

if mode == "import":
    before = start()
    huggingface.import_params(huggingface.open_published(folder / "hf"), folder / "checkpoints")
elif mode == "export":
    stored = StoredParams(folder / sys.argv[3])
    (folder / "out").mkdir(exist_ok=True)
    before = start()
    huggingface.export_params(stored, config, folder / "out", shard_bytes={shard})
print("PEAK", resident() - before)
"""

WRITE = """
import sys
from pathlib import Path
import jax, numpy as np
from mlm.checkpoints import Checkpointer
from mlm.interop import huggingface
from mlm.interop.files import write_tensors
from mlm.models.families import t5_style
from mlm.models.transformer import Transformer
import json

folder = Path(sys.argv[1])
config = t5_style(vocab_size={rows}, d_model={width}, d_ff=16384, heads=2, head_dim=8, layers=({layers}, {layers}))
family, content = huggingface.describe(config)
pieces = huggingface.plan(config, family.rules(config))
(folder / "hf").mkdir()
(folder / "hf" / "config.json").write_text(json.dumps({{**content, "model_type": family.name}}))
zeros = lambda b: np.zeros((b.rows.stop - b.rows.start, *b.piece.their_shape[1:]), np.float32)
blocks = lambda p: ((b.rows, zeros(b)) for b in p.blocks())
write_tensors(folder / "hf", {{p.name: p.their_shape for p in pieces}}, ((p.name, blocks(p)) for p in pieces))
trained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), Transformer(config).shapes())
with Checkpointer(str(folder / "trained")) as checkpoints:  # as training writes it: an array is one chunk
    checkpoints.save(0, {{"params": trained}})
"""


def run(script: str, *arguments: str) -> str:
    code = script.format(rows=ROWS, width=WIDTH, layers=LAYERS, shard=SHARD)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("large")
    run(WRITE, str(path))
    return path


def peak(folder: Path, *mode: str) -> int:
    found = int(run(SCRIPT, str(folder), *mode).split("PEAK")[1])
    print(f"{' '.join(mode)}: {found / MiB:.0f} MiB; largest tensor {LARGEST / MiB:.0f}, model {MODEL / MiB:.0f}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_peak_follows_the_largest_tensor(folder):
    assert MODEL > 5 * LARGEST
    assert peak(folder, "import") < 1.3 * LARGEST
    assert peak(folder, "export", "checkpoints") < 1.3 * LARGEST + SHARD
    assert peak(folder, "export", "trained") < 1.3 * LARGEST + SHARD
