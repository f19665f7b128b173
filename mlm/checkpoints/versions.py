"""Which software and machine made a run."""

import importlib.metadata
import platform
import sys

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Name -> version of Python, this project, the packages that decide about numbers, and the platform."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    found = {"python": sys.version.split()[0], "mlm": version("mlm")}
    return {**found, **{package: version(package) for package in PACKAGES}, "platform": platform.platform()}
