"""`mlm infer`: every line has its record, in order, once, whatever kills it."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm.cli import infer as command
from mlm.cli.infer import infer, read_line
from mlm.cli.main import Failed, main

SETTINGS = {"to": "fr", "step": 10}
LINES = [f"line {i}" for i in range(23)]


def shout(numbers: list[int], texts: list[str]) -> list[dict]:
    """A decoder whose results tell the line and the batch that it was decoded in."""
    batch = f"{numbers[0]}-{numbers[-1]}"
    return [{"output": t.upper(), "score": -float(n), "batch": batch} for n, t in zip(numbers, texts, strict=True)]


def stream(lines: list[str]) -> io.BytesIO:
    return io.BytesIO("".join(line + "\n" for line in lines).encode())


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def whole(tmp_path) -> Path:
    """The output of a run that nobody disturbed."""
    path = tmp_path / "whole.jsonl"
    assert infer(stream(LINES), path, SETTINGS, shout, chunk=4) == {"lines": 23, "errors": 0}
    return path


def names(path: Path) -> set[str]:
    return {p.name.removeprefix(path.name) for p in path.parent.glob(f"{path.name}*")}


def test_records_are_in_order_with_scores_and_a_marker(whole):
    found = records(whole)
    assert [r["line"] for r in found] == list(range(1, 24))
    assert found[2] == {"line": 3, "input": "line 2", "output": "LINE 2", "score": -3.0, "batch": "1-4"}
    assert names(whole) == {"", ".completed"}
    marker = json.loads(whole.with_name("whole.jsonl.completed").read_text())
    assert marker == {"settings": SETTINGS, "lines": 23, "errors": 0}


def test_a_complete_output_is_left_alone(whole):
    def never(*_):
        raise AssertionError("nothing is left to decode")

    before = whole.read_bytes()
    assert infer(stream(LINES), whole, SETTINGS, never) is None
    assert whole.read_bytes() == before


@pytest.mark.parametrize("calls", range(7))
@pytest.mark.parametrize("torn", [b"", b'{"line": 99, "inp', b"\x00\xff\n"])
def test_resuming_gives_the_same_bytes(whole, tmp_path, calls, torn):
    """Stopped at every call of the decoder, with a torn record behind."""
    output, left = tmp_path / "out.jsonl", calls

    def failing(numbers, texts):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return shout(numbers, texts)

    try:
        infer(stream(LINES), output, SETTINGS, failing, chunk=4)
    except KeyboardInterrupt:
        assert names(output) >= {".settings"}
        with open(output, "ab") as file:
            file.write(torn)
    infer(stream(LINES), output, SETTINGS, shout, chunk=4)
    assert output.read_bytes() == whole.read_bytes()
    assert names(output) == {"", ".completed"}


def test_a_chunk_that_was_written_in_part_is_made_again_as_a_whole(whole, tmp_path):
    """Five records of chunks of four: the fifth is decoded again, with its old neighbours."""
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:5]))
    output.with_name("out.jsonl.settings").write_text(json.dumps({"settings": SETTINGS}))
    infer(stream(LINES), output, SETTINGS, shout, chunk=4)
    assert output.read_bytes() == whole.read_bytes()


def test_killed_at_random_it_ends_as_if_never_killed(tmp_path):
    """A real process, really killed (SIGKILL), until it gets through."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom mlm.cli.infer import infer\n"
        "def decode(numbers, texts):\n    time.sleep(0.02)\n"
        "    return [{'output': t[::-1], 'score': n} for n, t in zip(numbers, texts)]\n"
        "infer(open(sys.argv[1], 'rb'), Path(sys.argv[2]), {'a': 1}, decode, chunk=2)\n"
    )
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(f"text number {i} {'x' * i}" for i in range(101)))  # the last line has no line end
    rng, kills = random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    job = [sys.executable, str(script), str(source), str(output)]
    for _ in range(60):
        process = subprocess.Popen(job, stderr=subprocess.PIPE, env=environment)
        began = time.monotonic()
        while not output.exists() and time.monotonic() - began < 60 and process.poll() is None:
            time.sleep(0.005)
        try:
            _, errors = process.communicate(timeout=0.05 + rng.random() * 0.4)
            assert process.returncode == 0, errors.decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 2
    found = records(output)
    assert [r["line"] for r in found] == list(range(1, 102))
    assert [r["output"][::-1] for r in found] == source.read_text().split("\n")
    assert output.with_name("out.jsonl.completed").exists()


