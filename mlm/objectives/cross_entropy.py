"""Cross-entropy over large vocabularies: the output head and its loss in one differentiable function.

`head_cross_entropy` never holds logits for more than a slice of the target positions. While a slice is at hand it also
computes the gradients of the hidden states and of the kernel, so the logits are formed once: 6 B T D V floating-point
operations in all, 2 B T D V when no gradient is asked for. `token_cross_entropy` is the same loss on logits, in the
plainest words.

    nll_t  = log Z_t - l_t[y_t],   log Z_t = logsumexp_v l_t[v],   l_t[v] = sum_d hidden_t[d] kernel[d, v] + bias[v]
    loss_t = (1 - e) nll_t + e/(V-1) sum_{v != y} (log Z_t - l_t[v]) - entropy + z_loss (log Z_t)^2
    loss   = sum_t weights_t loss_t                                                                in nats

The entropy of the smoothed target is subtracted, so a perfect prediction costs 0. Sources: T5X `losses.py` (z-loss,
smoothing); Hsu et al. 2024, Liger Kernel (gradients in the forward pass); Shoeybi et al. 2019, Megatron-LM (split
vocabulary).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mlm.types import Hidden, Logits, Tokens, Weights

BATCH_AXES = ("replica", "data", "fsdp", "expert")  # mesh axes that split the rows of a batch
VOCAB_AXIS = "tensor"  # mesh axis that splits the vocabulary
EMBED_AXIS = "fsdp"  # mesh axis that splits the kernel's other dimension between steps

# Bytes of temporaries to aim at on one device, beside the gradients themselves. Fewer positions at a time save memory
# and visit the kernel's gradient more often: 64 MiB keep a CPU busy at V = 250,112, accelerators need more.
MEMORY = {"cpu": 2**26}
ACCELERATOR_MEMORY = 2**30
VISIT = 24  # adding to the whole kernel gradient once takes as long as the products of about 24 tokens (measured, CPU)


class TokenStats(NamedTuple):
    """What each target position says about the model; carries no gradient."""

    nll: Float[Array, "B T"]  # -log p(target), nats, without smoothing and z-loss
    log_z: Float[Array, "B T"]  # log-partition, nats
    correct: Bool[Array, "B T"]  # the target is the most probable token; a tie is no answer


def head_cross_entropy(
    hidden: Hidden,
    kernel: Float[Array, "D V"],
    targets: Tokens,
    weights: Weights,
    *,
    bias: Float[Array, "V"] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Float[Array, ""], TokenStats]:
    """Weighted sum of the loss of `hidden @ kernel + bias` against `targets`, and the statistics of every position.

    z_loss: coefficient of (log Z)^2. softcap: logits become softcap * tanh(logits / softcap). chunk: target positions
    whose logits are held at a time (None: as many as fit MEMORY on one device). mesh: None takes the ambient mesh of
    `jax.set_mesh`; rows split over BATCH_AXES and the vocabulary over VOCAB_AXIS as far as they divide. Each device
    sums its kernel gradient over all its slices and exchanges it once; nothing is gathered along the vocabulary.

    Multiplies in the type of `hidden` and accumulates in float32 (float64 for float64). Gradients flow through the sum
    only: to hidden, kernel, bias and weights. Raises ValueError when an option is out of its range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap={softcap} must be positive; use None for no cap")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} target positions must be at least 1; use None to have it chosen")
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    sizes = {} if mesh.empty or mesh.size == 1 else {name: size for name, size in mesh.shape.items() if size > 1}
    batch = _dividing([name for name in BATCH_AXES if name in sizes], sizes, targets.shape[0])
    split = _Split(
        mesh=mesh if sizes else None,
        batch=batch,
        vocab=_dividing([name for name in (VOCAB_AXIS,) if name in sizes], sizes, kernel.shape[1]),
        embed=_dividing([name for name in (EMBED_AXIS,) if name in batch], sizes, kernel.shape[0]),
    )
    terms = _Terms(float(z_loss), float(label_smoothing), softcap, kernel.shape[1], chunk)
    return _loss(terms, split, hidden, kernel, bias, targets, weights)


