"""What searches find: several readings of a source, phrases that a text must hold, the text that others agree with.

    python bench/search.py [--steps 600] [--lines 64] [--run_dir runs/quickstart] [--samples 32] [--json FILE]

Ambiguous: a model is trained here on sources of four words, each of which may be written in one of four styles (with
0.4, 0.3, 0.2 and 0.1 of the lines), and ends in one of eight flourishes. Counted are the styles among the best four
results: by beam search, whose four are mostly flourishes of one style, and by diverse beam search, each group of one,
at both strengths of diversity that its papers use.
Phrases: of unseen lines two words of the reference must be held, ten beams; counted is who holds them, and how many
words are the reference's. Agreement (needs a trained run, as `make run` leaves it): chrF of translations by one sample,
by the most probable of the samples, by minimum Bayes risk with chrF over them, and by greedy and beam search.
"""

import argparse
from pathlib import Path

from timing import environment, huge_pages, pin_threads, report

huge_pages()
pin_threads(2)

import numpy as np  # noqa: E402

from mlm.data.batching import Example, Packer  # noqa: E402
from mlm.decoding.config import DecodeConfig  # noqa: E402
from mlm.decoding.generate import Generator  # noqa: E402
from mlm.decoding.phrases import constraints  # noqa: E402
from mlm.models.families import t5_style  # noqa: E402
from mlm.models.transformer import Transformer  # noqa: E402
from mlm.parallel import MeshConfig, global_batch, make_mesh  # noqa: E402
from mlm.training.optimizers import make_optimizer  # noqa: E402
from mlm.training.trainer import TrainConfig, Trainer  # noqa: E402

WORDS, LENGTH, STYLES, FLOURISHES, ROWS = 10, 4, 4, 8, 64
SHARES = (0.4, 0.3, 0.2, 0.1)
FIRST = 3  # words 3 … 12, styles of them 13 … 52, flourishes 53 … 60
VOCABULARY = FIRST + WORDS * (1 + STYLES) + FLOURISHES
TASK = "tatoeba.translate.en.fr"
TARGETS = {"diverse": 1.5, "held": 1.0}


def lines(count, random):
    """(sources, targets, styles), the end of sequence included."""
    words = random.integers(0, WORDS, (count, LENGTH))
    styles = random.choice(STYLES, count, p=SHARES)
    flourish = FIRST + WORDS * (1 + STYLES) + random.integers(0, FLOURISHES, (count, 1))
    end = np.ones((count, 1), np.int64)
    written = FIRST + WORDS * (1 + styles[:, None]) + words
    return (
        np.concatenate([FIRST + words, end], axis=1).astype(np.int32),
        np.concatenate([written, flourish, end], axis=1).astype(np.int32),
        styles,
    )


def style_of(source, tokens):
    """The style in which the source is written throughout, or None."""
    styles = (tokens[:LENGTH] - FIRST) // WORDS - 1
    right = len(tokens) > LENGTH and ((tokens[:LENGTH] - FIRST) % WORDS == source[:LENGTH] - FIRST).all()
    return int(styles[0]) if right and len(set(styles.tolist())) == 1 and 0 <= styles[0] < STYLES else None


def trained(steps):
    config = t5_style(vocab_size=VOCABULARY, d_model=64, d_ff=128, heads=4, head_dim=16, layers=(2, 2))
    optimizer = make_optimizer("adamw", learning_rate=2e-3, weight_decay=0.0)
    trainer = Trainer(config, TrainConfig(steps=steps, z_loss=0.0), optimizer, make_mesh(MeshConfig()), languages=2)
    state, random = trainer.init(), np.random.default_rng(1)
    for _ in range(steps):
        packer = Packer(LENGTH + 1, LENGTH + 2, pack=False)
        for source, target in zip(*lines(ROWS, random)[:2], strict=True):
            packer.add(Example(source, target, language=1, task=1, inputs_language=1))
        state, _ = trainer.step(state, global_batch(packer.take(ROWS), trainer.mesh))
    return Transformer(config), state.params


