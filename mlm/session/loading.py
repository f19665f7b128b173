"""From a run directory to a `Session`: model, vocabulary and parameters, checked against each other."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.checkpoints import CheckpointConfig, Checkpointer, CheckpointError, CorruptCheckpoint
from mlm.checkpoints.run_directory import RunDirectory
from mlm.decoding.ngrams import Trigrams, trigram_table
from mlm.models.config import from_json
from mlm.models.quantisation import BITS, quantised
from mlm.models.specs import check_choice
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, MeshPlacement, batch_sharding, make_mesh, shardings
from mlm.parallel.rules import fitting
from mlm.registry import nearest
from mlm.session.session import Session
from mlm.types import EOS_ID, Params, PyTree

PARAMETERS = ("auto", "params", "ema")


def load(
    run_dir: str | os.PathLike,
    step: int | str | None = None,
    *,
    parameters: str = "auto",
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 32,
    quantise: str | None = None,
    draft: str | os.PathLike | None = None,
    ensemble: Sequence[str | os.PathLike] = (),
    contrast: str | os.PathLike | None = None,
    ngram_text: str | os.PathLike | None = None,
    best_metric: str | None = None,
    best_mode: str = "min",
) -> "Session":
    """The model of a run directory.

    step: a checkpoint's number, "latest" (as None), or "best" by `best_metric` (default: the held-out loss).
    parameters: "ema", the running mean, "params", or "auto": the mean where the run kept one. mesh: how to split over
    the devices (default: rows over all); devices: some of them only. batch_size: examples per device call. quantise:
    "int8" or "int4", how the matrices of the layers are kept (`mlm.models.quantisation`). ngram_text: file of text like
    that to be written, a line for each, whose trigrams guess ahead (proposer="ngram_table").
    Other run directories of the same vocabulary, each with its latest checkpoint or, as "runs/small@2000", another
    one, as they are kept: quantise and parameters are of the first alone. draft: a smaller model, which guesses ahead
    (proposer="draft_model"). ensemble: models that are one with this one from here on. contrast: a weaker model, whose
    faults are to be avoided (contrast="model").
    Raises CheckpointError for a directory without a run or checkpoint, ValueError naming both hashes when the
    vocabulary is not the one that the model was trained with.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters={parameters!r} is not one of {PARAMETERS}; {nearest(parameters, PARAMETERS)}")
    if isinstance(ensemble, str | os.PathLike):
        raise ValueError(f"ensemble={str(ensemble)!r} must be a list of runs: ensemble=[{str(ensemble)!r}]")
    if quantise is not None:
        check_choice("load", "quantise", quantise, tuple(BITS))
    run = RunDirectory(run_dir)
    config, data = from_json(run.read_json("model.json")), run.read_json("data.json")
    from mlm.data.vocabulary import check_same_vocabulary, load_vocabulary  # seconds, so not before the above is there

    vocabulary = load_vocabulary(run / data["vocabulary"])
    check_same_vocabulary(data["vocabulary_digest"], vocabulary, f"{run / 'data.json'}, written by the training", "now")
    if vocabulary.vocab_size > config.vocab_size:
        raise ValueError(f"{vocabulary} has more ids than the model's table of {config.vocab_size} rows")
    named = [("draft", draft), ("contrast", contrast), *(("ensemble", member) for member in ensemble)]
    for name, other in named:  # before anything large is read
        if other is not None:
            digest, size = _vocabulary_of(other)
            check_same_vocabulary(vocabulary.digest, digest, str(run.path), f"the {name} model {other}")
            if size != config.vocab_size:
                raise ValueError(
                    f"the {name} model {other} has a table of {size} rows and the model one of {config.vocab_size}; "
                    "models that decode together need equally many"
                )

    table = None if ngram_text is None else _table(ngram_text, vocabulary)

    grid = make_mesh(mesh or MeshConfig(), devices)
    model = Transformer(config, MeshPlacement(grid))
    shapes = model.shapes()
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, model.axes(), grid),
    )
    metric = best_metric or f"{data.get('evaluation_split', 'validation')}/loss"
    retention = CheckpointConfig(best_metric=metric, best_mode=best_mode)
    checkpoints = Checkpointer(str(run.checkpoints), retention, read_only=True)
    number = _step(checkpoints, step, metric)
    subtree = parameters_kept(checkpoints, number) if parameters == "auto" else parameters
    restored = checkpoints.restore_params(number, wanted, subtree)

    def opened(other: str | os.PathLike) -> Session:
        path, number = path_and_step(other)
        return load(path, number, mesh=mesh, devices=devices, batch_size=batch_size)

    return Session(
        run=run,
        step=restored.step,
        parameters=subtree,
        config=config,
        data=data,
        extra=restored.extra,
        vocabulary=vocabulary,
        model=model,
        params=restored.state if quantise is None else quantised_in_place(restored.state, quantise),
        quantise=quantise,
        draft=None if draft is None else opened(draft),
        ensemble=[opened(member) for member in ensemble],
        contrast=None if contrast is None else opened(contrast),
        table=table,
        rows=batch_sharding(grid),
        batch_size=batch_size,
    )


