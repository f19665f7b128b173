"""Layers as int8 or int4 against float32: what it costs in quality, what it saves in memory, what it does to speed.

    python bench/quantisation.py [--run_dir runs/quickstart] [--examples 2] [--repeats 5] [--quick] [--json FILE]

Quality, of a trained run (`make run` makes runs/quickstart): bits per byte of held-out text over all tasks of its
mixture, and the share of target positions where the most probable token is float32's. Speed: T5 1.1 small, random
weights, 64 source tokens, 64 new tokens, greedy, 2 threads; each kind alone in a process. "layers MB" counts the
matrices of the layers, "model MB" all parameters. --quick: a tiny model; its numbers say nothing.
"""

import argparse
from functools import partial
from pathlib import Path

from timing import Peer, environment, huge_pages, measure, pin_threads, report

KINDS = (None, "int8", "int4")
BATCHES = (1, 8)  # of decoding
ROWS = 16  # of packed held-out text


def quality(run_dir, kind, examples):
    """A call that gives (bits per byte, the most probable token at every target position) of held-out text."""
    pin_threads(2)
    import jax
    import numpy as np

    import mlm
    from mlm.data.evaluator import packed_batches, read_examples
    from mlm.data.recipes import Lengths

    session = mlm.load(run_dir, quantise=kind)
    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    found = read_examples(session.tasks(), session.vocabulary, lengths, "validation", examples)
    batches = list(packed_batches((example for _, of_task in found for example in of_task), lengths, ROWS))

    @jax.jit
    def best(params, batch):
        return session.model.logits(params, session.model(params, batch).hidden).argmax(-1)

    def call():
        tokens = [np.asarray(best(session.params, b))[b["decoder_loss_weights"] > 0] for b in batches]
        return float(session.language_losses(batches).total().bits_per_byte[0]), np.concatenate(tokens)

    return call, megabytes(session.params)


def speed(name, kind, batch):
    pin_threads(2)
    import jax
    import numpy as np

    from mlm.decoding.config import DecodeConfig
    from mlm.decoding.generate import Generator
    from mlm.models.presets import preset
    from mlm.models.quantisation import quantised
    from mlm.models.transformer import Transformer

    model = Transformer(preset(name))
    params = jax.jit(model.init)(jax.random.key(0))
    if kind:
        params = jax.jit(partial(quantised, kind=kind))(params)
    sources = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch, 64))
    generator = Generator(model, DecodeConfig(max_length=64, min_length=64))
    generator(params, sources)
    return lambda: generator(params, sources) and None, megabytes(params)


def megabytes(params):
    """(of the stacked matrices of the layers, of everything)."""
    import jax

    from mlm.trees import named_leaves

    sizes = {name: leaf.nbytes / 1e6 for name, leaf in named_leaves(params)}
    layers = sum(size for name, size in sizes.items() if name.startswith(("encoder/", "decoder/")))
    return layers, sum(leaf.nbytes / 1e6 for leaf in jax.tree.leaves(params))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run_dir", default="runs/quickstart")
    parser.add_argument("--examples", type=int, default=2, help="of every task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = []
    name = "tiny" if options.quick else "t5_1_1_small"
    peers = {(kind, batch): Peer(speed, name, kind, batch) for batch in BATCHES for kind in KINDS}
    times = measure(peers, options.repeats)
    for kind in KINDS:
        layers, whole = peers[kind, 1].facts
        rates = {f"tokens/s, batch {b}": 64 * b / times[kind, b]["seconds"] for b in BATCHES}
        rows.append({"layers": kind or "float32", "layers MB": layers, "model MB": whole, **rates})
    report(f"Decoding {name}", environment("jax"), rows, options.json)
    del peers
    if not Path(options.run_dir).is_dir():
        print(f"\nno {options.run_dir}: quality not measured; `make run` trains it")
        return
    rows, reference = [], None
    for kind in KINDS:
        peer = Peer(quality, options.run_dir, kind, options.examples)
        bits, best = peer()
        reference = best if reference is None else reference
        same = float((best == reference).mean())
        rows.append(
            {"layers": kind or "float32", "bits per byte": bits, "same best token": same, "layers MB": peer.facts[0]}
        )
    path = options.json and str(Path(options.json).with_stem(Path(options.json).stem + "_quality"))
    report(f"Quality of {options.run_dir}", {"examples of a task": options.examples}, rows, path)


if __name__ == "__main__":
    huge_pages()
    main()
