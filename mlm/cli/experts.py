"""`mlm experts show|upcycle|prune RUN …`: which experts serve which language; a sparse run from a dense one, and fewer
experts.

A new run is a directory like any other; `run.initial` of a gin file trains on from it.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from mlm.cli import screen
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> None:
    flags = _parse(arguments)
    if not Path(flags.run).expanduser().is_dir():
        raise UsageError(f"{flags.run} is no run directory")
    try:
        {"show": _show, "upcycle": _upcycle, "prune": _prune}[flags.command](flags)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise UsageError(str(error)) from error


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlm experts", description="Mixtures of experts of a run.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, target: bool = True) -> argparse.ArgumentParser:
        new = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        new.add_argument("run", metavar="RUN", help="a run directory")
        if target:
            new.add_argument("target", metavar="NEW", help="the run directory to write")
            new.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the latest)")
        return new

    show = command("show", "how the experts of every layer share the languages", target=False)
    show.add_argument("--stack", choices=("encoder", "decoder"), help="default: both")
    show.add_argument(
        "--languages", type=int, default=12, metavar="N", help="languages to list (default: 12, most used)"
    )
    upcycle = command("upcycle", "makes a dense run sparse: every expert begins as a copy of its layer's network")
    upcycle.add_argument("--experts", type=int, required=True, metavar="E")
    upcycle.add_argument(
        "--every", type=int, default=2, metavar="N", help="every N-th layer becomes sparse (default: 2)"
    )
    upcycle.add_argument("--k", type=int, default=2, help="experts of a token (default: 2)")
    upcycle.add_argument("--capacity", type=float, metavar="F", help="slots of an expert (default: nothing is dropped)")
    upcycle.add_argument("--noise", type=float, default=0.0, metavar="STD", help="relative, on every copy (default: 0)")
    upcycle.add_argument("--seed", type=int, default=0)
    prune = command("prune", "keeps the experts that are chosen most")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="experts of every layer")
    prune.add_argument("--for", dest="codes", nargs="+", metavar="CODE", help="count these languages only")
    prune.add_argument("--merge", action="store_true", help="average the others into the most similar kept one")
    for one in (show, prune):
        one.add_argument("--table", default="validation", metavar="NAME", help="evaluation that counted (validation)")
    return parser.parse_args(arguments)


def _show(flags: argparse.Namespace) -> None:
    import numpy as np

    from mlm.training.metrics import read_experts

    tables = read_experts(Path(flags.run).expanduser(), flags.table)
    codes = tables.pop("languages")
    for stack in [flags.stack] if flags.stack else list(tables):
        for layer, table in enumerate(tables[stack]):
            experts = table.shape[1]
            most = [i for i in np.argsort(-table.sum(axis=1), kind="stable")[: flags.languages] if table[i].any()]
            shares = table[most] / table[most].sum(axis=1, keepdims=True)
            everyone = table.sum(axis=0) / max(table.sum(), 1)
            favourites = [", ".join(f"{e} {row[e]:.0%}" for e in np.argsort(-row)[:4] if row[e] > 0) for row in shares]
            rows = [(codes[i], f"{int(table[i].sum()):,}", text) for i, text in zip(most, favourites, strict=True)]
            rows.append(
                ("all", f"{int(table.sum()):,}", ", ".join(f"{e} {everyone[e]:.0%}" for e in np.argsort(-everyone)[:4]))
            )
            title = f"{stack}, mixture {layer}: the experts of {experts} that each language chose most"
            screen.table(title, ("language", ">choices", "expert and share"), rows)


def _upcycle(flags: argparse.Namespace) -> None:
    import jax

    from mlm.adaptation.experts import upcycle
    from mlm.models.families import sparse
    from mlm.models.specs import RouterSpec

    session = _load(flags)
    gates = "chosen" if flags.k > 1 else "raw"
    router = RouterSpec(experts=flags.experts, k=flags.k, gates=gates, capacity=flags.capacity)
    config = sparse(session.config, router, every=flags.every)
    with screen.working("copying networks …"):
        params = upcycle(session.params, session.config, config, jax.random.key(flags.seed), noise=flags.noise)
        _write(flags, session, config, params)
    if gates == "raw":
        screen.say("one expert a token: outputs begin multiplied by its probability, so the loss will first rise")


def _prune(flags: argparse.Namespace) -> None:
    import numpy as np

    from mlm.adaptation.experts import keep_most_used, merge, prune
    from mlm.registry import nearest
    from mlm.training.metrics import read_experts

    tables = read_experts(Path(flags.run).expanduser(), flags.table)
    codes = tables.pop("languages").tolist()
    for code in flags.codes or ():
        if code not in codes:
            raise UsageError(f"--for: no language {code!r}; {nearest(code, codes)}")
    if flags.codes:
        counted = np.isin(codes, flags.codes)[:, None]
        tables = {stack: table * counted for stack, table in tables.items()}
    session = _load(flags)
    kept = keep_most_used(tables, flags.keep)
    with screen.working("choosing experts …"):
        if flags.merge:
            params, config = merge(session.params, session.config, kept, tables)
        else:
            params, config = prune(session.params, session.config, kept)
        _write(flags, session, config, params)
    for stack, table in tables.items():
        served = np.take_along_axis(table.sum(axis=1), kept[stack], axis=1).sum() / max(table.sum(), 1)
        screen.say(f"{stack}: {flags.keep} of {table.shape[2]} experts, which served {served:.1%} of the choices")


def _load(flags: argparse.Namespace) -> Any:
    import mlm

    with screen.working(f"reading {flags.run}"):
        session = mlm.load(flags.run, step=flags.step)
    if session.config.chimera is not None:
        raise UsageError(
            f"{flags.run} has chimera heads, which would guess by states that its experts change: take the run that "
            "they were trained on (run.initial in its config.gin), and train heads on what comes out"
        )
    return session


def _write(flags: argparse.Namespace, session: Any, config: Any, params: Any) -> None:
    """The new run, whole or not at all: what the old one was, with another model."""
    from mlm import trees
    from mlm.checkpoints import CheckpointConfig, Checkpointer
    from mlm.checkpoints.run_directory import RunDirectory, new_folder
    from mlm.models.config import to_json

    with new_folder(Path(flags.target)) as folder:
        new = RunDirectory(folder)
        for name in ("data.json", session.data["vocabulary"]):
            shutil.copy(session.run / name, folder / name)
        new.write_json("model.json", to_json(config))
        with Checkpointer(str(new.checkpoints), CheckpointConfig()) as checkpointer:
            checkpointer.save(0, {"params": params}, extra={"made_from": f"{flags.run} step {session.step}"})
    count = trees.count(params)
    screen.say(f"{flags.target}: {count:,} parameters, from {trees.count(session.params):,} of {flags.run}")