def path_and_step(run_dir: str | os.PathLike) -> tuple[str, str | None]:
    """Path and checkpoint of "runs/small@2000"; without the latter, and where a folder has that name, the path."""
    path, _, step = os.fspath(run_dir).rpartition("@")
    return (path, step) if path and not os.path.exists(run_dir) else (os.fspath(run_dir), None)


def _vocabulary_of(run_dir: str | os.PathLike) -> tuple[str, int]:
    """(digest of the vocabulary, rows of the model's table), as the run says."""
    run = RunDirectory(path_and_step(run_dir)[0])
    return run.read_json("data.json")["vocabulary_digest"], from_json(run.read_json("model.json")).vocab_size


def _table(path: str | os.PathLike, vocabulary: Any) -> Trigrams:
    """Trigrams of the lines of a file, each ended. Raises ValueError for a file without text."""
    from mlm.data.preprocessors import clean_line

    lines = [line for line in map(clean_line, Path(path).read_text(encoding="utf-8").splitlines()) if line]
    if not lines:
        raise ValueError(f"ngram_text={str(path)!r} holds no line of text to count")
    return trigram_table([*map(int, vocabulary.encode(line)), EOS_ID] for line in lines)


def quantised_in_place(params: Params, kind: str) -> Params:
    """Integers lie where their matrices lay, scales as far as they have the dimensions."""
    make = partial(quantised, kind=kind)

    def place(array: jax.Array, made: PyTree) -> PyTree:
        mesh, partition = array.sharding.mesh, array.sharding.spec
        whole = P(*partition, *(None,) * (array.ndim - len(partition)))
        return jax.tree.map(lambda leaf: NamedSharding(mesh, fitting(whole, leaf)), made)

    return jax.jit(make, out_shardings=jax.tree.map(place, params, jax.eval_shape(make, params)))(params)


def _step(checkpoints: Checkpointer, step: int | str | None, metric: str) -> int | None:
    if step is None or step == "latest":
        return None
    if step == "best":
        best = checkpoints.best()
        if best is None:
            stored = sorted({name for s in checkpoints.steps() for name in checkpoints.record(s)["metrics"]})
            raise CheckpointError(
                f"no checkpoint in {checkpoints.directory} has the metric {metric!r}; {nearest(metric, stored)}"
            )
        return best
    if isinstance(step, bool) or not str(step).isdigit():
        raise ValueError(f"step={step!r} must be a checkpoint's number, 'latest' or 'best'")
    return int(step)


def parameters_kept(checkpoints: Checkpointer, step: int | None) -> str:
    """What decodes: "ema", the running mean of the parameters, where the checkpoint has one, or else "params"."""
    for candidate in reversed(checkpoints.steps()) if step is None else [step]:
        try:
            leaves = checkpoints.record(candidate)["leaves"]
        except CorruptCheckpoint:  # restoring falls back to an older one, and says so
            continue
        return "ema" if any(name.startswith("ema/") for name in leaves) else "params"
    return "params"
