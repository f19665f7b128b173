"""gin at the edge: later files win, the command line wins over files, a mistake is one line with what is nearest."""

import re

import pytest

from mlm.cli import configuration, train
from mlm.cli.main import UsageError

RUN = "gin/runs/quickstart.gin"


@pytest.fixture(autouse=True)
def names():
    train.bind_all()


def plan(*files: str, overrides: tuple[str, ...] = ()):
    configuration.resolve(files or [RUN], overrides)
    return train.configured()


def options(*arguments: str) -> list[str]:
    return train._parse([f"--gin_file={RUN}", *arguments]).overrides


@pytest.mark.parametrize(
    "spelling",
    [
        ["--set", "data.batch_size=64"],
        ["--set=data.batch_size=64"],
        ["--gin.data.batch_size=64"],
        ["--gin_bindings", "data.batch_size = 64"],
    ],
)
def test_an_override_in_every_spelling(spelling):
    overrides = options(*spelling)
    resolved = configuration.resolve([RUN], overrides)
    (change,) = resolved.changes
    assert re.fullmatch(r"data.batch_size: \d+ -> 64", change)
    assert train.configured().data.batch_size == 64
    assert "data.batch_size = 64" in resolved.text


def test_steps_and_run_dir_are_part_of_the_configuration():
    """So config.gin in the run directory says them too."""
    overrides = options("--steps", "7", "--run_dir", "7")
    resolved = configuration.resolve([RUN], overrides)
    assert "run.run_dir: 'runs/quickstart' -> '7'" in resolved.changes
    assert any(re.fullmatch(r"train.steps: \d+ -> 7", change) for change in resolved.changes)
    assert "train.steps = 7" in resolved.text
    assert "run.run_dir = '7'" in resolved.text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.vocabulary=some/where.model", "some/where.model"),
        ("data.vocabulary='some/where.model'", "some/where.model"),
        ("data.vocabulary=None", None),
        ("data.pack=False", False),
        ("data.seed=-1", -1),
        ("train.z_loss=1e-3", 1e-3),
        ("data.stages=((0.0, 'a'), (0.5, 'b'))", ((0.0, "a"), (0.5, "b"))),
        ("MIXTURE=udhr.denoise.fr", "udhr.denoise.fr"),
    ],
)
def test_values_are_literals_or_text(text, value):
    name = text.partition("=")[0]
    overrides = (text, "data.steps=10") if "stages" in text else (text,)
    made = plan(overrides=overrides)
    owner, _, field = name.rpartition(".")
    assert getattr(getattr(made, owner or "data"), field if owner else "mixture") == value


def test_later_files_win(tmp_path):
    (tmp_path / "one.gin").write_text("data.batch_size = 8\ndata.seed = 1\n")
    (tmp_path / "two.gin").write_text("data.seed = 2\n")
    made = plan(RUN, str(tmp_path / "one.gin"), str(tmp_path / "two.gin"))
    assert (made.data.batch_size, made.data.seed) == (8, 2)
    assert plan(RUN).data.seed == 0  # nothing is left over from before


def test_includes_are_found_beside_the_file_here_or_among_the_shipped(tmp_path, monkeypatch, caplog):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/seed.gin").write_text("data.seed = 5\n")
    (tmp_path / "here.gin").write_text("data.shards = 2\n")
    (tmp_path / "beside/mine.gin").write_text(f"include '{RUN}'\ninclude 'seed.gin'\ninclude 'here.gin'\n")
    monkeypatch.chdir(tmp_path)
    made = plan("beside/mine.gin")
    assert (made.data.seed, made.data.shards, made.data.mixture) == (5, 2, "quickstart")
    assert not caplog.records


