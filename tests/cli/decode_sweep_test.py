"""`mlm decode-sweep`: grids are read, every setting is decoded once, and the numbers are those of the session."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import seqio

import mlm
from mlm.cli.decode_grids import GRIDS, Setting, parse_grid, settings, tried
from mlm.cli.main import UsageError, main
from mlm.decoding.config import METHODS, DecodeConfig, Method
from mlm.decoding.selectors import Greedy

# A task module that a fresh process can import too.
MODULE = """
import seqio
import tensorflow as tf
from mlm.data.languages import language_id
from mlm.data.registration import default_vocabulary
from mlm.evaluation.metrics import metric_fns

PAIRS = [("good day", "bon jour"), ("thanks", "merci"), ("yes", "oui")]


def read(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": [a for a, _ in PAIRS], "targets": [b for _, b in PAIRS]})


def prepare(dataset, output_features):
    encode = output_features["targets"].vocabulary.encode_tf
    number = tf.constant(language_id("fr"), tf.int32)
    return dataset.map(lambda r: {**{k: encode(v) for k, v in r.items()}, "language": number,
                                  "targets_pretokenized": r["targets"]})


tokens = seqio.Feature(default_vocabulary(), add_eos=True, dtype=tf.int32)
for name, metrics in (("swept.en.fr", ("chrf", "accuracy")), ("swept.silent", ())):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=["validation"]),
        preprocessors=[prepare, seqio.preprocessors.append_eos],
        output_features={"inputs": tokens, "targets": tokens},
        metric_fns=metric_fns(*metrics),
    )
