"""`mlm report`: files in the run, numbers that can be worked out by hand, an exit code that tells."""

import json
import math
import shutil

import numpy as np
import pytest

from mlm.cli import report
from mlm.cli.main import main
from mlm.cli.report_samples import fill_in
from mlm.data.registration import add_denoising_tasks, add_translation_tasks, register_mixture
from mlm.data.sources import TableSource
from mlm.evaluation.report import Verdict
from mlm.sampling import proportional

RECORDS = 128


def table(letters, seed):
    """Records of random letters, each letter as likely as the other."""
    draw = np.random.default_rng(seed)
    texts = ["".join(draw.choice(list(letters), 24)).encode() for _ in range(RECORDS)]
    return TableSource(
        lambda split: {"text": texts, "english": texts, "other": texts[::-1]}, ("text", "english", "other")
    )


@pytest.fixture(scope="module")
def mixture():
    names = add_denoising_tasks("rt", {"fr": table("ab", 0), "sw": table("cdef", 1)})
    names += add_translation_tasks("rt", {"fr": table("ab", 2)})
    return register_mixture("rt.all", names, proportional)


@pytest.fixture
def run(tiny_run, mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TOKENS_COUNTED", 20_000)
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**data, "mixture": mixture}))
    (folder / "config.gin").write_text("train.seed = 7\nschedule.total_steps = 20\n")
    lines = [
        {"kind": "train", "step": step, "nll": 3.0, "steps_per_second": 2.0, "tokens_per_second": 64.0}
        for step in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_random_parameters_fail_and_say_so(run, capsys):
    assert main(["report", "--run_dir", str(run)]) == 1
    error = capsys.readouterr().err
    assert "does not beat its baselines" in error
    assert f"report: {run / 'report.html'}" in error
    data = json.loads((run / "report.json").read_text())
    assert not data["passed"]
    assert (data["steps"], data["seconds"]) == (20, 10.0)  # metrics after the checkpoint do not count
    assert set(data["languages"]) == {"fr", "sw"}
    for language in data["languages"].values():
        bits = language["bits_per_byte"]
        assert set(bits) == {"trained", "untrained", "unigram", "own_unigram"}
        assert bits["trained"] > bits["own_unigram"]
    # Every language token of a byte vocabulary spells one byte, so random letters out of 2 and of 4 need 1 and 2 bits,
    # and a little for the space between records (1 byte of 25).
    space = 24 / 25 * math.log2(25 / 24) + math.log2(25) / 25
    own = [data["languages"][code]["bits_per_byte"]["own_unigram"] for code in ("fr", "sw")]
    assert own == pytest.approx([24 / 25 + space, 2 * 24 / 25 + space], rel=0.1)
    # The mixture's unigram must tell the languages apart as well.
    for code, alone in zip(("fr", "sw"), own, strict=True):
        assert data["languages"][code]["bits_per_byte"]["unigram"] > alone + 0.2
    page = (run / "report.html").read_text()
    assert "Run run" in page
    assert "French → English" in page or "English → French" in page
    assert (run / "report.md").read_text().startswith("# Run run")
    assert not list(run.glob(".*.tmp"))


def test_every_language_is_scored_on_enough_text(run, monkeypatch):
    """Few held-out bytes are hidden again elsewhere, until there are enough or the draws are used up."""
    monkeypatch.setattr(report, "SCORED_BYTES", 1)
    few = report.measure(run)
    monkeypatch.setattr(report, "SCORED_BYTES", 10**9)
    monkeypatch.setattr(report, "GAPS_DRAWN", 3)
    many = report.measure(run)
    for a, b in zip(few.languages, many.languages, strict=True):
        assert b.bytes == pytest.approx(3 * a.bytes, rel=0.1)


def test_a_run_that_beats_its_baselines_exits_with_0(run, monkeypatch, capsys):
    monkeypatch.setattr("mlm.evaluation.report.judge", lambda rows: Verdict(True, f"passed: {len(rows)} languages"))
    assert main(["report", "--run_dir", str(run)]) == 0
    assert "passed: 2 languages" in capsys.readouterr().err


def test_fresh_parameters_come_from_the_seed_of_the_run(run):
    from mlm.checkpoints.run_directory import RunDirectory

    assert report._seed(RunDirectory(run)) == 7
    (run / "config.gin").unlink()
    assert report._seed(RunDirectory(run)) == 0


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main(["report", "--run_dir", str(tmp_path)]) == 1
    assert "is not the directory of a run" in capsys.readouterr().err


def test_gaps_are_matched_by_their_sentinels():
    text = "A <extra_id_0> sat<extra_id_1> on <extra_id_2>."
    truth = "<extra_id_0>cat<extra_id_1> down<extra_id_2>it"
    found = fill_in("en", text, truth, "no sentinel at all", "<extra_id_1> x<extra_id_0>dog<extra_id_0>second")
    assert found.kept == ("A ", " sat", " on ", ".")
    assert found.truth == ("cat", " down", "it")
    assert found.before == ("", "", "")
    assert found.after == ("dog", " x", "")


def test_a_long_text_is_cut_after_its_first_gaps():
    text = "".join(f"w{i}<extra_id_{i}>" for i in range(9)) + "end"
    found = fill_in("en", text, text, "", "")
    assert found.kept == ("w0", "w1", "w2", "w3", "w4 …")
    assert len(found.truth) == 4
