"""One training step of T5 1.1 small on the CPU: sequences per second against Hugging Face and a plain JAX port.

    python bench/train_step.py [--quick] [--repeats 5] [--json results/train_step.json]

4 rows of 512 source and 114 target tokens, float32, no dropout, AdamW, 2 threads. Every peer starts from the same
weights, sees the same batch and must give the same loss for three steps (1e-4) before anything is timed; the peer in
bfloat16 autocast is excused, and so is nobody else. "model GF/s" counts what the mathematics needs
(mlm.models.flops); "of peak" divides it by the fastest float32 matrix product of either library in this run.
"dispatch" is the time for which a step of the tiny model keeps Python, while the step itself runs behind it.

--quick: the tiny model and short rows, to see that everything runs; its numbers say nothing.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from timing import environment, huge_pages, measure, pin_threads, report

huge_pages()
THREADS = pin_threads(2)

import hugging_face  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from mlm.models.config import ModelConfig  # noqa: E402
from mlm.models.flops import training_flops  # noqa: E402
from mlm.models.presets import preset  # noqa: E402
from mlm.parallel import MeshConfig, global_batch, make_mesh  # noqa: E402
from mlm.training.optimizers import make_optimizer  # noqa: E402
from mlm.training.trainer import TrainConfig, Trainer  # noqa: E402

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
DISPATCH_TARGET = 2e-3  # seconds
Step = Callable[[dict[str, np.ndarray]], float]  # batch -> mean loss per target token, nats


def random_batch(config: ModelConfig, rows: int, source: int, target: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens: no padding, one example a row."""
    random = np.random.default_rng(0)
    batch = {}
    for side, length in (("encoder", source), ("decoder", target)):
        batch[f"{side}_segment_ids"] = np.ones((rows, length), np.int32)
        batch[f"{side}_language_ids"] = np.ones((rows, length), np.int32)
        batch[f"{side}_positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    targets = random.integers(3, config.vocab_size, (rows, target), dtype=np.int32)
    return {
        **batch,
        "encoder_input_tokens": random.integers(3, config.vocab_size, (rows, source), dtype=np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((rows, target), np.float32),
        "decoder_task_ids": np.ones((rows, target), np.int32),
    }


def make_trainer(config: ModelConfig) -> Trainer:
    optimizer = make_optimizer("adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Trainer(config, TrainConfig(steps=1, z_loss=0.0), optimizer, make_mesh(MeshConfig()), languages=8)


def compiled(step: Callable, state: Any, batch: dict[str, np.ndarray]) -> tuple[Step, float]:
    """A step (state, batch) -> (state, loss) as a Step that carries its state along, and its compile seconds."""
    carried = {"state": state}
    start = time.perf_counter()
    program = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start

    def call(batch):
        carried["state"], loss = program(carried["state"], batch)
        jax.block_until_ready(carried["state"])
        return float(loss)

    return call, seconds


def our_step(config: ModelConfig, batch: dict[str, np.ndarray]) -> tuple[Step, float]:
    """The trainer's own program, as training runs it: inside another `jax.jit` XLA:CPU makes it twice as slow."""
    trainer = make_trainer(config)
    carried, placed = {"state": trainer.init()}, global_batch(batch, trainer.mesh)
    start = time.perf_counter()
    program = trainer.step.lower(carried["state"], placed).compile()
    seconds = time.perf_counter() - start

    def call(batch):
        carried["state"], metrics = program(carried["state"], placed)
        jax.block_until_ready(carried["state"])
        return float(metrics["loss"][0] / metrics["loss"][1])

    return call, seconds


# The plain port: what one writes after reading a PyTorch model. A list of layers, dense matrices, the position bias
# computed in every layer, whole logits, one-hot cross-entropy as T5X has it.


def port_parameters(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    def stack(tree, count):
        layers = []
        for i in range(count):
            layer = {}
            for name, body in tree["layers"]["0"].items():
                weights = {k: jnp.array(v[i]) for k, v in body.items() if k != "norm"}
                if "query" in weights:
                    out = weights.pop("out")
                    weights = {k: w.reshape(w.shape[0], -1) for k, w in weights.items()}
                    weights["out"] = out.reshape(-1, out.shape[-1])
                layer[name] = {**weights, "norm": jnp.array(body["norm"]["scale"][i])}
            layers.append(layer)
        return {
            "layers": layers,
            "position": jnp.array(tree["position"]),
            "norm": jnp.array(tree["final_norm"]["scale"]),
        }

    return {
        "embedding": jnp.array(params["embedding"]),
        "head": jnp.array(params["head"]),
        "encoder": stack(params["encoder"], config.encoder.repeats),
        "decoder": stack(params["decoder"], config.decoder.repeats),
    }


def port_loss(params: dict[str, Any], batch: dict[str, np.ndarray], heads: int) -> jax.Array:
    def norm(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def bias(table, queries, keys, causal):
        distance = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
        buckets, n = table.shape[1], -distance
        first = 0
        if causal:
            n = jnp.maximum(n, 0)
        else:
            buckets //= 2
            first = jnp.where(n < 0, buckets, 0)
            n = jnp.abs(n)
        exact = buckets // 2
        far = exact + (jnp.log(n / exact + np.finfo(np.float32).eps) / np.log(128 / exact) * (buckets - exact)).astype(
            int
        )
        bucket = first + jnp.where(n < exact, n, jnp.minimum(far, buckets - 1))
        return table.T[bucket].transpose(2, 0, 1)[None]

    def attention(p, x, memory, mask, position_bias):
        def split(y):
            return y.reshape(*y.shape[:2], heads, -1)

        q, k, v = split(x @ p["query"]), split(memory @ p["key"]), split(memory @ p["value"])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) + position_bias + jnp.where(mask, 0.0, -1e10)
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return attended.reshape(*x.shape[:2], -1) @ p["out"]

    def stack(p, tokens, mask, causal, memory=None, memory_mask=None):
        x = params["embedding"][tokens]
        for layer in p["layers"]:
            own = layer["self_attention"]
            h = norm(x, own["norm"])
            x += attention(own, h, h, mask, bias(p["position"], x.shape[1], x.shape[1], causal))
            if memory is not None:
                cross = layer["cross_attention"]
                x += attention(cross, norm(x, cross["norm"]), memory, memory_mask, 0.0)
            ffn = layer["ffn"]
            h = norm(x, ffn["norm"])
            x += (jax.nn.gelu(h @ ffn["gate"]) * (h @ ffn["up"])) @ ffn["down"]
        return norm(x, p["norm"])

    source, target = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    seen = (batch["encoder_segment_ids"] > 0)[:, None, None, :]
    past = jnp.tril(jnp.ones((target.shape[1],) * 2, bool))[None, None]
    encoded = stack(params["encoder"], source, seen, False)
    hidden = stack(params["decoder"], target, past, True, encoded, seen)
    logits = hidden @ params["head"]
    labels = jax.nn.one_hot(batch["decoder_target_tokens"], logits.shape[-1])
    nll = -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    weights = batch["decoder_loss_weights"]
    return jnp.sum(nll * weights) / jnp.sum(weights)


def port_step(config: ModelConfig, params: dict[str, Any], batch: dict[str, np.ndarray]) -> tuple[Step, float]:
    mine = port_parameters(config, params)
    decayed = jax.tree.map(lambda x: x.ndim > 1, mine)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed)

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, moments = state
        loss, gradients = jax.value_and_grad(port_loss)(params, batch, config.encoder.heads)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return compiled(step, (mine, jax.jit(optimizer.init)(mine)), batch)


def dispatch_seconds(repeats: int = 100) -> float:
    """Median time in which a call of the tiny model's step returns, the device idle before each call."""
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


def peak_flops(repeats: int = 7) -> dict[str, float]:
    """FLOP/s of a large float32 matrix product, JAX and PyTorch."""
    import torch

    size = 2048
    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    ours, theirs = jnp.asarray(a), torch.from_numpy(a)
    product = jax.jit(jnp.matmul)
    calls = {"jax": lambda: product(ours, ours).block_until_ready(), "torch": lambda: theirs @ theirs}
    return {name: 2 * size**3 / time["seconds"] for name, time in measure(calls, repeats).items()}


def peers(config: ModelConfig, batch: dict[str, np.ndarray]) -> tuple[dict[str, Step], dict[str, float]]:
    """name -> step, and compile seconds of those that compile."""
    unrolled, scanned = (
        replace(config, encoder=replace(config.encoder, scan=scan), decoder=replace(config.decoder, scan=scan))
        for scan in (False, True)
    )
    params = jax.device_get(make_trainer(unrolled).init().params)
    steps, seconds = {}, {}
    on_device = jax.device_put(batch)

    def add(name, made):
        step, seconds[name] = made
        steps[name] = lambda _: step(on_device)

    add("ours", our_step(unrolled, on_device))
    add("ours, scanned layers", our_step(scanned, on_device))
    add("plain JAX port", port_step(unrolled, params, on_device))

    def torch_step(attention, **options):
        model = hugging_face.t5(config, params, attention, THREADS)
        return hugging_face.training_step(model, hugging_face.adamw(model, LEARNING_RATE, WEIGHT_DECAY), **options)

    steps["Hugging Face, sdpa"] = torch_step("sdpa")
    steps["Hugging Face, eager"] = torch_step("eager")
    if shutil.which("g++"):
        steps["Hugging Face, torch.compile"] = torch_step("sdpa", compiled=True)
    steps["Hugging Face, bf16 autocast"] = torch_step("sdpa", bfloat16=True)
    return steps, seconds


def check_equal(steps: dict[str, Step], batch: dict[str, np.ndarray]) -> list[float]:
    """Losses of three steps, which every float32 peer must share to 1e-4. Raises ValueError where one does not."""
    losses = {name: [step(batch) for _ in range(3)] for name, step in steps.items()}
    expected = losses["ours"]
    for name, values in losses.items():
        if not np.allclose(values, expected, rtol=2e-2 if "bf16" in name else 1e-4):
            raise ValueError(f"{name} computes something else: losses {values}, ours {expected}; nothing was timed")
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, short rows: a smoke test")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each peer")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    config, rows, source, target = preset("t5_1_1_small"), 4, 512, 114
    if options.quick:
        config, rows, source, target = preset("tiny"), 2, 64, 16

    batch = random_batch(config, rows, source, target)
    steps, compile_seconds = peers(config, batch)
    losses = check_equal(steps, batch)
    peak = peak_flops()
    times = measure({name: partial(step, batch) for name, step in steps.items()}, options.repeats)
    dispatch = dispatch_seconds()

    flops = training_flops(config, rows, source, target)
    best = max(peak.values())
    ours = times["ours"]["seconds"]
    table = [
        {
            "step": name,
            "seq/s": rows / time["seconds"],
            "seconds": time["seconds"],
            "cpu seconds": time["processor_seconds"],
            "ours is x": time["seconds"] / ours,
            "model GF/s": flops / time["seconds"] / 1e9,
            "of peak": flops / time["seconds"] / best,
            "compile s": compile_seconds.get(name),
        }
        for name, time in times.items()
    ]
    setting = {
        "model": f"{'tiny (smoke test)' if options.quick else 't5_1_1_small'}, {rows} x ({source} + {target}) tokens, "
        f"{flops / rows:.3g} FLOP a sequence",
        "losses of three steps": ", ".join(f"{loss:.5f}" for loss in losses),
        "peak, GF/s": ", ".join(f"{name} {value / 1e9:.0f}" for name, value in peak.items()),
        "dispatch of tiny, ms": f"{dispatch * 1e3:.2f}",
        **environment("jax", "jaxlib", "optax", "torch", "transformers", "numpy"),
    }
    report("One training step", setting, table, options.json)
    if options.quick:
        return
    best_float32 = min(t["seconds"] for name, t in times.items() if name.startswith("Hugging") and "bf16" not in name)
    checks = {
        "x best Hugging Face float32": (best_float32 / ours, 1.0),
        "x plain JAX port": (times["plain JAX port"]["seconds"] / ours, 1.4),
        "dispatch limit / dispatch": (DISPATCH_TARGET / dispatch, 1.0),
    }
    for name, (value, least) in checks.items():
        print(f"{name}: {value:.2f}, target >= {least}: {'met' if value >= least else 'MISSED'}")


if __name__ == "__main__":
    main()