def token_cross_entropy(
    logits: Logits, targets: Tokens, weights: Weights, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], TokenStats]:
    """The same loss on logits that are already there: the reference, and the choice for small vocabularies.

    Differentiable through JAX; memory is several times B T V. Returns the weighted sum in nats and the statistics.
    """
    logits = logits.astype(_accumulator(logits.dtype))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    vocab = logits.shape[-1]
    high, low, entropy = _smoothing(label_smoothing, vocab)
    loss = log_z - (high - low) * label - low * jnp.sum(logits, axis=-1) - entropy + z_loss * log_z**2
    top = jnp.max(logits, axis=-1, keepdims=True)
    alone = jnp.sum(logits == top, axis=-1) == 1
    stats = TokenStats(log_z - label, log_z, (label == top[..., 0]) & alone)
    return jnp.sum(loss * weights), jax.tree.map(lax.stop_gradient, stats)


@dataclasses.dataclass(frozen=True)
class _Terms:
    """The static part of the loss."""

    z_loss: float
    label_smoothing: float
    softcap: float | None
    vocab: int  # of all devices together
    chunk: int | None


@dataclasses.dataclass(frozen=True)
class _Split:
    """Mesh axes that split the rows, the vocabulary and the kernel's gradient."""

    mesh: Mesh | AbstractMesh | None
    batch: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]


class _Slice(NamedTuple):
    """Results of some positions, as seen by one device. dhidden is None when no gradient is wanted."""

    loss: Array  # [B, t], before the weights
    stats: TokenStats
    dhidden: Array | None  # [B, t, D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(terms, split, hidden, kernel, bias, targets, weights):
    return _sharded(terms, split, False, hidden, kernel, bias, targets, weights)[:2]


def _loss_forward(terms, split, hidden, kernel, bias, targets, weights):
    total, stats, losses, dhidden, (dkernel, dbias) = _sharded(
        terms, split, True, hidden, kernel, bias, targets, weights
    )
    # Empty arrays carry the dtypes: the gradients stay in the accumulator's type until they have been scaled.
    dtypes = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), (hidden, kernel, bias, weights))
    return (total, stats), ((dhidden, dkernel, dbias, losses), dtypes)


def _loss_backward(terms, split, residuals, cotangents):
    del terms, split
    scale = cotangents[0]
    dhidden, dkernel, dbias, dweights = jax.tree.map(lambda g, d: (scale * g).astype(d.dtype), *residuals)
    return dhidden, dkernel, dbias, None, dweights


_loss.defvjp(_loss_forward, _loss_backward)


def _sharded(terms, split, gradients, hidden, kernel, bias, targets, weights):
    """One device's share under the mesh: rows and vocabulary local, sums exchanged once at the end."""
    local = functools.partial(_local, terms, split, gradients)
    if split.mesh is None:
        return local(hidden, kernel, bias, targets, weights)
    rows, columns = P(split.batch or None), P(None, split.vocab or None)
    numbers = None if bias is None else P(split.vocab or None)
    # The kernel's gradient leaves in pieces along D: FSDP keeps the kernel so, and otherwise it costs as much as a sum.
    scattered = P(split.embed or None, split.vocab or None)
    graded = (rows, rows, (scattered, numbers)) if gradients else (None,) * 3
    mapped = jax.shard_map(
        local,
        mesh=split.mesh,
        in_specs=(rows, columns, numbers, rows, rows),
        out_specs=(P(), TokenStats(rows, rows, rows), *graded),
        check_vma=False,
    )
    return mapped(hidden, kernel, bias, targets, weights)


