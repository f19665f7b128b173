"""`mlm vocab train` and `mlm vocab show`."""

import argparse
from pathlib import Path

from mlm.cli import screen
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mlm vocab", description="Train a vocabulary on a mixture, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="SentencePiece on text sampled at the mixture's own rates")
    train.add_argument("--mixture", required=True, help="whose text, at whose rates")
    train.add_argument("--size", type=int, required=True, help="ids in all, rounded up to a multiple of 128")
    train.add_argument("--output", default="vocabulary.model", metavar="FILE")
    train.add_argument("--lines", type=int, default=200_000, help="text lines to sample (default 200000)")
    train.add_argument("--model_type", default="unigram", help="unigram or bpe")
    train.add_argument("--sentinels", type=int, default=256, help="<extra_id_n> tokens for span corruption")
    train.add_argument("--character_coverage", type=float, default=0.9995)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--module", action="append", default=[], help="a Python module that registers your tasks")
    train.add_argument("--force", action="store_true", help="overwrite the output")
    show = commands.add_parser("show", help="size, specials and the pieces of a text")
    show.add_argument("path")
    show.add_argument("--text", help="show how this text is cut")
    options = parser.parse_args(arguments)
    _train(options) if options.command == "train" else _show(options)


def _train(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.exists() and not options.force:
        raise UsageError(f"{output} exists: checkpoints may depend on it; choose another --output, or --force")
    with screen.working("reading the tasks …"):
        from mlm.data.registration import load_tasks
        from mlm.data.text import mixture_languages, sample_lines
        from mlm.data.vocabulary_training import train_vocabulary

        load_tasks(*options.module)
        languages = mixture_languages(options.mixture)
    with screen.working(f"training {options.size} pieces on {options.lines} lines …"):
        vocabulary = train_vocabulary(
            sample_lines(options.mixture, options.lines, seed=options.seed),
            output,
            options.size,
            model_type=options.model_type,
            languages=languages,
            sentinels=options.sentinels,
            character_coverage=options.character_coverage,
            seed=options.seed,
        )
    print(f"{output}: {vocabulary.vocab_size} ids, {len(languages)} language tokens, {options.sentinels} sentinels")
    print(f"sha256 {vocabulary.digest}")


def _show(options: argparse.Namespace) -> None:
    from mlm.data.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(options.path)
    print(f"{options.path}: {vocabulary.vocab_size} ids, sha256 {vocabulary.digest}")
    print(f"{len(vocabulary.sentinel_ids)} sentinels, {len(vocabulary.language_tokens)} language tokens: ", end="")
    print(" ".join(sorted(vocabulary.language_tokens)))
    if options.text:
        ids = vocabulary.encode(options.text)
        print(" ".join(f"{vocabulary.decode([i])}({i})" for i in ids))
        print(f"{len(ids)} tokens for {len(options.text.encode())} bytes")
