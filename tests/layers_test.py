"""Who may import whom, which package is allowed where, and what importing costs.

The tables are the rule. The checks read syntax trees, so an import inside a function or under TYPE_CHECKING counts too.
A file directly under mlm/ is a room of its own name; `mlm/__init__.py` is the room "mlm".
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MLM = ROOT / "mlm"

EVERYONE_MAY_IMPORT = {"types", "registry", "trees", "shipped", "mlm"}
MAY_IMPORT = {
    "types": set(),
    "registry": set(),
    "trees": set(),
    "shipped": set(),
    "sampling": set(),
    "objectives": set(),
    "models": set(),
    "parallel": set(),
    "checkpoints": {"parallel"},
    "data": {"sampling"},
    "decoding": {"models"},
    "training": {"models", "objectives", "parallel", "checkpoints"},
    "evaluation": {"decoding", "models", "parallel", "checkpoints", "objectives"},
    "adaptation": {"models", "sampling", "checkpoints", "training"},
    "interop": {"models", "checkpoints"},
}
MAY_IMPORT["session"] = set(MAY_IMPORT)  # a run's model, vocabulary and tasks, for notebooks and commands
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["mlm"] = {"session"}  # `mlm.load`, which imports nothing before it is called

JAX_ROOMS = {"types", "trees", "models", "objectives", "parallel", "checkpoints", "decoding", "training", "evaluation"}
JAX_ROOMS |= {"adaptation", "interop", "session", "cli"}
ALL = set(MAY_IMPORT)
# package -> rooms that may import it at the top of a file, rooms that may import it inside a function only.
PACKAGES = {
    "numpy": (ALL, set()),
    "jaxtyping": (ALL, set()),
    "jax": (JAX_ROOMS, set()),
    "flax": ({"models", "adaptation", "interop"}, set()),
    "optax": ({"training", "adaptation"}, set()),
    "orbax": ({"checkpoints"}, set()),
    "etils": ({"checkpoints"}, set()),  # paths that may be gs://
    "tensorstore": ({"checkpoints", "interop"}, set()),
    "safetensors": ({"interop"}, set()),
    "ml_dtypes": ({"interop"}, set()),
    "torch": (set(), {"interop"}),
    "transformers": (set(), {"interop"}),
    "tensorflow": ({"data"}, set()),
    "tensorflow_text": ({"data"}, set()),
    "tensorflow_datasets": ({"data"}, set()),
    "seqio": ({"data"}, set()),
    "sentencepiece": ({"data"}, set()),
    "regex": ({"data"}, set()),  # Unicode scripts and graphemes, which re lacks
    "tensorboardX": ({"training"}, set()),
    "sacrebleu": (set(), {"evaluation"}),
    "scipy": (set(), {"evaluation"}),
    "sklearn": (set(), {"evaluation"}),
    "matplotlib": (set(), {"evaluation", "cli"}),
    "gin": ({"cli"}, set()),
    "absl": ({"cli", "checkpoints"}, set()),  # its logging carries what Orbax says
    "rich": ({"cli"}, set()),
}
MAX_LINES = 600


class Import(NamedTuple):
    """One name that a file imports: `module` is dotted and absolute; `inside` says that it stands in a function."""

    line: int
    module: str
    inside: bool


def imports(source: str, module: str) -> Iterator[Import]:
    """The imports of a file of the package `module`: relative ones made absolute, `from a import b` giving `a.b`."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, inside)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", inside)
        within = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, within)

    return visit(ast.parse(source), False)


def room(parts: tuple[str, ...]) -> str:
    """("mlm", "data", "sources") -> "data"; ("mlm",) -> "mlm"."""
    return parts[1] if len(parts) > 1 else "mlm"


def violations(root: Path) -> list[str]:
    """Every import below the package folder `root` (named mlm) that the two tables do not allow, in words."""
    found = []
    rooms = {path.stem for path in root.iterdir() if path.suffix == ".py"} | {
        p.name for p in root.iterdir() if p.is_dir()
    }
    for path in sorted(root.rglob("*.py")):
        parts = ("mlm", *path.relative_to(root).with_suffix("").parts)
        own = room(parts[:-1] if parts[-1] == "__init__" else parts)
        where = path.relative_to(root.parent)
        if own not in MAY_IMPORT:
            found.append(f"{where}: no room {own!r} in MAY_IMPORT of {Path(__file__).name}; give it a line")
            continue
        for line, module, inside in imports(path.read_text(encoding="utf-8"), ".".join(parts[:-1])):
            top, *rest = module.split(".")
            if top in sys.stdlib_module_names:
                continue
            if top == "mlm":
                # `from mlm import __version__` names no room but the package itself.
                other = rest[0] if rest and rest[0] in rooms else "mlm"
                if other != own and other not in MAY_IMPORT[own] | EVERYONE_MAY_IMPORT:
                    found.append(f"{where}:{line}: {own} imports {other}")
            elif top == "tasks":
                if own != "cli":
                    found.append(f"{where}:{line}: {own} imports tasks, which import mlm")
            elif top not in PACKAGES:
                found.append(f"{where}:{line}: {top} is not in PACKAGES of {Path(__file__).name}")
            else:
                anywhere, in_functions = PACKAGES[top]
                if own not in anywhere | in_functions:
                    found.append(f"{where}:{line}: {own} imports {top}")
                elif own not in anywhere and not inside:
                    found.append(f"{where}:{line}: {own} imports {top} outside a function")
            if own == "mlm" and not inside:
                found.append(f"{where}:{line}: `import mlm` imports {module}")
    return found


