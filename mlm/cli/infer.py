"""`mlm infer --run_dir DIR --input FILE --output OUT.jsonl --to fr`: a file of lines -> JSON lines, resumable.

    OUT.jsonl             one record a line, in the order of the input
    OUT.jsonl.settings    while it grows: what it is made with, so that nothing else is appended to it
    OUT.jsonl.completed   when it is complete: the same, and the counts

Killed at any moment, the same command goes on after the last whole chunk of records; no line is lost or repeated, and
the records are those of an uninterrupted run. A record is {"line", "input", "output", "score"}, with n_best > 1 also
"alternatives", with --choose the "value" of each, by which the output was chosen; or {"line", "input", "error"} for a
line that is empty or not UTF-8; "trimmed" says that the model could not read the whole line. Scores: log-probabilities
in nats (for beam search over its length penalty).
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlm.cli import decoding_flags, screen, shot_flags
from mlm.cli.main import Failed, UsageError

Record = dict[str, Any]
Decode = Callable[[list[int], list[str]], list[Record]]  # line numbers, texts -> what a record holds beside them

EMPTY = "empty line"


def run(arguments: list[str]) -> int:
    """Exit code 0 when every line has its record, also where that record is an error."""
    flags = _parse(arguments)
    if flags.chunk < 1:
        raise UsageError(f"--chunk={flags.chunk} must be at least 1")
    options = decoding_flags.decode_options(flags)
    if flags.input != "-" and not Path(flags.input).is_file():
        raise UsageError(f"--input={flags.input} is no file")
    if (flags.constraints is not None) != (options["method"] == "constrained_beam"):
        raise UsageError("--constraints and --method constrained_beam belong together: give both, or neither")
    asked = None if flags.constraints is None else _Constraints(Path(flags.constraints), flags.input)
    shots = shot_flags.read_shots(flags)
    session = decoding_flags.open_session(flags)
    languages = decoding_flags.languages(session, flags)
    chooser = decoding_flags.chooser(session, flags, languages, options)
    settings = {
        **session.origin,
        "run": str(session.run.path.absolute()),
        **languages,
        **options,
        **({} if asked is None else {"constraints": asked.digest}),
        **({} if chooser is None else {"choose": _choice(chooser, session)}),
        **(shots.settings if shots else {}),
    }

    from mlm.session.phrases import held  # TensorFlow loads behind what is said of the flags

    try:
        session.answer(session.ask((), **languages, **options, **({} if asked is None else {"phrases": ()})))
    except (KeyError, ValueError) as error:  # what no line can be decoded with, before anything is written
        raise UsageError(str(error.args[0])) from error
    rates = Rates()

    def decode(numbers: list[int], texts: list[str]) -> list[Record]:
        results: list[Record] = [{} for _ in texts]
        sources, places, phrases = [], [], []
        for place, text in enumerate(texts):
            try:
                prompt = shots.prompt(session, text, numbers[place], languages) if shots else text
                (source,) = session.encode(prompt, **languages)
                if asked is not None:
                    phrases.append(held(session, asked.of(numbers[place]), source, **languages, **options))
                sources.append(source)
                places.append(place)
            except ValueError as error:
                results[place] = {"error": str(error)}
        if not sources:
            return results
        # The line's number is the source of its randomness, so that a resumed run draws what the first one would have.
        ids = [numbers[place] for place in places]
        told = {} if asked is None else {"phrases": phrases}
        found = session.decode(sources, **languages, ids=ids, choose=chooser, **told, **options)
        rates.tokens += sum(len(best[0].tokens) - best[0].given for best in found)
        rates.passes += sum(best[0].passes for best in found)
        for place, source, best in zip(places, sources, found, strict=True):
            results[place] = as_record(best) | ({"trimmed": True} if source.trimmed else {})
        return results

    output, total = Path(flags.output), None if flags.input == "-" else _count(Path(flags.input))
    with _open(flags.input) as lines:
        counts = infer(
            lines, output, settings, decode, total=total, chunk=flags.chunk, overwrite=flags.overwrite, watch=rates
        )
    if counts is None:
        screen.say(f"{flags.output} is complete already ({flags.output}.completed); --overwrite makes it anew")
    else:
        screen.say(f"{flags.output}: {counts['lines']} lines, {counts['errors']} of them errors")
    return 0


def infer(
    lines: Iterable[bytes],
    output: Path,
    settings: Mapping[str, Any],
    decode: Decode,
    *,
    total: int | None = None,
    chunk: int = 256,
    overwrite: bool = False,
    watch: Callable[[int], str] = lambda lines: "",
) -> dict[str, int] | None:
    """Appends the records that `output` does not hold yet; counts of lines and errors, or None when it was complete.

    total: number of lines, for the bar. chunk: lines that are decoded together and written at once. watch: what the bar
    says after so many lines more.
    Raises Failed when the output, or what a killed run left of it, was made with other settings or from other lines.
    """
    state, marker = (output.with_name(output.name + end) for end in (".settings", ".completed"))
    if overwrite:
        for path in (marker, state, output):
            path.unlink(missing_ok=True)
    if marker.exists():
        _check_settings(marker, settings, output)
        return None
    done = errors = 0
    numbered: Iterator[tuple[int, bytes]] = enumerate(lines)
    if state.exists():
        _check_settings(state, settings, output)
        done, errors, numbered = _resume(output, numbered, chunk)
    elif output.exists():
        raise Failed(f"{output} exists and was not made by an interrupted `mlm infer`; choose another, or --overwrite")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(state, {"settings": dict(settings)})
    if done:
        screen.say(f"{output} holds {done} lines already; going on after them")
    with open(output, "ab") as file, screen.Bar("line", total, done, "compiling …") as bar:
        for records in _chunks(numbered, decode, chunk):
            file.write(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
            file.flush()
            os.fsync(file.fileno())
            done += len(records)
            errors += sum("error" in record for record in records)
            bar.show(done, watch(len(records)))
    counts = {"lines": done, "errors": errors}
    _write_whole(marker, {"settings": dict(settings), **counts})
    state.unlink(missing_ok=True)
    return counts


class _Constraints:
    """A file of a line for every line of the input: phrases that its result must hold, tabs between them."""

    def __init__(self, path: Path, source: str):
        if not path.is_file():
            raise UsageError(f"--constraints={path} is no file")
        if source == "-":
            raise UsageError("--constraints goes line by line with a file: give --input=FILE in place of -")
        own, wanted = _count(path), _count(Path(source))
        if own != wanted:
            raise UsageError(
                f"--constraints={path} has {own} lines and --input={source} has {wanted}: line {min(own, wanted) + 1} "
                "is in one of them only; give a line for each, an empty one where a result need hold nothing"
            )
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self._lines = self._numbered(path)

    def of(self, number: int) -> list[str]:
        """The phrases of this line; lines come in order. Raises ValueError for what is no text or an empty phrase."""
        raw = next(line for own, line in self._lines if own == number)
        text, error = read_line(raw)
        if error == EMPTY:
            return []
        if error:
            raise ValueError(f"its phrases: {error}")
        return text.split("\t")

    @staticmethod
    def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
        with open(path, "rb") as file:
            yield from enumerate(file, 1)


class Rates:
    """Lines and tokens a second since it was made, and tokens that a pass of the decoder confirms, as a text."""

    def __init__(self):
        self.lines = self.tokens = self.passes = 0
        self._began = time.perf_counter()

    def __call__(self, lines: int) -> str:
        self.lines += lines
        seconds = time.perf_counter() - self._began
        said = f"{screen.amount(self.lines / seconds)} lines/s  {screen.amount(self.tokens / seconds)} tokens/s"
        return said + (f"  {self.tokens / self.passes:.2f} tokens/pass" if self.passes else "")


def read_line(raw: bytes) -> tuple[str, str | None]:
    """(text, None), or (what can be shown of it, what is wrong with the line)."""
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}"
        return raw.decode("utf-8", "backslashreplace"), reason
    return text, None if text.strip() else EMPTY


def _chunks(lines: Iterator[tuple[int, bytes]], decode: Decode, size: int) -> Iterator[list[Record]]:
    """Records of `size` lines at a time, in order."""
    chunk: list[Record] = []
    for number, raw in lines:
        text, error = read_line(raw)
        chunk.append({"line": number + 1, "input": text} | ({"error": error} if error else {}))
        if len(chunk) == size:
            yield _decoded(chunk, decode)
            chunk = []
    if chunk:
        yield _decoded(chunk, decode)


def _decoded(chunk: list[Record], decode: Decode) -> list[Record]:
    good = [record for record in chunk if "error" not in record]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of long texts: their records say so
        results = decode([record["line"] for record in good], [record["input"] for record in good]) if good else []
    for record, result in zip(good, results, strict=True):
        record.update(result)
    return chunk


def as_record(best: list[Any]) -> Record:
    """What is said of the results of a text, best first."""
    first, *others = [
        {"output": h.text, "score": h.score} | ({} if h.value is None else {"value": h.value}) for h in best
    ]
    return first | ({"alternatives": others} if others else {})


def _choice(chooser: Any, session: Any) -> Record:
    from mlm.session.choosing import settings

    return settings(chooser, session)


def _resume(
    output: Path, lines: Iterator[tuple[int, bytes]], chunk: int
) -> tuple[int, int, Iterator[tuple[int, bytes]]]:
    """(records kept, errors among them, the lines that follow). Whatever is no whole chunk is cut off and made again:
    so the same lines are decoded together as in a run that was never killed, and give the same numbers.
    """
    done = errors = size = 0
    read: list[tuple[int, bytes]] = []  # lines, sizes and errors of records since the last whole chunk
    sizes = found_errors = 0
    for raw, record in whole_records(output):
        number, line = next(lines, (-1, b""))
        if record["line"] != number + 1 or record["input"] != read_line(line)[0]:
            raise Failed(
                f"{output}: record {record['line']} is of {record['input'][:60]!r}, where the input has "
                f"{read_line(line)[0][:60]!r}: it has changed. Choose another --output, or --overwrite"
            )
        read.append((number, line))
        sizes, found_errors = sizes + len(raw), found_errors + ("error" in record)
        if len(read) == chunk:
            done, errors, size = done + chunk, errors + found_errors, size + sizes
            read, sizes, found_errors = [], 0, 0
    if output.exists():
        os.truncate(output, size)
    return done, errors, itertools.chain(read, lines)


def whole_records(output: Path) -> Iterator[tuple[bytes, Record]]:
    """The records with the bytes of their lines, up to the first torn one."""
    if not output.exists():
        return
    with open(output, "rb") as file:
        for raw in file:
            try:
                record = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                return
            if record is None:
                return
            yield raw, record


def _check_settings(path: Path, settings: Mapping[str, Any], output: Path) -> None:
    try:
        stored = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError) as error:
        raise Failed(f"{path} is damaged; choose another --output, or --overwrite") from error
    settings = json.loads(json.dumps(settings))  # as they were stored: lists for tuples
    names = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if names:
        changes = ", ".join(f"{name}: {stored.get(name)!r} then, {settings.get(name)!r} now" for name in names)
        raise Failed(f"{output} was made with other settings ({changes}); choose another --output, or --overwrite")


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    os.replace(temporary, path)


def _count(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _open(name: str) -> BinaryIO:
    return open(os.dup(sys.stdin.fileno()), "rb") if name == "-" else open(name, "rb")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlm infer",
        description=(
            "Decode a file line by line into JSON lines with scores, in order. Killed, the same command goes on where "
            "it stopped; OUT.jsonl.completed says that it is done."
        ),
        epilog="example: mlm infer --run_dir runs/quickstart --input english.txt --output french.jsonl --to fr",
    )
    parser.add_argument("--input", required=True, metavar="FILE|-", help="text, one example a line, UTF-8; -: stdin")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="where the records go")
    parser.add_argument(
        "--constraints",
        metavar="FILE",
        help="constrained_beam: a line for each of the input, phrases that its result must hold, tabs between them",
    )
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="lines between two writes (default 256)")
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever the output holds")
    decoding_flags.add_language_flags(parser)
    decoding_flags.add_contrast_flag(parser)
    decoding_flags.add_model_flags(parser)
    decoding_flags.add_decode_flags(parser)
    decoding_flags.add_choose_flag(parser)
    shot_flags.add_shot_flags(parser)
    return parser.parse_args(arguments)
