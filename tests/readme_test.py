"""What README.md tells a newcomer to type exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]


def test_files_and_folders_are_there():
    for name in re.findall(r"\]\(([^):]+)\)", TEXT) + re.findall(r"`([\w/.]+/)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"gin/\w+/\w+\.gin", TEXT):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`?((?:mlm|tasks|tests)/\w+\.py)", TEXT):
        assert (ROOT / name).is_file(), name


def test_commands_and_targets_exist():
    from mlm.cli.main import COMMANDS

    targets = re.findall(r"^make (\w+)", "\n".join(SHELL), re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert {"run", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    named = set(re.findall(r"^mlm ([\w-]+)", "\n".join(SHELL), re.M)) | set(re.findall(r"`mlm ([\w-]+)`", TEXT))
    assert named == set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("mlm ")])
def test_a_command_line_has_flags_that_its_command_knows(line, capsys):
    from mlm.cli.main import COMMANDS

    command, *words = shlex.split(line, comments=True)[1:]
    module = importlib.import_module(f"mlm.cli.{COMMANDS[command][0]}")
    sub = (
        [words[0]] if words[0] in ("list", "show", "train", "from-hf", "to-hf", "from-t5x", "upcycle", "prune") else []
    )
    with pytest.raises(SystemExit):
        module.run([*sub, "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def test_tasks_and_mixtures_are_registered():
    from mlm.data.registration import get, load_tasks

    load_tasks()
    names = set(re.findall(r"\b(?:help|ui|tatoeba|udhr|uagec)\.(?:denoise|translate)\.[\w.]*\w", TEXT))
    assert len(names) >= 2
    for name in names:
        assert get(name)


def test_the_task_module_registers_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for code, lines in (("fr", 30), ("sw", 10)):
        for split in ("train", "validation"):
            (tmp_path / f"text/{code}.{split}.txt").write_text("Une ligne de texte.\n" * lines)
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    from mlm.data.registration import mixture_rates

    rates = mixture_rates("mine")
    assert rates["mine.denoise.fr"] / rates["mine.denoise.sw"] == pytest.approx(3**0.3)