def test_a_macro_may_be_left_without_use_by_an_override():
    assert plan(overrides=("data.mixture=udhr.denoise.fr",)).data.mixture == "udhr.denoise.fr"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dta.batch_size=1"], "nothing is named 'dta'; did you mean 'data'?"),
        (["data.bath_size=1"], "data has no parameter 'bath_size'; did you mean 'batch_size'?"),
        (["run.model=@prest()"], "nothing is named 'prest'; did you mean 'preset'?"),
        (["MIXTUR=x"], "nothing uses the macro MIXTUR; did you mean 'MIXTURE'?"),
        (["run.model=%MODL"], "the macro MODL is used but not set; did you mean 'MODEL'?"),
        (["data.batch_size=many"], "data.batch_size='many' must be a whole number"),
        (["data.batch_size=1.5"], "data.batch_size=1.5 must be a whole number"),
        (["data.pack=1"], "data.pack=1 must be True or False"),
        (["checkpoints.keep_every_steps=x"], "must be a whole number or None"),
        (["data.batch_size=%gin.REQUIRED"], "required, but not set: data.batch_size"),
        (["data.batch_size=[1"], "data.batch_size=[1: a bracket is not closed"),
        (["data.batch_size"], "must read NAME.parameter=value, e.g. data.batch_size=64"),
        (["batch size=3"], "must read NAME.parameter=value"),
    ],
)
def test_a_wrong_override_is_one_line(overrides, message):
    with pytest.raises(UsageError) as error:
        configuration.resolve([RUN], overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("include 'gin/models/tny.gin'", "line 1: no gin file 'gin/models/tny.gin' here or among the shipped ones; "),
        ("\nprest.name = 'tiny'", "line 2: nothing is named 'prest'; did you mean 'preset'?"),
        ("preset.nme = 'tiny'", "line 1: preset has no parameter 'nme'; did you mean 'name'?"),
        ("preset.name = tiny", "line 1: tiny is no value; text needs quotes"),
        ("preset.name 'tiny'", "line 1"),
        ("import no.such.module", "line 1: No module named 'no'"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path, content, message):
    (tmp_path / "wrong.gin").write_text(content + "\n")
    with pytest.raises(UsageError) as error:
        configuration.resolve([RUN, str(tmp_path / "wrong.gin")], [])
    assert message in str(error.value)
    assert "wrong.gin" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["gin/runs/quikstart.gin"], "no gin file 'gin/runs/quikstart.gin' .*did you mean 'gin/runs/quickstart.gin'"),
        (["gin/runs/pretrain.gin"], "the macro MIXTURE is used but not set.*files of gin/models and gin/mixtures"),
        (
            ["gin/models/tiny.gin", "gin/mixtures/quickstart.gin", "gin/runs/pretrain.gin"],
            "required, but not set: data.batch_size, data.vocabulary, run.run_dir, train.steps",
        ),
    ],
)
def test_missing_files_and_values(files, message):
    with pytest.raises(UsageError, match=message):
        configuration.resolve(files, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset.name=mt5_smal", "no model preset named 'mt5_smal'; did you mean 'mt5_small'"),
        ("optimizer.name=adamm", "no optimizer named 'adamm'; did you mean 'adamw'"),
        ("optimizer.decay_exponnt=0.9", "has no option 'decay_exponnt'; did you mean 'decay_exponent'?"),
        ("schedule.name=cosin", "no schedule named 'cosin'; did you mean 'cosine'"),
        ("train.on_nonfinite=stp", "did you mean 'stop'"),
        ("mesh.fsdp=0", "mesh axis fsdp=0"),
        ("data.batch_size=0", "batch_size=0: at least 1"),
        ("train.steps=0", "steps=0 must be at least 1"),
    ],
)
def test_what_a_value_means_is_checked_when_the_plan_is_made(override, message):
    """One line for a user; gin's own notes on where it called what are left out."""
    with pytest.raises((ValueError, KeyError, TypeError)) as error:
        plan(overrides=(override,))
    assert message in configuration.explain(error.value)
    assert "\n" not in configuration.explain(error.value)
    assert "In call to" not in configuration.explain(error.value)


def test_the_objective_of_masked_blocks_asks_for_its_mask():
    files = [RUN, "gin/objectives/mask_block.gin"]
    with pytest.raises(UsageError, match=r"required, but not set: train\.mask_token"):
        configuration.resolve(files, [])
    made = plan(*files, overrides=("train.mask_token=8100",))
    assert (made.train.objective, made.train.block, made.train.mask_token) == ("mask_block", 8, 8100)
    assert not made.data.pack


def test_the_objective_of_lexical_units_asks_for_its_mask():
    files = [RUN, "gin/objectives/lexical_units.gin"]
    with pytest.raises(UsageError, match=r"required, but not set: .*train\.mask_token"):
        configuration.resolve(files, [])
    made = plan(*files, overrides=("train.mask_token=8100", "train.unit_threshold=0.8", "run.initial='runs/base'"))
    assert (made.train.objective, made.train.block, made.train.unit_threshold) == ("lexical_units", 9, 0.8)


def test_a_configuration_without_a_run_says_what_is_missing():
    configuration.resolve(["gin/objectives/text_to_text.gin"], [])
    with pytest.raises(TypeError) as error:
        train.configured()
    assert "sets no run.model" in configuration.explain(error.value)
