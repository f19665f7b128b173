"""`mlm train`: what a run leaves behind, every way to stop and go on, and every mistake in one line."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm.checkpoints import Checkpointer
from mlm.cli.main import main
from mlm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
RUN = """
include 'gin/models/tiny.gin'
include 'gin/runs/pretrain.gin'
MIXTURE = 'tatoeba.denoise.fr'
preset.vocab_size = 8192
run.evaluation_rows = 8
data.vocabulary = 'quickstart'
data.inputs_length = 32
data.targets_length = 16
data.batch_size = 8
train.steps = 6
optimizer.name = 'adamw_rms'
schedule.name = 'constant'
schedule.learning_rate = 0.01
schedule.warmup_steps = 0
checkpoints.every_steps = 2
checkpoints.keep = 2
loop.log_every = 1
loop.evaluate_every = 4
"""
FILES = {
    "config.gin",
    "model.json",
    "data.json",
    "versions.json",
    "mesh.json",
    "parameters.txt",
    "vocabulary.model",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
}


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gin") / "run.gin"
    path.write_text(RUN)
    return path


@pytest.fixture
def train(gin_file, capsys):
    """train(run_dir, arguments…) in this process -> (exit code, what stood on the screen)."""

    def call(run_dir: Path, *arguments: str) -> tuple[int, str]:
        code = main(["train", f"--gin_file={gin_file}", f"--run_dir={run_dir}", *arguments])
        return code, capsys.readouterr().err

    return call


def command(gin_file: Path, run_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlm", "train", f"--gin_file={gin_file}", f"--run_dir={run_dir}", *arguments]


def environment(tmp_path: Path) -> dict[str, str]:
    """One process as a user starts it: no forced devices; compiled programs are kept between starts to save time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLM_", "JAX_", "XLA_"))}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**kept, **cache, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def state_of(run_dir: Path, step: int) -> tuple[dict, dict, dict]:
    """Everything a checkpoint holds: arrays by name, places in the data, counters."""
    with Checkpointer(str(run_dir / "checkpoints"), read_only=True) as checkpoints:
        assert checkpoints.latest() == step
        record = checkpoints.record(step)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {}
        for name, (shape, dtype, _) in record["leaves"].items():
            *folders, leaf = name.split("/")
            place = abstract
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        restored = checkpoints.restore(step, abstract)
    return restored.state, restored.data_states, restored.extra["tokens_seen"]


def assert_identical(got: tuple, want: tuple) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got[0]), jax.device_get(want[0]))
    assert got[1] == want[1]
    assert got[2] == want[2]


# What a run leaves behind.


