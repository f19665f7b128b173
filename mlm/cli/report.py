"""`mlm report --run_dir DIR`: what a run was worth, language by language, as report.html, .md and .json."""

import argparse
import copy
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm.cli import screen
from mlm.cli.main import Failed
from mlm.cli.report_samples import hiding_plan, sample
from mlm.evaluation.language_loss import LanguageLosses
from mlm.evaluation.report import LanguageRow, Report, Verdict, to_json
from mlm.evaluation.report_html import prominent, to_html
from mlm.evaluation.report_text import to_markdown

TOKENS_COUNTED = 2_000_000  # text tokens of training rows behind the unigram baselines
ROWS = 32  # of a batch
SCORED_BYTES = 1500  # of a language's held-out text, at least, where other gaps in the same text can provide them
GAPS_DRAWN = 8  # times at most, to get there
EXAMPLES = 2000  # held-out ones of a task, at most
SAMPLES = 8  # languages whose translations and fill-ins are shown

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
        translations, fill_ins = sample(session, fresh, tasks, prominent(rows, SAMPLES + 1), split)
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
            f"The unigrams know where text stands and how frequent each token is among {_text_tokens(counts):,} text "
            "tokens of training batches, inputs and targets together, plus one for each token; the own unigram counts "
            "tokens of the same language only."
        ),
        held_out=split,
        names={language.code: language.name for language in LANGUAGES},
        directions={language.code: language.direction for language in LANGUAGES},
        next_steps=_next_steps(run_dir, session),
    )


# Held-out text.


def _denoising(tasks: Sequence[str]) -> tuple[list[str], str]:
    """The tasks that hide text of one language, and what they do in words; all tasks when there is none such."""
    plans = {name: plan for name in tasks if (plan := hiding_plan(name))}
    if not plans:
        return list(tasks), "the targets of its tasks"
    return list(plans), " and ".join(sorted(set(plans.values()))).replace("_", " ")


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
        for name, found in examples_once(
            remaining, split, session.vocabulary, lengths, SEED + draw, EXAMPLES, session.own_template
        ):
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
            template=session.own_template,
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
        mixture = unigram_log_probs(np.sum(list(counts.values()), axis=0), spelling)
        return {
            name: language_losses(token_nll, batches, spelling, languages=len(LANGUAGES))
            for name, token_nll in (("unigram", unigram(mixture)), ("own_unigram", unigram(own)))
        }


# Tables.


def _rows(session: Any, losses: Mapping[str, LanguageLosses], text_share: float) -> list[LanguageRow]:
    """One row for each language of the mixture; one without held-out text counts as not won."""
    from mlm.data.languages import LANGUAGES
    from mlm.data.recipes import Lengths
    from mlm.data.statistics import mixture_table

    seen = {int(i): int(n) for i, n in session.extra.get("tokens_seen", {}).items()}
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    budget = text_share * sum(seen.values())
    sizes = {row.name: row for row in mixture_table(session.data["mixture"], budget, session.vocabulary, lengths)}
    bits = {model: found.bits_per_byte for model, found in losses.items()}
    rows = []
    for language in LANGUAGES[1:]:
        size, index = sizes.get(language.code), language.id
        if size is None and not losses["trained"].tokens[index]:
            continue
        rows.append(
            LanguageRow(
                code=language.code,
                name=language.name,
                script=language.script,
                trained=float(bits["trained"][index]),
                untrained=float(bits["untrained"][index]),
                unigram=float(bits["unigram"][index]),
                own_unigram=float(bits["own_unigram"][index]),
                bytes=int(losses["trained"].bytes[index]),
                characters=size.characters if size else 0,
                rate=size.rate if size else 0.0,
                tokens_seen=seen.get(index, 0),
                epochs=size.epochs if size else float("nan"),
            )
        )
    return sorted(rows, key=lambda row: row.code)


# Words.


def _seed(directory: Any) -> int:
    """The seed that the run's parameters were made from."""
    found = re.search(r"^train\.seed = (\d+)", _config(directory), re.M)
    return int(found[1]) if found else 0


def _config(directory: Any) -> str:
    path = directory / "config.gin"
    return path.read_text() if path.exists() else ""


def _machine(session: Any) -> str:
    path = session.run / "mesh.json"
    mesh = session.run.read_json("mesh.json") if path.exists() else {}
    if mesh.get("platform", "cpu") == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{mesh['devices']} × {mesh['device_kind']}"


def _model(session: Any) -> str:
    config = session.config
    stacks = [(s.repeats * len(s.group)) for s in (config.encoder, config.decoder)]
    return f"{stacks[0]} encoder and {stacks[1]} decoder layers, width {config.d_model}, {config.vocab_size:,} ids"


def _next_steps(run_dir: Path, session: Any) -> list[tuple[str, str]]:
    folder, steps = shlex.quote(str(run_dir)), 10 * session.step
    to = next((code for code in ("fr", "es", "uk") if code in session.languages), (session.languages or ["en"])[0])
    longer = f"mlm train --gin_file={folder}/config.gin --run_dir {folder}-longer --steps {steps}"
    if "schedule.total_steps" in _config(session.run):
        longer += f" --set schedule.total_steps={steps}"
    return [
        ("Translate a sentence", f'mlm generate "Where is the station?" --to {to} --run_dir {folder}'),
        ("Score every task of the mixture on held-out text", f"mlm eval --run_dir {folder} --num_examples 100"),
        ("Train longer, in another run", longer),
        ("See what the mixture reads at any budget", f"mlm mixture show {session.data['mixture']} --budget 1e8"),
        ("Curves of every language", f"tensorboard --logdir {folder}/tensorboard"),
        ("In a notebook", f'import mlm\nrun = mlm.load("{run_dir}")\nrun.generate(["Good morning"], to="{to}")'),
    ]
