"""Learning rates by name: functions step -> rate, where step counts the updates already made (0 for the first).

Linear warm-up to the peak is (step + 1) / warmup_steps, so the first update already moves.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mlm.registry import Registry

Schedule = Callable[[Any], Any]  # int or int32 array -> float32 scalar


def constant(*, learning_rate: float, warmup_steps: int = 0) -> Schedule:
    """learning_rate, after a linear warm-up. T5 fine-tuning: 1e-3."""
    return lambda step: learning_rate * _warmup(step, warmup_steps)


def inverse_sqrt(*, learning_rate: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """learning_rate / sqrt(max(step, warmup_steps)): flat first, then falling. T5 and mT5 pre-training with Adafactor.

    The rate of the first 10,000 steps is 0.01 at the defaults. Source: Raffel et al. 2020, section 3.1.2.
    """
    _positive("inverse_sqrt", warmup_steps=warmup_steps)
    return lambda step: learning_rate / jnp.sqrt(jnp.maximum(_float(step), warmup_steps))


def inverse_sqrt_warmup(*, learning_rate: float, warmup_steps: int) -> Schedule:
    """Linear warm-up to the peak learning_rate, then learning_rate * sqrt(warmup_steps / step). Vaswani et al. 2017."""
    _positive("inverse_sqrt_warmup", warmup_steps=warmup_steps)
    return lambda step: (
        learning_rate * _warmup(step, warmup_steps) * jnp.sqrt(warmup_steps / jnp.maximum(_float(step), warmup_steps))
    )


def cosine(*, learning_rate: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine from the peak down to final_fraction of it at total_steps.

    Source: Loshchilov & Hutter 2017.
    """
    _order("cosine", warmup_steps, total_steps)

    def rate(step):
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, warmup_steps, total_steps)))
        return learning_rate * _warmup(step, warmup_steps) * (final_fraction + (1.0 - final_fraction) * fall)

    return rate


def linear(*, learning_rate: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """Linear warm-up, then a straight line from the peak down to final_fraction of it at total_steps."""
    _order("linear", warmup_steps, total_steps)

    def rate(step):
        fall = 1.0 - _progress(step, warmup_steps, total_steps)
        return learning_rate * _warmup(step, warmup_steps) * (final_fraction + (1.0 - final_fraction) * fall)

    return rate


def warmup_stable_decay(
    *, learning_rate: float, total_steps: int, decay_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> Schedule:
    """Linear warm-up, the peak, and over the last decay_steps a straight line down to final_fraction of it.

    Source: Hu et al. 2024, MiniCPM.
    """
    _positive("warmup_stable_decay", decay_steps=decay_steps)
    _order("warmup_stable_decay", warmup_steps + decay_steps, total_steps)

    def rate(step):
        fall = 1.0 - _progress(step, total_steps - decay_steps, total_steps)
        return learning_rate * _warmup(step, warmup_steps) * (final_fraction + (1.0 - final_fraction) * fall)

    return rate


SCHEDULES: Registry[Callable[..., Schedule]] = Registry(
    "schedule",
    constant=constant,
    inverse_sqrt=inverse_sqrt,
    inverse_sqrt_warmup=inverse_sqrt_warmup,
    cosine=cosine,
    linear=linear,
    warmup_stable_decay=warmup_stable_decay,
)


def make_schedule(name: str, **options: Any) -> Schedule:
    """The schedule of that name. Raises KeyError for an unknown name, TypeError for an unknown or missing option."""
    return SCHEDULES[name](**options)


def _float(step: Any):
    return jnp.asarray(step, jnp.float32)


def _warmup(step: Any, warmup_steps: int):
    return jnp.minimum(1.0, (_float(step) + 1.0) / max(warmup_steps, 1))


def _progress(step: Any, start: int, end: int):
    return jnp.clip((_float(step) - start) / max(end - start, 1), 0.0, 1.0)


def _positive(name: str, **values: int) -> None:
    for option, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: {option}={value} must be at least 1")


def _order(name: str, before: int, total_steps: int) -> None:
    if before > total_steps or total_steps < 1:
        raise ValueError(
            f"{name}: total_steps={total_steps} is less than the {before} steps of its phases; "
            f"shorten them or train longer"
        )
