"""Real tokens per second when examples are short: packed rows against padded ones and against length buckets.

    python bench/packing.py [--quick] [--examples 96] [--repeats 5] [--json results/packing.json]

T5 1.1 small, float32, AdamW, 2 threads. Sources have log-normal lengths (mean 150 tokens, at most 512) like web text in
many languages, targets 114/512 of that; the same examples reach every peer. Ours trains on batches of 4 rows of 512 and
114 positions, packed or one example a row. Hugging Face's T5 (PyTorch, sdpa) sorts the examples by length, and takes as
many as fill 4 x 512 source positions once padded to the longest of them. Counted are tokens that are not padding,
source and target, over one pass. Before that the losses must agree: packed and unpacked to 1e-5, PyTorch to 1e-4.

--quick: the tiny model, to see that everything runs; its numbers say nothing.
"""

import argparse
from collections.abc import Sequence

from timing import environment, huge_pages, measure, pin_threads, report

huge_pages()
THREADS = pin_threads(2)

import hugging_face  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from mlm.data.batching import Example, Packer, fill_rate  # noqa: E402
from mlm.models.presets import preset  # noqa: E402
from mlm.parallel import MeshConfig, make_mesh  # noqa: E402
from mlm.training.optimizers import make_optimizer  # noqa: E402
from mlm.training.trainer import TrainConfig, Trainer  # noqa: E402

ROWS, SOURCE, TARGET = 4, 512, 114
MEAN, SIGMA = 150, 1.0  # tokens of a source; spread of its logarithm
Batch = dict[str, np.ndarray]


def make_examples(count: int, vocab: int) -> list[Example]:
    """Random tokens in lengths like those of web text, from a fixed seed."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count).round().clip(8, SOURCE).astype(int)
    examples = []
    for length in lengths:
        sides = (random.integers(3, vocab, n, dtype=np.int32) for n in (length, max(2, length * TARGET // SOURCE)))
        examples.append(Example(*sides, language=1, task=1, inputs_language=1))
    return examples


def rows(examples: Sequence[Example], pack: bool) -> list[Batch]:
    """Batches of ROWS rows, the last one filled up with empty rows."""
    packer = Packer(SOURCE, TARGET, pack)
    for example in examples:
        packer.add(example)
    packer.flush()
    batches = []
    while packer.ready:
        batch = packer.take(ROWS)
        batches.append({name: np.pad(x, ((0, ROWS - len(x)), (0, 0))) for name, x in batch.items()})
    return batches


def buckets(examples: Sequence[Example]) -> list[Batch]:
    """Batches of equal work: sorted by length, each padded to its longest example, at most ROWS x SOURCE positions."""
    ordered = sorted(examples, key=lambda e: len(e.inputs), reverse=True)
    batches = []
    while ordered:
        longest = len(ordered[0].inputs)
        group, ordered = ordered[: ROWS * SOURCE // longest], ordered[ROWS * SOURCE // longest :]
        packer = Packer(longest, max(len(e.targets) for e in group), pack=False)
        for example in group:
            packer.add(example)
        batches.append(packer.take(len(group)))
    np.random.default_rng(1).shuffle(batches)
    return batches


def tokens(batches: Sequence[Batch]) -> int:
    return sum(int((b[f"{side}_segment_ids"] > 0).sum()) for b in batches for side in ("encoder", "decoder"))


def fill(batches: Sequence[Batch]) -> float:
    """Share of positions, source and target together, that hold a token."""
    positions = sum(b["encoder_input_tokens"].size + b["decoder_input_tokens"].size for b in batches)
    return tokens(batches) / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny model: a smoke test")
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes over the examples")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    config = preset("tiny" if options.quick else "t5_1_1_small", scan=False)
    optimizer = make_optimizer("adamw", learning_rate=1e-4)
    trainer = Trainer(config, TrainConfig(steps=1, z_loss=0.0), optimizer, make_mesh(MeshConfig()), languages=2)
    examples = make_examples(options.examples, config.vocab_size)
    sets = {"packed": rows(examples, True), "padded": rows(examples, False), "length buckets": buckets(examples)}
    assert len({tokens(batches) for batches in sets.values()}) == 1, "every peer sees every token"

    state = trainer.init()
    model = hugging_face.t5(config, jax.device_get(state.params), "sdpa", THREADS)
    step = hugging_face.training_step(model, hugging_face.adamw(model, 1e-4, 0.01))
    losses = {}
    for name in ("packed", "padded"):
        sums = [jax.device_get(trainer.evaluate_batch(state.params, batch)["nll"]) for batch in sets[name]]
        losses[name] = float(np.divide(*np.sum(sums, axis=0, dtype=np.float64)))
    losses["length buckets"] = hugging_face.mean_loss(model, sets["length buckets"])
    for name, tolerance in (("padded", 1e-5), ("length buckets", 1e-4)):
        if not np.isclose(losses[name], losses["packed"], rtol=tolerance):
            raise ValueError(f"{name} computes something else than packed: {losses}; nothing was timed")

    carried = {"state": state}

    def our_pass(batches):
        for batch in batches:
            carried["state"], _ = trainer.step(carried["state"], batch)
        jax.block_until_ready(carried["state"])

    calls = {
        "ours, packed": lambda: our_pass(sets["packed"]),
        "ours, padded": lambda: our_pass(sets["padded"]),
        "Hugging Face, length buckets": lambda: [step(batch) for batch in sets["length buckets"]],
    }
    times = measure(calls, options.repeats)
    count = tokens(sets["packed"])
    packed = times["ours, packed"]["seconds"]
    table = [
        {
            "pass": name,
            "real tokens/s": count / time["seconds"],
            "packed is x": time["seconds"] / packed,
            "batches": len(sets[name.split(", ")[1]]),
            "fill": fill(sets[name.split(", ")[1]]),
            "seconds": time["seconds"],
            "cpu seconds": time["processor_seconds"],
        }
        for name, time in times.items()
    ]
    source, target = (np.mean(x) for x in zip(*(fill_rate(b) for b in sets["packed"]), strict=True))
    setting = {
        "model": "tiny (smoke test)" if options.quick else "t5_1_1_small",
        "examples": f"{len(examples)}, {count} tokens; packed rows are {source:.0%} full at the source, {target:.0%} "
        "at the target",
        "loss": ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()),
        **environment("jax", "jaxlib", "torch", "transformers", "numpy"),
    }
    report("Packing", setting, table, options.json)
    if options.quick:
        return
    ratios = {row["pass"]: row["packed is x"] for row in table}
    checks = {"ours, padded": 0.9 / fill(sets["padded"]), "Hugging Face, length buckets": 1.15}
    for name, least in checks.items():
        met = "met" if ratios[name] >= least else "MISSED"
        print(f"packed over {name}: {ratios[name]:.2f}x, target >= {least:.2f}: {met}")


if __name__ == "__main__":
    main()
