"""Where the files that travel with the package lie, in a checkout and in an installed wheel alike."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def gin_path() -> Path:
    """The folder that holds models/, objectives/, mixtures/ and runs/."""
    installed = PACKAGE / "gin"  # setup.py puts the checkout's gin/ here
    return installed if installed.is_dir() else PACKAGE.parent / "gin"


def tasks_path() -> Path:
    """The folder of SeqIO registrations: beside `mlm` in a checkout and in site-packages."""
    return PACKAGE.parent / "tasks"


def corpora_path() -> Path:
    """The folder of the text that is shipped with the package."""
    return tasks_path() / "corpora"


def vocabulary_path(name: str) -> Path:
    """The file of a shipped vocabulary; it need not exist."""
    return tasks_path() / "vocabularies" / f"{name}.model"
