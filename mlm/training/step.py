"""One update, as a pure function of (state, batch). `jax.jit` is applied where the mesh is known, in `run.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from mlm.objectives import Loss
from mlm.training.optimizers import ema
from mlm.training.state import TrainState, stream
from mlm.types import Batch, Params

LossFunction = Callable[[Params, Batch, Key[Array, ""] | None], Loss]
Metrics = dict[str, Any]  # name -> (sum, weight) arrays, or a scalar
# (parameters, batch, key, step) -> what the loss reads
Prepare = Callable[[Params, Batch, Key[Array, ""], int | Array], Batch]
LAST_STEP = 2**31 - 1  # where whatever changes in training has come to its end


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    microbatches: int = 1,
    ema_decay: float = 0.0,
    adjust: Callable[[Params, Metrics], Params] = lambda params, metrics: params,
    prepare: Prepare | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one update on the global batch, and its metrics.

    gradient = d(sum of losses) / d params / (sum of weights): one division over the whole batch, so the update does not
    depend on microbatches, packing or devices. Every microbatch draws its own dropout key, folded from the step number.
    adjust moves what no gradient moves, by the step's metrics (biases of routers). prepare: see `Prepare`; it draws for
    the global batch, so that microbatches change nothing.
    When the loss or the gradient norm is not finite, everything but the step count stays as it was and `skipped` grows.
    """
    if prepare is not None:
        own = jax.random.fold_in(stream(key, "prepare"), state.step)
        batch = prepare(state.params, batch, own, state.step)
    key = jax.random.fold_in(stream(key, "dropout"), state.step)
    loss, gradients = accumulate(loss_fn, state.params, batch, key, microbatches)
    weight = jnp.maximum(loss.weight, 1.0)  # a batch of padding alone has no gradient to scale
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss.sum) & jnp.isfinite(norm)

    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = adjust(optax.apply_updates(state.params, updates), loss.metrics)
    average = None if state.ema is None else ema(state.ema, params, ema_decay)
    params, moments, average = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, moments, average),
        (state.params, state.optimizer, state.ema),
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = {
        **loss.metrics,
        "loss": (loss.sum, loss.weight),
        "gradient_norm": norm,
        "parameter_norm": optax.tree.norm(params),
        "finite": finite,
        "skipped": skipped,
    }
    return TrainState(state.step + 1, skipped, params, moments, average), metrics


def accumulate(
    loss_fn: LossFunction, params: Params, batch: Batch, key: Key[Array, ""] | None, microbatches: int
) -> tuple[Loss, Params]:
    """(summed loss, summed gradients) over `microbatches` equal parts of the batch, one after another.

    A part takes every `microbatches`-th row, so that each device keeps working on rows it already holds.
    """

    def differentiate(part: Batch, key: Key[Array, ""] | None) -> tuple[Loss, Params]:
        def objective(params: Params) -> tuple[Array, Loss]:
            loss = loss_fn(params, part, key)
            return loss.sum, loss

        gradients, loss = jax.grad(objective, has_aux=True)(params)
        return loss, gradients

    if microbatches == 1:
        return differentiate(batch, None if key is None else jax.random.fold_in(key, 0))

    def body(total: tuple[Loss, Params], numbered: tuple[Array, Batch]) -> tuple[tuple[Loss, Params], None]:
        number, part = numbered
        part_key = None if key is None else jax.random.fold_in(key, number)
        return jax.tree.map(jnp.add, total, differentiate(part, part_key)), None

    parts = {name: jnp.swapaxes(_split(x, microbatches), 0, 1) for name, x in batch.items()}
    first = jax.eval_shape(lambda: differentiate(jax.tree.map(lambda x: x[0], parts), key))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(microbatches), parts))
    return total


def _split(x: Array, parts: int) -> Array:
    if x.shape[0] % parts:
        raise ValueError(
            f"a batch of {x.shape[0]} rows does not divide into microbatches={parts}; "
            f"use a divisor of {x.shape[0]}: {[d for d in range(1, x.shape[0] + 1) if x.shape[0] % d == 0]}"
        )
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:])


def evaluation_step(params: Params, batch: Batch, *, loss_fn: LossFunction, prepare: Prepare | None = None) -> Metrics:
    """Metrics of a batch, no dropout, no gradients. prepare: as after the last step, with the same key every time."""
    if prepare is not None:
        batch = prepare(params, batch, jax.random.key(0), LAST_STEP)
    loss = loss_fn(params, batch, None)
    return {**loss.metrics, "loss": (loss.sum, loss.weight)}
