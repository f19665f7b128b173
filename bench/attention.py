"""T5's self-attention (bucket bias, packed examples) on the CPU: seconds and temporary memory against peers, by length.

    python bench/attention.py [--lengths 512 2048 8192] [--tokens 8192] [--repeats 5] [--quick] [--json FILE]

4 heads of 64, float32, 2 threads, the same number of tokens at every length; "gradients" are those of queries, keys,
values and the table of biases. Every peer is alone in a process and must give plain attention's values and gradients
(1e-4 of the largest entry) before anything is timed. "temporary MB" is what XLA plans beyond inputs and results; for
PyTorch, by how much the process grew at its peak. flex_attention has no gradients on a CPU and needs a C++ compiler.
On an accelerator: not run. --quick: short rows, to see that everything runs; the numbers say nothing.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from timing import Peer, environment, huge_pages, measure, pin_threads, report

huge_pages()
THREADS = pin_threads(2)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mlm.models.attention import Keys, attend  # noqa: E402
from mlm.models.blockwise import attend_blockwise  # noqa: E402
from mlm.models.positions import relative_bucket  # noqa: E402
from mlm.models.sight import Sight  # noqa: E402
from mlm.models.specs import PositionSpec  # noqa: E402

H, K = 4, 64
BUCKETS = PositionSpec()
TARGETS = {"x plain": 1 / 1.5, "memory": 0.25}  # of blockwise with gradients, from 2,048 tokens on


def problem(length, tokens):
    """Queries, keys, values, table, segments of a few examples a row, and the gradient of the result."""
    random = np.random.default_rng(0)
    shape = (tokens // length, H, length, K)
    q, k, v, g = (random.normal(size=shape).astype(np.float32) for _ in range(4))
    cuts = np.sort(random.integers(1, length, (shape[0], 3)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    table = random.normal(size=(H, BUCKETS.buckets)).astype(np.float32)
    return q * K**-0.5, k, v, table, segments.astype(np.int32), g


def buckets(length, causal):
    """The bucket of every distance, from -(length - 1) to length - 1."""
    distances = jnp.arange(-length + 1, length)
    found = relative_bucket(distances, bidirectional=not causal, buckets=BUCKETS.buckets, max_distance=128)
    return np.asarray(found)


# What a peer's process makes: (call, (values or gradients, temporary megabytes)).


def ours(path, length, tokens, causal, backward):
    attention = {"plain": attend, "blockwise": attend_blockwise}[path]

    def values(q, k, v, table, segments):
        sight = Sight(
            shape=(length, length),
            causal=causal,
            segments=(segments, segments),
            position=BUCKETS,
            heads=H,
            table=table,
        )
        return attention(q, [Keys(k, v, sight)])

    return jax_call(values, length, tokens, backward)


def jax_nn(length, tokens, causal, backward):
    at = np.arange(length)
    bucket = buckets(length, causal)[at[None, :] - at[:, None] + length - 1]
    order = at[None, :] <= at[:, None] if causal else np.ones((length, length), bool)

    def values(q, k, v, table, segments):
        mask = order & (segments[:, :, None] == segments[:, None, :])
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        bias = table[:, bucket][None]
        out = jax.nn.dot_product_attention(q, k, v, bias, mask[:, None], scale=1.0, implementation="xla")
        return jnp.swapaxes(out, 1, 2)

    return jax_call(values, length, tokens, backward)


def jax_call(values, length, tokens, backward):
    *arrays, g = map(jnp.asarray, problem(length, tokens))

    def gradients(q, k, v, table, segments):
        return jax.vjp(lambda *x: values(*x, segments), q, k, v, table)[1](g)

    program = jax.jit(gradients if backward else values).lower(*arrays).compile()

    def call():
        jax.block_until_ready(program(*arrays))

    result = jax.tree.leaves(jax.device_get(program(*arrays)))
    return call, (result, program.memory_analysis().temp_size_in_bytes / 1e6)


def torch_peer(kind, length, tokens, causal, backward):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.set_num_threads(THREADS)
    q, k, v, table, segments, g = map(torch.from_numpy, problem(length, tokens))
    bucket = torch.tensor(buckets(length, causal)).long()
    at = torch.arange(length)

    if kind == "sdpa":
        of_pair = bucket[at[None, :] - at[:, None] + length - 1]
        order = at[None, :] <= at[:, None] if causal else torch.ones(length, length, dtype=bool)

        def values():
            mask = order & (segments[:, None, :, None] == segments[:, None, None, :])
            bias = table[:, of_pair][None].masked_fill(~mask, float("-inf"))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    else:

        def biased(score, b, h, i, j):
            return score + table[h, bucket[j - i + length - 1]]

        def visible(b, h, i, j):
            return (segments[b, i] == segments[b, j]) & ((j <= i) | (not causal))

        compiled = torch.compile(flex_attention)

        def values():
            mask = create_block_mask(visible, q.shape[0], None, length, length, device="cpu")
            return compiled(q, k, v, score_mod=biased, block_mask=mask, scale=1.0)

    inputs = q, k, v, table

    def run():
        if not backward:
            with torch.no_grad():
                return [values()]
        for x in inputs:
            x.requires_grad_().grad = None
        values().backward(g)
        return [x.grad for x in inputs]

    def call():
        run()

    result = [x.detach().numpy().copy() for x in run()]
    return call, (result, peak_growth(call))


def peak_growth(call):
    """Megabytes by which a call's peak exceeds what this process held before it; None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # the peak is now what is held

    def kilobytes(name):
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1e3


