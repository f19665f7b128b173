"""What mixtures of experts and readers of positions add to a step: their losses, metrics, the balance of biases."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlm.models.routing import Routed
from mlm.models.transformer import Transformer
from mlm.objectives import Loss
from mlm.training.metrics import EXPERT_LOAD, EXPERTS_BY_LANGUAGE, ROUTING
from mlm.training.step import Metrics
from mlm.types import Batch, Params


def with_routing(loss: Loss, routed: Mapping[str, Routed], batch: Batch) -> Loss:
    """The loss with the routers' own, and metrics of every layer.

    A row's router losses, summed over layers, count as often as the row has target tokens: so they add up over rows,
    and the update depends neither on microbatches nor on devices.

    Metrics, each (sum, weight): router_loss in nats per target token; per stack and layer [n] routing/STACK/dropped
    (share of choices), entropy (nats per token), z (logsumexp^2 per token); expert_load [n, E], the share of an expert
    in all choices; experts_by_language [n, L, E], counts.
    """
    weights = jnp.sum(batch["decoder_loss_weights"].astype(jnp.float32), axis=1)
    total = sum(jnp.sum(jnp.sum(r.loss, axis=0) * weights) for r in routed.values())
    metrics = dict(loss.metrics, router_loss=(total, jnp.sum(weights)))
    for stack, r in routed.items():
        metrics |= {
            f"{ROUTING}{stack}/dropped": (r.dropped, r.choices),
            f"{ROUTING}{stack}/entropy": (r.entropy, r.tokens),
            f"{ROUTING}{stack}/z": (r.z, r.tokens),
            f"{ROUTING}{stack}/{EXPERT_LOAD}": (r.load, r.choices[:, None]),
            f"{ROUTING}{stack}/{EXPERTS_BY_LANGUAGE}": (r.languages, r.languages),
        }
    return Loss(loss.sum + total, loss.weight, metrics)


def with_positions(loss: Loss, losses: Mapping[str, Float[Array, ""]], batch: Batch) -> Loss:
    """The loss with those of the readers of positions, which every target token counts once, as `with_routing` does
    the routers'. Metric: position_loss in nats per target token.
    """
    weight = jnp.sum(batch["decoder_loss_weights"].astype(jnp.float32))
    total = sum(losses.values()) * weight
    return Loss(loss.sum + total, loss.weight, dict(loss.metrics, position_loss=(total, weight)))


def rebalanced(model: Transformer, params: Params, metrics: Metrics) -> Params:
    """Router biases after a step of loss-free balancing, by the loads of the whole global batch."""
    loads = {
        stack: metrics[f"{ROUTING}{stack}/{EXPERT_LOAD}"][0]
        for stack, config in model.config.stacks().items()
        if any(router.bias_rate for router in config.routers())
    }
    return model.rebalanced(params, loads) if loads else params
