"""`mlm tasks`: what is registered, what an example looks like, and one line for an error."""

import json

import pytest

from mlm.cli.main import main


def run(capsys, *arguments):
    code = main(["tasks", *arguments])
    return code, *capsys.readouterr()


def test_every_shipped_task_is_listed(capsys):
    code, out, err = run(capsys, "list", "--json")
    assert code == 0
    assert err == ""
    tasks = {task["task"]: task for task in json.loads(out)}
    assert len(tasks) > 100
    assert tasks["help.translate.en.fr"] == {
        "task": "help.translate.en.fr",
        "corpus": "help",
        "objective": "translation",
        "reads": "en",
        "writes": "fr",
        "splits": ["train", "validation", "test"],
        "metrics": ["bleu", "chrf_plus_plus"],
    }
    assert tasks["help.denoise.fr"]["objective"] == "span_corruption"


def test_a_pattern_narrows_the_list(capsys):
    code, out, err = run(capsys, "list", "--match", r"^tatoeba\.denoise\.(fr|uk)$")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["task", "tatoeba.denoise.fr", "tatoeba.denoise.uk"]
    assert err.startswith("2 tasks; mixtures: ")
    assert "quickstart" in err


def test_an_example_shows_its_corruption(capsys):
    flags = ["--examples", "2", "--inputs_length", "48", "--targets_length", "24"]
    code, out, _ = run(capsys, "show", "tatoeba.denoise.fr", *flags)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "tatoeba.denoise.fr: span_corruption fr, train"
    assert "records" in lines[1]
    shown = [line for line in lines if "<extra_id_0>" in line]
    assert len(shown) == 4  # inputs and targets of two examples
    assert "examples/s" in lines[-1]


def test_the_same_as_json(capsys):
    flags = ["--examples", "1", "--json", "--split", "validation", "--inputs_length", "64", "--targets_length", "32"]
    code, out, _ = run(capsys, "show", "tatoeba.translate.en.uk", "--vocabulary", "quickstart", *flags)
    assert code == 0
    found = json.loads(out)
    assert (found["reads"], found["writes"], found["split"]) == ("en", "uk", "validation")
    assert found["shown"][0]["inputs"].startswith("<2uk>")
    percentiles = [found["inputs_percentiles"][point] for point in ("5", "25", "50", "75", "95", "100")]
    assert percentiles == sorted(percentiles)
    assert percentiles[-1] <= 64
    assert found["examples_per_second"] > 0
    assert found["tokens_per_second"] > found["examples_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "help.denoise.ukk"], "did you mean 'help.denoise.uk'"),
        (["show", "quickstart"], "mlm mixture show quickstart"),
        (["show", "tatoeba.denoise.fr", "--split", "dev"], "it has train, validation, test"),
        (["show", "tatoeba.denoise.fr", "--examples", "0"], "--examples=0 must be at least 1"),
        (["show", "tatoeba.denoise.fr", "--vocabulary", "nowhere.model"], "--vocabulary: "),
        (["list", "--match", "("], "is not a regular expression"),
        (["list", "--module", "no_such_module"], "no Python module 'no_such_module'"),
    ],
)
def test_errors_take_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
