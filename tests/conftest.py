"""The test session is stricter than a run: 8 devices, no silent broadcasting, every annotated shape checked."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # silences TensorFlow's start-up notes; errors still show

import jax
from jaxtyping import install_import_hook

DEVICES = 8

jax.config.update("jax_num_cpu_devices", DEVICES)  # before any JAX operation
jax.config.update("jax_numpy_rank_promotion", "raise")
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