def _local(terms, split, gradients, hidden, kernel, bias, targets, weights):
    """(loss sum, statistics, position losses, gradient of hidden, gradients of kernel and bias) from local rows and
    columns.
    """
    rows, length, width = hidden.shape
    columns = kernel.shape[1]
    accumulator = _accumulator(hidden.dtype)
    positions = terms.chunk or _memory() * 13 // 16 // (rows * columns * accumulator.itemsize)
    slices, positions = _cut(rows, length, positions)
    inputs = (hidden, targets, weights)

    def body(sums, number):
        start = number * positions
        part = (lax.dynamic_slice_in_dim(x, start, positions, axis=1) for x in inputs)
        return _slice(terms, split, kernel, bias, sums, *part)

    # Positions of weight 0 fill the last slice: XLA would hold the logits of a smaller one beside those of the loop.
    inputs = tuple(jnp.pad(x, [(0, 0), (0, slices * positions - length)] + [(0, 0)] * (x.ndim - 2)) for x in inputs)
    kernel = kernel.astype(hidden.dtype)
    dkernel = jnp.zeros((width, columns), accumulator)
    dbias = None if bias is None else jnp.zeros((columns,), accumulator)
    sums, parts = lax.scan(body, (dkernel, dbias) if gradients else None, jnp.arange(slices))
    done = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length], parts)

    total = jnp.sum(done.loss * weights.astype(accumulator))
    if split.batch:
        total = lax.psum(total, split.batch)
    if not gradients:
        return total, done.stats, None, None, None
    dkernel, dbias = sums
    dhidden = lax.psum(done.dhidden, split.vocab) if split.vocab else done.dhidden
    for name in split.batch:
        if name in split.embed:
            dkernel = lax.psum_scatter(dkernel, name, scatter_dimension=0, tiled=True)
    others = tuple(name for name in split.batch if name not in split.embed)
    dkernel = lax.psum(dkernel, others) if others else dkernel
    dbias = lax.psum(dbias, split.batch) if split.batch and bias is not None else dbias
    return total, done.stats, done.loss, dhidden, (dkernel, dbias)