@pytest.fixture(scope="module")
def finished(gin_file, tmp_path_factory) -> Path:
    """A complete run."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", f"--gin_file={gin_file}", f"--run_dir={run_dir}"]) == 0
    return run_dir


def test_a_run_leaves_everything_a_reader_needs(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    read = {name: json.loads((finished / name).read_text()) for name in FILES if name.endswith(".json")}
    assert read["data.json"]["mixture"] == "tatoeba.denoise.fr"
    assert read["model.json"]["vocab_size"] == 8192
    assert read["mesh.json"]["devices"] == jax.device_count()
    assert {"jax", "python"} <= set(read["versions.json"])
    lines = (finished / "parameters.txt").read_text().splitlines()
    assert lines[0].split() == ["path", "shape", "axes", "mesh", "count"]
    assert any(line.startswith("embedding ") for line in lines)
    assert "data.mixture = %MIXTURE" in (finished / "config.gin").read_text()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["4", "6"]


def test_metrics_have_a_line_for_each_logged_step_and_evaluation(finished):
    records = read_metrics(finished)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 6]
    for record in records:
        assert np.isfinite(record["loss"])
        assert set(record["languages"]) == {"fr"}
    last = [r for r in records if r["kind"] == "train"][-1]["languages"]["fr"]
    assert last["tokens_seen"] > last["tokens"] > 0
    assert last["rate"] == 1
    assert last["epochs"] == pytest.approx(last["tokens_seen"] / one_pass(), abs=1e-6)
    assert state_of(finished, 6)[2] == {str(k): v for k, v in {french(): last["tokens_seen"]}.items()}


def one_pass() -> int:
    """Tokens of the French sentences of Tatoeba."""
    from mlm.data.statistics import task_counts
    from mlm.data.vocabulary import load_vocabulary

    return task_counts("tatoeba.denoise.fr", vocabulary=load_vocabulary("quickstart")).tokens


def french() -> int:
    from mlm.data.languages import language_id

    return language_id("fr")


def test_the_same_command_again_says_complete_and_changes_nothing(finished, train):
    before = {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*")}
    records = read_metrics(finished)
    code, screen = train(finished)
    assert code == 0
    assert f"{finished} is complete: 6 of 6 steps" in screen
    assert "resuming" not in screen
    assert {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*")} == before
    assert read_metrics(finished) == records


def test_a_dry_run_checks_everything_and_writes_nothing(train, tmp_path):
    code, screen = train(tmp_path / "run", "--dry_run", "--steps=9", "--set", "data.seed=3")
    assert code == 0
    assert "set train.steps: 6 -> 9" in screen
    assert "set data.seed: 0 -> 3" in screen
    assert "dry run: 9 steps" in screen
    assert "per device" in screen
    assert not (tmp_path / "run").exists()


def test_a_users_task_module_in_the_working_directory_is_found(train, tmp_path, monkeypatch):
    (tmp_path / "my_own_tasks.py").write_text(
        "from mlm.data.registration import register_mixture\n"
        "register_mixture('my.mixture', ['tatoeba.denoise.fr', 'tatoeba.denoise.uk'], lambda counts: counts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    arguments = ["--dry_run", "--set", "MIXTURE=my.mixture", "--set"]
    code, screen = train(tmp_path / "run", *arguments, "run.task_modules=('my_own_tasks',)")
    assert (code, "data: my.mixture" in screen) == (0, True), screen
    code, screen = train(tmp_path / "run", *arguments, "run.task_modules=('my_tasks',)")
    assert code == 2
    assert "no Python module 'my_tasks'" in screen


# Mistakes.


def one_line(screen: str) -> str:
    """The message: the last line, and no traceback before it."""
    assert "Traceback" not in screen
    lines = [line for line in screen.strip().splitlines() if not line.startswith(("set ", "model: "))]
    assert len(lines) == 1, screen
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=12", "batch=12 does not divide over data=8"),
        ("train.microbatches=3", "batch_size=8 does not divide into microbatches=3; use a multiple of 3"),
        ("mesh.tensor=3", "does not fit 8 devices"),
        ("mesh.tensor=8", "heads"),  # of which there are four
        ("preset.name=tny", "no model preset named 'tny'; did you mean 'tiny'?"),
        ("preset.vocab_size=512", "the vocabulary has 8,192 ids but the model only 512: set preset.vocab_size=8192"),
        ("MIXTURE=tatoeba.denoise.fra", "no task or mixture named 'tatoeba.denoise.fra'; did you mean"),
        ("data.vocabulary=nowhere.model", "nowhere.model"),
        ("data.shards=3", "batch_size=8 rows do not divide over shards=3"),
        ("data.targets_length=5", "raise targets_length to"),
        ("run.initial='nowhere'", "nowhere is not the directory of a run"),
        ("run.evaluation_split=validaton", "no task of tatoeba.denoise.fr has a split 'validaton'"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_code_2(train, tmp_path, override, message):
    code, screen = train(tmp_path / "run", "--set", override)
    assert code == 2, screen
    assert message in one_line(screen)
    assert not (tmp_path / "run").exists()


def test_norms_behind_the_residuals_need_a_rate_that_warms_up():
    from dataclasses import replace

    from mlm.cli.train import Plan, _check_warmup
    from mlm.models.presets import preset
    from mlm.models.specs import ResidualSpec
    from mlm.training.schedules import make_schedule

    model = preset("tiny")
    post, deep = (replace(model.decoder, residual=ResidualSpec(order="post", alpha=a)) for a in (1.0, 1.6))
    flat, warm = (make_schedule("constant", learning_rate=0.1, warmup_steps=n) for n in (0, 100))
    plan = Plan(model=model, data=None, train=None, optimizer=lambda axes, shapes: None, schedule=flat, run_dir="")
    bare = replace(plan, model=replace(model, decoder=post))
    deepened = replace(plan, model=replace(model, decoder=deep))
    for sound in (plan, deepened, replace(bare, schedule=warm), replace(bare, initial="a run")):
        _check_warmup(sound)
    with pytest.raises(
        ValueError, match=r"^decoder: norms after each residual.* take schedule.name=.* with schedule.warmup_steps"
    ):
        _check_warmup(bare)


def test_another_vocabulary_in_the_run_names_both_hashes(finished, train):
    from mlm.data.vocabulary import load_vocabulary

    code, screen = train(finished, "--set", "data.vocabulary=bytes")
    assert code == 2
    for name in ("bytes", "quickstart"):
        assert load_vocabulary(name).digest in screen
    assert "Traceback" not in screen


def test_another_model_in_the_run_is_refused_and_nothing_is_lost(finished, train):
    code, screen = train(finished, "--steps=8", "--set", "preset.vocab_size=8320")
    assert code == 1
    assert "holds another state than this run" in screen
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["4", "6"]
    assert json.loads((finished / "model.json").read_text())["vocab_size"] == 8192


def test_a_run_directory_that_cannot_be_written_is_a_failure(train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, screen = train(tmp_path / "file" / "run")
    assert code == 1
    assert "cannot write in the run directory" in one_line(screen)
    assert "choose another with --run_dir" in one_line(screen)


def test_traceback_shows_where_an_error_came_from(train, tmp_path):
    code, screen = train(tmp_path / "run", "--set", "preset.name=tny", "--traceback")
    assert code == 2
    assert "Traceback" in screen
    assert "presets.py" in screen


def test_a_damaged_checkpoint_is_passed_over_and_named(finished, train, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    victim = max((run_dir / "checkpoints" / "6" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    victim.write_bytes(victim.read_bytes()[:-100])
    code, screen = train(run_dir)
    assert code == 0
    assert screen.count("checkpoint 6 is damaged") == 1
    assert f"resuming {run_dir} at step 4" in screen
    assert f"complete: 6 steps in {run_dir}" in screen
    assert {"4", "6", "6.corrupt"} == {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert_identical(state_of(run_dir, 6), state_of(finished, 6))


# Heads that guess ahead, on a run that stays as it is.

HEADS = ["--gin_file=gin/objectives/chimera.gin", "--steps=3", "--set", "chimera.heads=2", "--set", "chimera.d_ff=64"]


def test_heads_are_trained_on_a_run_and_guess_for_it(finished, train, tmp_path, capsys):
    run_dir, initial = tmp_path / "heads", f"run.initial={finished}"
    code, screen = train(run_dir, *HEADS, "--set", initial, "--steps=2")
    assert (code, f"beginning with the parameters of {finished}, step 6; its chimera heads are fresh" in screen) == (
        0,
        True,
    ), screen
    assert train(run_dir, *HEADS, "--set", initial)[0] == 0  # one step more, from where it stopped
    base, own = state_of(finished, 6)[0]["params"], state_of(run_dir, 3)[0]
    chimera = own["params"].pop("chimera")
    jax.tree.map(np.testing.assert_array_equal, own["params"], base)
    assert chimera["mix"].shape[0] == 2
    last = read_metrics(run_dir)[-2]
    assert {"nll", "nll_head_1", "nll_head_2", "accuracy_head_2", "state_error"} <= set(last)
    texts = []
    for asked in ([finished], [run_dir, "--proposer=chimera", "--guesses=1"], [run_dir, "--proposer=chimera"]):
        assert main(["generate", "Bonjour", f"--run_dir={asked[0]}", *asked[1:], "--max_length=8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    again, screen = train(tmp_path / "again", *HEADS, "--set", f"run.initial={run_dir}")
    assert (again, "fresh" in screen) == (0, False)
    code, screen = train(tmp_path / "other", "--set", f"run.initial={run_dir}")
    assert code == 2
    assert "has chimera heads, which only objective='chimera' trains" in one_line(screen)
    assert main(["experts", "upcycle", str(run_dir), str(tmp_path / "sparse"), "--experts=2"]) == 2
    assert "has chimera heads" in one_line(capsys.readouterr().err)
    assert main(["convert", "to-hf", str(run_dir), str(tmp_path / "hf")]) == 1
    assert "no place for the chimera heads" in capsys.readouterr().err


def test_heads_are_trained_on_what_the_run_decodes_with(tiny_run):
    """Its running mean, where it kept one; other objectives go on from the parameters themselves."""
    from dataclasses import replace

    import mlm
    from mlm.cli.train import Plan, _initial
    from mlm.data.vocabulary import load_vocabulary
    from mlm.models.specs import ChimeraSpec
    from mlm.parallel import MeshConfig, make_mesh
    from mlm.training.optimizers import make_optimizer
    from mlm.training.trainer import TrainConfig, Trainer

    one, vocabulary = jax.devices()[:1], load_vocabulary(str(tiny_run / "vocabulary.json"))
    base = mlm.load(tiny_run, devices=one)
    optimizer = make_optimizer("adamw", learning_rate=0.1)
    for objective, chimera in (("chimera", ChimeraSpec(heads=1, d_ff=16)), ("text_to_text", None)):
        model, config = replace(base.config, chimera=chimera), TrainConfig(steps=1, objective=objective)
        plan = Plan(
            model=model,
            data=None,
            train=config,
            optimizer=optimizer,
            schedule=float,
            run_dir="",
            initial=str(tiny_run),
        )
        trainer = Trainer(model, config, optimizer, make_mesh(MeshConfig(), one), 5)
        params = _initial(plan, trainer, vocabulary).params
        wanted = base if chimera else mlm.load(tiny_run, parameters="params", devices=one)
        params.pop("chimera", None)
        jax.tree.map(np.testing.assert_array_equal, params, wanted.params)
    assert (base.parameters, wanted.parameters) == ("ema", "params")


def test_heads_need_a_model_to_guess_for(train, tmp_path):
    code, screen = train(tmp_path / "run", *HEADS, "--set", "run.initial=None")
    assert code == 2
    assert "trains heads of a model that stays as it is: name its run" in one_line(screen)


# Stopping and going on.


def test_more_steps_continue_a_run_as_if_it_had_never_ended(finished, train, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir, "--steps=3")[0] == 0
    code, screen = train(run_dir, "--steps=6")
    assert code == 0
    assert f"resuming {run_dir} at step 3" in screen
    assert_identical(state_of(run_dir, 6), state_of(finished, 6))
    steps = [r["step"] for r in read_metrics(run_dir) if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, seconds: float = 300) -> None:
    """Returns when metrics.jsonl has the step, or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if any(record["step"] >= step for record in read_metrics(run_dir)):
            return
        time.sleep(0.02)
    assert process.poll() is not None, f"step {step} was not reached in {seconds} s"


