"""Positions as functions: T5 buckets, ALiBi and rotation act between tokens, sinusoids are added to them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mlm.models.specs import PositionSpec


def relative_bucket(
    relative: Int[Array, "*shape"], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """Bucket of relative = key position - query position, in tokens.

    n = -relative. Bidirectional: half of the buckets serve keys to the right (n < 0), then n = |n|; causal:
    n = max(n, 0). With m exact buckets (half of what is left), n < m has its own bucket, the rest share
    m + floor(ln(n / m + eps) / ln(max_distance / m) * (buckets - m)), at most the last one.
    eps is the float32 machine epsilon: without it n = m * 2^i can fall one bucket short. Source: T5X relpos_bias.
    """
    n = -relative
    base = jnp.zeros_like(n)
    if bidirectional:
        buckets //= 2
        base = jnp.where(n < 0, buckets, 0)
        n = jnp.abs(n)
    else:
        n = jnp.maximum(n, 0)
    exact = buckets // 2
    scaled = jnp.log(n.astype(jnp.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    far = exact + (scaled * (buckets - exact)).astype(jnp.int32)
    return base + jnp.where(n < exact, n, jnp.minimum(far, buckets - 1))


def relative_bias(
    table: Float[Array, "H buckets"],
    queries: Int[Array, "*R T"],
    keys: Int[Array, "*_ S"],
    *,
    causal: bool,
    spec: PositionSpec,
) -> Float[Array, "*R H T S"]:
    """Bias of every query position to every key position, in nats. Positions in tokens.

    Packed rows need nothing more: inside one example the distance of positions is the distance of indices,
    and pairs of different examples are masked.
    """
    relative = keys[..., None, :] - queries[..., None]
    bucket = relative_bucket(relative, bidirectional=not causal, buckets=spec.buckets, max_distance=spec.max_distance)
    return jnp.moveaxis(table[:, bucket], 0, -3)


def from_diagonals(values: Float[Array, "*H L"], rows: int) -> Float[Array, "*H {rows} S"]:
    """The matrix of L - rows + 1 columns whose entry (t, s) is values[s - t + rows - 1]: equal along its diagonals.

    By copies alone, so that its gradient is a sum along diagonals without a scatter: rows of L + 1 values, read as if
    they had L, begin one further to the right each.
    """
    length = values.shape[-1]
    lead = values.shape[:-1]
    wide = jnp.pad(values, [(0, 0)] * len(lead) + [(0, 1)])[..., None, :]
    flat = jnp.broadcast_to(wide, (*lead, rows, length + 1)).reshape(*lead, -1)
    return flat[..., : rows * length].reshape(*lead, rows, length)[..., rows - 1 :]


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 i / h) for i = 1 … h, h a power of two; else those of the power below, then every second one of twice it.

    Source: Press et al. 2022, released code.
    """
    power = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: heads - power]]).astype(np.float32)


def alibi_bias(heads: int, queries: Int[Array, "*R T"], keys: Int[Array, "*_ S"]) -> Float[Array, "*R {heads} T S"]:
    """-slope x distance in tokens, whichever the direction."""
    distance = jnp.abs(keys[..., None, :] - queries[..., None]).astype(jnp.float32)
    return -alibi_slopes(heads)[:, None, None] * distance[..., None, :, :]


def rope_turns(spec: PositionSpec, head_dim: int) -> Float[np.ndarray, "pairs"]:
    """Radians per token of each pair of numbers: base^(-2 m / K) for the m-th, over `factor`.

    With a trained `context`, a pair that turns n = context w / 2 pi times in it keeps the share s = (n - 1) / (4 - 1),
    at least 0 and at most 1, of its speed w and is slowed for the rest: s w + (1 - s) w / factor. Sources: Su et al.
    2021; Llama Team 2024, released code.
    """
    half = head_dim // 2
    turns = spec.base ** (-np.arange(half, dtype=np.float32) / half)
    if spec.context is None:
        return turns / np.float32(spec.factor)
    kept = np.clip((spec.context * turns / (2 * np.pi) - 1.0) / 3.0, 0.0, 1.0)
    return (kept * turns + (1.0 - kept) * turns / spec.factor).astype(np.float32)


def rotate(x: Float[Array, "B H T K"], positions: Int[Array, "#B T"], spec: PositionSpec) -> Float[Array, "B H T K"]:
    """Rotary positions, halves convention: (a, b) -> (a cos - b sin, b cos + a sin), angle = position x `rope_turns`.

    Angles in float32. Source: Su et al. 2021; Hugging Face's halves.
    """
    angles = positions.astype(jnp.float32)[:, None, :, None] * rope_turns(spec, x.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def sinusoids(positions: Int[Array, "*B T"], width: int) -> Float[Array, "*B T {width}"]:
    """[sin(p w_i), cos(p w_i)] with w_i = 10000^(-i / (width/2 - 1)), i < width/2. Source: fairseq."""
    half = width // 2
    frequencies = np.exp(np.arange(half) * -(np.log(10_000.0) / (half - 1))).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def segment_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Place of every token inside its example; examples of a packed row are contiguous."""
    at = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return at - jax.lax.cummax(jnp.where(starts, at, 0), axis=1)