def _slice(terms, split, kernel, bias, sums, hidden, targets, weights):
    """(gradients of kernel and bias so far, _Slice) of a few positions: hidden [B, t, D]; sums None: no gradients."""
    rows, length, width = hidden.shape
    columns = kernel.shape[1]
    accumulator = _accumulator(hidden.dtype)
    hidden = hidden.reshape(rows * length, width)
    targets = targets.reshape(-1)
    weights = weights.reshape(-1).astype(accumulator)
    high, low, entropy = _smoothing(terms.label_smoothing, terms.vocab)
    first = lax.axis_index(split.vocab) * columns if split.vocab else 0  # number of this device's first column

    logits = jnp.matmul(hidden, kernel, preferred_element_type=accumulator)
    if bias is not None:
        logits += bias.astype(accumulator)
    if terms.softcap:
        logits = terms.softcap * jnp.tanh(logits / terms.softcap)
    top = _across(lax.pmax, split.vocab, jnp.max(logits, axis=-1))
    mass = _across(lax.psum, split.vocab, jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
    log_z = top + jnp.log(mass)
    place = targets - first
    here = (place >= 0) & (place < columns)
    label = jnp.take_along_axis(logits, jnp.clip(place, 0, columns - 1)[:, None], axis=-1)[:, 0]
    label = _across(lax.psum, split.vocab, jnp.where(here, label, 0))
    # How many tokens share the top: floor(exp(0)) is 1, any other 0. XLA:CPU sums this 4 times faster than comparisons.
    ties = _across(lax.psum, split.vocab, jnp.sum(jnp.floor(jnp.exp(logits - top[:, None])), axis=-1))

    loss = log_z - (high - low) * label - entropy + terms.z_loss * log_z**2
    if low:
        loss -= low * _across(lax.psum, split.vocab, jnp.sum(logits, axis=-1))
    grid = (rows, length)
    stats = TokenStats(*(x.reshape(grid) for x in (log_z - label, log_z, (label == top) & (ties == 1))))
    if sums is None:
        return None, _Slice(loss.reshape(grid), stats, None)

    # dlogits = weight * (softmax * (1 + 2 z_loss log Z) - smoothed target), tile by tile so that the product
    # added to the kernel's gradient stays small. The last tile starts early; columns already done count zero.
    tile = min(columns, max(1, _memory() // 16 // (width * accumulator.itemsize)))
    rise = weights * (1 + 2 * terms.z_loss * log_z)

    def add_tile(j, carry):
        (dkernel, dbias), dhidden = carry
        start = jnp.minimum(j * tile, columns - tile)
        part = lax.dynamic_slice_in_dim(logits, start, tile, axis=1)
        number = start + jnp.arange(tile)[None]
        target = jnp.where(place[:, None] == number, high, low).astype(accumulator)
        dlogits = rise[:, None] * jnp.exp(part - log_z[:, None]) - weights[:, None] * target
        if terms.softcap:
            dlogits *= 1 - (part / terms.softcap) ** 2
        dlogits = jnp.where(number >= j * tile, dlogits, 0)
        if bias is not None:
            sofar = jnp.sum(dlogits, axis=0) + lax.dynamic_slice_in_dim(dbias, start, tile)
            dbias = lax.dynamic_update_slice_in_dim(dbias, sofar, start, axis=0)
        dlogits = dlogits.astype(hidden.dtype)
        weight = lax.dynamic_slice_in_dim(kernel, start, tile, axis=1)
        dhidden += jnp.einsum("nv,dv->nd", dlogits, weight, preferred_element_type=accumulator)
        product = jnp.einsum("nd,nv->dv", hidden, dlogits, preferred_element_type=accumulator)
        product += lax.dynamic_slice_in_dim(dkernel, start, tile, axis=1)
        return (lax.dynamic_update_slice_in_dim(dkernel, product, start, axis=1), dbias), dhidden

    dhidden = jnp.zeros(hidden.shape, accumulator)
    sums, dhidden = lax.fori_loop(0, math.ceil(columns / tile), add_tile, (sums, dhidden))
    return sums, _Slice(loss.reshape(grid), stats, dhidden.reshape(rows, length, width))


def _cut(rows: int, length: int, most: int) -> tuple[int, int]:
    """(slices, positions of each) for `length` positions of `rows` rows, at most `most` of them at a time.

    Chosen for the least work: positions filled up, and VISIT tokens' worth for every slice.

    >>> _cut(4, 114, 16)  # 8 x 15 = 120 positions, against 8 x 16 = 128
    (8, 15)
    """
    most = min(max(most, 1), length)
    positions = min(range(1, most + 1), key=lambda p: math.ceil(length / p) * (rows * p + VISIT))
    return math.ceil(length / positions), positions


def _across(reduce, names, x):
    """`reduce` over the devices that hold the other columns."""
    return reduce(x, names) if names else x


def _smoothing(epsilon: float, vocab: int) -> tuple[float, float, float]:
    """(probability of the target, of each other token, entropy of that distribution in nats).

    >>> round(_smoothing(0.1, 4)[2], 4)
    0.4349
    """
    if not epsilon:
        return 1.0, 0.0, 0.0
    high, low = 1.0 - epsilon, epsilon / (vocab - 1)
    return high, low, -(high * math.log(high) + epsilon * math.log(low))


def _memory() -> int:
    return MEMORY.get(jax.default_backend(), ACCELERATOR_MEMORY)


def _accumulator(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _dividing(names: list[str], sizes: dict[str, int], length: int) -> tuple[str, ...]:
    """The longest run of leading mesh axes whose sizes' product divides `length`."""
    while names and length % math.prod(sizes[name] for name in names):
        names = names[:-1]
    return tuple(names)