LONG = ["--steps=120", "--set", "checkpoints.every_steps=15", "--set", "loop.evaluate_every=40"]


@pytest.fixture(scope="module")
def uninterrupted(gin_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = subprocess.run(
        command(gin_file, folder / "run", *LONG),
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_at_random_steps_ends_with_identical_parameters(gin_file, uninterrupted, tmp_path):
    draw = random.Random(0)
    run_dir, kills, aims = tmp_path / "run", [], [3, 18, 40, 75, 110]  # before the first checkpoint, and on
    for aim in aims:
        with open(tmp_path / "screen.txt", "w") as screen:
            process = subprocess.Popen(
                command(gin_file, run_dir, *LONG), env=environment(uninterrupted.parent.parent), stderr=screen
            )
            wait_for_step(process, run_dir, aim + draw.randrange(10))
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            kills.append(process.wait())
    assert kills.count(-signal.SIGKILL) >= 3, kills
    done = subprocess.run(
        command(gin_file, run_dir, *LONG),
        env=environment(uninterrupted.parent.parent),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"complete: 120 steps in {run_dir}" in done.stderr or "is complete" in done.stderr
    assert_identical(state_of(run_dir, 120), state_of(uninterrupted, 120))
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(d) if r["kind"] == "train"] for d in (run_dir, uninterrupted)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_resume_and_exits_with_0(gin_file, uninterrupted, tmp_path, name):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(gin_file, run_dir, *LONG),
        env=environment(uninterrupted.parent.parent),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(process, run_dir, 20)
    process.send_signal(name)
    _, screen = process.communicate(timeout=120)
    assert process.returncode == 0, screen
    stopped = re.search(
        r"stopped at step (\d+), everything is saved; the same command resumes:\n  mlm train (.+)", screen
    )
    assert stopped, screen
    assert "Traceback" not in screen
    assert 20 <= int(stopped[1]) < 120
    again = [sys.executable, "-m", "mlm", "train", *shlex.split(stopped[2])]
    assert again == command(gin_file, run_dir, *LONG)
    done = subprocess.run(
        again, env=environment(uninterrupted.parent.parent), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming {run_dir} at step {stopped[1]}" in done.stderr
    assert_identical(state_of(run_dir, 120), state_of(uninterrupted, 120))
