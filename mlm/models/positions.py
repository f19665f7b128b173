"""T5 relative positions: distances become buckets, buckets become a learned bias per head (Raffel et al. 2020)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mlm.models.config import PositionSpec


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
    keys: Int[Array, "S"],
    *,
    causal: bool,
    spec: PositionSpec,
) -> Float[Array, "*R H T S"]:
    """Bias of every query position to every key position, in nats. Positions in tokens.

    Packed rows need nothing more: inside one example the distance of positions is the distance of indices,
    and pairs of different examples are masked.
    """
    relative = keys - queries[..., None]
    bucket = relative_bucket(relative, bidirectional=not causal, buckets=spec.buckets, max_distance=spec.max_distance)
    return jnp.moveaxis(table[:, bucket], 0, -3)
