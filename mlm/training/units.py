"""The step that learns lexical units: what the model is sure of, before it learns to say it at once."""

from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from mlm.models.transformer import Transformer
from mlm.objectives import head_cross_entropy
from mlm.objectives.lexical_units import with_units
from mlm.training.step import Prepare
from mlm.types import Batch, Params


def unit_masking(
    model: Transformer, *, threshold: float, block: int, mask_token: int, chunk: int | None, mesh: Mesh | None
) -> Prepare:
    """Units by the present parameters, without dropout: one more pass forward over the whole batch, as an evaluation
    makes it, whatever the microbatches. chunk, mesh: of the head, see `head_cross_entropy`.
    """

    def prepare(params: Params, batch: Batch, key: Key[Array, ""], step: int | Array) -> Batch:
        return with_units(batch, target_nll(params, batch), key, threshold, block, mask_token)

    def target_nll(params: Params, batch: Batch) -> Float[Array, "B T"]:
        states = model(params, batch).hidden
        hidden, kernel, bias, targets, within = model.prediction(params, states, batch["decoder_target_tokens"])
        _, stats = head_cross_entropy(
            hidden,
            kernel,
            targets,
            batch["decoder_loss_weights"],
            bias=bias,
            softcap=model.config.head.softcap,
            chunk=chunk,
            mesh=mesh,
        )
        return stats.nll if within is None else stats.nll + within.nll

    return prepare
