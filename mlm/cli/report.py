"""`mlm report --run_dir DIR`: what a run was worth, language by language; report.html, report.md and report.json in it."""

import argparse
import copy
import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm.cli import screen
from mlm.cli.main import Failed
from mlm.evaluation.report import FillIn, LanguageRow, Report, Translation, Verdict, to_json, to_markdown
from mlm.evaluation.report_html import prominent, to_html

TOKENS_COUNTED = 2_000_000  # text tokens of training rows behind the unigram baselines
ROWS = 32  # of a batch
SCORED_BYTES = 1500  # of a language's held-out text, at least, where other gaps in the same text can provide them
GAPS_DRAWN = 8  # times at most, to get there
EXAMPLES = 2000  # held-out ones of a task, at most
SAMPLES = 8  # languages whose translations and fill-ins are shown
GAPS_SHOWN = 4  # of a fill-in
_SENTINEL = re.compile(r"<extra_id_(\d+)>")

Batch = Mapping[str, np.ndarray]


def run(arguments: list[str]) -> int:
    """Exit code 0: passed; 1: the trained model does not beat the baselines, or there is no model."""
    parser = argparse.ArgumentParser(
        prog="mlm report",
        description="Measure the latest checkpoint of a run on held-out text, language by language, against fresh "
        "parameters and unigram baselines; write report.html, report.md and report.json into the run.",
        epilog="example: mlm report --run_dir runs/quickstart",
    )
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="directory of a training run")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verdict = write_report(Path(parser.parse_args(arguments).run_dir))
    screen.say(verdict.text)
    if not verdict.passed:
        raise Failed("the trained model does not beat its baselines; see the report")
    return 0


def write_report(run_dir: Path) -> Verdict:
    """Measures the run's latest checkpoint and writes the three files; each whole or not at all.

    In a run of several processes it measures nothing and says which command does.
    Raises CheckpointError for a directory without a run or checkpoint, ValueError when there is no held-out text.
    """
    import jax

    if jax.process_count() > 1:
        return Verdict(True, f"in one process, write the report with: mlm report --run_dir {shlex.quote(str(run_dir))}")
    from mlm.checkpoints.run_directory import RunDirectory

    report = measure(run_dir)
    directory = RunDirectory(run_dir)
    directory.write_json("report.json", to_json(report))
    directory.write("report.md", to_markdown(report))
    path = directory.write("report.html", to_html(report))
    screen.say(f"report: {path}")
    return report.verdict


def measure(run_dir: Path) -> Report:
    """Everything that a report says."""
    with screen.working(f"reading {run_dir} …"):
        from mlm import session as sessions
        from mlm.checkpoints import versions
        from mlm.data.languages import LANGUAGES
        from mlm.data.registration import load_tasks
        from mlm.training.metrics import read_metrics
        from mlm.trees import count

        session = sessions.load(run_dir)
        load_tasks(*session.data.get("task_modules", ()))
        fresh = copy.copy(session)  # shares what is compiled
        fresh.params = session.untrained(_seed(session.run))
    split = session.data.get("evaluation_split", "validation")
    tasks = session.tasks(split=split)
    hidden, what = _denoising(tasks)
    with screen.working("held-out text …"):
        batches = _held_out(session, hidden, split)
    screen.say(f"report: {len(batches)} batches of held-out text, four models; about a minute")
    counts, text_share = _token_counts(session)
    losses = {
        "trained": session.language_losses(screen.track(batches, "trained model  ", len(batches))),
        "untrained": fresh.language_losses(screen.track(batches, "fresh parameters", len(batches))),
        **_unigrams(session, counts, batches),
    }
    with screen.working("sizes of the corpora …"):
        rows = _rows(session, losses, text_share)
    with screen.working("translations and fill-ins …"):
        translations, fill_ins = _samples(session, fresh, tasks, rows, split)
    return Report(
        run=session.run.path.resolve().name,
        mixture=session.data["mixture"],
        steps=session.step,
        parameters=count(session.params),
        languages=rows,
        records=[r for r in read_metrics(session.run.path) if r["step"] <= session.step],
        translations=translations,
        fill_ins=fill_ins,
        versions=versions(),
        machine=_machine(session),
        model=_model(session),
        task=(
            f"Every model is scored on the same hidden pieces of the {split} text ({what}): all of it, documents that "
            f"training never saw{_limits(hidden, split)}."
        ),
        told=(
            f"The unigrams know where text stands and how frequent each token is among {_text_tokens(counts):,} text tokens "
            "of the training batches, inputs and targets together, plus one for each token; the own unigram counts only "
            "tokens of the same language."
        ),
        held_out=split,
        directions={language.code: language.direction for language in LANGUAGES},
        next_steps=_next_steps(run_dir, session),
    )


