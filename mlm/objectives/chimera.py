"""What Chimera heads are asked to do: the targets, each some places further ahead, and the states that they stand for.

    loss = mean over heads k and targets p of  -log p_k(y_p) + |o_p - h_p|^2 / D                           in nats

h_p is the frozen model's state from which it says y_p itself, o_p what stands for it where it is not there yet. The
mean is over all that is predicted: head k has no state to look from at the first k targets of an example.
Source: Zeng et al. 2024 (arXiv:2402.15758); see `models.chimera`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlm.objectives.text_to_text import Loss


def chimera(heads: Sequence[Loss], error: Float[Array, "n B T"], weights: Float[Array, "n B T"]) -> Loss:
    """One loss of those of the heads, as text to text, the first head first, and of the mean squares of o - h.

    Metrics, each (sum, weight): nll, z_loss and accuracy over all heads; nll_head_K and accuracy_head_K; state_error,
    mean (o - h)^2. By language, and for padding, the first head's: so that a target counts once, but for the first of
    each example, which no head predicts.
    """
    distance = jnp.sum(error * weights), jnp.sum(weights)
    metrics = dict(heads[0].metrics, state_error=distance)
    for name in ("nll", "z_loss", "accuracy"):
        sums, counts = zip(*(head.metrics[name] for head in heads), strict=True)
        metrics[name] = sum(sums), sum(counts)
    for number, head in enumerate(heads, 1):
        metrics |= {f"{name}_head_{number}": head.metrics[name] for name in ("nll", "accuracy")}
    return Loss(sum(head.sum for head in heads) + distance[0], sum(head.weight for head in heads), metrics)
