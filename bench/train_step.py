"""One training step of T5 1.1 small on the CPU: sequences per second against Hugging Face and a plain JAX port.

    python bench/train_step.py [--flax DIR] [--kinds] [--quick] [--repeats 5] [--json results/train_step.json]

4 rows of 512 source and 114 target tokens, float32, no dropout, AdamW, 2 threads. Every peer is alone in a process,
starts from the same weights, sees the same batch and must give the same loss for three steps (1e-4) before anything is
timed; the peer in bfloat16 autocast is excused, and so is nobody else. "model GF/s" counts what the mathematics needs
(mlm.models.flops); "of peak" divides it by the fastest float32 matrix product of either library in this run.
"dispatch" is the time for which a step of the tiny model keeps Python, while the step itself runs behind it.

--flax DIR: Hugging Face's Flax T5 too, from a folder made by `pip install --target DIR transformers==4.57.6`, the last
release that has it. --kinds: our own members instead, at equal FLOPs a token: dense against Switch-style sparse (8
experts in every second layer), and the merged attention of T5Gemma 2 against a separate self- and cross-attention of
the same heads. --quick: the tiny model and short rows, to see that everything runs; its numbers say nothing.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from timing import Peer, environment, huge_pages, measure, pin_threads, report

huge_pages()
THREADS = pin_threads(2)

import flax_t5  # noqa: E402
import hugging_face  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import plain_port  # noqa: E402

from mlm.data.batching import Example, Packer  # noqa: E402
from mlm.models.config import ModelConfig  # noqa: E402
from mlm.models.families import gemma_3, sparse  # noqa: E402
from mlm.models.flops import training_flops  # noqa: E402
from mlm.models.presets import preset  # noqa: E402
from mlm.models.specs import NO_POSITION, LayerSpec, RouterSpec  # noqa: E402
from mlm.models.transformer import Transformer  # noqa: E402
from mlm.parallel import MeshConfig, global_batch, make_mesh  # noqa: E402
from mlm.training.optimizers import make_optimizer  # noqa: E402
from mlm.training.trainer import TrainConfig, Trainer  # noqa: E402
from mlm.trees import count  # noqa: E402

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
DISPATCH_TARGET = 2e-3  # seconds
TORCH_FLOAT32 = ("Hugging Face, sdpa", "Hugging Face, eager", "Hugging Face, torch.compile")
NAIVE = ("plain JAX port", "Hugging Face, Flax")
Batch = dict[str, np.ndarray]
Step = Callable[[], float]  # -> mean loss per target token before the update, nats


def random_batch(config: ModelConfig, rows: int, source: int, target: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens: no padding, one example a row."""
    random = np.random.default_rng(0)
    packer = Packer(source, target, pack=False)
    targets = random.integers(3, config.vocab_size, (rows, target), dtype=np.int32)
    sources = random.integers(3, config.vocab_size, (rows, source), dtype=np.int32)
    for row in zip(sources, targets, strict=True):
        packer.add(Example(*row, language=1, task=1, inputs_language=1))
    return packer.take(rows)


# What a peer's process makes: (step, seconds it took to compile, or None).


def ours(config: ModelConfig, batch: Batch) -> tuple[Step, float]:
    trainer = make_trainer(config)
    placed = global_batch(batch, trainer.mesh)

    def loss(metrics):
        return metrics["loss"][0] / metrics["loss"][1]

    return carrying(trainer.step, trainer.init(), placed, loss)


def jax_peer(config: ModelConfig, batch: Batch, flax: str | None = None) -> tuple[Step, float]:
    """The plain port, or Hugging Face's Flax T5 from the folder `flax`, each with optax's AdamW."""
    params = make_trainer(config).init().params
    if flax:
        flax_t5.load(flax)
        mine, loss = flax_t5.t5(config, jax.device_get(params))
    else:
        mine = plain_port.parameters(config, jax.device_get(params))
        loss = partial(plain_port.loss, heads=config.encoder.attentions()[0].heads)
    del params
    decayed = jax.tree.map(lambda x: x.ndim > 1, mine)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed)

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return carrying(step, (mine, jax.jit(optimizer.init)(mine)), jax.device_put(batch), lambda value: value)


