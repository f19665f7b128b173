"""Attention by the vendors' kernels, and what each of them cannot do. Nothing is dropped to make a model fit.

Sources: cuDNN's and Pallas' checks as of jax 0.10.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mlm.models.attention import Keys
from mlm.models.blockwise import SAVED
from mlm.models.config import StackConfig
from mlm.models.sight import Sight


def attend_cudnn(
    query: Float[Array, "R H T K"],
    seen: Sequence[Keys],
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "R H T K"]:
    """`attention.attend` by cuDNN's fused kernel: no logits are kept, but masks and biases are, [R or 1, H or 1, T, S].

    Segments and prefixes go in as a mask, which cuDNN adds to the bias: no other way in says all that they say.
    """
    assert softcap is None
    assert rate == 0.0
    query, scale = _scaled(query, scale)
    drawn = [piece.sight.drawn() for piece in seen]
    shapes = [(1, 1, query.shape[2], piece.key.shape[2]) for piece in seen]
    mask = _joined([jnp.broadcast_to(d.mask, jnp.broadcast_shapes(d.mask.shape, s)) for d, s in zip(drawn, shapes)])
    bias = None
    if any(d.bias is not None for d in drawn):
        none = [jnp.zeros(shape, query.dtype) for shape in shapes]
        bias = _joined([zero if d.bias is None else d.bias.astype(query.dtype) for d, zero in zip(drawn, none)])
    key, value = (jnp.concatenate(x, axis=2) for x in zip(*((piece.key, piece.value) for piece in seen)))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation="cudnn"), 1, 2)


def attend_splash(
    query: Float[Array, "R H T K"],
    seen: Sequence[Keys],
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "R H T K"]:
    """`attention.attend` by Pallas' splash attention for TPUs: segments, order and windows inside the kernel, whose
    blocks out of reach are not visited. Padding sees padding, where plain attention gives it a mean of everything.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    assert rate == 0.0
    (piece,) = seen
    sight = piece.sight
    assert isinstance(sight, Sight)
    assert sight.segments is not None
    assert sight.prefix is None
    query, scale = _scaled(query, scale)
    reach = sight.reach()
    mask = splash.FullMask(sight.shape) if reach == (None, None) else splash.LocalMask(sight.shape, reach, 0)
    size = next(size for size in (512, 256, 128) if not any(length % size for length in sight.shape))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=splash.BlockSizes(**{f"block_{name}": size for name in names}),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    queries, keys = sight.segments
    return jax.vmap(kernel)(query * scale, piece.key, piece.value, splash.SegmentIds(queries, keys))


def _scaled(query: Float[Array, "R H T K"], scale: float | Array | None) -> tuple[Float[Array, "R H T K"], float]:
    """The kernels know no scale that is learned: it goes into the queries."""
    if isinstance(scale, jax.Array):
        return (query * scale).astype(query.dtype), 1.0
    return query, 1.0 if scale is None else scale


def _joined(parts: Sequence[Array]) -> Array:
    """Along the keys; what one part says for all rows or heads, it says for each."""
    rows, heads = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    return jnp.concatenate([jnp.broadcast_to(part, (rows, heads, *part.shape[2:])) for part in parts], axis=3)


def cudnn_misfits(stack: StackConfig, dtype: str) -> list[str]:
    specs = stack.attentions()
    found = [f"softcap={spec.softcap}: cuDNN has no soft cap" for spec in specs if spec.softcap]
    found += [
        f"head_dim={spec.head_dim}: cuDNN takes multiples of 8 up to 256 (128 before Hopper)"
        for spec in specs
        if spec.head_dim % 8 or spec.head_dim > 256
    ]
    if dtype != "bfloat16":
        found.append(f"dtype={dtype!r}: cuDNN takes bfloat16")
    if stack.dropout:
        found.append(f"dropout={stack.dropout}: the kernel drops no probabilities")
    return list(dict.fromkeys(found))


def splash_misfits(stack: StackConfig, dtype: str) -> list[str]:
    del dtype
    specs = stack.attentions()
    found = [
        f"position={spec.position.kind!r}: the kernel adds no bias"
        for spec in specs
        if spec.position.kind in ("t5_bucket", "alibi")
    ]
    if any(spec.source == "joint" for spec in specs):
        found.append("joint attention: the kernel has one piece of keys")
    if stack.dropout:
        found.append(f"dropout={stack.dropout}: the kernel drops no probabilities")
    return list(dict.fromkeys(found))


def cudnn_misfits_here(lengths: Sequence[int], prefix: bool) -> list[str]:
    found = [] if jax.default_backend() == "gpu" else [f"the devices are of kind {jax.default_backend()!r}, not 'gpu'"]
    return found + [f"length {length}: cuDNN takes even lengths" for length in lengths if length % 2]


def splash_misfits_here(lengths: Sequence[int], prefix: bool) -> list[str]:
    found = [] if jax.default_backend() == "tpu" else [f"the devices are of kind {jax.default_backend()!r}, not 'tpu'"]
    if jax.device_count() > 1:
        found.append(f"{jax.device_count()} devices: the kernel is not split over a mesh")
    if prefix:
        found.append("decoder_causal_attention: the kernel knows no prefix")
    return found + [f"length {length}: the kernel takes multiples of 128" for length in lengths if length % 128]
