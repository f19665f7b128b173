"""Guesses ahead against one token a pass: passes and seconds for the same tokens, where most of the input is copied.

    python bench/lossless.py [--steps 1500] [--repeats 5] [--lines 64] [--json FILE]

The task is made here: lines of 40 words out of 30, of which 2 to 10 % are misspelled in the source; the target has them
right. A model of 4 + 4 layers, a draft of 1 + 1, and one of 1 + 1 that fills blocks of masks are trained on it, and
Chimera heads on the finished model, for as many steps. Then 64 unseen lines are corrected one at a time, greedily, 2
threads: one token a pass, and with guesses of every kind, chains and trees. Tokens must be the same before anything is
timed. Tokens a pass with the draft are set against (1 - a^(W+1)) / (1 - a), a the share of positions where, behind the
same tokens, both choose the same.
"""

import argparse
from dataclasses import replace
from functools import partial

from timing import environment, huge_pages, measure, pin_threads, report

huge_pages()
pin_threads(2)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mlm.data.batching import Example, Packer  # noqa: E402
from mlm.decoding.config import DecodeConfig  # noqa: E402
from mlm.decoding.generate import Generator  # noqa: E402
from mlm.decoding.proposers import PROPOSERS  # noqa: E402
from mlm.models.families import fairseq_style  # noqa: E402
from mlm.models.specs import ChimeraSpec  # noqa: E402
from mlm.models.transformer import Transformer  # noqa: E402
from mlm.parallel import MeshConfig, global_batch, make_mesh  # noqa: E402
from mlm.training.optimizers import make_optimizer  # noqa: E402
from mlm.training.trainer import TrainConfig, Trainer  # noqa: E402

WORDS, LENGTH, ROWS = 30, 40, 32
VOCABULARY = 64  # 3 … 32: words; 33 … 62: their misspellings
MASK = 63
WAYS = {  # name -> how tokens are guessed
    "input_copy": {"proposer": "input_copy", "guesses": 15},
    "draft_model": {"proposer": "draft_model", "guesses": 4},
    "draft_model, tree": {"proposer": "draft_model", "guesses": 8, "branches": 2},
    "ngram_table": {"proposer": "ngram_table", "guesses": 8},
    "ngram_table, tree": {"proposer": "ngram_table", "guesses": 12, "branches": 2},
    "staged": {"proposer": "staged", "guesses": 4},
    "mask_block": {"proposer": "mask_block", "guesses": 8, "mask_token": MASK},
    "chimera": {"proposer": "chimera", "guesses": 3},
}
SIZES = {"model": (256, 4), "draft_model": (64, 1), "mask_block": (64, 1)}  # width, layers of each stack
TARGETS = {"passes": 4.0, "seconds": 2.5, "formula": 0.1}


def lines(count, random):
    """(sources, targets), int32 [count, LENGTH + 1], the end of sequence included."""
    right = random.integers(3, 3 + WORDS, (count, LENGTH), dtype=np.int32)
    wrong = random.random((count, LENGTH)) < random.uniform(0.02, 0.1, (count, 1))
    end = np.ones((count, 1), np.int32)
    return tuple(np.concatenate([x, end], axis=1) for x in (np.where(wrong, right + WORDS, right), right))


def sized(name):
    width, layers = SIZES[name]
    return fairseq_style(d_model=width, d_ff=2 * width, heads=4, layers=layers, vocab_size=VOCABULARY)


def trained(config, steps, block=0, params=None, **options):
    """(model, parameters, loss of the last steps in nats per token). params: to begin with."""
    optimizer = make_optimizer("adamw", learning_rate=1e-3, weight_decay=0.0)
    masking = {"objective": "mask_block", "block": block, "mask_token": MASK} if block else {}
    train = TrainConfig(steps=steps, z_loss=0.0, **masking, **options)
    trainer = Trainer(config, train, optimizer, make_mesh(MeshConfig()), languages=2)
    state, random, losses = trainer.init(jax.tree.map(jnp.copy, params)), np.random.default_rng(1), []
    for _ in range(steps):
        packer = Packer(LENGTH + 1, LENGTH + 1 + block, pack=False)
        for source, target in zip(*lines(ROWS, random), strict=True):
            packer.add(Example(source, target, language=1, task=1, inputs_language=1))
        state, metrics = trainer.step(state, global_batch(packer.take(ROWS), trainer.mesh))
        losses.append(metrics["loss"])
    last = [float(total / weight) for total, weight in jax.device_get(losses[-50:])]
    return Transformer(config), state.params, float(np.mean(last))


