"""`mlm train --gin_file=…`: from gin files to a trained model in a run directory. The same command resumes it."""

import argparse
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm.cli import configuration, screen
from mlm.cli.main import Failed, UsageError


def run(arguments: list[str]) -> int:
    """Exit code 0: complete, or stopped on request with everything saved. 1: failed. 2: wrong configuration."""
    options = _parse(arguments)
    import jax

    from mlm.parallel import initialize_distributed

    initialize_distributed()
    if jax.process_index() > 0:
        screen.silence()
    bind_all()
    resolved = configuration.resolve(options.gin_file, options.overrides)
    for change in resolved.changes:
        screen.say(f"set {change}")
    try:
        plan = configured()
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(configuration.explain(error)) from error
    return pretrain(plan, resolved.text, dry_run=options.dry_run)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm train",
        description="Train a model from gin files. Run it again to resume; a complete run says so.",
        epilog="example: mlm train --gin_file=gin/runs/quickstart.gin --set data.batch_size=32 --run_dir=runs/mine",
    )
    parser.add_argument(
        "--gin_file", action="append", required=True, metavar="FILE", help="may be repeated; later wins"
    )
    parser.add_argument("--run_dir", metavar="DIR", help="where the run lives (default: what the gin file says)")
    parser.add_argument("--steps", type=int, metavar="N", help="same as --set train.steps=N")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME.PARAM=VALUE",
        dest="overrides",
        help="override one gin value",
    )
    parser.add_argument(
        "--gin_bindings", action="append", default=[], metavar="BINDING", help="the same, in gin's own spelling"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    # T5X users write --gin.NAME=VALUE.
    dotted = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    options = parser.parse_args([a for a in arguments if not a.startswith("--gin.")])
    options.overrides += options.gin_bindings + dotted
    if options.run_dir is not None:
        options.overrides.append(f"run.run_dir={options.run_dir!r}")
    if options.steps is not None:
        options.overrides.append(f"train.steps={options.steps}")
    return options


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole training run as values. gin name: `run`.

    optimizer: (parameter axes, shapes) -> optimizer; schedule: step -> learning rate. evaluation_rows: held-out rows
    of every evaluation. initial: a run directory whose parameters this run begins with; where that is a published
    model's, its way of writing sources stays. report: write report.html when complete, and let the exit code say
    whether it passed.
    """

    model: Any
    data: Any
    train: Any
    optimizer: Callable[..., Any]
    schedule: Callable[[Any], Any]
    run_dir: str
    mesh: Any = None
    checkpoints: Any = None
    loop: Any = None
    evaluation_split: str = "validation"
    evaluation_rows: int = 256
    task_modules: tuple[str, ...] = ()
    initial: str | None = None
    report: bool = False


def bind_all() -> None:
    """Gives gin its names: one place, the whole vocabulary of a gin file."""
    from mlm.checkpoints import CheckpointConfig
    from mlm.data.pipeline import DataConfig
    from mlm.models.presets import preset
    from mlm.models.specs import ChimeraSpec, PositionSpec, RouterSpec, SeqPESpec
    from mlm.objectives.any_order import AnyOrder
    from mlm.parallel import MeshConfig
    from mlm.training.loop import LoopConfig
    from mlm.training.optimizers import make_optimizer
    from mlm.training.schedules import make_schedule
    from mlm.training.trainer import TrainConfig

    names: dict[str, Callable[..., Any]] = {
        "run": Plan,
        "preset": preset,
        "router": RouterSpec,
        "position": PositionSpec,
        "seqpe": SeqPESpec,
        "chimera": ChimeraSpec,
        "data": DataConfig,
        "train": TrainConfig,
        "any_order": AnyOrder,
        "optimizer": make_optimizer,
        "schedule": make_schedule,
        "mesh": MeshConfig,
        "checkpoints": CheckpointConfig,
        "loop": LoopConfig,
    }
    for name, target in names.items():
        configuration.bind(name, target)


def configured() -> Plan:
    """The run that the resolved gin configuration describes."""
    import gin

    plan = gin.get_configurable("run")()
    from mlm.checkpoints import CheckpointConfig
    from mlm.parallel import MeshConfig
    from mlm.training.loop import LoopConfig

    defaults = {"mesh": MeshConfig, "checkpoints": CheckpointConfig, "loop": LoopConfig}
    missing = {name: make() for name, make in defaults.items() if getattr(plan, name) is None}
    return dataclasses.replace(plan, **missing)


def pretrain(plan: Plan, config_text: str, *, dry_run: bool = False) -> int:
    """Builds everything, checks it before compiling, restores what is there, trains, and reports."""
    import jax

    from mlm.checkpoints import Checkpointer, CheckpointError
    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.data.languages import LANGUAGES
    from mlm.data.pipeline import BatchIterator
    from mlm.data.prefetch import Prefetcher
    from mlm.data.registration import load_tasks
    from mlm.models.flops import heads_flops, training_flops, units_flops
    from mlm.parallel import data_layout, describe, make_mesh
    from mlm.parallel.peaks import peak_flops
    from mlm.training.loop import fit
    from mlm.training.metrics import MetricWriter, TokenCounter
    from mlm.training.trainer import Trainer

    try:
        mesh = make_mesh(plan.mesh)
        trainer = Trainer(plan.model, plan.train, plan.optimizer, mesh, len(LANGUAGES))
        trainer.check_batch(plan.data.batch_size)
        _check_warmup(plan)
        layout = data_layout(mesh)
        directory = RunDirectory(plan.run_dir)
        _check_heads(plan, directory)
        data = _data_of_the_run(plan, directory)
        with screen.working("preparing the data …"):
            load_tasks(*plan.task_modules)
            rows = BatchIterator(data, layout.index, layout.count)
            held_out = _held_out(plan, data, layout)
        _check_vocabulary(plan, rows.vocabulary)
    except (ValueError, KeyError, FileNotFoundError, CheckpointError) as error:
        raise UsageError(str(error.args[0]) if isinstance(error, KeyError) else str(error)) from error

    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract.params))
    screen.say(f"model: {count:,} parameters; mesh: {describe(mesh)['summary']}; data: {data.mixture}")
    if dry_run:
        with screen.working("compiling …"):
            memory = _compiled_memory(trainer, rows)
        screen.say(f"dry run: {plan.train.steps} steps into {directory.path}; {memory}; nothing was trained")
        return 0

    directory.create()
    checkpointer = Checkpointer(str(directory.checkpoints), plan.checkpoints)
    start = checkpointer.latest() or 0
    if start:
        restored = _restore(checkpointer, trainer.abstract)
        state, start, extra = restored.state, restored.step, restored.extra
        rows.restore(restored.data_states)
        if start < plan.train.steps:
            screen.say(f"resuming {directory.path} at step {start}")
    else:
        state, extra = _initial(plan, trainer, rows.vocabulary), {}
    if jax.process_index() == 0:
        _describe_run(plan, directory, trainer, rows, config_text, start)

    if start < plan.train.steps:
        counts = {"chimera": heads_flops, "lexical_units": units_flops}
        flops = counts.get(plan.train.objective, training_flops)
        codes = [language.code or "-" for language in LANGUAGES]
        with (
            MetricWriter(directory.path, codes, start) as writer,
            screen.TrainingScreen(plan.train.steps, start) as observer,
            Prefetcher(rows) as source,
        ):
            outcome = fit(
                trainer,
                source,
                checkpointer=checkpointer,
                writer=writer,
                observer=observer,
                loop=plan.loop,
                counter=TokenCounter(len(LANGUAGES), extra.get("tokens_seen")),
                state=state,
                start=start,
                schedule=plan.schedule,
                evaluations={plan.evaluation_split: held_out},
                language_info=_language_info(rows),
                flops_per_step=flops(plan.model, data.batch_size, data.inputs_length, data.targets_length),
                peak_flops=peak_flops(),
            )
        checkpointer.close()
        if outcome.interrupted:
            screen.say(f"stopped at step {outcome.step}, everything is saved; the same command resumes:")
            screen.say(f"  mlm train {' '.join(_command())}")
            return 0
        screen.say(f"complete: {outcome.step} steps in {directory.path}")
    else:
        checkpointer.close()
        screen.say(f"{directory.path} is complete: {start} of {plan.train.steps} steps")
    return _report(plan, directory, plan.train.steps)


def _initial(plan: Plan, trainer: Any, vocabulary: Any) -> Any:
    """The state before the first step, with the parameters of the run `initial` where one is named, and fresh Chimera
    heads where that run has none. What heads are trained on is what the run decodes with: the mean, where it kept one.

    Raises UsageError when that run's model computes something else, or its vocabulary is another.
    """
    if plan.initial is None:
        return trainer.init()
    from mlm.checkpoints import Checkpointer, CheckpointError
    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.data.vocabulary import check_same_vocabulary
    from mlm.models.comparison import differences, mathematics
    from mlm.models.config import from_json, to_json
    from mlm.session.loading import parameters_kept

    try:
        source = RunDirectory(plan.initial)
        theirs, data = from_json(source.read_json("model.json")), source.read_json("data.json")
        ours, wanted = plan.model, dict(trainer.abstract.params)
        if theirs.chimera is None and ours.chimera is not None:
            ours = dataclasses.replace(ours, chimera=None)
            del wanted["chimera"]
        elif ours.chimera is None and theirs.chimera is not None:
            raise ValueError(
                f"run.initial={plan.initial!r} has chimera heads, which only objective='chimera' trains: begin with "
                "the run that they were trained on, run.initial in its config.gin"
            )
        lines = differences(to_json(mathematics(ours)), to_json(mathematics(theirs)))
        if lines:
            raise ValueError(f"run.initial={plan.initial!r} holds another model:\n  " + "\n  ".join(lines[:8]))
        check_same_vocabulary(data["vocabulary_digest"], vocabulary, plan.initial, "this run")
        checkpointer = Checkpointer(str(source.checkpoints), read_only=True)
        subtree = parameters_kept(checkpointer, None) if plan.train.trains_heads else "params"
        restored = checkpointer.restore_params(None, wanted, subtree)
    except (ValueError, CheckpointError) as error:
        raise UsageError(str(error)) from error
    fresh = "" if ours is plan.model else "; its chimera heads are fresh"
    what = "running mean of the parameters" if subtree == "ema" else "parameters"
    screen.say(f"beginning with the {what} of {plan.initial}, step {restored.step}{fresh}")
    return trainer.init(restored.state)


def _restore(checkpointer: Any, abstract: Any) -> Any:
    """The newest intact checkpoint. Damaged ones are said on the screen, and not in the log as well."""
    logger = logging.getLogger("mlm.checkpoints.checkpointer")
    logger.disabled = True
    try:
        restored = checkpointer.restore(None, abstract)
    finally:
        logger.disabled = False
    for step, reason in restored.skipped:
        screen.say(f"checkpoint {step} is damaged ({reason}) and now called {step}.corrupt; using step {restored.step}")
    return restored


def _command() -> list[str]:
    import shlex
    import sys

    return [shlex.quote(argument) for argument in sys.argv[2:]]


def _origin(plan: Plan, directory: Any) -> Any:
    """The run that this start goes on from: itself, once it has a checkpoint, or `initial`; None: neither."""
    from mlm.checkpoints import Checkpointer
    from mlm.checkpoints.run_directory import RunDirectory

    if Checkpointer(str(directory.checkpoints), read_only=True).latest():
        return directory
    return None if plan.initial is None else RunDirectory(plan.initial)


def _data_of_the_run(plan: Plan, directory: Any) -> Any:
    """The data config with what belongs to the run: the vocabulary file in its directory, copied there by the first
    start, and the template, at first that of the run `initial`.

    A run that already has a vocabulary must be continued with the same: raises ValueError naming both hashes.
    """
    from mlm.data.templates import Template
    from mlm.data.vocabulary import check_same_vocabulary, load_vocabulary

    data, origin = plan.data, _origin(plan, directory)
    if origin is not None:
        data = dataclasses.replace(data, template=Template.of_run(origin.read_json("data.json")))
    configured = data.load_vocabulary()
    own = next((p for p in (directory / "vocabulary.model", directory / "vocabulary.json") if p.exists()), None)
    if own is not None:
        check_same_vocabulary(
            configured, load_vocabulary(str(own)), "the configuration", f"the run at {directory.path}"
        )
        return dataclasses.replace(data, vocabulary=str(own))
    return data


def _check_warmup(plan: Plan) -> None:
    """Raises ValueError for fresh parameters with norms behind the residuals, as in BERT, at a full learning rate from
    the first step: these diverge (Xiong et al. 2020), unless DeepNorm's constants hold them.
    """
    bare = [n for n, s in plan.model.stacks().items() if s.residual.order == "post" and s.residual.alpha == 1.0]
    if bare and plan.initial is None and float(plan.schedule(0)) >= float(plan.schedule(1)):
        raise ValueError(
            f"{', '.join(bare)}: norms after each residual, without DeepNorm's constants, need a learning rate that "
            "warms up, and this schedule does not rise: take schedule.name='inverse_sqrt_warmup' with "
            "schedule.warmup_steps=4000 (Vaswani et al. 2017)"
        )


def _check_heads(plan: Plan, directory: Any) -> None:
    """Raises ValueError for heads on a model that nobody has trained: what they are to guess is noise."""
    if plan.train.trains_heads and _origin(plan, directory) is None:
        raise ValueError(
            "objective='chimera' trains heads of a model that stays as it is: name its run, with --set "
            "run.initial=runs/base, and its own gin file for the rest"
        )


def _check_vocabulary(plan: Plan, vocabulary: Any) -> None:
    size = plan.model.vocab_size
    if vocabulary.vocab_size > size:
        raise ValueError(
            f"the vocabulary has {vocabulary.vocab_size:,} ids but the model only {size:,}: "
            f"set preset.vocab_size={vocabulary.vocab_size}"
        )


def _held_out(plan: Plan, data: Any, layout: Any) -> Callable[[], Iterator[Mapping[str, Any]]]:
    """A function that gives the same held-out rows at every evaluation, in any number of processes.

    Raises ValueError when no task has the split.
    """
    from mlm.data.pipeline import BatchIterator

    config = dataclasses.replace(data, split=plan.evaluation_split, seed=0, stages=(), steps=None)
    batches = BatchIterator(config, layout.index, layout.count)
    beginning = batches.state()

    def rows() -> Iterator[Mapping[str, Any]]:
        batches.restore(beginning)
        for _ in range(max(1, plan.evaluation_rows // data.batch_size)):
            yield next(batches)

    return rows


def _language_info(rows: Any) -> dict[int, dict[str, float]]:
    """language id -> {"rate": share of drawn examples at the start of the run, "epoch_tokens": tokens of one pass}.

    Tokens seen hold sentinels and ends as well: epochs made of them are about a tenth too high for span corruption.
    """
    from mlm.data.languages import language_id
    from mlm.data.readers import is_unit_task
    from mlm.data.registration import get, owner
    from mlm.data.statistics import pass_tokens

    info: dict[int, dict[str, float]] = {}
    for task, rate in zip(map(get, rows.tasks), rows.rates.at(0), strict=True):
        if is_unit_task(task):
            known = info.setdefault(language_id(owner(task)), {"rate": 0.0})
            known["rate"] += float(rate)
    for mixture in dict.fromkeys(name for _, name in rows.config.stages or ((0, rows.config.mixture),)):
        for index, tokens in pass_tokens(mixture, rows.vocabulary).items():
            known = info.setdefault(index, {"rate": 0.0})
            known["epoch_tokens"] = max(known.get("epoch_tokens", 0.0), float(tokens))
    return info


def _compiled_memory(trainer: Any, rows: Any) -> str:
    from mlm.parallel import global_batch
    from mlm.training.memory import step_memory

    memory = step_memory(trainer, global_batch(next(rows), trainer.mesh))
    return f"{screen.amount(float(sum(memory)))}B per device" if memory else "memory unknown on this platform"


def _describe_run(plan: Plan, directory: Any, trainer: Any, rows: Any, config_text: str, start: int) -> None:
    """Everything a later reader needs, beside the checkpoints."""
    from mlm.checkpoints import versions
    from mlm.models.config import to_json
    from mlm.parallel import describe, parameter_table

    directory.write("config.gin", config_text)
    directory.write_json("model.json", to_json(plan.model))
    directory.write_json("versions.json", versions())
    directory.write_json("mesh.json", describe(trainer.mesh))
    axes, placed = trainer.model.axes(), trainer.shardings.params
    directory.write("parameters.txt", "\n".join(parameter_table(trainer.model.shapes(), axes, placed)) + "\n")
    name = (
        "vocabulary.json"
        if rows.vocabulary.where == "bytes" or rows.vocabulary.where.endswith(".json")
        else "vocabulary.model"
    )
    if not (directory / name).exists():
        temporary = Path(f"{directory / name}.tmp")
        rows.vocabulary.save(temporary)
        temporary.replace(directory / name)
    data = {
        "mixture": plan.data.mixture,
        "inputs_length": plan.data.inputs_length,
        "targets_length": plan.data.targets_length,
        "vocabulary": name,
        "vocabulary_digest": rows.vocabulary.digest,
        "evaluation_split": plan.evaluation_split,
        "task_modules": list(plan.task_modules),
    }
    if (template := rows.config.template) is not None:
        data["template"] = template.to_json()
    if (masks := _masks(plan, directory)) is not None:
        data["masks"] = masks
    directory.write_json("data.json", data)
    if plan.initial and not start:
        _keep_origin(Path(plan.initial).expanduser(), directory)


def _masks(plan: Plan, directory: Any) -> dict[str, Any] | None:
    """What the run says of the masks that it fills: heads on a run change nothing of what that has learned."""
    if not plan.train.trains_heads:
        return plan.train.masks
    return _origin(plan, directory).read_json("data.json").get("masks")


def _keep_origin(initial: Path, directory: Any) -> None:
    """What `mlm convert to-hf` gives back of the published model that the run began with: the same model and vocabulary
    still.
    """
    for name in ("published.json", "tokenizer"):
        if (initial / name).is_dir():
            shutil.copytree(initial / name, directory / name, dirs_exist_ok=True)
        elif (initial / name).exists():
            shutil.copyfile(initial / name, directory / name)


def _report(plan: Plan, directory: Any, step: int) -> int:
    """Writes the report, unless the one that is there is of this step."""
    if not plan.report:
        return 0
    written = directory.read_json("report.json") if (directory / "report.json").exists() else {}
    if written.get("steps") == step:
        passed, text = written["passed"], f"{written['verdict']}\nreport: {directory / 'report.html'}"
    else:
        from mlm.cli.report import write_report

        verdict = write_report(directory.path)
        passed, text = verdict.passed, verdict.text
    screen.say(text)
    if not passed:
        raise Failed("the trained model does not beat its baselines; see the report")
    return 0