# Held-out text.


def _denoising(tasks: Sequence[str]) -> tuple[list[str], str]:
    """The tasks that hide text of one language, and what they do in words; all tasks when there is none such."""
    plans = {name: plan for name in tasks if (plan := _plan(name))}
    if not plans:
        return list(tasks), "the targets of its tasks"
    return list(plans), " and ".join(sorted(set(plans.values()))).replace("_", " ")


def _plan(name: str) -> str | None:
    """How a task hides text, e.g. "span_corruption"; None for one that does not."""
    from mlm.data.readers import is_unit_task
    from mlm.data.recipes import Denoising
    from mlm.data.registration import get

    task = get(name)
    examples = task.preprocessors[0].recipe.examples if is_unit_task(task) else None
    return examples.plan if isinstance(examples, Denoising) else None


def _held_out(session: Any, tasks: Sequence[str], split: str) -> list[Batch]:
    """Rows of the tasks' held-out text. Languages with little of it are hidden again in other places, so that more of
    what there is gets scored.
    """
    import jax

    from mlm.data.evaluator import packed_batches
    from mlm.data.languages import LANGUAGES
    from mlm.data.once import SEED, examples_once
    from mlm.data.recipes import Lengths
    from mlm.evaluation.language_loss import language_losses

    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    devices = jax.device_count()
    rows, spelling = -(-ROWS // devices) * devices, session.spelling
    nothing = lambda batch: np.zeros(batch["decoder_target_tokens"].shape)  # noqa: E731
    batches: list[Batch] = []
    scored = np.zeros(len(LANGUAGES))
    remaining = list(tasks)
    for draw in range(GAPS_DRAWN):
        examples, language = [], {}
        for name, found in examples_once(remaining, split, session.vocabulary, lengths, SEED + draw, EXAMPLES):
            examples += found
            language[name] = {example.language for example in found}
        made = list(packed_batches(examples, lengths, rows))
        batches += made
        scored += language_losses(nothing, made, spelling, languages=len(LANGUAGES)).bytes
        remaining = [n for n in remaining if any(scored[i] < SCORED_BYTES for i in language[n])]
        if not remaining:
            break
    return batches


def _limits(tasks: Sequence[str], split: str) -> str:
    """What `_held_out` leaves out, in words."""
    from mlm.data.statistics import task_counts

    large = [name for name in tasks if task_counts(name, split).examples > EXAMPLES]
    return f"; of {len(large)} large tasks the first {EXAMPLES:,} examples" if large else ""


# Unigrams.


def _token_counts(session: Any) -> tuple[dict[int, np.ndarray], float]:
    """Language id -> how often each token stands in training batches, inputs and targets together; and the share of
    their tokens that spells text.
    """
    from mlm.data.pipeline import BatchIterator, DataConfig
    from mlm.evaluation.language_loss import token_counts

    data = session.data
    rows = BatchIterator(
        DataConfig(
            mixture=data["mixture"],
            inputs_length=data["inputs_length"],
            targets_length=data["targets_length"],
            batch_size=ROWS,
            vocabulary=str(session.run / data["vocabulary"]),
        )
    )

    def counted() -> Iterator[Batch]:
        seen = 0
        while seen < TOKENS_COUNTED:
            batch = next(rows)
            for side in (batch, _inputs_as_targets(batch)):
                seen += int(np.count_nonzero(side["decoder_target_tokens"]))
                yield side

    with screen.working("token frequencies of the training mixture …"):
        counts = token_counts(counted(), session.config.vocab_size)
    text = session.spelling.text
    total = sum(int(c.sum()) for c in counts.values())
    for c in counts.values():
        c[~text] = 0
    return counts, _text_tokens(counts) / total


def _inputs_as_targets(batch: Batch) -> Batch:
    inputs = batch["encoder_input_tokens"]
    return {
        "decoder_target_tokens": inputs,
        "decoder_language_ids": batch["encoder_language_ids"],
        "decoder_loss_weights": inputs > 0,
    }


def _text_tokens(counts: Mapping[int, np.ndarray]) -> int:
    return sum(int(c.sum()) for c in counts.values())


def _unigrams(session: Any, counts: Mapping[int, np.ndarray], batches: Sequence[Batch]) -> dict[str, Any]:
    """Losses of the two baselines. A language that no counted batch held has an even unigram of its own."""
    from mlm.data.languages import LANGUAGES
    from mlm.evaluation.language_loss import language_losses, unigram, unigram_log_probs

    spelling = session.spelling
    met = {int(i) for batch in batches for i in np.unique(batch["decoder_language_ids"]) if i}
    none = np.zeros(session.config.vocab_size, np.int64)
    with screen.working("unigrams …"):
        own = {i: unigram_log_probs(counts.get(i, none), spelling).astype(np.float32) for i in met}
        tables = {"unigram": unigram_log_probs(sum(counts.values()), spelling), "own_unigram": own}
        return {
            name: language_losses(unigram(table), batches, spelling, languages=len(LANGUAGES))
            for name, table in tables.items()
        }


# Tables.


def _rows(session: Any, losses: Mapping[str, Any], text_share: float) -> list[LanguageRow]:
    """One row for each language of the mixture that has hidden text, and for those only translated into."""
    from mlm.data.languages import LANGUAGES
    from mlm.data.recipes import Lengths
    from mlm.data.statistics import mixture_table

    seen = {int(i): int(n) for i, n in session.extra.get("tokens_seen", {}).items()}
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    budget = text_share * sum(seen.values())
    sizes = {row.name: row for row in mixture_table(session.data["mixture"], budget, session.vocabulary, lengths)}
    rows = []
    for index in losses["trained"].seen():
        language = LANGUAGES[index]
        size = sizes.get(language.code)
        rows.append(
            LanguageRow(
                code=language.code,
                name=language.name,
                script=language.script,
                **{model: float(found.bits_per_byte[index]) for model, found in losses.items()},
                bytes=int(losses["trained"].bytes[index]),
                tokens_seen=seen.get(index, 0),
                **({"characters": size.characters, "rate": size.rate, "epochs": size.epochs} if size else {}),
            )
        )
    return sorted(rows, key=lambda row: row.code)


# Samples.


def _samples(
    session: Any, fresh: Any, tasks: Sequence[str], rows: Sequence[LanguageRow], split: str
) -> tuple[list[Translation], list[FillIn]]:
    """Held-out examples in languages of different scripts, decoded by the trained and the fresh parameters."""
    from mlm.data.languages import LANGUAGES
    from mlm.data.once import examples_once
    from mlm.data.recipes import Lengths
    from mlm.session import Source

    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    chosen = [code for code in prominent(rows, SAMPLES + 1) if code != "en"][:SAMPLES]
    names = _shown_tasks(tasks, chosen)
    found = {n: es for n, es in examples_once(names, split, session.vocabulary, lengths, limit=50) if es}
    examples = {name: _typical(session, found[name]) for name in names if name in found}
    sources = [Source([int(token) for token in e.inputs], False) for e in examples.values()]
    if not sources:
        return [], []
    before, after = ([best[0].text for best in model.decode(sources)] for model in (fresh, session))
    translations, fill_ins = [], []
    for example, *written in zip(examples.values(), before, after, strict=True):
        text, reference = (session.vocabulary.decode(side.tolist()) for side in (example.inputs, example.targets))
        source, target = LANGUAGES[example.inputs_language].code, LANGUAGES[example.language].code
        if source != target:
            tag = f"<2{target}>"
            plain = [t.removeprefix(tag).strip() for t in (text, reference, *written)]
            translations.append(Translation(source, target, *plain))
        elif "<extra_id_0>" in text:
            fill_ins.append(fill_in(target, text, reference, *written))
    return translations, fill_ins


def _shown_tasks(tasks: Sequence[str], codes: Iterable[str]) -> list[str]:
    """For each language its first translation from English, into English, and its first task that hides text."""
    from mlm.data.readers import is_unit_task
    from mlm.data.registration import get

    by_pair: dict[tuple[str, str], str] = {}
    for name in tasks:
        task = get(name)
        if is_unit_task(task):
            units = task.preprocessors[0]
            if units.inputs_language != units.language or _plan(name):
                by_pair.setdefault((units.inputs_language, units.language), name)
    wanted = [pair for code in codes for pair in (("en", code), (code, "en"), (code, code))]
    return [by_pair[pair] for pair in wanted if pair in by_pair]


def _typical(session: Any, examples: Sequence[Any]) -> Any:
    """Neither the shortest nor the longest: a sentence that can be read at a glance."""
    return min(examples, key=lambda e: abs(len(e.targets) - 16))


def fill_in(language: str, text: str, truth: str, before: str, after: str) -> FillIn:
    """The first gaps of a corrupted text, and what stands after the same sentinels in the targets and the predictions.

    >>> fill_in("en", "A <extra_id_0> sat<extra_id_1>.", "<extra_id_0> cat<extra_id_1> down", "x", "<extra_id_0> dog").after
    (' dog', '')
    """
    parts = _SENTINEL.split(text)  # text, number, text, number, text
    kept, numbers = parts[0::2], parts[1::2]
    if len(numbers) > GAPS_SHOWN:
        kept = [*kept[:GAPS_SHOWN], kept[GAPS_SHOWN].rstrip() + " …"]
        numbers = numbers[:GAPS_SHOWN]

    def gaps(written: str) -> tuple[str, ...]:
        cut = _SENTINEL.split(written)
        by_number = dict(zip(reversed(cut[1::2]), reversed(cut[2::2]), strict=True))  # the first of a repeated one
        return tuple(by_number.get(number, "") for number in numbers)

    return FillIn(language, tuple(kept), gaps(truth), gaps(before), gaps(after))


# Words.


def _seed(directory: Any) -> int:
    """The seed that the run's parameters were made from."""
    path = directory / "config.gin"
    found = re.search(r"^train\.seed = (\d+)", path.read_text(), re.M) if path.exists() else None
    return int(found[1]) if found else 0


def _machine(session: Any) -> str:
    path = session.run / "mesh.json"
    mesh = session.run.read_json("mesh.json") if path.exists() else {}
    devices = f"{mesh.get('devices', 1)} × {mesh.get('device_kind', 'device')}"
    cores = f" ({os.cpu_count()} cores)" if mesh.get("platform") == "cpu" else ""
    return devices + cores


def _model(session: Any) -> str:
    config = session.config
    stacks = [(s.repeats * len(s.group)) for s in (config.encoder, config.decoder)]
    return f"{stacks[0]} encoder and {stacks[1]} decoder layers, width {config.d_model}, {config.vocab_size:,} ids"


def _next_steps(run_dir: Path, session: Any) -> list[tuple[str, str]]:
    where = f"--run_dir {shlex.quote(str(run_dir))}"
    to = next((code for code in ("fr", "es", "uk") if code in session.languages), (session.languages or ["en"])[0])
    return [
        ("Translate a sentence", f'mlm generate "Where is the station?" --to {to} {where}'),
        ("Score every task of the mixture on its held-out text", f"mlm eval {where} --num_examples 100"),
        (
            "Train longer, in another run",
            f"mlm train --gin_file={where.split()[-1]}/config.gin --steps {10 * session.step} --run_dir RUN",
        ),
        ("See what the mixture reads, at any budget", f"mlm mixture show {session.data['mixture']} --budget 1e8"),
        ("Curves of every language", f"tensorboard --logdir {where.split()[-1]}/tensorboard"),
        ("In a notebook", f'import mlm\nrun = mlm.load("{run_dir}")\nrun.generate(["Good morning"], to="{to}")'),
    ]
