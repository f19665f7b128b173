"""Tokens per second that the quickstart's data gives a core, packed or not, against plain SeqIO on the same tasks.

    python bench/input_pipeline.py [--quick] [--tasks 64] [--batches 40] [--json results/input_pipeline.json]

Batches of 32 rows of 512 source and 114 target tokens from the mixture `quickstart` with the shipped vocabulary: text
is cleaned, tokenised, noised, packed. Counted are tokens that are not padding, source and target; "a core" divides by
the processor seconds of all threads. The peer is `seqio.get_dataset` with SeqIO's own feature converter and packing. It
opens one pipeline a task, which for all tasks of the mixture takes minutes, and more to fill their shuffle buffers: so
both are compared on the tasks that are drawn most, and SeqIO does not shuffle.

--quick: three tasks, to see that everything runs; its numbers say nothing.
"""

import argparse
import gc
import time
from collections.abc import Iterator

from timing import environment, measure, pin_threads, report

pin_threads(2)

import numpy as np  # noqa: E402

from mlm.data.pipeline import BatchIterator, DataConfig  # noqa: E402
from mlm.data.recipes import with_vocabulary  # noqa: E402
from mlm.data.registration import load_tasks, mixture_rates, register_mixture  # noqa: E402
from mlm.data.tensorflow import seqio  # noqa: E402

ROWS, SOURCE, TARGET = 32, 512, 114
PEAK_DEMAND = 2.3e6  # tokens/s that T5 small eats on one H200 at 40 % of its peak (derived)
Batches = Iterator[dict[str, np.ndarray]]


def ours(mixture: str, pack: bool) -> Batches:
    config = DataConfig(
        mixture=mixture,
        vocabulary="quickstart",
        inputs_length=SOURCE,
        targets_length=TARGET,
        batch_size=ROWS,
        pack=pack,
    )
    return BatchIterator(config)


def plain_seqio(mixture: str, pack: bool) -> Batches:
    """`seqio.get_dataset`, endless, with the run's vocabulary in place of the tasks' default."""
    vocabulary = DataConfig(
        mixture=mixture, vocabulary="quickstart", inputs_length=SOURCE, targets_length=TARGET, batch_size=ROWS
    ).load_vocabulary()
    rates = {}
    for name, rate in mixture_rates(mixture).items():
        task = with_vocabulary(seqio.TaskRegistry.get(name), vocabulary)
        copy = f"seqio_peer.{name}"
        if copy not in seqio.TaskRegistry.names():
            task = task.replace(name=copy)
            seqio.TaskRegistry.add_provider(copy, task)
        rates[copy] = rate
    name = f"seqio_peer_{mixture}"
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, list(rates.items()))
    dataset = seqio.get_dataset(
        name,
        {"inputs": SOURCE, "targets": TARGET},
        dataset_split="train",
        shuffle=False,
        num_epochs=None,
        feature_converter=seqio.EncDecFeatureConverter(pack=pack),
        seed=0,
        batch_size=ROWS,
    )
    return dataset.as_numpy_iterator()


def tokens(batch: dict[str, np.ndarray]) -> int:
    return int((batch["encoder_input_tokens"] != 0).sum() + (batch["decoder_target_tokens"] != 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three tasks: a smoke test")
    parser.add_argument("--tasks", type=int, default=64, help="tasks on which both are compared")
    parser.add_argument("--batches", type=int, default=40, help="batches taken in each sample")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each pipeline")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    load_tasks()
    rates = mixture_rates("quickstart")
    most = sorted(rates, key=rates.__getitem__, reverse=True)[: 3 if options.quick else options.tasks]
    some = register_mixture("quickstart_most", [(name, rates[name]) for name in most])
    peers = {
        "ours, packed": (ours, some, True),
        "ours, one example a row": (ours, some, False),
        "SeqIO, packed": (plain_seqio, some, True),
        "SeqIO, one example a row": (plain_seqio, some, False),
    }
    if not options.quick:
        peers["ours, packed, every task"] = (ours, "quickstart", True)
    table = []
    for name, (make, mixture, pack) in peers.items():
        # One after the other: a pipeline that waits for its turn would fill its buffers meanwhile.
        start = time.perf_counter()
        batches = make(mixture, pack)
        next(batches)
        first = time.perf_counter() - start
        counts = []

        def take(batches=batches, counts=counts):
            counts.append(sum(tokens(next(batches)) for _ in range(options.batches)))

        seconds = measure({name: take}, options.repeats)[name]
        del batches, take
        gc.collect()
        seen = float(np.median(counts[1:]))  # the first was to warm up
        table.append(
            {
                "pipeline": name,
                "tasks": len(mixture_rates(mixture)),
                "tokens/s": round(seen / seconds["seconds"]),
                "tokens/s a core": round(seen / seconds["processor_seconds"]),
                "fill": seen / (options.batches * ROWS * (SOURCE + TARGET)),
                "first batch s": first,
            }
        )
    setting = {
        "batches": f"{options.batches} a sample, of {ROWS} x ({SOURCE} + {TARGET}) tokens",
        **environment("tensorflow", "seqio", "sentencepiece", "numpy"),
    }
    report("Input pipeline", setting, table, options.json)
    speed = {row["pipeline"]: row["tokens/s a core"] for row in table}
    for kind in ("packed", "one example a row"):
        print(f"ours over SeqIO, {kind}: {speed[f'ours, {kind}'] / speed[f'SeqIO, {kind}']:.1f}x a core")
    whole = list(speed)[0 if options.quick else -1]
    print(f"cores that feed T5 small on one H200 (2.3M tokens/s): {PEAK_DEMAND / speed[whole]:.1f}")


if __name__ == "__main__":
    main()
