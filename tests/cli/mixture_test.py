"""`mlm mixture show`: a table that adds up and fits, a warning above the cap, a picture."""

import json

import pytest

from mlm.cli import mixture as command
from mlm.cli.main import main
from mlm.data.registration import add_denoising_tasks, register_mixture
from mlm.data.sources import TableSource
from mlm.sampling import proportional


@pytest.fixture(scope="module")
def mixture():
    def source(count):
        texts = [f"ten bytes{i % 10}".encode() for i in range(count)]
        return TableSource(lambda split: {"text": texts}, ("text",), ("train",))

    names = add_denoising_tasks("mt", {"fr": source(300), "ca-valencia": source(100)})
    return register_mixture("mt.all", names, proportional)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(capsys, *arguments):
    code = main(["mixture", "show", *arguments])
    return code, *capsys.readouterr()


def test_a_budget_is_divided_by_the_rates(mixture, capsys):
    code, out, err = run(capsys, mixture, "--budget", "8000", "--json")
    assert code == 0
    assert err == ""
    data = json.loads(out)
    rows = {row["name"]: row for row in data["rows"]}
    # 300 and 100 records of 10 bytes, 3000 and 1000 tokens, seen in proportion: 8000 tokens are two epochs of each.
    assert rows["fr"]["rate"] == pytest.approx(0.75)
    assert (rows["fr"]["tokens"], rows["ca-valencia"]["tokens"]) == (3000, 1000)
    assert [row["epochs"] for row in data["rows"]] == pytest.approx([2, 2])
    assert data["total"]["expected_tokens"] == pytest.approx(8000)
    assert data["total"]["epochs"] == pytest.approx(2)
    assert (data["total"]["rows"], data["total"]["characters"]) == (2, 4000)


def test_the_table_has_a_line_for_each_language_and_for_all(mixture, capsys):
    code, out, err = run(capsys, mixture, "--budget", "8000")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("mt.all at 8k tokens of text; tokens: bytes")
    assert lines[2].split() == ["fr", "French", "Latn", "300", "3k", "3k", "75.000%", "6k", "2.00"]
    assert lines[4].split() == ["all", "2", "1", "400", "4k", "4k", "100.0%", "8k", "2.00"]
    assert "2 languages, scripts: 1, rates from 25.000% to 75.000%" in err
    assert "warning" not in err


@pytest.mark.parametrize("name", ["quickstart", "embedded.all"])
def test_shipped_tables_fit_a_terminal_of_100_columns(name, capsys):
    code, out, _ = run(capsys, name, "--budget", "1e7")
    assert code == 0
    assert "Guarani" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100


def test_tasks_can_be_shown_one_by_one(mixture, capsys):
    code, out, _ = run(capsys, mixture, "--by_task", "--budget", "8000")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["mt.denoise.fr", "mt.denoise.ca_valencia", "all"]


def test_reading_text_too_often_is_warned_of(mixture, capsys):
    code, out, err = run(capsys, mixture, "--budget", "18000")  # 4.5 epochs
    assert code == 0
    assert "warning: 2 of 2 are read more than 4 times" in err
    assert "4.50!" in out
    assert "warning" not in run(capsys, mixture, "--budget", "18000", "--cap", "5")[2]


def test_a_picture_is_drawn(mixture, tmp_path, capsys):
    path = tmp_path / "rates.png"
    assert run(capsys, mixture, "--budget", "8000", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_sizes_that_are_not_known_are_not_zero(capsys):
    code, out, _ = run(capsys, "opus100.all", "--json")
    assert code == 0
    assert {row["epochs"] for row in json.loads(out)["rows"]} == {None}
    assert "nan" not in out.lower().split('"rows"')[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstat"], "did you mean 'quickstart'"),
        (["help.denoise.uk"], "mlm tasks show help.denoise.uk"),
        (["quickstart", "--budget", "0"], "--budget=0: a number of tokens above 0"),
        (["quickstart", "--plot", "rates.pdf"], "must be a .png"),
        (["quickstart", "--plot", "no/such/folder/rates.png"], "in a folder that exists"),
    ],
)
def test_errors_take_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_cap_is_named_once():
    assert command.above([], command.CAP) == ""
