"""The flags of commands that can show a model examples before each text."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm.cli.main import UsageError

NAMES = ("shots", "shot_choice", "shot_form", "shot_separator", "shot_query", "shot_seed")


def add_shot_flags(parser: argparse.ArgumentParser) -> None:
    """--examples and what is done with them."""
    from mlm.data.prompts import CHOICES, USUAL_FORM

    group = parser.add_argument_group("examples before each text (few-shot prompts)")
    group.add_argument("--examples", metavar="FILE.tsv", help="a source and its target a line, a tab between them")
    group.add_argument("--shots", type=int, metavar="K", help="examples before a text (default 4); those that fit stay")
    group.add_argument(
        "--shot_choice",
        choices=sorted(CHOICES),
        help="the first K (fixed, the default), those nearest to the text (retrieved), or drawn by its number (random)",
    )
    group.add_argument(
        "--shot_form", metavar="TEXT", help=f"how an example is written (default: '{USUAL_FORM.example}')"
    )
    group.add_argument(
        "--shot_separator", metavar="TEXT", help=f"what is between two (default: '{USUAL_FORM.separator}')"
    )
    group.add_argument(
        "--shot_query", metavar="TEXT", help="how the text is written (default: an example up to {target})"
    )
    group.add_argument("--shot_seed", type=int, metavar="INT", help="of --shot_choice random (default 0)")


@dataclass(frozen=True)
class Shots:
    """Examples and how they are put before a text. settings: what the prompts depend on, for the record."""

    pool: Any  # mlm.data.prompts.Pool
    form: Any  # mlm.data.prompts.Format
    settings: dict[str, Any]

    def prompt(self, session: Any, text: str, number: int, languages: dict[str, str | None]) -> str:
        """The text behind its examples. number: its line. Raises ValueError where not even the text fits."""
        count, choice, seed = (self.settings[name] for name in ("shots", "shot_choice", "shot_seed"))
        (prompt,) = session.few_shot(
            text, self.pool, count, choice, form=self.form, seed=seed, ids=[number], **languages
        )
        return prompt


def read_shots(flags: argparse.Namespace) -> Shots | None:
    """What the flags say, None without --examples. Raises UsageError for a file with a bad line, naming it, and for
    flags that make no sense.
    """
    given = {name: getattr(flags, name) for name in NAMES if getattr(flags, name) is not None}
    if flags.examples is None:
        if given:
            raise UsageError(f"--{next(iter(given))} means nothing without --examples FILE.tsv")
        return None
    from mlm.data.prompts import USUAL_FORM, Example, Format, Pool
    from mlm.data.sources import read_tsv

    written = {"shot_form": USUAL_FORM.example, "shot_separator": USUAL_FORM.separator, "shot_query": None}
    chosen: dict[str, Any] = {"shots": 4, "shot_choice": "fixed", "shot_seed": 0, **written, **given}
    try:
        pairs = [Example(*pair) for pair in read_tsv(Path(flags.examples), ("source", "target"))]
        form = Format(chosen["shot_form"], chosen["shot_separator"], chosen["shot_query"])
    except OSError as error:
        raise UsageError(f"--examples={flags.examples}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not 0 <= chosen["shots"] <= len(pairs):
        raise UsageError(
            f"--shots={chosen['shots']} must be between 0 and {len(pairs)}, the examples in {flags.examples}"
        )
    digest = hashlib.sha256("\n".join("\t".join(pair) for pair in pairs).encode()).hexdigest()[:16]
    return Shots(Pool(pairs), form, {"examples": digest, **chosen})
