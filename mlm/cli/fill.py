"""`mlm fill "Le <extra_id_0> dort." --run_dir DIR`: one text with blanks in, the text without them out."""

import argparse
import json
from dataclasses import asdict

from mlm.cli import decoding_flags, screen
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> int:
    """Prints the text. Raises UsageError for a text without a blank, a missing source, options out of range."""
    flags = _parse(arguments)
    for name in ("draft", "contrast", "ngram_text", "ensemble"):
        if getattr(flags, name):
            raise UsageError(f"--{name} means nothing to filling, which one model does: leave it out")
    session = decoding_flags.open_session(flags)
    languages = decoding_flags.languages(session, flags)
    given = {name: getattr(flags, name) for name in ("block", "temperature", "seed")}
    options = {name: value for name, value in given.items() if value is not None}
    with screen.working("filling"):
        try:
            (found,) = session.fill(flags.text, flags.source, mask_token=flags.mask_token, **languages, **options)
        except (KeyError, ValueError) as error:
            raise UsageError(str(error.args[0])) from error
    print(json.dumps({"input": flags.text, **asdict(found)}, ensure_ascii=False) if flags.json else found.text)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm fill",
        description="Fill the blanks of a text with a model that learned to write in any order (train.any_order). What "
        "is drawn is exactly what one token after another would give; passes are at most as many as blanks.",
        epilog='example: mlm fill "Le <extra_id_0><extra_id_0> dort." --source "The cat sleeps." --run_dir RUN --to fr',
    )
    parser.add_argument("text", help="what is to be filled; <extra_id_0>, or the run's mask token, for each blank")
    parser.add_argument("--source", metavar="TEXT", help="what the encoder reads, of a model that has one")
    parser.add_argument(
        "--mask_token",
        type=decoding_flags.token,
        metavar="TOKEN",
        help="id or name of the blank, where the run does not say (<extra_id_0>, …)",
    )
    parser.add_argument("--block", type=int, metavar="N", help="blanks guessed at once (default 8; 1: none ahead)")
    parser.add_argument("--temperature", type=float, metavar="T", help="below 1 sharper, above 1 flatter (default 1)")
    parser.add_argument("--seed", type=int, help="(default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON record: input, text, tokens, blanks, passes")
    decoding_flags.add_language_flags(parser)
    decoding_flags.add_model_flags(parser)
    return parser.parse_args(arguments)
