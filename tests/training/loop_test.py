"""The loop: resumed = uninterrupted bit for bit, stops on request, skips or refuses bad batches, counts every token."""

import os
import signal

import jax
import numpy as np
import optax
import pytest

from mlm.checkpoints import CheckpointConfig, Checkpointer
from mlm.parallel import MeshConfig, make_mesh
from mlm.training.loop import LoopConfig, TrainingDiverged, fit
from mlm.training.metrics import MetricWriter, TokenCounter, read_metrics
from mlm.training.trainer import TrainConfig, Trainer
from tests.training.toy import LANGUAGES, MODEL, examples, rows_of, with_dropout

CODES = ["-", "aa", "bb", "cc", "dd"]


class Rows:
    """A deterministic endless source whose place is one number."""

    def __init__(self, poison=()):
        self.drawn, self.poison = 0, poison

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        batch = rows_of([[e] for e in examples(4, seed=self.drawn)])
        if self.drawn in self.poison:
            batch["decoder_loss_weights"][:] = np.inf
        return batch

    def state(self):
        return {0: str(self.drawn).encode()}

    def restore(self, states):
        self.drawn = int(states[0])
        return self


class Recorder:
    """An observer that keeps what it is told, and can act on a step."""

    def __init__(self, at=None, act=None):
        self.logged, self.events, self.at, self.act = {}, [], at, act

    def log(self, step, info):
        self.logged[step] = dict(info)
        if step == self.at:
            self.act()

    def event(self, text):
        self.events.append(text)


def run(directory, steps=8, every=3, rows=None, observer=None, evaluations=None, best=None, **config):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    train = TrainConfig(steps=steps, ema_decay=0.9, **config)
    trainer = Trainer(with_dropout(0.1), train, lambda axes, shapes: optax.adam(1e-2), mesh, LANGUAGES)
    rows, observer = rows or Rows(), observer or Recorder()
    with Checkpointer(
        str(directory / "checkpoints"), CheckpointConfig(every_steps=every, keep=9, best_metric=best)
    ) as saved:
        start, state, extra = saved.latest() or 0, None, {}
        if start:
            restored = saved.restore(None, trainer.abstract)
            state, extra = restored.state, restored.extra
            rows.restore(restored.data_states)
        with MetricWriter(directory, CODES, start) as writer:
            counter = TokenCounter(LANGUAGES, extra.get("tokens_seen"))
            outcome = fit(
                trainer,
                rows,
                checkpointer=saved,
                writer=writer,
                observer=observer,
                loop=LoopConfig(log_every=1, evaluate_every=2),
                counter=counter,
                state=state if start else trainer.init(),
                start=start,
                evaluations=evaluations,
                flops_per_step=1e6,
            )
            steps_saved = saved.steps(), saved.best()
    return outcome, counter, observer, steps_saved


def assert_identical(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, counted, screen, _ = run(tmp_path / "whole")
    first, *_ = run(tmp_path / "parts", steps=5)
    assert first.step == 5
    second, recounted, _, _ = run(tmp_path / "parts")
    assert_identical(second.state, whole.state)
    np.testing.assert_array_equal(recounted.counts, counted.counts)
    assert sorted(screen.logged) == list(range(1, 9))
    losses = [[r["loss"] for r in read_metrics(tmp_path / d) if r["kind"] == "train"] for d in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, name):
    """Batches are drawn ahead of training: what was drawn but not trained on must not be lost."""
    whole, *_ = run(tmp_path / "whole", steps=12, every=100)
    before = signal.getsignal(name)
    stopper = Recorder(at=4, act=lambda: os.kill(os.getpid(), name))
    stopped, *_ = run(tmp_path / "cut", steps=12, every=100, observer=stopper)
    assert stopped.interrupted
    assert 4 < stopped.step < 12
    assert signal.getsignal(name) == before
    resumed, *_ = run(tmp_path / "cut", steps=12, every=100)
    assert not resumed.interrupted
    assert_identical(resumed.state, whole.state)


def test_every_token_is_counted_for_its_language(tmp_path):
    _, counter, _, _ = run(tmp_path, steps=5)
    want = np.zeros(LANGUAGES, np.int64)
    for seed in range(1, 6):
        for inputs, targets, language in examples(4, seed=seed):
            want[language] += len(inputs) + len(targets)
    np.testing.assert_array_equal(counter.counts, want)
    last = [r for r in read_metrics(tmp_path) if r["kind"] == "train"][-1]
    for code, values in last["languages"].items():
        assert values["tokens_seen"] == want[CODES.index(code)]


def test_a_bad_batch_stops_the_run_with_the_reason(tmp_path):
    with pytest.raises(
        TrainingDiverged, match=r"not finite at step 3 .* parameters are those of step 2.*on_nonfinite='skip'"
    ):
        run(tmp_path, rows=Rows(poison=(3,)))


def test_a_bad_batch_can_be_skipped_and_is_counted(tmp_path):
    outcome, _, screen, _ = run(tmp_path, rows=Rows(poison=(3,)), on_nonfinite="skip")
    assert outcome.step == 8
    assert int(outcome.state.skipped) == 1
    assert screen.logged[8]["skipped"] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(outcome.state.params)))


def test_checkpoints_evaluations_and_the_best_of_them(tmp_path):
    held_out = {"validation": lambda: [rows_of([[e] for e in examples(4, seed=99)])]}
    _outcome, _, screen, (steps, best) = run(tmp_path, steps=8, every=2, evaluations=held_out, best="validation/loss")
    assert steps == [2, 4, 6, 8]
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "validation"}
    assert sorted(losses) == steps
    assert best == min(losses, key=losses.get)
    assert len(screen.events) == 4


def test_a_progress_line_has_its_numbers(tmp_path):
    _, _, screen, _ = run(tmp_path, steps=3)
    info = screen.logged[3]
    assert info["model_flops_per_second"] == pytest.approx(1e6 * info["steps_per_second"])
    assert info["tokens_per_second"] > 0
    assert np.isfinite(info["gradient_norm"])
    assert 0 <= info["accuracy"] <= 1


def test_metric_lines_of_steps_to_be_repeated_are_dropped(tmp_path):
    with MetricWriter(tmp_path, CODES, 0) as writer:
        for step in (1, 2, 3):
            writer.write("train", step, {"loss": float(step)}, {1: {"loss": 2.0}})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    with MetricWriter(tmp_path, CODES, 2) as writer:
        writer.write("train", 3, {"loss": float("nan")})
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[-1]["loss"] is None
    assert records[0]["languages"] == {"aa": {"loss": 2.0}}


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"log_every=0 must be at least 1"):
        LoopConfig(log_every=0)
    assert MODEL.vocab_size == 64
