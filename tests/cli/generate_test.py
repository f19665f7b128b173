"""`mlm generate`: one text, one answer, one line for an error."""

import json

import pytest

import mlm
from mlm.cli.main import main
from mlm.data.prompts import Format


@pytest.fixture(scope="module")
def session(tiny_run):
    return mlm.load(tiny_run)


def test_it_prints_what_the_session_generates(tiny_run, session, capsys):
    assert main(["generate", "Good morning", "--run_dir", str(tiny_run), "--to", "fr", "--max_length", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == session.generate(["Good morning"], to="fr", max_length=8)[0] + "\n"
    assert captured.err == ""


def test_several_results_come_with_their_scores(tiny_run, session, capsys):
    options = {"method": "beam", "beams": 3, "n_best": 2, "alpha": 0.5, "max_length": 8}
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert main(["generate", "Hi", "--run_dir", str(tiny_run), "--to", "uk", *flags]) == 0
    (want,) = session.decode("Hi", "uk", **options)
    lines = capsys.readouterr().out.rstrip("\n")
    assert lines == "\n".join(f"{h.score:.4f}\t{h.text}" for h in want)


def test_a_gin_file_says_how_and_flags_win(tiny_run, session, tmp_path, capsys):
    """The answer as one record of JSON; a file that sets what decoding does not know, or a wrong name, is refused."""
    path = tmp_path / "search.gin"
    path.write_text("decode.method = 'beam'\ndecode.beams = 3\ndecode.n_best = 2\ndecode.max_length = 20\n")
    flags = ["--run_dir", str(tiny_run), "--to", "uk", "--gin_file", str(path), "--max_length", "8", "--json"]
    assert main(["generate", "Hi", *flags]) == 0
    first, second = session.decode("Hi", "uk", method="beam", beams=3, n_best=2, max_length=8)[0]
    assert json.loads(capsys.readouterr().out) == {
        "input": "Hi",
        "output": first.text,
        "score": pytest.approx(first.score, abs=1e-5),
        "alternatives": [{"output": second.text, "score": pytest.approx(second.score, abs=1e-5)}],
    }
    path.write_text("decode.bams = 3\n")
    assert main(["generate", "Hi", *flags]) == 2
    assert "decode has no parameter 'bams'; did you mean 'beams'" in capsys.readouterr().err


def test_a_chosen_result_stands_alone_or_first_with_its_value(tiny_run, session, capsys):
    options = {"method": "sample", "n_best": 3, "max_length": 8}
    flags = [*(f"--{name}={value}" for name, value in options.items()), "--choose", "mbr,utility=bleu"]
    (want,) = session.decode("Hi", "uk", **options, choose="mbr,utility=bleu")
    assert main(["generate", "Hi", "--run_dir", str(tiny_run), "--to", "uk", *flags]) == 0
    assert capsys.readouterr().out == want[0].text + "\n"
    assert main(["generate", "Hi", "--run_dir", str(tiny_run), "--to", "uk", *flags, "--scores"]) == 0
    assert capsys.readouterr().out == "".join(f"{h.value:.4f}\t{h.score:.4f}\t{h.text}\n" for h in want)


def test_phrases_are_held_and_a_stop_sequence_is_not_printed(tiny_run, session, capsys):
    flags = ["--method", "constrained_beam", "--phrase", "two", "--phrase", "one", "--stop", "!", "--bad_words", "x"]
    assert main(["generate", "Hi", "--run_dir", str(tiny_run), "--to", "fr", *flags, "--max_length", "12"]) == 0
    held = {"phrases": [["two", "one"]], "stop": ["!"], "bad_words": ["x"]}
    (want,) = session.generate("Hi", "fr", "constrained_beam", max_length=12, **held)
    assert capsys.readouterr().out == want + "\n"
    assert "two" in want
    assert "one" in want


def test_without_a_language_special_tokens_are_meant(tiny_run, session, capsys):
    assert main(["generate", "The <extra_id_0> sat", "--run_dir", str(tiny_run), "--max_length", "8"]) == 0
    assert capsys.readouterr().out == session.generate("The <extra_id_0> sat", max_length=8)[0] + "\n"


def test_a_long_text_is_said_to_be_cut(tiny_run, capsys):
    assert main(["generate", "x" * 99, "--run_dir", str(tiny_run), "--to", "fr", "--max_length", "8"]) == 0
    assert "longer than the 48 tokens" in capsys.readouterr().err


def test_examples_stand_before_the_text(tiny_run, session, tmp_path, capsys):
    file = tmp_path / "shots.tsv"
    file.write_text("un\tone\ndeux\ttwo\ntrois\tthree\n")
    flags = ["--examples", str(file), "--shots", "2", "--shot_choice", "retrieved", "--shot_form", "{source}:{target}"]
    assert main(["generate", "une", "--run_dir", str(tiny_run), "--to", "fr", "--max_length", "8", *flags]) == 0
    (prompt,) = session.few_shot(
        "une", [("un", "one"), ("deux", "two"), ("trois", "three")], 2, "retrieved", form=Format("{source}:{target}")
    )
    assert prompt.endswith("un:one ; une:")
    assert capsys.readouterr().out == session.generate(prompt, to="fr", max_length=8)[0] + "\n"


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        ([], "un\tone\n\ndeux\ttwo\n", "shots.tsv, line 2: 1 fields, 1 of them empty"),
        ([], "un\tone\ttwo\n", "shots.tsv, line 1: 3 fields"),
        (["--shots", "2"], "un\tone\n", "--shots=2 must be between 0 and 1, the examples in"),
        (["--shots", "1", "--shot_form", "{source}"], "un\tone\n", "behind it {target}"),
        (["--shots", "1"], None, "No such file"),
    ],
)
def test_bad_examples_are_named_before_anything_is_loaded(tmp_path, capsys, flags, text, message):
    file = tmp_path / "shots.tsv"
    if text is not None:
        file.write_text(text)
    assert main(["generate", "Hi", "--run_dir", str(tmp_path / "nothing"), "--examples", str(file), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([" ", "--to", "fr"], 2, "the text is empty"),
        (["Hi", "--to", "frr"], 2, "did you mean"),
        (["Hi", "--to", "fr", "--method", "sample", "--top_p", "2"], 2, "top_p=2.0 must be in (0, 1]"),
        (["Hi", "--to", "fr", "--shots", "2"], 2, "--shots means nothing without --examples"),
        (["Hi", "--to", "fr", "--stop", " "], 2, "--stop=' ' is empty"),
        (["Hi", "--to", "fr", "--phrase", "a"], 2, "--phrase and --method constrained_beam belong together"),
        (["Hi", "--to", "fr", "--method", "constrained_beam"], 2, "--phrase and --method constrained_beam belong"),
        (["Hi", "--to", "fr", "--method", "constrained_beam", "--phrase", "a" * 99], 1, "may have 24"),
        (["Hi", "--to", "fr", "--method", "value_guided_beam"], 2, "value=None must be a function"),
        (["Hi", "--to", "fr", "--method", "lexical_units"], 2, "mask_token=None must be an integer of at least 1"),
        (["Hi", "--to", "fr", "--threshold", "0.5"], 2, "threshold=0.5 means nothing to method='greedy'"),
        (["Hi", "--to", "fr", "--step", "11"], 1, "complete checkpoints: 10, 20"),
        (["Hi", "--to", "fr", "--choose", "mbr"], 2, "--choose: there is nothing to choose from one result"),
        (["Hi", "--to", "fr", "--choose", "mbrr"], 2, "--choose: no way to choose named 'mbrr'"),
    ],
)
def test_errors_take_one_line(tiny_run, capsys, flags, code, message):
    assert main(["generate", "--run_dir", str(tiny_run), *flags]) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["generate", "Hi", "--run_dir", str(tmp_path)]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err
