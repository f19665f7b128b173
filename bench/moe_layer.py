"""A mixture-of-experts layer: useful work per second and core, against the usual ways to run one.

    python bench/moe_layer.py [--experts 8 32 64] [--k 1 2] [--repeats 5] [--without ragged_dot] [--json FILE]

All of it takes about twenty minutes, most of them ragged_dot's and torch's.

One row of 2,048 tokens, width 512, experts of width 1,024 (ReLU), float32; the router is skewed on purpose. On a GPU
(--gpu): 64 rows of 1,024 tokens, width 2,048, 64 experts of width 1,408, bfloat16. Useful work is that of the experts
that serve a token, 4 k T D F operations forward and three times that forward and backward; "dense" is a network of
width k F on the same tokens, what the hardware gives when nothing is sorted. Every peer gives the same outputs and
gradients, checked first, but those that drop, whose share is shown. "temporary" is what XLA allocates for forward and
backward beside inputs and outputs. Each peer works alone in a process.
"""

import argparse
from functools import partial

from timing import Peer, environment, huge_pages, measure, pin_threads, report

CPU = {"rows": 1, "tokens": 2048, "width": 512, "hidden": 1024, "dtype": "float32"}
GPU = {"rows": 64, "tokens": 1024, "width": 2048, "hidden": 1408, "dtype": "bfloat16"}
SKEW = 1.0  # of the Dirichlet distribution that experts' shares come from


def problem(shape, experts, k):
    """(x, weights) as NumPy: inputs with a constant entry, and a router that reads it, so that it has favourites."""
    import numpy as np

    draw = np.random.default_rng(experts)
    d, f = shape["width"], shape["hidden"]
    x = draw.normal(size=(shape["rows"], shape["tokens"], d)).astype("f")
    x[..., 0] = 1.0
    router = draw.normal(size=(d, experts)).astype("f") * d**-0.5
    router[0] = np.log(draw.dirichlet(np.full(experts, SKEW)) + 1e-3)
    up = draw.normal(size=(experts, d, f)).astype("f") * d**-0.5
    down = draw.normal(size=(experts, f, d)).astype("f") * f**-0.5
    return x, {"router": router, "up": up, "down": down}


def our_layer(k, capacity=None):
    """The layer as models run it: router, dispatch, experts, record."""
    from mlm.models.experts import MixtureOfExperts
    from mlm.models.functional import Template
    from mlm.models.layers import Pass
    from mlm.models.specs import FFNSpec, RouterSpec

    def layer(weights, x):
        import jax.numpy as jnp

        experts, d, f = weights["up"].shape
        router = RouterSpec(experts=experts, k=k, capacity=capacity, eval_capacity=capacity)
        spec = FFNSpec(d_ff=f, activation="relu", router=router)
        template = Template(lambda rngs: MixtureOfExperts(d, spec, 1.0, rngs))
        y, record = template.bind(weights)(x, Pass(real=jnp.ones(x.shape[:2], bool)), None)
        return y, record.dropped / record.choices

    return layer