def torch_peer(config: ModelConfig, batch: Batch, attention: str, options: dict[str, bool]) -> tuple[Step, None]:
    params = jax.device_get(make_trainer(config).init().params)
    model = hugging_face.t5(config, params, attention, THREADS)
    step = hugging_face.training_step(model, hugging_face.adamw(model, LEARNING_RATE, WEIGHT_DECAY), **options)
    return partial(step, batch), None


def make_trainer(config: ModelConfig) -> Trainer:
    optimizer = make_optimizer("adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Trainer(config, TrainConfig(steps=1, z_loss=0.0), optimizer, make_mesh(MeshConfig()), languages=8)


def carrying(step: Callable, state: Any, batch: Any, loss: Callable) -> tuple[Step, float]:
    """A compiled step (state, batch) -> (state, metrics) that carries its state along."""
    carried = {"state": state}
    start = time.perf_counter()
    program = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    del state

    def call():
        carried["state"], metrics = program(carried["state"], batch)
        jax.block_until_ready(carried["state"])
        return float(loss(metrics))

    return call, seconds


def dispatch(repeats: int = 100) -> tuple[Callable[[], float], None]:
    """A call that gives the median seconds in which the tiny model's step returns, the device idle before each."""

    def call():
        trainer = make_trainer(preset("tiny", scan=False))
        batch = jax.device_put(random_batch(preset("tiny"), 1, 8, 8))
        state, _ = trainer.step(trainer.init(), batch)
        samples = []
        for _ in range(repeats):
            jax.block_until_ready(state)
            start = time.perf_counter()
            state, _ = trainer.step(state, batch)
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    return call, None


def large_product(library: str, size: int = 2048) -> tuple[Callable[[], None], float]:
    """One float32 matrix product and its FLOPs."""
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    if library == "torch":
        import torch

        torch.set_num_threads(THREADS)
        tensor = torch.from_numpy(matrix)

        def call():
            tensor @ tensor
    else:
        array, product = jnp.asarray(matrix), jax.jit(jnp.matmul)

        def call():
            product(array, array).block_until_ready()

    return call, 2 * size**3


def start_peers(config: ModelConfig, batch: Batch, flax: str | None) -> dict[str, Peer]:
    unrolled, scanned = (
        replace(config, encoder=replace(config.encoder, scan=scan), decoder=replace(config.decoder, scan=scan))
        for scan in (False, True)
    )
    peers = {
        "ours": Peer(ours, unrolled, batch),
        "ours, scanned layers": Peer(ours, scanned, batch),
        "plain JAX port": Peer(jax_peer, unrolled, batch),
    }
    if flax:
        peers["Hugging Face, Flax"] = Peer(jax_peer, unrolled, batch, flax)
    peers["Hugging Face, sdpa"] = Peer(torch_peer, unrolled, batch, "sdpa", {})
    peers["Hugging Face, eager"] = Peer(torch_peer, unrolled, batch, "eager", {})
    if shutil.which("g++"):
        peers["Hugging Face, torch.compile"] = Peer(torch_peer, unrolled, batch, "sdpa", {"compiled": True})
    peers["Hugging Face, bf16 autocast"] = Peer(torch_peer, unrolled, batch, "sdpa", {"bfloat16": True})
    return peers


def check_equal(peers: dict[str, Peer]) -> list[float]:
    """Losses of three steps, which every float32 peer must share to 1e-4. Raises ValueError where one does not."""
    losses = {name: [step() for _ in range(3)] for name, step in peers.items()}
    expected = losses["ours"]
    for name, values in losses.items():
        if not np.allclose(values, expected, rtol=2e-2 if "bf16" in name else 1e-4):
            raise ValueError(f"{name} computes something else: losses {values}, ours {expected}; nothing was timed")
    return expected


def kinds() -> dict[str, ModelConfig]:
    """Members of about the same work a token, unrolled."""
    dense = preset("t5_1_1_small", scan=False)
    merged = gemma_3(
        d_model=512,
        d_ff=1024,
        heads=8,
        kv_heads=2,
        head_dim=64,
        layers=6,
        window=128,
        factor=1.0,
        encoder=True,
        vocab_size=dense.vocab_size,
    )
    stacks = {name: replace(stack, scan=False) for name, stack in merged.stacks().items()}
    merged = replace(merged, **stacks)

    def apart(layer: LayerSpec) -> LayerSpec:
        joint, ffn = layer.sublayers
        own = replace(joint, source="self")
        return LayerSpec(sublayers=(own, replace(own, source="cross", window=None, position=NO_POSITION), ffn))

    separate = replace(merged.decoder, group=tuple(map(apart, merged.decoder.group)))
    return {
        "T5 1.1 small, dense": dense,
        "sparse, dropless": sparse(dense, RouterSpec(experts=8), every=2),
        "sparse, capacity 1.25": sparse(dense, RouterSpec(experts=8, capacity=1.25), every=2),
        "T5Gemma 2, merged attention": merged,
        "T5Gemma 2, separate attention": replace(merged, decoder=separate),
    }


def compare_kinds(rows: int, source: int, target: int, repeats: int, path: str | None) -> None:
    """Seconds of a step of every kind; the two groups begin with what the others are compared to."""
    configs = kinds()
    peers = {name: Peer(ours, config, random_batch(config, rows, source, target)) for name, config in configs.items()}
    times, table, first = measure(peers, repeats), [], 0.0
    for name, config in configs.items():
        flops, seconds = training_flops(config, rows, source, target), times[name]["seconds"]
        first = seconds if name.endswith(("dense", "merged attention")) else first
        table.append(
            {
                "kind": name,
                "parameters, M": count(Transformer(config).shapes()) / 1e6,
                "GFLOP": flops / 1e9,
                "seconds": seconds,
                "cpu seconds": times[name]["processor_seconds"],
                "x the first": seconds / first,
                "model GF/s": flops / seconds / 1e9,
            }
        )
    setting = {"batch": f"{rows} x ({source} + {target}) tokens, float32, AdamW", **environment("jax", "optax")}
    report("One training step, by kind of member", setting, table, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flax", metavar="DIR", help="folder with transformers 4.57.6, for its Flax T5")
    parser.add_argument("--kinds", action="store_true", help="dense against sparse, merged against separate attention")
    parser.add_argument("--quick", action="store_true", help="tiny model, short rows: a smoke test")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each peer")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    config, rows, source, target = preset("t5_1_1_small"), 4, 512, 114
    if options.quick:
        config, rows, source, target = preset("tiny"), 2, 64, 16

    if options.kinds:
        compare_kinds(rows, source, target, options.repeats, options.json)
        return

    batch = random_batch(config, rows, source, target)
    peers = start_peers(config, batch, options.flax)
    losses = check_equal(peers)
    times = measure(peers, options.repeats)
    products = {library: Peer(large_product, library) for library in ("jax", "torch")}
    peak = {
        library: products[library].facts / time["seconds"]
        for library, time in measure(products, options.repeats).items()
    }
    dispatch_seconds = Peer(dispatch)()

    flops = training_flops(config, rows, source, target)
    best = max(peak.values())
    mine = times["ours"]["seconds"]
    table = [
        {
            "step": name,
            "seq/s": rows / time["seconds"],
            "seconds": time["seconds"],
            "cpu seconds": time["processor_seconds"],
            "ours is x": time["seconds"] / mine,
            "model GF/s": flops / time["seconds"] / 1e9,
            "of peak": flops / time["seconds"] / best,
            "compile s": peers[name].facts,
        }
        for name, time in times.items()
    ]
    setting = {
        "model": f"{'tiny (smoke test)' if options.quick else 't5_1_1_small'}, {rows} x ({source} + {target}) tokens, "
        f"{flops / rows:.3g} FLOP a sequence",
        "losses of three steps": ", ".join(f"{loss:.5f}" for loss in losses),
        "peak, GF/s": ", ".join(f"{name} {value / 1e9:.0f}" for name, value in peak.items()),
        "dispatch of tiny, ms": f"{dispatch_seconds * 1e3:.2f}",
        **environment("jax", "jaxlib", "optax", "torch", "transformers", "numpy"),
    }
    report("One training step", setting, table, options.json)
    if options.quick:
        return
    best_float32 = min(t["seconds"] for name, t in times.items() if name in TORCH_FLOAT32)
    checks = {
        "x best Hugging Face float32": (best_float32 / mine, 1.0),
        **{f"x {name}": (times[name]["seconds"] / mine, 1.4) for name in NAIVE if name in times},
        "dispatch limit / dispatch": (DISPATCH_TARGET / dispatch_seconds, 1.0),
    }
    for name, (value, least) in checks.items():
        print(f"{name}: {value:.2f}, target >= {least}: {'met' if value >= least else 'MISSED'}")


if __name__ == "__main__":
    main()