def test_bad_lines_get_their_record_in_place(tmp_path):
    raw = b"fine\n\n  \t\ncaf\xe9 au lait\nalso fine\r\nlast"
    output = tmp_path / "out.jsonl"
    assert infer(io.BytesIO(raw), output, SETTINGS, shout, chunk=3) == {"lines": 6, "errors": 3}
    found = records(output)
    assert [r.get("output") for r in found] == ["FINE", None, None, None, "ALSO FINE", "LAST"]
    assert [r.get("error") for r in found[1:4]] == [
        "empty line",
        "empty line",
        "not valid UTF-8: byte 0xe9 at position 3",
    ]
    assert found[3]["input"] == "caf\\xe9 au lait"


def test_bad_lines_are_counted_again_after_a_kill(tmp_path):
    raw, output = b"a\n\nb\n\nc\nd\n", tmp_path / "out.jsonl"

    def failing(numbers, texts):
        if 5 in numbers:
            raise KeyboardInterrupt
        return shout(numbers, texts)

    with pytest.raises(KeyboardInterrupt):
        infer(io.BytesIO(raw), output, SETTINGS, failing, chunk=2)
    assert infer(io.BytesIO(raw), output, SETTINGS, shout, chunk=2) == {"lines": 6, "errors": 2}


def test_an_empty_input_is_complete_at_once(tmp_path):
    assert infer(io.BytesIO(b""), tmp_path / "out.jsonl", SETTINGS, shout) == {"lines": 0, "errors": 0}
    assert names(tmp_path / "out.jsonl") == {"", ".completed"}


def interrupted(path: Path) -> Path:
    """An output that a kill left with two chunks of four."""

    def failing(numbers, texts):
        if 9 in numbers:
            raise KeyboardInterrupt
        return shout(numbers, texts)

    with pytest.raises(KeyboardInterrupt):
        infer(stream(LINES), path, SETTINGS, failing, chunk=4)
    return path


def test_other_settings_are_never_mixed_in(tmp_path, whole):
    other = {**SETTINGS, "to": "de"}
    for path in (whole, interrupted(tmp_path / "out.jsonl")):
        before = path.read_bytes()
        with pytest.raises(Failed, match="to: 'fr' then, 'de' now"):
            infer(stream(LINES), path, other, shout)
        assert path.read_bytes() == before
        assert infer(stream(LINES), path, other, shout, overwrite=True) == {"lines": 23, "errors": 0}


def test_a_changed_input_is_noticed(tmp_path):
    output = interrupted(tmp_path / "out.jsonl")
    changed = [*LINES[:5], "another line", *LINES[6:]]
    with pytest.raises(Failed, match="record 6 is of 'line 5', where the input has 'another line'"):
        infer(stream(changed), output, SETTINGS, shout)
    with pytest.raises(Failed, match="it has changed"):
        infer(stream(LINES[:3]), output, SETTINGS, shout)


def test_a_file_of_somebody_else_is_not_touched(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(Failed, match="was not made by an interrupted"):
        infer(stream(LINES), output, SETTINGS, shout)
    assert output.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (b"text\r\n", ("text", None)),
        (b" spaced \n", (" spaced ", None)),
        (b"\xff\n", ("\\xff", "not valid UTF-8: byte 0xff at position 0")),
        (b"\n", ("", "empty line")),
    ],
)
def test_lines_are_read(raw, want):
    assert read_line(raw) == want


# With a model.


def test_the_command_decodes_what_the_session_decodes(tiny_run, tmp_path, capsys):
    import mlm

    source, output = tmp_path / "in.txt", tmp_path / "out" / "o.jsonl"
    texts = ["Good morning", "Yes", "x" * 60]
    source.write_text("\n".join([texts[0], "\x01", *texts[1:]]) + "\n")
    flags = ["--run_dir", str(tiny_run), "--input", str(source), "--output", str(output), "--to", "fr", "--step", "10"]
    arguments = [*flags, "--method", "beam", "--beams", "2", "--n_best", "2", "--max_length", "8"]
    assert main(["infer", *arguments]) == 0
    found = records(output)
    session = mlm.load(tiny_run, 10)
    with pytest.warns(UserWarning, match="longer than"):
        want = session.decode(texts, "fr", method="beam", beams=2, n_best=2, max_length=8)
    good = [r for r in found if "error" not in r]
    assert [r["output"] for r in good] == [best[0].text for best in want]
    assert [r["alternatives"][0]["output"] for r in good] == [best[1].text for best in want]
    assert good[0]["score"] == pytest.approx(want[0][0].score, rel=1e-5)
    assert "is empty" in found[1]["error"]
    assert [r.get("trimmed", False) for r in found] == [False, False, False, True]
    assert "4 lines, 1 of them errors" in capsys.readouterr().err
    assert main(["infer", *arguments]) == 0
    assert "complete already" in capsys.readouterr().err


