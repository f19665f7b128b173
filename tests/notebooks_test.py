"""The notebooks run from top to bottom, define nothing that belongs in the package, and hold their outputs."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 12  # lines of a function in a notebook; more belongs in mlm/


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts(cell) -> list[str]:
    """What a cell has printed or shown as text."""
    return [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs]


def test_there_is_one_for_each_of_the_first_steps():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_tell_nothing_of_the_machine(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 2
    for text in (text for cell in cells for text in texts(cell)):
        assert not re.search(r"/(home|root|tmp|work|Users)/|\x1b|Traceback|[EW]0000", text), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_define_nothing_that_belongs_in_the_package(path):
    for cell in code_cells(path):
        if cell.source.startswith("%%writefile"):
            continue
        for node in ast.walk(ast.parse(_python(cell.source))):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST, node.name


def _python(source: str) -> str:
    """A cell without its magics and shell commands, which may go on over several lines."""
    lines = re.sub(r"\\\n\s*", "", source).splitlines()
    return "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)


def execute(path: Path, folder: Path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [text for cell in notebook.cells if cell.cell_type == "code" for text in texts(cell)]


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch, tmp_path):
    """The package is found, one device, no display."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("MLM_RUN", raising=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_task_is_registered_and_looked_at(tmp_path):
    shown = "\n".join(execute(NOTEBOOKS[0], tmp_path))
    assert "<extra_id_0>" in shown
    assert "inputs   <2fr> " in shown
    assert "dry run: " in shown
    assert "nothing was trained" in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "ipython"]  # it writes in a folder of its own


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_policies_are_drawn(tmp_path):
    shown = execute(NOTEBOOKS[1], tmp_path)
    assert sum("Figure" in text for text in shown) == 2
    assert any("UniMax cannot spend a budget" in text for text in shown)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_checkpoint_is_evaluated(tmp_path):
    """With a run that the notebook trains itself."""
    shown = "\n".join(execute(NOTEBOOKS[2], tmp_path))
    assert "complete: 40 steps" in shown
    assert "50 examples: loss" in shown
    assert re.search(r"km +Khmer +Khmr +[\d,]+ +\d+\.\d+ +\d+\.\d+", shown)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_experts_are_drawn_by_language(tmp_path):
    """With a run that the notebook trains itself."""
    shown = "\n".join(execute(NOTEBOOKS[3], tmp_path))
    assert "encoder: 1 mixtures of 8 experts" in shown
    assert "Figure" in shown
    moved = [float(x) for x in re.findall(r"outputs move by (\d\.\d+)", shown)]
    assert len(moved) == 8
    assert max(moved) > 0