def test_rooms_import_only_what_the_tables_allow():
    assert violations(MLM) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("models/layers.py", "from mlm.training import loop", "models imports training"),
        ("models/layers.py", "import mlm.data.sources", "models imports data"),
        ("models/layers.py", "from mlm import decoding", "models imports decoding"),
        ("models/layers.py", "from ..objectives import loss", "models imports objectives"),
        ("models/layers.py", "def f():\n    from mlm.cli import main", "models imports cli"),
        ("data/tasks.py", "if TYPE_CHECKING:\n    from mlm.models import config", "data imports models"),
        ("training/loop.py", "import tensorflow as tf", "training imports tensorflow"),
        ("sampling.py", "import jax.numpy as jnp", "sampling imports jax"),
        ("evaluation/scores.py", "import sacrebleu", "evaluation imports sacrebleu outside a function"),
        ("session.py", "import mlm.cli.main", "session imports cli"),
        ("models/layers.py", "import haiku", "haiku is not in PACKAGES"),
        ("data/mixtures.py", "import tasks.declaration", "data imports tasks"),
        ("__init__.py", "from mlm.registry import nearest", "`import mlm` imports"),
        ("helpers.py", "", "no room 'helpers'"),
    ],
)
def test_the_check_can_fail(tmp_path, file, source, message):
    package = tmp_path / "mlm"
    for name in ("training", "data", "decoding", "objectives", "cli", "models", "evaluation"):
        (package / name).mkdir(parents=True)
    (package / file).write_text(source, encoding="utf-8")
    (found,) = violations(package)
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("evaluation/scores.py", "def bleu():\n    import sacrebleu\n"),
        ("evaluation/scores.py", "from ..decoding import loop\nfrom mlm.models.config import ModelConfig\n"),
        ("cli/train.py", "from mlm.data import pipeline\n"),
        ("data/sources.py", "import os.path\nfrom . import other\nfrom mlm import __version__, registry\n"),
        ("__init__.py", "def load(path):\n    from mlm import session\n"),
    ],
)
def test_the_check_lets_the_rest_pass(tmp_path, file, source):
    package = tmp_path / "mlm"
    for name in ("data", "decoding", "cli", "models", "evaluation"):
        (package / name).mkdir(parents=True)
    (package / "registry.py").touch()
    (package / "session.py").touch()
    (package / file).write_text(source, encoding="utf-8")
    assert violations(package) == []


def test_every_package_that_is_imported_is_a_dependency():
    """What a room imports at the top of a file comes with a plain `pip install`."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    (lists,) = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "REQUIRES"]
    declared = {re.split(r"[<>=!\[]", name)[0].lower().replace("-", "_") for name in ast.literal_eval(lists.value)}
    distribution = {"absl": "absl_py", "gin": "gin_config", "orbax": "orbax_checkpoint"}
    used = set()
    for path in MLM.rglob("*.py"):
        for _, module, inside in imports(path.read_text(encoding="utf-8"), "mlm"):
            top = module.split(".")[0]
            if not inside and top in PACKAGES:
                used.add(distribution.get(top, top).lower())
    assert used <= declared, f"add to REQUIRES in setup.py: {sorted(used - declared)}"


def python_files() -> list[Path]:
    folders = ("mlm", "tasks", "tests", "bench", "launch")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_file_says_what_it_is_for_and_stays_short():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no module docstring"
        count = text.count("\n")
        assert count <= MAX_LINES, f"{path.relative_to(ROOT)} has {count} lines; split it below {MAX_LINES}"
        assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, f"{path}: name it for what it does"


def test_nothing_is_left_for_later():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]))
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not words.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_tests_mirror_the_package():
    """tests/<room>/<file>_test.py stands for a room that exists."""
    for path in (ROOT / "tests").rglob("*_test.py"):
        for part in path.relative_to(ROOT / "tests").parts[:-1]:
            assert (MLM / part).is_dir() or (ROOT / part).is_dir(), f"{path.relative_to(ROOT)}: no room {part!r}"


def loaded(statement: str, *packages: str) -> set[str]:
    """Which of the packages a fresh Python has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('LOADED', *[p for p in {packages!r} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


DATA_PACKAGES = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "sentencepiece", "gin")


def modules_below(name: str) -> list[str]:
    """Every module of a room: "mlm.models", "mlm.models.attention", …"""
    folder = ROOT.joinpath(*name.split("."))
    found = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    return sorted({".".join(p[:-1] if p[-1] == "__init__" else p) for p in found})


def test_what_stands_after_the_host_batch_loads_no_tensorflow():
    """One fresh process imports every module of every such room; other tests cannot hide what it loads."""
    rooms = sorted(JAX_ROOMS - {"types", "trees", "session", "cli"})
    modules = [module for room in rooms for module in modules_below(f"mlm.{room}")]
    assert modules
    assert loaded("import " + ", ".join(modules), *DATA_PACKAGES) == set()


def test_importing_mlm_loads_neither_jax_nor_numpy():
    assert loaded("import mlm", "jax", "numpy", "flax", "optax", *DATA_PACKAGES) == set()


def test_the_command_line_starts_without_any_of_them():
    """`mlm --help` answers at once; a subcommand's module is imported only when it runs."""
    assert loaded("import mlm.cli.main", "jax", "numpy", "flax", "optax", "rich", *DATA_PACKAGES) == set()


def test_the_loading_check_can_fail():
    assert loaded("import numpy", "numpy", "jax") == {"numpy"}