def test_chosen_results_keep_their_values_and_settings(tiny_run, tmp_path, capsys):
    import mlm

    source, output = tmp_path / "in.txt", tmp_path / "o.jsonl"
    source.write_text("Good morning\n\nYes\n")
    flags = ["--run_dir", str(tiny_run), "--input", str(source), "--output", str(output), "--to", "fr"]
    flags += ["--method", "sample", "--n_best", "4", "--max_length", "8", "--chunk", "1", "--choose"]
    assert main(["infer", *flags, "mbr,references=2"]) == 0
    found = records(output)
    options = {"method": "sample", "n_best": 4, "max_length": 8, "choose": "mbr,references=2"}
    want = mlm.load(tiny_run).decode(["Good morning", "Yes"], "fr", **options, ids=[1, 3])
    for record, best in zip((found[0], found[2]), want, strict=True):
        chosen = [{name: r[name] for name in ("output", "score", "value")} for r in (record, *record["alternatives"])]
        assert [r["output"] for r in chosen] == [h.text for h in best]
        assert [r["value"] for r in chosen] == pytest.approx([h.value for h in best])
    assert found[1]["error"] == "empty line"
    marker = json.loads(output.with_name("o.jsonl.completed").read_text())
    assert marker["settings"]["choose"] == {
        "name": "mbr",
        "utility": "chrf",
        "references": 2,
        "aggregate": False,
        "seed": 0,
    }
    assert main(["infer", *flags, "mbr,references=3"]) == 1
    assert "choose: {'name': 'mbr'" in capsys.readouterr().err


def test_examples_stand_before_every_line(tiny_run, tmp_path, capsys):
    """Drawn by the line's number; a line that does not fit alone is an error in place; other shots are not mixed in."""
    import mlm

    source, shots, output = (tmp_path / name for name in ("in.txt", "shots.tsv", "o.jsonl"))
    source.write_text("neuf\n" + "x" * 60 + "\ndix\n")
    pairs = [("un", "one"), ("deux", "two"), ("trois", "three")]
    shots.write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    flags = ["--run_dir", str(tiny_run), "--input", str(source), "--output", str(output), "--max_length", "8"]
    command = ["infer", *flags, "--examples", str(shots), "--shot_choice", "random", "--shots"]
    assert main([*command, "2"]) == 0
    found = records(output)
    session = mlm.load(tiny_run)
    prompts = session.few_shot(["neuf", "dix"], pairs, 2, "random", ids=[1, 3])
    assert [found[0]["output"], found[2]["output"]] == session.generate(prompts, max_length=8)
    assert "the query alone takes 62 tokens, more than the 47" in found[1]["error"]
    capsys.readouterr()
    assert main([*command, "1"]) == 1
    assert "shots: 2 then, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "nowhere.txt"], "nowhere.txt is no file"),
        (["--method", "beem"], "did you mean 'beam'"),
        (["--beams", "3"], "means nothing to method='greedy'"),
        (["--choose", "mbr"], "nothing to choose from one result"),
        (["--chunk", "0"], "--chunk=0 must be at least 1"),
        (["--to", "de"], "no token <2de>"),
        (["--step", "newest"], "give a checkpoint's number"),
        (["--mesh", "date=2"], "no axis ['date']"),
        (["--mesh", "data"], "must read like"),
    ],
)
def test_wrong_flags_exit_with_2(tiny_run, tmp_path, capsys, change, message):
    source = tmp_path / "in.txt"
    source.write_text("a\n")
    flags = ["--run_dir", str(tiny_run), "--input", str(source), "--output", str(tmp_path / "o.jsonl"), "--to", "fr"]
    assert main(["infer", *flags, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mlm infer: ")
    assert len(error.splitlines()) == 1


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit) as exit:
        command.run(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--input", "--output", "--to", "--method", "--beams", "--overwrite", "--step", "example:"):
        assert flag in text
