"""`mlm generate "text" --run_dir DIR --to fr`: one text in, decoded text out."""

import argparse
import json
import warnings

from mlm.cli import decoding_flags, screen, shot_flags
from mlm.cli.infer import as_record
from mlm.cli.main import UsageError


def run(arguments: list[str]) -> int:
    """Prints the result, or with n_best > 1 one result a line with its score, or of --choose the chosen one."""
    flags = _parse(arguments)
    if not flags.text.strip():
        raise UsageError("the text is empty")
    options = decoding_flags.decode_options(flags)
    if bool(flags.phrase) != (options["method"] == "constrained_beam"):
        raise UsageError("--phrase and --method constrained_beam belong together: give both, or neither")
    if flags.phrase:
        options["phrases"] = [flags.phrase]
    shots = shot_flags.read_shots(flags)
    session = decoding_flags.open_session(flags)
    languages = decoding_flags.languages(session, flags)
    chooser = decoding_flags.chooser(session, flags, languages, options)
    text = shots.prompt(session, flags.text, 1, languages) if shots else flags.text
    with screen.working("decoding"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (found,) = session.decode(text, **languages, choose=chooser, **options)
    for warning in caught:
        if warning.category is UserWarning:
            screen.say(f"mlm generate: {warning.message}")
    if chooser is not None and not flags.scores and not flags.json:
        found = found[:1]
    if flags.json:
        print(json.dumps({"input": flags.text, **as_record(found)}, ensure_ascii=False))
        return 0
    for hypothesis in found:
        numbers = [hypothesis.score] if hypothesis.value is None else [hypothesis.value, hypothesis.score]
        told = [f"{number:.4f}" for number in numbers] if len(found) > 1 or flags.scores else []
        print("\t".join([*told, hypothesis.text]))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm generate",
        description="Decode one text with a trained model.",
        epilog='example: mlm generate "Good morning" --run_dir runs/quickstart --to fr --method beam --beams 4',
    )
    parser.add_argument("text", help="what the model reads")
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="TEXT",
        help="constrained_beam: what the result must hold; may be given several times",
    )
    decoding_flags.add_language_flags(parser)
    decoding_flags.add_contrast_flag(parser)
    parser.add_argument(
        "--scores",
        action="store_true",
        help="print the log-probability (nats) before the text; with --choose all results, before it what each is "
        "chosen by",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON record, as `mlm infer` writes them: output, score, alternatives"
    )
    decoding_flags.add_model_flags(parser)
    decoding_flags.add_decode_flags(parser)
    decoding_flags.add_choose_flag(parser)
    shot_flags.add_shot_flags(parser)
    return parser.parse_args(arguments)
