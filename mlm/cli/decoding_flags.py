"""The flags of every command that decodes: a run directory, a checkpoint, and the options of the search."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlm.cli.main import UsageError


def token(text: str) -> int | str:
    """An id, or the name of a special token."""
    return int(text) if text.isdigit() else text


AXES = ("data", "fsdp", "expert", "tensor", "replica")
# option of DecodeConfig -> (type, help). A function's value of a beginning is for a session alone.
OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "beams": (int, "beam, diverse_beam, constrained_beam: hypotheses kept (default 4)"),
    "groups": (int, "diverse_beam: parts of the beams that avoid each other's tokens (default 2)"),
    "diversity": (float, "diverse_beam: nats that a token costs for each earlier beam that chose it (default 0.5)"),
    "alpha": (float, "beam, diverse_beam, constrained_beam: exponent of the length penalty (default 0.6)"),
    "coverage": (float, "beam: weight of the log of what was looked at of each source token, as 0.2 (default 0: off)"),
    "n_best": (int, "sample and beams: results per text (default 1)"),
    "candidates": (int, "contrastive_search, fsd, fsd_d: most probable tokens to choose of (default 5)"),
    "penalty_alpha": (float, "the same: weight of the penalty on repetition (default 0.6; fsd: 0.4)"),
    "ngram": (int, "fsd, fsd_d, lexical_units: tokens of an n-gram that is not to come twice (default 3; fsd: 2)"),
    "smoothing": (float, "fsd_d: weight of n-grams against shorter ones (default 0.9)"),
    "temperature": (float, "sample: below 1 sharper, above 1 flatter (default 1)"),
    "top_k": (int, "sample: from the k most probable tokens (default 0, off)"),
    "top_p": (float, "sample: from the most probable tokens that hold this mass (default 1, off)"),
    "min_p": (float, "sample: from tokens at least this share of the best (default 0, off)"),
    "epsilon": (float, "sample: from tokens of at least this probability (default 0, off)"),
    "eta": (float, "sample: the same, lower where the model is unsure (default 0, off)"),
    "typical": (float, "sample: from the tokens of average surprise that hold this mass (default 1, off)"),
    "mirostat": (float, "sample: from as many as keep the surprise at so many bits a token (default 0, off)"),
    "language_bias": (
        float,
        "greedy, sample: weight of a token's log-frequency in the language of --to (default 0, off)",
    ),
    "contrast_alpha": (float, "contrasts: from tokens at least this share of the best (default 0.1)"),
    "contrast_beta": (float, "contrasts: weight of what is avoided (default 0.5)"),
    "ensemble_mean": (str, "of several models: probabilities (default) or log_probabilities"),
    "repetition_penalty": (float, "greedy, sample: above 1 less of what is there already (default 1, off)"),
    "no_repeat_ngram": (int, "no n-gram of this size twice (default 0, off)"),
    "seed": (int, "sample: seed (default 0)"),
    "proposer": (str, "greedy, sample: who guesses tokens ahead, for fewer passes; `mlm decode list` names them"),
    "guesses": (
        int,
        "tokens guessed a pass; lexical_units: placeholders (default 8; chimera: at most as many as the run has heads)",
    ),
    "branches": (int, "guesses behind a guess at most (default 1: a chain; more make a tree)"),
    "mask_token": (
        token,
        "mask_block, lexical_units: id or name of the token that the drafter, or the model, fills (default: as its run "
        "was trained)",
    ),
    "threshold": (
        float,
        "lexical_units: probability above which a token behind a placeholder is taken (default 0.9; 1 is greedy)",
    ),
    "max_length": (int, "tokens at most (default: the targets_length of the run)"),
    "min_length": (int, "no end before this token (default 0)"),
}
TEXTS = {  # options that are several texts, a flag for each
    "stop": "end behind this text, which is not printed; may be given several times",
    "bad_words": "never write this text; may be given several times",
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--run_dir, --step, --parameters, --mesh, --batch_size and the like: which models, and where they run."""
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="directory of a training run")
    parser.add_argument(
        "--step", default="latest", metavar="N|best|latest", help="checkpoint to load (default: the latest)"
    )
    parser.add_argument("--best_metric", metavar="NAME", help="what --step=best looks at (default: the held-out loss)")
    parser.add_argument(
        "--best_mode", choices=("min", "max"), default="min", help="is a smaller or a larger value better"
    )
    parser.add_argument(
        "--parameters",
        choices=("auto", "params", "ema"),
        default="auto",
        help="ema: their running mean; auto (default): the mean where the run kept one",
    )
    parser.add_argument(
        "--quantise",
        choices=("int8", "int4"),
        help="keep the matrices of the layers as integers, in a quarter or an eighth of their memory",
    )
    parser.add_argument(
        "--draft", metavar="DIR", help="run of a smaller model of the same vocabulary, which guesses ahead"
    )
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="DIR[@STEP]",
        help="another run of the same vocabulary that decodes together with this one; once for each",
    )
    parser.add_argument(
        "--contrast",
        metavar="DIR[@STEP]",
        help="greedy, sample: run of a weaker model of the same vocabulary, whose faults are avoided",
    )
    parser.add_argument(
        "--ngram_text",
        metavar="FILE",
        help="text like that to be written, a line for each: its trigrams guess ahead (--proposer ngram_table, staged)",
    )
    parser.add_argument("--mesh", default="", metavar="data=4,tensor=2", help="how to split over the devices")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="examples per device call (default 32)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def add_decode_flags(parser: argparse.ArgumentParser) -> None:
    """--method and one flag per option of the search."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="options as lines decode.NAME = value; those given here win over the file's",
    )
    group.add_argument(
        "--method",
        metavar="NAME",
        help="greedy (default), sample, beam, contrastive_search, …: `mlm decode list` names them all",
    )
    for name, (kind, text) in OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    for name, text in TEXTS.items():
        group.add_argument(f"--{name}", action="append", default=[], metavar="TEXT", help=text)
    group.add_argument(
        "--language_mask",
        action="store_true",
        help="no tokens that the run's text in the language of --to does not have",
    )
    group.add_argument(
        "--dola_layers",
        metavar="N,N",
        help="greedy, sample: avoid what the model would say after one of these numbers of decoder layers",
    )


def add_choose_flag(parser: argparse.ArgumentParser) -> None:
    """--choose: which of n_best results is the output."""
    parser.add_argument(
        "--choose",
        metavar="NAME[,OPTION=VALUE…]",
        help="how one of n_best results is chosen, e.g. mbr or mbr,utility=bleu; `mlm decode list` says more",
    )


def add_language_flags(parser: argparse.ArgumentParser) -> None:
    """--to, --from, --language_token: what is written and read, and how the model is told."""
    parser.add_argument(
        "--to",
        metavar="CODE",
        help="language to write; without it special tokens in the text are meant as such: 'The <extra_id_0> sat'",
    )
    parser.add_argument(
        "--from",
        dest="from_",
        metavar="CODE",
        help="language of the text, for a model that is told: NLLB, M2M-100, mBART, tasks with both tokens",
    )
    parser.add_argument(
        "--language_token",
        choices=("source", "target", "both"),
        help=(
            "where the language tokens stand: that of --to before the text that is read, or forced first in the "
            "output, or there and that of --from before the text (default: as a converted run says, or source)"
        ),
    )


def add_contrast_flag(parser: argparse.ArgumentParser) -> None:
    """--contrast_to, for commands that read texts."""
    parser.add_argument(
        "--contrast_to",
        metavar="CODE|none",
        help="greedy, sample: away from what the model writes when told this language, or none, in place of --to",
    )


def decode_options(flags: argparse.Namespace) -> dict[str, Any]:
    """The search as `Session.decode` takes it. Raises UsageError for an unknown method or options that do not fit."""
    from mlm.decoding.config import DecodeConfig
    from mlm.decoding.proposers import PROPOSERS
    from mlm.session.masks import Masks

    filed = _of_gin(flags.gin_file)
    texts = {name: filed.pop(name) for name in TEXTS if name in filed}
    given = filed | {name: getattr(flags, name) for name in OPTIONS if getattr(flags, name) is not None}
    method = flags.method or given.pop("method", "greedy")
    given.pop("method", None)
    if flags.draft:
        masks = Masks.of_run(_written(flags.draft, "data.json"))
        blocks = masks is not None and masks.objective == "mask_block"
        drafting = "staged" if flags.ngram_text else "draft_model"
        given.setdefault("proposer", "mask_block" if blocks or given.get("mask_token") is not None else drafting)
    elif flags.ngram_text:
        given.setdefault("proposer", "ngram_table")
    if flags.language_mask:
        given["language_mask"] = True
    if flags.dola_layers:
        given["dola_layers"] = _numbers(flags.dola_layers)
    contrast_to = getattr(flags, "contrast_to", None)
    if flags.contrast and contrast_to:
        raise UsageError("--contrast and --contrast_to: a model has one contrast at a time")
    if flags.contrast or contrast_to:
        given["contrast"] = "model" if flags.contrast else "language"
    try:
        given = by_runs(flags)(method, given)
        known = {"mask_token": 1} if isinstance(given.get("mask_token"), str) else {}  # the session finds its id
        proposer = PROPOSERS[DecodeConfig(method=method, **{**given, **known}).proposer]
    except (KeyError, ValueError) as error:
        raise UsageError(str(error.args[0])) from error
    for flag, path, reads in (
        ("draft", flags.draft, proposer.drafts),
        ("ngram_text", flags.ngram_text, proposer.counts),
    ):
        if path and not reads:
            raise UsageError(f"--{flag}={path} means nothing to --proposer {given['proposer']}: leave one of them out")
    texts |= {name: getattr(flags, name) for name in TEXTS if getattr(flags, name)}
    for name, values in texts.items():
        for value in values:
            if isinstance(value, str) and not value.strip():
                raise UsageError(f"--{name}={value!r} is empty: give a text, or leave it out")
    return {"method": method, **given, **texts, **({"contrast_to": contrast_to} if contrast_to else {})}


def _of_gin(files: Sequence[str]) -> dict[str, Any]:
    """What gin files bind of `decode`. Raises UsageError for anything else in them."""
    if not files:
        return {}
    from mlm.cli import configuration
    from mlm.decoding.config import DecodeConfig

    configuration.bind("decode", DecodeConfig)
    configuration.resolve(files, [])
    return configuration.bound("decode")


def by_runs(flags: argparse.Namespace) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    """(method, options) -> these with what --run_dir and --draft decide (`mlm.session.masks.decided`)."""
    from mlm.session.masks import decided

    data, model = (_written(flags.run_dir, name) for name in ("data.json", "model.json"))
    draft = _written(flags.draft, "data.json") if flags.draft else None
    heads = (model.get("chimera") or {}).get("heads")
    return lambda method, options: decided(method, options, data, draft, heads)


def _written(run_dir: str, name: str) -> dict[str, Any]:
    """A file of a run; nothing where it is missing, as `load` will say."""
    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.session.loading import path_and_step

    run = RunDirectory(path_and_step(run_dir)[0])
    return run.read_json(name) if (run / name).exists() else {}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise UsageError(f"--dola_layers={text!r} must read like 2,4") from None


def open_session(flags: argparse.Namespace):
    """The session that the flags ask for. Raises UsageError for flags that make no sense."""
    from mlm.cli.screen import working

    with working(f"loading {flags.run_dir}"):
        from mlm import session

        if flags.step not in ("latest", "best") and not flags.step.isdigit():
            raise UsageError(f"--step={flags.step}: give a checkpoint's number, 'best' or 'latest'")
        if flags.batch_size < 1:
            raise UsageError(f"--batch_size={flags.batch_size} must be at least 1")
        return session.load(
            flags.run_dir,
            flags.step,
            parameters=flags.parameters,
            mesh=_mesh(flags.mesh),
            batch_size=flags.batch_size,
            quantise=flags.quantise,
            draft=flags.draft,
            ensemble=flags.ensemble,
            contrast=flags.contrast,
            ngram_text=flags.ngram_text,
            best_metric=flags.best_metric,
            best_mode=flags.best_mode,
        )


def languages(session: Any, flags: argparse.Namespace) -> dict[str, str | None]:
    """What --to, --from and --language_token say, as the session takes it. Raises UsageError, with the nearest codes,
    when the run is not told these languages, or misses one.
    """
    given = {"to": flags.to, "from_": flags.from_, "language_token": flags.language_token}
    try:
        session.frame(**given)
        if getattr(flags, "contrast_to", None) not in (None, "none"):
            session.frame(**{**given, "to": flags.contrast_to})
    except (KeyError, ValueError) as error:
        raise UsageError(str(error.args[0])) from error
    return given


def chooser(session: Any, flags: argparse.Namespace, told: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """What --choose says, as the session takes it; None without it. told, options: of `languages`, `decode_options`.

    Raises UsageError for an unknown name, options that make no sense, or results that it cannot choose among.
    """
    if flags.choose is None:
        return None
    from mlm.session.choosing import checked

    try:
        return checked(flags.choose, session.ask(**told, **options))
    except (KeyError, ValueError) as error:
        raise UsageError(f"--choose: {error.args[0]}") from error


def _mesh(text: str):
    """ "data=4,tensor=2" as a MeshConfig."""
    from mlm.parallel import MeshConfig

    sizes: Mapping[str, int] = {}
    try:
        sizes = {name.strip(): int(size) for name, _, size in (part.partition("=") for part in text.split(",") if part)}
    except ValueError:
        raise UsageError(f"--mesh={text!r} must read like data=4,tensor=2") from None
    known = {field.name for field in dataclasses.fields(MeshConfig)}
    if set(sizes) - known:
        raise UsageError(f"--mesh: no axis {sorted(set(sizes) - known)}; axes: {', '.join(AXES)}")
    try:
        return MeshConfig(**sizes)
    except ValueError as error:
        raise UsageError(f"--mesh: {error}") from error
