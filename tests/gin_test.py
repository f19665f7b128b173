"""Every shipped configuration is whole: it parses, uses what it sets, and describes something that can be built."""

import jax
import pytest

from mlm.cli import configuration, train
from mlm.cli.main import UsageError
from mlm.models.specs import ChimeraSpec
from mlm.objectives.any_order import AnyOrder
from mlm.shipped import gin_path

ROOT = gin_path()
FILES = sorted(str(path.relative_to(ROOT.parent)) for path in ROOT.rglob("*.gin"))
RUNS = [name for name in FILES if name.startswith("gin/runs/")]
MODELS = [name for name in FILES if name.startswith("gin/models/")]
MIXTURES = [name for name in FILES if name.startswith("gin/mixtures/")]
# What the base file of all runs leaves to its reader.
PRETRAIN = "gin/runs/pretrain.gin"
REQUIRED = ["run.run_dir=runs/x", "data.batch_size=8", "data.vocabulary=bytes", "train.steps=10"]


@pytest.fixture(autouse=True)
def names():
    train.bind_all()


def resolve(name: str, *overrides: str) -> configuration.Resolved:
    if name == PRETRAIN:
        return configuration.resolve(["gin/models/tiny.gin", "gin/mixtures/quickstart.gin", name], REQUIRED)
    return configuration.resolve([name], overrides)


def test_the_files_are_found():
    assert PRETRAIN in RUNS
    assert len(MODELS) >= 6
    assert len(MIXTURES) >= 2
    assert sorted({name.split("/")[1] for name in FILES}) == ["mixtures", "models", "objectives", "runs"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_is_a_plan(name):
    """resolve() refuses unused and undefined macros, required values without one, and values of the wrong type."""
    text = resolve(name).text
    plan = train.configured()
    assert plan.data.mixture
    assert plan.train.steps > 0
    assert plan.run_dir
    assert float(plan.schedule(0)) >= 0
    assert float(plan.schedule(plan.train.steps)) >= 0
    assert "%gin.REQUIRED" not in text


@pytest.mark.parametrize("name", RUNS)
def test_a_resolved_configuration_is_a_gin_file_that_says_the_same(name, tmp_path):
    """It is written into the run directory as config.gin, and can be given to --gin_file."""
    text = resolve(name).text
    (tmp_path / "config.gin").write_text(text)
    assert configuration.resolve([str(tmp_path / "config.gin")], []).text == text


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_describes_a_model(name):
    from mlm.models.transformer import Transformer
    from mlm.trees import count

    configuration.resolve([name, "gin/mixtures/quickstart.gin", PRETRAIN], REQUIRED)
    model = train.configured().model
    assert count(Transformer(model).shapes()) > 100_000


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_file_names_a_registered_mixture(name):
    from mlm.data.registration import get, load_tasks

    configuration.resolve(["gin/models/tiny.gin", name, PRETRAIN], REQUIRED)
    load_tasks()
    assert get(train.configured().data.mixture)


def test_any_run_may_learn_any_order():
    configuration.resolve(["gin/runs/quickstart.gin", "gin/objectives/any_order.gin"], ["any_order.mask_token=258"])
    assert train.configured().train.any_order == AnyOrder(mask_token=258)


def test_heads_may_be_trained_on_any_run():
    files = ["gin/runs/quickstart.gin", "gin/objectives/chimera.gin"]
    configuration.resolve(files, ["run.initial=runs/base", "chimera.heads=2"])
    plan = train.configured()
    assert (plan.train.objective, plan.initial) == ("chimera", "runs/base")
    assert plan.model.chimera == ChimeraSpec(heads=2)
    with pytest.raises(UsageError, match=r"required, but not set: run.initial"):
        configuration.resolve(files, [])


@pytest.mark.parametrize("name", RUNS)
def test_a_file_says_what_it_is(name):
    lines = (ROOT.parent / name).read_text().splitlines()
    assert lines[0].startswith("# what:")
    if name != PRETRAIN:
        assert "cost:" in lines[1]
        assert "result:" in lines[1]


def test_the_quickstart_is_whole():
    """The run file comes last and wins over the base file that it includes."""
    text = resolve("gin/runs/quickstart.gin").text
    assert "schedule.name = 'cosine'" in text
    assert "schedule.name = 'inverse_sqrt'" not in text
    plan = train.configured()
    assert plan.report
    assert plan.data.mixture == "quickstart"
    assert plan.model.vocab_size == plan.data.load_vocabulary().vocab_size
    rates = jax.vmap(plan.schedule)(jax.numpy.arange(plan.train.steps))
    assert rates.argmax() < plan.train.steps / 4
    assert rates[-1] < rates.max() / 5  # it ends where the steps end
