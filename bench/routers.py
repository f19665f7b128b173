"""Dense against sparse at equal work for a token, on the shipped text: curves, loss by language, who serves whom.

    python bench/routers.py [--steps 400] [--experts 8] [--output results/routers]

Four runs of the quickstart's mixture that differ in their feed-forward networks alone, each of width 256 for a token:
dense; one of E experts of width 256; two of E experts of width 128; and experts of width 128 that choose the encoder's
tokens, two for each on average (a decoder cannot: it keeps two of E). A run that is there already is not trained again.
Writes OUTPUT/report.html, which stands alone.
"""

import argparse
import dataclasses
import json
import os
import re
from html import escape
from pathlib import Path

from timing import environment, huge_pages, pin_threads

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parents[1]
SHOWN = 24  # languages of the expert table


def models(experts, vocab_size):
    """name -> model."""
    from mlm.models.families import sparse, t5_style
    from mlm.models.presets import T5_COLUMNS, TINY
    from mlm.models.specs import RouterSpec

    size = dict(zip(T5_COLUMNS.split(), TINY, strict=True)) | {"vocab_size": vocab_size}
    dense, narrow = t5_style(**size), t5_style(**size | {"d_ff": size["d_ff"] // 2})
    two = sparse(narrow, RouterSpec(experts=experts, k=2, gates="chosen", z=1e-3), every=1)
    choose = RouterSpec(experts=experts, kind="expert_choice", capacity=2.0, balance=0.0, z=1e-3)
    found = {
        "dense": dense,
        "one expert a token": sparse(dense, RouterSpec(experts=experts, z=1e-3), every=1),
        "two experts a token": two,
        "experts choose (encoder)": dataclasses.replace(two, encoder=sparse(narrow, choose, every=1).encoder),
    }
    unrolled = lambda stack: dataclasses.replace(stack, scan=False)  # noqa: E731  as `tiny` on a CPU
    return {
        n: dataclasses.replace(m, encoder=unrolled(m.encoder), decoder=unrolled(m.decoder)) for n, m in found.items()
    }


def train(folder, experts, steps):
    """Trains what is missing -> name -> run directory."""
    from mlm.cli import configuration
    from mlm.cli.train import bind_all, configured, pretrain

    bind_all()
    changes = [f"train.steps={steps}", f"schedule.total_steps={steps}", "run.report=False", "checkpoints.keep=1"]
    changes += [f"loop.evaluate_every={steps // 4}", f"schedule.warmup_steps={min(100, steps // 4)}"]
    resolved = configuration.resolve([str(ROOT / "gin/runs/quickstart.gin")], changes)
    plan = configured()
    runs = {}
    for name, model in models(experts, plan.model.vocab_size).items():
        runs[name] = folder / re.sub(r"\W+", "_", name).strip("_")
        pretrain(dataclasses.replace(plan, model=model, run_dir=str(runs[name])), resolved.text)
    return runs


def report(runs, experts, steps):
    """The page."""
    from mlm.evaluation.report_html import page
    from mlm.evaluation.report_plots import Line, lines
    from mlm.models.config import from_json
    from mlm.models.flops import idle_parameters, training_flops
    from mlm.models.transformer import Transformer
    from mlm.training.metrics import read_experts, read_metrics
    from mlm.trees import count

    curves, held_out, facts, losses = [], [], [], {}
    for colour, (name, run) in enumerate(runs.items()):
        records = read_metrics(run)
        for kind, series in (("train", curves), ("validation", held_out)):
            points = [(r["step"], r["nll"]) for r in records if r["kind"] == kind]
            series.append(Line(name, points, colour, dots=kind == "validation"))
        last = [r for r in records if r["kind"] == "validation"][-1]
        losses[name] = {code: row["loss"] for code, row in last["languages"].items()}
        config = from_json(json.loads((run / "model.json").read_text()))
        total = count(Transformer(config).shapes())
        speed = [r["tokens_per_second"] for r in records if r["kind"] == "train"]
        busiest = [value for key, value in last.items() if "/busiest/" in key]
        facts.append(
            (
                name,
                f"{total:,}",
                f"{total - idle_parameters(config):,}",
                f"{training_flops(config, 1, 128, 64) / 192 / 1e6:.1f}",
                f"{sorted(speed)[len(speed) // 2]:,.0f}",
                f"{last['nll']:.4f}",
                f"{max(busiest):.2f}" if busiest else "",
            )
        )
    body = [
        f"<h1>Experts at equal work</h1><p>{steps:,} steps of the quickstart's mixture, {experts} experts; "
        + escape(", ".join(f"{k} {v}" for k, v in environment("jax").items()))
        + "</p>",
        table(
            (
                "run",
                "parameters",
                "for a token",
                "MFLOP a token",
                "tokens/s",
                "held-out loss, nats/token",
                "busiest expert, × mean",
            ),
            facts,
        ),
        "<h2>Held-out loss</h2>" + lines(held_out, x="step", y="loss (nats per target token)"),
        "<h2>Training loss</h2>" + lines(curves, x="step", y="loss (nats per target token)"),
        "<h2>Held-out loss by language, nats per target token</h2>" + by_language(losses),
    ]
    for name, run in runs.items():
        if name != "dense":
            tables = read_experts(run)
            codes = tables.pop("languages")
            body += [f"<h2>Who serves whom: {escape(name)}</h2>"]
            body += [heat(f"{stack}, last mixture", codes, choices[-1]) for stack, choices in tables.items()]
    return page("Experts at equal work", body)


def by_language(losses):
    """Loss of every language in every run, the best in bold."""
    names = list(losses)
    common = sorted(set.intersection(*(set(own) for own in losses.values())))
    rows = []
    for code in common:
        values = [losses[name][code] for name in names]
        cells = [f"<b>{v:.3f}</b>" if v == min(values) else f"{v:.3f}" for v in values]
        rows.append((escape(code), *cells))
    best = [sum(losses[n][c] == min(losses[m][c] for m in names) for c in common) for n in names]
    return table(("language", *names), [("best in", *(f"{count} of {len(common)}" for count in best)), *rows])


def heat(title, codes, choices):
    """Rows of languages, columns of experts, shares of a language's choices as shades."""
    order = choices.sum(1).argsort()[::-1][:SHOWN]
    rows = []
    for index in (i for i in order if choices[i].any()):
        shares = choices[index] / choices[index].sum()
        cells = "".join(f'<td class="n" style="background:rgba(43,108,176,{s:.2f})">{s:.0%}</td>' for s in shares)
        rows.append(f"<tr><td>{escape(str(codes[index]))}</td>{cells}</tr>")
    head = "".join(f'<th class="n">{e}</th>' for e in range(choices.shape[1]))
    return f"<h3>{escape(title)}</h3><table><tr><th>language</th>{head}</tr>{''.join(rows)}</table>"


def table(columns, rows):
    head = "".join(f"<th{' class=n' if i else ''}>{escape(c)}</th>" for i, c in enumerate(columns))
    lines = [
        "<tr>" + "".join(f"<td{' class=n' if i else ''}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows
    ]
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("results/routers"))
    options = parser.parse_args()
    runs = train(options.output, options.experts, options.steps)
    written = options.output / "report.html"
    temporary = written.with_suffix(".tmp")
    temporary.write_text(report(runs, options.experts, options.steps))
    temporary.replace(written)
    print(written)


if __name__ == "__main__":
    huge_pages()
    pin_threads(2)
    main()