def agreement(models, sources, written):
    """Share of positions where both models choose the same token behind the same, written, tokens."""
    choices = []
    for model, params, _ in models:
        shifted = np.pad(written, ((0, 0), (1, 0)))[:, :-1]
        batch = {
            "encoder_input_tokens": sources,
            "encoder_segment_ids": np.ones_like(sources),
            "decoder_input_tokens": shifted,
            "decoder_segment_ids": np.ones_like(written),
        }
        logits = jax.jit(lambda params, batch, model=model: model.logits(params, model(params, batch).hidden))
        choices.append(np.asarray(logits(params, batch)).argmax(-1))
    return float((choices[0] == choices[1]).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--json")
    options = parser.parse_args()
    models = {
        name: trained(sized(name), options.steps, WAYS[name]["guesses"] if name == "mask_block" else 0)
        for name in SIZES
    }
    model, params, _ = models["model"]
    heads = ChimeraSpec(heads=WAYS["chimera"]["guesses"], attention_heads=4, head_dim=64, d_ff=512)
    models["chimera"] = trained(
        replace(sized("model"), chimera=heads), options.steps, params=params, objective="chimera"
    )
    sources, targets = lines(options.lines, np.random.default_rng(2))
    width = LENGTH + 1

    def speaker(name):
        return models["chimera" if name == "chimera" else "model"]

    generators = {"none": Generator(model, DecodeConfig(max_length=width))}
    drafts = {
        name: models["mask_block" if way["proposer"] == "mask_block" else "draft_model"]
        for name, way in WAYS.items()
        if PROPOSERS[way["proposer"]].drafts
    }
    for name, way in WAYS.items():
        draft = drafts[name][0] if name in drafts else None
        generators[name] = Generator(speaker(name)[0], DecodeConfig(max_length=width, **way), draft=draft)

    def correct(name):
        extra = {"draft": drafts[name][1]} if name in drafts else {}
        return [generators[name](speaker(name)[1], [source], **extra) for source in sources]

    found = {name: correct(name) for name in generators}
    written = {name: np.stack([one.tokens[0, 0] for one in results]) for name, results in found.items()}
    for name, tokens in written.items():
        if not np.array_equal(tokens, written["none"]):
            raise ValueError(f"{name} writes other tokens than one token a pass does; nothing was timed")
    times = measure({name: partial(correct, name) for name in generators}, options.repeats)
    tokens = sum(int(one.lengths.sum()) for one in found["none"])
    rows = []
    for name, results in found.items():
        passes, spent = sum(int(one.passes.sum()) for one in results), times[name]["seconds"]
        rows.append(
            {
                "proposer": name,
                "guesses": generators[name].config.guesses if name != "none" else 0,
                "tokens a pass": tokens / passes,
                "x fewer passes": sum(int(one.passes.sum()) for one in found["none"]) / passes,
                "tokens/s": tokens / spent,
                "x faster": times["none"]["seconds"] / spent,
            }
        )
    a = agreement((models["model"], models["draft_model"]), sources, written["none"])
    expected = sum(a**i for i in range(WAYS["draft_model"]["guesses"] + 1))
    setting = {
        "lines right": f"{(written['none'] == targets).all(1).mean():.2f} of {options.lines}",
        "loss, nats per token": ", ".join(f"{name} {loss:.4f}" for name, (_, _, loss) in models.items()),
        "draft agrees": f"{a:.3f} of positions; the formula gives {expected:.2f} tokens a pass",
        **environment("jax"),
    }
    report("Lossless decoding, one line at a time", setting, rows, options.json)
    copied, drafted = rows[1:3]
    parted = abs(drafted["tokens a pass"] / expected - 1)
    for what, met, value in (
        ("x fewer passes by input_copy", copied["x fewer passes"] >= TARGETS["passes"], copied["x fewer passes"]),
        ("x faster by input_copy", copied["x faster"] >= TARGETS["seconds"], copied["x faster"]),
        ("draft's tokens a pass off the formula", parted <= TARGETS["formula"], parted),
    ):
        print(f"{what}: {value:.2f}: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
