"""`mlm convert from-hf DIR RUN`, `mlm convert to-hf RUN DIR`, `mlm convert from-t5x DIR RUN`.

A converted run is a run directory like any other: `mlm generate`, `mlm eval`, `mlm infer` and `mlm.load` read it.
Nothing is written before the whole folder has been checked, and a target appears only when it is complete.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlm.cli import screen
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> None:
    flags = _parse(arguments)
    source = Path(flags.source).expanduser()
    if not source.is_dir():
        raise UsageError(f"{flags.source} is no folder")
    {"from-hf": _from_hf, "to-hf": _to_hf, "from-t5x": _from_t5x}[flags.command](flags, source, Path(flags.target))


def _from_hf(flags: argparse.Namespace, source: Path, target: Path) -> None:
    with screen.working(f"checking {source}"):
        from mlm.checkpoints.run_directory import new_folder
        from mlm.interop.huggingface import import_params, open_published

        published = open_published(source)
    with new_folder(target) as folder:
        _run_files(
            flags, source, folder, published.config, published.content, published.record(), published.family.ids.first
        )
        import_params(published, folder / "checkpoints", _bar("tensors", published.pieces))
    _done(target, published.family.name, published.config, f"from {len(published.tensors.shapes)} tensors of {source}")


def _from_t5x(flags: argparse.Namespace, source: Path, target: Path) -> None:
    if not flags.vocabulary:
        raise UsageError(
            "a T5X checkpoint comes without its vocabulary: give the SentencePiece model with --vocabulary FILE (and "
            "--sentinels 100 for T5's), or 'bytes' for ByT5"
        )
    with screen.working(f"checking {source}"):
        from mlm.checkpoints.run_directory import new_folder
        from mlm.interop.huggingface import write_pieces
        from mlm.interop.t5x import open_t5x

        found = open_t5x(source)
    with new_folder(target) as folder:
        _run_files(flags, source, folder, found.config, {}, {"t5x_step": found.step}, ())
        bar = _bar("arrays", found.pieces)
        write_pieces(found.pieces, found.config, found.arrays.read, folder / "checkpoints", bar)
    step = "" if found.step is None else f" of step {found.step:,}"
    _done(target, "T5X", found.config, f"from {len(found.arrays.shapes)} arrays{step} in {source}")


def _to_hf(flags: argparse.Namespace, source: Path, target: Path) -> None:
    with screen.working(f"reading {source}"):
        from mlm.checkpoints.run_directory import RunDirectory, new_folder
        from mlm.checkpoints.streaming import StoredParams
        from mlm.interop.huggingface import describe, export_params
        from mlm.interop.rules import plan
        from mlm.interop.runs import read_record
        from mlm.models.config import from_json

        directory = RunDirectory(source)
        config, record = from_json(directory.read_json("model.json")), read_record(directory)
        name = flags.family or record.get("family")
        family, _ = describe(config, name)
        stored = StoredParams(directory.checkpoints, flags.step, flags.parameters)
        pieces = plan(config, family.rules(config))
    with new_folder(target) as folder:
        _, files = export_params(
            stored,
            config,
            folder,
            family=family.name,
            dtype=flags.dtype or record.get("dtype", "float32"),
            keep=record.get("config"),
            progress=_bar("tensors", pieces),
        )
        from mlm.data.published import give_vocabulary

        give_vocabulary(directory.path, folder)
    _done(target, family.name, config, f"{len(pieces)} tensors in {files} file{'s' * (files > 1)}")


def _run_files(
    flags: argparse.Namespace,
    source: Path,
    folder: Path,
    config: Any,
    content: Mapping[str, Any],
    record: dict[str, Any],
    first_ids: tuple[int, ...],
) -> None:
    from mlm.data.published import keep_files, take_template, take_vocabulary
    from mlm.data.vocabulary import load_vocabulary
    from mlm.interop.runs import write_run_files

    template = None
    if flags.vocabulary:
        given = load_vocabulary(flags.vocabulary, flags.sentinels)
        file = folder / ("vocabulary.model" if hasattr(given, "sp_model") else "vocabulary.json")
        given.save(file)
        vocabulary = load_vocabulary(file)
    else:
        vocabulary = take_vocabulary(source, folder, content, first_ids)
        template = take_template(source, content, vocabulary)
        keep_files(source, folder / "tokenizer")
    if vocabulary.vocab_size > config.vocab_size:
        raise ValueError(
            f"{vocabulary} has more ids than the model's table of {config.vocab_size} rows: it belongs to another "
            "model; give the right one with --vocabulary FILE"
        )
    write_run_files(
        folder,
        config,
        vocabulary=Path(vocabulary.where),
        digest=vocabulary.digest,
        origin=f"converted from {source}",
        lengths=(flags.inputs_length, flags.targets_length),
        record=record,
        template=None if template is None else template.to_json(),
    )


def _bar(text: str, pieces: list[Any]) -> Callable[[Iterator], Iterator]:
    total = sum(1 for piece in pieces for _ in piece.blocks())
    return lambda blocks: screen.track(blocks, text, total)


def _done(target: Path, family: str, config: Any, what: str) -> None:
    from mlm import trees
    from mlm.models.transformer import Transformer

    count = trees.count(Transformer(config).shapes())
    print(f"{target}: {family}, {count:,} parameters, {what}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm convert",
        description="Published checkpoints become run directories, and run directories Hugging Face folders.",
        epilog="example: mlm convert from-hf mt5-small runs/mt5_small",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    from_hf = commands.add_parser("from-hf", help="config.json, safetensors and tokenizer -> a run directory")
    to_hf = commands.add_parser("to-hf", help="a run directory -> config.json, safetensors and tokenizer")
    from_t5x = commands.add_parser("from-t5x", help="a checkpoint of T5X -> a run directory")
    for command, source, target in ((from_hf, "DIR", "RUN"), (to_hf, "RUN", "DIR"), (from_t5x, "DIR", "RUN")):
        command.add_argument("source", metavar=source)
        command.add_argument("target", metavar=target, help="a folder that does not exist yet")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    for command in (from_hf, from_t5x):
        command.add_argument(
            "--vocabulary", metavar="FILE", help="instead of the tokenizer found there; 'bytes' for ByT5"
        )
        command.add_argument("--sentinels", type=int, default=0, help="to append to a vocabulary that has none")
        command.add_argument("--inputs_length", type=int, default=512, help="tokens that the run reads (default 512)")
        command.add_argument("--targets_length", type=int, default=512, help="tokens that it writes (default 512)")
    to_hf.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    to_hf.add_argument("--parameters", choices=("params", "ema"), default="params", help="ema: their running mean")
    to_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: as they came, or float32)"
    )
    to_hf.add_argument("--family", metavar="MODEL_TYPE", help="where several say the same, as t5 and mt5 do")
    return parser.parse_args(arguments)