def peers(length, tokens, causal, backward):
    case = length, tokens, causal, backward
    found = {
        "ours, plain": Peer(ours, "plain", *case),
        "ours, blockwise": Peer(ours, "blockwise", *case),
        "jax.nn, xla": Peer(jax_nn, *case),
    }
    if not importlib.util.find_spec("torch"):
        return found
    found["torch, sdpa"] = Peer(torch_peer, "sdpa", *case)
    if not backward and shutil.which("g++"):
        found["torch, flex_attention"] = Peer(torch_peer, "flex", *case)
    return found


def run(length, tokens, causal, backward, repeats):
    contenders = peers(length, tokens, causal, backward)
    truth = contenders["ours, plain"].facts[0]
    errors = {}
    for name, peer in contenders.items():
        pairs = zip(peer.facts[0], truth, strict=True)
        errors[name] = float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs))
        if not errors[name] <= 1e-4:
            raise ValueError(f"{name} differs from plain attention by {errors[name]:.1e} of the largest entry")
    times = measure(contenders, repeats)
    plain = contenders["ours, plain"].facts[1], times["ours, plain"]["seconds"]
    return [
        {
            "attention": name,
            "T": length,
            "order": "causal" if causal else "both ways",
            "pass": "gradients" if backward else "values",
            "seconds": times[name]["seconds"],
            "cpu seconds": times[name]["processor_seconds"],
            "x plain": times[name]["seconds"] / plain[1],
            "temporary MB": peer.facts[1],
            "memory": peer.facts[1] and peer.facts[1] / plain[0],
            "error": errors[name],
        }
        for name, peer in contenders.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of all rows together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.tokens, options.repeats = [64, 512], 512, 1
    rows = []
    for length in options.lengths:
        for causal in (False, True):
            for backward in (False, True):
                rows += run(length, options.tokens, causal, backward, options.repeats)
    setting = {"tokens": options.tokens, "heads": f"{H} x {K}", **environment("jax", "jaxlib", "torch", "numpy")}
    report("Self-attention with T5's bias, packed", setting, rows, options.json)
    far = [r for r in rows if r["attention"] == "ours, blockwise" and r["pass"] == "gradients" and r["T"] >= 2048]
    for key, target in TARGETS.items() if far else ():
        worst = max(row[key] for row in far)
        print(f"{key}: {worst:.3g}, target <= {target:.3g}: {'met' if worst <= target else 'MISSED'}")


if __name__ == "__main__":
    main()
