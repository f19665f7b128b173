"""The JAX peer: what one writes after reading a PyTorch model.

A list of layers, dense matrices, the position bias computed in every layer, whole logits, one-hot cross-entropy as T5X
has it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm.models.config import ModelConfig


def parameters(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
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


def loss(params: dict[str, Any], batch: dict[str, np.ndarray], heads: int) -> jax.Array:
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
    return one_hot_loss(hidden @ params["head"], batch)


def one_hot_loss(logits: jax.Array, batch: dict[str, np.ndarray]) -> jax.Array:
    """Mean loss per target token in nats, with one-hot labels."""
    labels = jax.nn.one_hot(batch["decoder_target_tokens"], logits.shape[-1])
    nll = -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    weights = batch["decoder_loss_weights"]
    return jnp.sum(nll * weights) / jnp.sum(weights)
