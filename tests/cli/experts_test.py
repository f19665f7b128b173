"""`mlm experts`: a dense run made sparse, trained on, looked at, and pruned; and every mistake in one line."""

from pathlib import Path

import numpy as np
import pytest

import mlm
from mlm.cli.main import main
from mlm.models.config import to_json
from mlm.training.metrics import read_experts, read_metrics
from tests.cli.train_test import RUN

SHORT = RUN + "train.steps = 2\nloop.evaluate_every = 0\n"
SPARSE = """
preset.router = @router()
router.experts = 4
router.k = 2
router.gates = 'chosen'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """runs dense (trained), sparse (made from it), trained (from sparse), each a command."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "dense.gin").write_text(SHORT)
    (folder / "sparse.gin").write_text(SHORT + SPARSE)
    run = lambda name: str(folder / name)  # noqa: E731
    assert main(["train", f"--gin_file={folder / 'dense.gin'}", f"--run_dir={run('dense')}"]) == 0
    assert main(["experts", "upcycle", run("dense"), run("sparse"), "--experts", "4"]) == 0
    begin = ["--set", f"run.initial={run('sparse')!r}"]
    assert main(["train", f"--gin_file={folder / 'sparse.gin'}", f"--run_dir={run('trained')}", *begin]) == 0
    return folder


def test_a_sparse_run_begins_where_the_dense_one_ended(folder):
    """Same text, same scores: two equal experts whose gates sum to 1 are the network that they were copied from."""
    dense, sparse = (mlm.load(folder / name) for name in ("dense", "sparse"))
    pairs = [("Bonjour tout le monde.", "Il pleut."), ("Il pleut.", "Bonjour.")]
    np.testing.assert_allclose(sparse.score(pairs, to="fr"), dense.score(pairs, to="fr"), rtol=1e-4)
    assert sparse.config.encoder.routers()[0].experts == 4
    assert sparse.generate(["Bonjour"], to="fr") == dense.generate(["Bonjour"], to="fr")


def test_training_goes_on_from_the_parameters_of_another_run(folder):
    """Both runs begin with the same batch: ln 8192 = 9.0 and more for fresh parameters, less for trained ones."""
    fresh, first = (next(r for r in read_metrics(folder / n) if r["kind"] == "train") for n in ("dense", "trained"))
    assert fresh["nll"] > 9.0
    assert first["nll"] < fresh["nll"] - 1.0
    assert first["routing/decoder/dropped/0"] == 0.0
    assert 0 < first["routing/encoder/entropy/0"] <= np.log(4) + 1e-6


def test_the_table_of_a_run_is_kept_and_shown(folder, capsys):
    table = read_experts(folder / "trained")
    assert table["encoder"].shape == (1, len(table["languages"]), 4)
    french = table["languages"].tolist().index("fr")
    assert table["encoder"][0, french].sum() == table["encoder"].sum() > 0
    assert main(["experts", "show", str(folder / "trained"), "--stack", "decoder"]) == 0
    shown = capsys.readouterr().out
    assert "decoder, mixture 0: the experts of 4" in shown
    assert f"{int(table['decoder'].sum()):,}" in shown
    assert "fr" in shown


@pytest.mark.parametrize("more", [[], ["--merge"]], ids=["pruned", "merged"])
def test_fewer_experts_are_a_run_that_generates(folder, tmp_path, capsys, more):
    target = tmp_path / "fewer"
    assert main(["experts", "prune", str(folder / "trained"), str(target), "--keep", "2", "--for", "fr", *more]) == 0
    assert "2 of 4 experts, which served" in capsys.readouterr().err
    session = mlm.load(target)
    assert to_json(session.config)["decoder"]["group"][1]["sublayers"][2]["router"]["experts"] == 2
    assert len(session.generate(["Bonjour"], to="fr")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "trained", "new", "--keep", "1"], "keep=1 must be between k=2 and 4"),
        (["prune", "trained", "new", "--keep", "2", "--for", "french"], "no language 'french'"),
        (["prune", "dense", "new", "--keep", "2"], "only models with mixtures of experts write them"),
        (["upcycle", "dense", "trained", "--experts", "4"], "is not empty"),
        (["upcycle", "nowhere", "new", "--experts", "4"], "nowhere is no run directory"),
        (["show", "trained", "--languages", "x"], "invalid int value"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    try:
        code = main(["experts", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["router.priority='score'", "router.capacity=1.0"], "priority='score' decides by later tokens"),
        (["mesh.expert=8"], "experts=4 does not divide over expert=8"),
        (["router.k=5"], "k=5 of experts=4"),
    ],
)
def test_experts_that_cannot_be_trained_are_refused_in_one_line(folder, capsys, changes, said):
    flags = [part for change in changes for part in ("--set", change)]
    command = ["train", f"--gin_file={folder / 'sparse.gin'}", f"--run_dir={folder / 'other'}", *flags]
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("set ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (folder / "other").exists()


def test_another_model_is_no_beginning(folder, capsys):
    override = ["--set", f"run.initial={str(folder / 'dense')!r}", "--run_dir", str(folder / "other")]
    assert main(["train", f"--gin_file={folder / 'sparse.gin'}", *override]) == 2
    said = capsys.readouterr().err
    assert "holds another model" in said
    assert "router" in said
