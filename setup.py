"""Package metadata. Every dependency comes from PyPI as a wheel; none is a git address."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mlm/__init__.py").read_text(encoding="utf-8"), re.M).group(1)

REQUIRES = [
    "absl-py>=2.1,<3",
    "etils[epath]>=1.9.1,<2",
    "flax>=0.12.8,<0.13",
    "gin-config>=0.5,<0.6",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3.5,<0.4",
    "matplotlib>=3.9,<4",
    "ml_dtypes>=0.5,<1",
    "numpy>=2.0,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "regex>=2024.11",
    "rich>=14,<16",
    "sacrebleu>=2.4,<3",
    "safetensors>=0.8,<1",
    # 0.2.3 is generated for protobuf 7 and does not import beside apache-beam, which holds protobuf at 6.
    "sentencepiece>=0.2,<0.2.3",
    "seqio>=0.0.20,<0.1",
    "tensorboardX>=2.6.2,<3",
    "tensorstore>=0.1.76,<0.2",
    # seqio needs tensorflow-text, which needs `tensorflow` by that name: the smaller tensorflow-cpu would come second.
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets>=4.9.10,<5",
    "tensorflow-text>=2.21,<2.22",
]
EXTRAS = {
    "dev": [
        "beartype>=0.22,<0.24",
        "hypothesis>=6.100,<7",
        "ipykernel>=6.29,<8",
        "mypy>=2.4,<2.5",
        "nbclient>=0.10,<0.12",
        "nbformat>=5.10,<6",
        "pytest>=9,<10",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.17.5,<0.18",
    ],
    "cache": ["apache-beam>=2.77,<3"],
    "parity": [
        "ctranslate2>=4.8,<5",
        "torch==2.13.*",
        "transformers>=5.20,<6",
    ],
}

setup(
    name="mlm",
    version=VERSION,
    description="Pretrain multilingual encoder-decoder and mixture-of-experts language models in JAX.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.14",  # tensorflow-text has wheels for these only
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mlm = mlm.cli.main:console"]},
    # gin/ stays at the top of the checkout, where users look for it; in the wheel it is mlm/gin/ (see mlm/shipped.py).
    packages=[*find_packages(include=["mlm", "mlm.*", "tasks", "tasks.*"]), "mlm.gin"],
    package_dir={"mlm.gin": "gin"},
    package_data={
        "mlm.gin": ["**/*.gin", "*.md"],
        "mlm": ["**/*.tsv", "**/*.gz", "**/*.md", "**/*.model"],
        "tasks": ["**/*"],
    },
    exclude_package_data={"": ["*.pyc"]},
    include_package_data=False,
    zip_safe=False,
)
