"""The command itself: help without weight, errors in one line, exit codes that scripts can trust."""

import subprocess
import sys
import types

import pytest

from mlm.cli import main
from mlm.registry import Registry


@pytest.fixture
def command(monkeypatch):
    """Makes `mlm model` run the given function."""

    def install(run):
        monkeypatch.setitem(sys.modules, "mlm.cli.model", types.SimpleNamespace(run=run))

    return install


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from mlm.cli.main import main; main(['--help']);"
        "sys.exit([m for m in ('jax', 'tensorflow', 'gin', 'rich') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, text) in main.COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


def test_an_unknown_command_is_a_usage_error_with_the_nearest(capsys):
    assert main.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def failing(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (main.UsageError("wrong flag"), 2, "mlm model: wrong flag\n"),
        (main.Failed("did not pass"), 1, "mlm model: did not pass\n"),
        (FileNotFoundError("no such corpus"), 1, "mlm model: no such corpus\n"),
        (KeyError("no language 'xx'"), 1, "mlm model: no language 'xx'\n"),
        (KeyboardInterrupt(), 130, "\nmlm: stopped\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(command, capsys, error, code, text):
    command(failing(error))
    assert main.main(["model", "list"]) == code
    assert capsys.readouterr().err == text


def test_a_name_that_no_registry_holds_is_a_usage_error(command, capsys):
    command(lambda arguments: Registry("preset", tiny=1)["tniy"])
    assert main.main(["model", "list"]) == 2
    assert capsys.readouterr().err == "mlm model: no preset named 'tniy'; did you mean 'tiny'?\n"


def test_what_nobody_expected_says_how_to_see_more(command, capsys):
    command(failing(ZeroDivisionError("division by zero")))
    assert main.main(["model", "list"]) == 1
    assert "ZeroDivisionError: division by zero" in (text := capsys.readouterr().err)
    assert "--traceback" in text
    assert main.main(["model", "list", "--traceback"]) == 1
    assert "raise error" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_training_starts_once_more_in_huge_pages(monkeypatch):
    started = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(main.os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setattr(main, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["mlm", "train", "--dry_run"])
    main.console()
    assert len(started) == 1
    assert main.os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    main.console()  # inside the new process
    monkeypatch.setattr(sys, "argv", ["mlm", "tasks"])
    monkeypatch.delenv("GLIBC_TUNABLES")
    main.console()
    assert len(started) == 1