"""


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run, told of the module's tasks."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "swept_tasks.py").write_text(MODULE)
    path = shutil.copytree(tiny_run, folder / "run")
    data = json.loads((path / "data.json").read_text())
    data |= {"mixture": "swept.en.fr", "task_modules": ["swept_tasks"]}
    (path / "data.json").write_text(json.dumps(data))
    sys.path.append(str(folder))
    yield path
    sys.path.remove(str(folder))
    for name in ("swept.en.fr", "swept.silent"):
        seqio.TaskRegistry.remove(name)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "settings.jsonl").read_text().splitlines()]


SMALL = ["--max_length", "8", "--num_examples", "2", "--step", "10"]


def test_the_command_measures_what_the_session_measures(run, capsys):
    flags = ["--methods", "greedy", "--grid", "beam:beams=1,2;alpha=0", "--grid", "sample:top_k=3", "--seeds", "2"]
    assert main(["decode-sweep", "--run_dir", str(run), *SMALL, *flags]) == 0
    captured = capsys.readouterr()
    folder = run / "decode_sweep" / "10"
    found = records(folder)
    # beams=4, the default, and each pair; sampling at its defaults and with top_k, both with two seeds.
    assert [(r["method"], r["options"], r["seed"]) for r in found] == [
        ("greedy", {}, 0),
        ("beam", {}, 0),
        ("beam", {"beams": 1, "alpha": 0.0}, 0),
        ("beam", {"beams": 2, "alpha": 0.0}, 0),
        *(("sample", options, seed) for options in ({}, {"top_k": 3}) for seed in (0, 1)),
    ]
    session = mlm.load(run, 10)
    for record in (found[0], found[-1]):
        options = {**record["options"], "max_length": 8}
        options |= {"seed": record["seed"]} if record["method"] == "sample" else {}
        want = session.evaluate("swept.en.fr", num_examples=2, method=record["method"], **options)
        assert record["metrics"] == want["metrics"]
        assert record["decode"] == json.loads(json.dumps(want["decode"]))
        decoded = session.decode(["good day", "thanks"], method=record["method"], **options)
        if record["method"] != "sample":  # whose randomness here comes from the tokens of an example
            assert record["tokens"] == sum(len(best.tokens) for (best,) in decoded)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert {(r["step"], r["examples"], r["num_examples"]) for r in found} == {(10, 2, 2)}
    summary = json.loads((folder / "summary.json").read_text())
    assert [(m["method"], m["metric"], m["settings"]) for m in summary["methods"]] == [
        ("greedy", "chrf", 1),
        ("beam", "chrf", 3),
        ("sample", "chrf", 2),
    ]
    chrf = [r["metrics"]["chrf"] for r in found if r["method"] == "sample"]
    assert summary["settings"][-1]["value"] == pytest.approx((chrf[2] + chrf[3]) / 2)
    page = (folder / "sweep.html").read_text()
    assert "beams of beam" in page
    assert "tokens per second" in page
    for part in ("swept.en.fr: chrf", "best-worst", "tokens/s", "alpha=0.0"):
        assert part in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    assert f"written to {folder}" in captured.err


def test_what_is_done_is_not_done_again(run, tmp_path, capsys, monkeypatch):
    """A torn record is made again, a wider grid decodes what is new in it."""
    from mlm.session.trials import Trials

    calls, decode = [], Trials.__call__
    monkeypatch.setattr(Trials, "__call__", lambda self, task, g: calls.append(g.config.beams) or decode(self, task, g))
    folder = tmp_path / "out"
    command = ["decode-sweep", "--run_dir", str(run), *SMALL, "--output", str(folder), "--grid"]
    assert main([*command, "beam:beams=1,2"]) == 0
    assert calls == [4, 1, 2]
    whole = (folder / "settings.jsonl").read_bytes()
    (folder / "settings.jsonl").write_bytes(whole[:-20])
    calls.clear()
    assert main([*command, "beam:beams=1,2,3", "--json"]) == 0
    assert calls == [2, 3]
    assert (folder / "settings.jsonl").read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:2]))
    out = capsys.readouterr().out
    assert [s["options"] for s in json.loads(out[out.index("{") :])["settings"]] == [
        {},
        {"beams": 1},
        {"beams": 2},
        {"beams": 3},
    ]
    assert main([*command, "beam:beams=1", "--num_examples", "1"]) == 1
    assert "num_examples: 2 then, 1 now" in capsys.readouterr().err
    assert main([*command, "beam:beams=1", "--num_examples", "1", "--overwrite"]) == 0
    assert len(records(folder)) == 2


@pytest.mark.slow
def test_killed_it_goes_on(run, tmp_path):
    """A real process, killed (SIGKILL) after its first record."""
    folder = tmp_path / "out"
    grid = "beam:beams=1,2,3"
    job = [sys.executable, "-m", "mlm", "decode-sweep", "--run_dir", str(run), *SMALL, "--output", str(folder)]
    paths = os.pathsep.join((str(Path(__file__).parents[2]), str(run.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen([*job, "--grid", grid], env=environment, stderr=subprocess.PIPE)
    file, began = folder / "settings.jsonl", time.monotonic()
    while not (file.exists() and file.read_bytes()) and time.monotonic() - began < 120 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = records(folder)[0]
    assert subprocess.run([*job, "--grid", grid], env=environment, timeout=300).returncode == 0
    found = records(folder)
    assert found[0] == first
    assert [r["options"] for r in found] == [{}, {"beams": 1}, {"beams": 2}, {"beams": 3}]


def test_a_method_that_is_registered_later_is_tried_at_its_defaults(run, tmp_path, monkeypatch, capsys):
    """One that cannot be decoded is noted, and fails the command only where it was named."""

    def broken(config):
        raise ValueError("needs a rod")

    for name in reversed([name for name in METHODS if name != "greedy"]):  # put back last first: in order
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setitem(METHODS, "dowsing", Method(lambda c: Greedy(), (), "greedy by another name"))
    monkeypatch.setitem(METHODS, "broken", Method(broken, (), "cannot be had"))
    command = ["decode-sweep", "--run_dir", str(run), *SMALL, "--output", str(tmp_path)]
    assert main(command) == 0
    assert [r["method"] for r in records(tmp_path)][:2] == ["greedy", "dowsing"]
    assert records(tmp_path)[0]["metrics"] == records(tmp_path)[1]["metrics"]
    assert "could not be decoded: broken: needs a rod" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["refused"] == {"broken": "needs a rod"}
    assert main([*command, "--methods", "greedy,broken"]) == 1
    assert "needs a rod" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "greddy"], "did you mean 'greedy'"),
        (["--grid", "beem:beams=1"], "did you mean 'beam'"),
        (["--grid", "beam:beems=1"], "did you mean 'beams'"),
        (["--grid", "beam:beams=many"], "beams=many must be like its default, 4"),
        (["--grid", "beam:beams"], "beams needs values, as beams=4"),
        (["--grid", "beam"], "must read METHOD:option=value"),
        (["--grid", "beam:beams=0"], "beams=0 must be an integer of at least 1"),
        (["--grid", "greedy:beams=2"], "greedy has no option 'beams'"),
        (["--grid", "sample:seed=1,2"], "say --seeds 5"),
        (["--seeds", "0"], "--seeds=0 must be at least 1"),
        (["--metric", "chrff"], "did you mean 'chrf'"),
        (["--tasks", "swept.en.f"], "did you mean 'swept.en.fr'"),
        (["--tasks", "swept.silent"], "none of 1 tasks has a metric of decoded text"),
    ],
)
def test_wrong_flags_exit_with_2(run, tmp_path, capsys, flags, message):
    assert main(["decode-sweep", "--run_dir", str(run), *SMALL, "--output", str(tmp_path / "no"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "no").exists()


def test_grids_are_products_and_defaults_come_first():
    assert parse_grid("beam: beams=1,4 ; alpha=0") == ("beam", {"beams": (1, 4), "alpha": (0.0,)})
    assert parse_grid("greedy:proposer=none,input_copy")[1] == {"proposer": ("none", "input_copy")}
    found = settings("beam", [{"beams": (1, 4), "alpha": (0.0, 0.6)}, {"beams": (1,)}])
    assert [dict(s.options) for s in found] == [{}, {"beams": 1, "alpha": 0.0}, {"beams": 1}, {"alpha": 0.0}]
    assert parse_grid("lexical_units:mask_token=9")[1] == {"mask_token": (9,)}
    found_units = settings("lexical_units", [{"mask_token": (9,), "threshold": (0.5, 0.9)}])
    assert [dict(s.options) for s in found_units] == [{"mask_token": 9, "threshold": 0.5}, {"mask_token": 9}]
    with pytest.raises(UsageError, match="lexical_units: mask_token=None must be"):
        settings("lexical_units", [])
    decided = settings("lexical_units", [{"threshold": (0.5,)}], lambda method, options: {"mask_token": 9, **options})
    assert [dict(s.options) for s in decided] == [{}, {"threshold": 0.5}]
    assert not found[0].draws
    assert Setting("sample", {}).draws
    assert tried({"beam": [{"beams": (1, 2)}, {"beams": (4,)}]}) == {("beam", "beams"): (1, 2, 4)}


def test_every_built_in_grid_is_of_a_method_that_takes_it():
    assert set(GRIDS) <= set(METHODS)
    for method, grids in GRIDS.items():
        found = settings(method, grids)
        assert len(found) > 2
        for setting in found:
            DecodeConfig(method=method, **setting.options)