def ambiguous(model, params, sources):
    """Rows, and how many times more styles diverse beam search finds."""
    diverse = [(groups, diversity) for groups in (2, 4) for diversity in (0.5, 1.0)]
    ways = {"beam": {"method": "beam"}} | {
        f"diverse_beam, {groups} groups, {diversity:g} nats": {
            "method": "diverse_beam",
            "groups": groups,
            "diversity": diversity,
        }
        for groups, diversity in diverse
    }
    rows = []
    for name, way in ways.items():
        config = DecodeConfig(max_length=LENGTH + 2, beams=4, n_best=4, **way)
        found = Generator(model, config)(params, sources)
        styles = [
            {style_of(source, t[:n]) for t, n in zip(tokens, lengths, strict=True)} - {None}
            for source, tokens, lengths in zip(sources, found.tokens, found.lengths, strict=True)
        ]
        rows.append({"search": name, "styles among four": float(np.mean([len(s) for s in styles]))})
    for row in rows:
        row["x beam"] = row["styles among four"] / rows[0]["styles among four"]
    return rows, max(row["x beam"] for row in rows[1:])


def held(model, params, sources, targets, random):
    """Rows, and the share of results that hold both words."""
    places = [sorted(random.choice(LENGTH, 2, replace=False)) for _ in targets]
    phrases = [[[int(target[i])] for i in own] for target, own in zip(targets, places, strict=True)]
    rows = []
    for method in ("beam", "constrained_beam"):
        given = constraints(phrases) if method == "constrained_beam" else {}
        config = DecodeConfig(method=method, max_length=LENGTH + 2, beams=10)
        found = Generator(model, config)(params, sources, given=given)
        texts = [t[0, : n[0]] for t, n in zip(found.tokens, found.lengths, strict=True)]
        holds = [all(token in text for (token,) in own) for text, own in zip(texts, phrases, strict=True)]
        right = [(text[:LENGTH] == target[:LENGTH]).mean() for text, target in zip(texts, targets, strict=True)]
        rows.append({"search": method, "holds both words": np.mean(holds), "words as the reference": np.mean(right)})
    return rows, float(rows[1]["holds both words"])


def agreement(run_dir, samples, examples):
    """Rows: corpus chrF of what each way chooses; and how much more minimum Bayes risk has than one sample."""
    import mlm
    from mlm.data.evaluator import read_examples
    from mlm.data.recipes import Lengths
    from mlm.evaluation.metrics import METRICS
    from mlm.session.session import Source

    session = mlm.load(run_dir)
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    session.tasks()
    ((_, found),) = read_examples([TASK], session.vocabulary, lengths, "validation", examples)
    references = [session.text(e.targets) for e in found]
    sources = [Source(e.inputs.tolist(), trimmed=False) for e in found]
    drawing = {"method": "sample", "n_best": samples}
    drawn = session.decode(sources, **drawing)
    ways = {
        "one sample": [best[place % samples] for place, best in enumerate(drawn)],
        "the most probable sample": [best[0] for best in drawn],
        f"minimum Bayes risk, {samples} samples": [
            best[0] for best in session.decode(sources, choose="mbr", **drawing)
        ],
        "greedy": [best[0] for best in session.decode(sources)],
        "beam of 4": [best[0] for best in session.decode(sources, method="beam")],
    }
    chrf = METRICS["chrf"]
    rows = [{"chosen by": name, "chrF": chrf(references, [h.text for h in of])["chrf"]} for name, of in ways.items()]
    return rows, rows[2]["chrF"] - rows[0]["chrF"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--run_dir", default="runs/quickstart")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--json")
    options = parser.parse_args()
    model, params = trained(options.steps)
    random = np.random.default_rng(2)
    sources, targets, _ = lines(options.lines, random)
    setting = {"steps": options.steps, "lines": options.lines, **environment("jax")}
    rows, diverse = ambiguous(model, params, sources)
    report(
        "Styles among the best four of an ambiguous source", setting, rows, options.json and f"{options.json}.styles"
    )
    print(f"x styles by diverse beam search: {diverse:.2f}: {'met' if diverse >= TARGETS['diverse'] else 'MISSED'}\n")
    rows, share = held(model, params, sources, targets, random)
    report("Two words of the reference to be held, 10 beams", setting, rows, options.json and f"{options.json}.held")
    print(f"results that hold both words: {share:.3f}: {'met' if share >= TARGETS['held'] else 'MISSED'}\n")
    if not Path(options.run_dir).is_dir():
        print(f"agreement: not run, as {options.run_dir} is not there (`make run` makes it)")
        return
    rows, more = agreement(options.run_dir, options.samples, options.lines)
    setting = {"run": options.run_dir, "task": TASK, "texts": options.lines, **environment("jax")}
    report("Translations by what chooses them", setting, rows, options.json and f"{options.json}.agreement")
    print(f"chrF by minimum Bayes risk over one sample: {more:+.2f}: {'met' if more > 0 else 'MISSED'}")


if __name__ == "__main__":
    main()
