"""The test session is stricter than a run: 8 devices, every annotated shape checked."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # silences TensorFlow's start-up notes; errors still show

import jax
import pytest
from jaxtyping import install_import_hook

DEVICES = 8

jax.config.update("jax_num_cpu_devices", DEVICES)  # before any JAX operation
jax.config.update("jax_default_matmul_precision", "highest")

# Compiled programs of earlier sessions, for every program that took half a second or more to compile.
cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlm" / "tests"
if not os.access(cache.parent if cache.parent.exists() else Path.home(), os.W_OK):
    cache = Path(tempfile.gettempdir()) / "mlm-tests"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

install_import_hook("mlm", "beartype.beartype")  # before anything imports mlm


def pytest_sessionstart(session):
    """The promise of this file, checked where it could be broken: another plugin may have started JAX before us."""
    assert jax.device_count() == DEVICES, f"{jax.device_count()} devices; JAX started before tests/conftest.py"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run directory with two checkpoints of a tiny random model over bytes; the second also holds a running mean."""
    import jax.numpy as jnp

    from mlm.checkpoints import CheckpointConfig, Checkpointer
    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.data.vocabulary import ByteVocabulary
    from mlm.models.config import to_json
    from mlm.models.families import t5_style
    from mlm.models.transformer import Transformer

    run = RunDirectory(tmp_path_factory.mktemp("runs") / "tiny").create()
    vocabulary = ByteVocabulary(sentinels=100, languages=["en", "fr", "sw", "uk"])
    vocabulary.save(run / "vocabulary.json")
    config = t5_style(vocab_size=vocabulary.vocab_size, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 1))
    run.write_json("model.json", to_json(config))
    data = {"mixture": "tiny.all", "inputs_length": 48, "targets_length": 24, "task_modules": []}
    run.write_json("data.json", {**data, "vocabulary": "vocabulary.json", "vocabulary_digest": vocabulary.digest})
    params = Transformer(config).init(jax.random.key(1))
    with Checkpointer(str(run.checkpoints), CheckpointConfig(keep=2, best_metric="validation/loss")) as checkpointer:
        extra = {"tokens_seen": {"1": 10}}
        checkpointer.save(10, {"params": params}, metrics={"validation/loss": 2.0}, extra=extra)
        mean = jax.tree.map(lambda x: x + jnp.full_like(x, 0.01), params)
        checkpointer.save(20, {"params": params, "ema": mean}, metrics={"validation/loss": 3.0}, extra=extra)
    return run.path