def ragged_layer(k):
    """Sorted pairs through `jax.lax.ragged_dot`, gradients as JAX derives them."""

    def layer(weights, x):
        import jax
        import jax.numpy as jnp

        flat = x.reshape(-1, x.shape[-1])
        probs = jax.nn.softmax(flat.astype(jnp.float32) @ weights["router"])
        gates, experts = jax.lax.top_k(probs, k)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=probs.shape[1])
        up, down = (weights[n].astype(x.dtype) for n in ("up", "down"))
        h = jax.nn.relu(jax.lax.ragged_dot(flat[order // k], up, sizes))
        y = jax.lax.ragged_dot(h, down, sizes) * gates.reshape(-1)[order, None].astype(x.dtype)
        return jnp.zeros_like(flat).at[order // k].add(y).reshape(x.shape), jnp.zeros(())

    return layer


def one_hot_layer(k, factor=1.25):
    """Dispatch and combine by products with one-hot tensors [tokens, E, C], as Flaxformer does."""

    def layer(weights, x):
        import jax
        import jax.numpy as jnp

        tokens, count = x.shape[1], weights["up"].shape[0]
        slots = max(4, round(factor * k * tokens / count))
        probs = jax.nn.softmax(x.astype(jnp.float32) @ weights["router"])
        gates, experts = jax.lax.top_k(probs, k)
        chosen = jax.nn.one_hot(experts, count)  # [B, N, k, E]
        order = jnp.swapaxes(chosen, 1, 2).reshape(x.shape[0], k * tokens, count)
        place = jnp.cumsum(order, axis=1) * order - 1
        place = jnp.swapaxes(place.reshape(x.shape[0], k, tokens, count), 1, 2).max(2)
        dispatch = jax.nn.one_hot(place.astype(jnp.int32), slots, dtype=x.dtype)
        combine = dispatch * jnp.einsum("bnk,bnke->bne", gates, chosen)[..., None].astype(x.dtype)
        inputs = jnp.einsum("bnd,bnec->ebcd", x, dispatch)
        h = jax.nn.relu(jnp.einsum("ebcd,edf->ebcf", inputs, weights["up"].astype(x.dtype)))
        y = jnp.einsum("ebcf,efd->ebcd", h, weights["down"].astype(x.dtype))
        return jnp.einsum("ebcd,bnec->bnd", y, combine), 1 - dispatch.sum() / (k * x.shape[0] * tokens)

    return layer


def dense_layer(k):
    """A network of width k F: the same operations with nothing to route."""

    def layer(weights, x):
        import jax
        import jax.numpy as jnp

        up, down = (jnp.concatenate(list(weights[n][:k]), axis=a).astype(x.dtype) for n, a in (("up", 1), ("down", 0)))
        return jax.nn.relu(x @ up) @ down, jnp.zeros(())

    return layer


LAYERS = {
    "ours, dropless": our_layer,
    "ours, capacity 2": partial(our_layer, capacity=2.0),
    "ragged_dot": ragged_layer,
    "one-hot dispatch": one_hot_layer,
    "dense": dense_layer,
}
TORCH = "torch, expert by expert"


def make(name, shape, experts, k):
    """Compiles a peer; its call takes "forward" or "both" and gives nothing, or "results" and gives the numbers."""
    threads = pin_threads(2) if shape is CPU or shape == CPU else None
    import jax
    import jax.numpy as jnp
    import numpy as np

    x, weights = problem(shape, experts, k)
    x, weights = jnp.asarray(x, shape["dtype"]), jax.tree.map(jnp.asarray, weights)
    pull = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    layer = LAYERS[name](k=k)
    forward = jax.jit(layer).lower(weights, x).compile()
    loss = lambda weights, x: jnp.sum(layer(weights, x)[0].astype(jnp.float32) * pull)  # noqa: E731
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(weights, x).compile()
    temporary = both.memory_analysis()

    def call(kind):
        if kind == "results":
            y, dropped = forward(weights, x)
            value, (dweights, dx) = both(weights, x)
            small = {"y": y, "dx": dx, "router": dweights["router"], "up": dweights["up"].sum(0)}
            return {n: np.asarray(a, np.float32) for n, a in small.items()}, float(value), float(dropped)
        return jax.block_until_ready({"forward": forward, "both": both}[kind](weights, x)) and None

    return call, {"temporary": temporary.temp_size_in_bytes / 1e6, "threads": threads}


def torch_make(shape, experts, k):
    """Expert by expert, as Hugging Face runs Switch and Mixtral."""
    import numpy as np

    threads = pin_threads(2)
    import torch

    torch.set_num_threads(threads)
    x, weights = problem(shape, experts, k)
    x, weights = (
        torch.from_numpy(x).requires_grad_(),
        {n: torch.from_numpy(w).requires_grad_() for n, w in weights.items()},
    )
    pull = torch.cos(torch.arange(x.numel(), dtype=torch.float32)).reshape(x.shape)

    def layer():
        flat = x.reshape(-1, x.shape[-1])
        gates, chosen = torch.topk(torch.softmax(flat @ weights["router"], -1), k)
        y = torch.zeros_like(flat)
        for e in range(experts):
            rows, slot = torch.where(chosen == e)
            if len(rows):
                h = torch.relu(flat[rows] @ weights["up"][e]) @ weights["down"][e]
                y = y.index_add(0, rows, h * gates[rows, slot, None])
        return y.reshape(x.shape)

    def call(kind):
        if kind == "forward":
            with torch.no_grad():
                layer()
            return None
        for leaf in (x, *weights.values()):
            leaf.grad = None
        y = layer()
        loss = (y * pull).sum()
        loss.backward()
        if kind != "results":
            return None
        small = {"y": y, "dx": x.grad, "router": weights["router"].grad, "up": weights["up"].grad.sum(0)}
        return {n: np.asarray(a.detach().numpy()) for n, a in small.items()}, float(loss.detach()), 0.0

    return call, {"temporary": None, "threads": threads}


def check(results, name):
    """Raises when outputs or gradients are not those of our dropless layer.

    Gradients by their norm: where rounding moves a hidden unit across ReLU's kink, single entries differ by more.
    """
    import numpy as np

    want, got = results["ours, dropless"], results[name]
    for leaf in want[0]:
        measure_of, limit = (np.max, 1e-5) if leaf == "y" else (np.linalg.norm, 1e-3)
        difference = measure_of(np.abs(want[0][leaf] - got[0][leaf])) / measure_of(np.abs(want[0][leaf]))
        if difference > limit:
            raise SystemExit(f"{name}: {leaf} differs by {difference:.1e}")


def run(shape, experts, k, repeats, without):
    names = [name for name in LAYERS if name not in without]
    peers = {name: Peer(make, name, shape, experts, k) for name in names}
    if shape == CPU and TORCH not in without:
        try:
            import torch  # noqa: F401

            peers[TORCH] = Peer(torch_make, shape, experts, k)
        except ImportError:
            pass
    results = {name: peer("results") for name, peer in peers.items()}
    if shape == CPU:  # bfloat16 peers round in other places
        for name in ("ragged_dot", TORCH):
            if name in results:
                check(results, name)
    work = 4 * k * shape["rows"] * shape["tokens"] * shape["width"] * shape["hidden"] / 1e9
    threads = peers["ours, dropless"].facts["threads"] or 1
    forward = measure({n: partial(p, "forward") for n, p in peers.items()}, repeats)
    both = measure({n: partial(p, "both") for n, p in peers.items()}, repeats)
    unit = "GF/s per core" if shape == CPU else "GF/s"
    return [
        {
            "layer": f"E={experts} k={k} {name}",
            f"forward, {unit}": work / forward[name]["seconds"] / threads,
            f"and backward, {unit}": 3 * work / both[name]["seconds"] / threads,
            "ours is x": both[name]["seconds"] / both["ours, dropless"]["seconds"],
            "dropped": results[name][2],
            "temporary, MB": peer.facts["temporary"],
        }
        for name, peer in peers.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    others = [name for name in (*LAYERS, TORCH) if name != "ours, dropless"]
    parser.add_argument("--without", nargs="+", default=[], choices=others, metavar="PEER", help=", ".join(others))
    parser.add_argument("--gpu", action="store_true", help="the shape for an accelerator")
    parser.add_argument("--json")
    options = parser.parse_args()
    shape = GPU if options.gpu else CPU
    rows = [
        row for e in options.experts for k in options.k for row in run(shape, e, k, options.repeats, options.without)
    ]
    setting = {**shape, "skew": f"Dirichlet({SKEW})", **environment("jax", "torch")}
    report("Mixture-of-experts layer", setting, rows, options.json)


if __name__ == "__main__":
    huge_pages()
    pin_threads(2)
    main()
