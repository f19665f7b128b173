"""What a model keeps for every target language beside its norms: a bridge between the stacks, offsets before the head.

A language is the id of the batch's `*_language_ids`; 0 stands for none (padding, or a source without a target).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mlm.models.grouped import by_group, grouped_matmul, permute
from mlm.models.layers import zeros
from mlm.models.sight import segment_mask
from mlm.types import Hidden, Params, Placement, Segments, SourceHidden, SourceSegments

_AXES = {
    "states": ("batch", None, "mlp"),
    "languages": ("batch", None),
    "matrices": ("languages", "mlp", "embed"),
}


def languages_of_sources(sources: SourceSegments, targets: Segments, languages: Int[Array, "B T"]) -> Int[Array, "B S"]:
    """The target language of every source token: that of the target tokens of its own example; 0 where there are none.

    Several examples may share a row, and the language of a target is the same at all of its tokens.
    """
    return jnp.max(jnp.where(segment_mask(sources, targets), languages[:, None, :], 0), axis=-1)


class Bridge(nnx.Module):
    """m' = m W[t], a matrix for every target language t, the identity at first, on the encoder's output (LALT).

    Tokens are sorted by language and multiplied by groups: work does not grow with the number of languages, and no
    token gathers a matrix of its own. Source: Zhang et al. 2020.
    """

    def __init__(self, width: int, languages: int):
        one = jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (languages, width, width))
        self.matrices = nnx.Param(one, axes=_AXES["matrices"])

    def __call__(self, memory: SourceHidden, languages: Int[Array, "B #S"], placement: Placement) -> SourceHidden:
        languages = jnp.broadcast_to(languages, memory.shape[:2])
        rows, weights = {"states": memory, "languages": languages}, {"matrices": self.matrices[...]}
        return placement.by_expert(_crossed, rows, weights, _AXES).astype(memory.dtype)


def _crossed(rows: Params, weights: Params, first: int | Int[Array, ""]) -> Float[Array, "B S W"]:
    """The tokens of the languages first, first + 1, … of `weights` times their matrices; zeros for the others."""
    x, matrices = rows["states"], weights["matrices"]
    own = rows["languages"] - first
    held = matrices.shape[0]
    group = jnp.where((own >= 0) & (own < held), own, held).reshape(-1)
    order, inverse, sizes = by_group(group, held)
    y = grouped_matmul(permute(x.reshape(-1, x.shape[-1]), order, inverse), matrices.astype(x.dtype), sizes)
    return permute(y, inverse, order).reshape(*x.shape[:-1], -1).astype(jnp.float32)


class Offsets(nnx.Module):
    """h' = h + E[language] + F[script of the language], before the head; zero at first (LangSAMP).

    The states below know nothing of the language, so that they serve other tasks without the tables. scripts: number
    of every language's script. Source: Liu et al. 2025.
    """

    def __init__(self, width: int, kinds: tuple[str, ...], languages: int, scripts: tuple[int, ...]):
        self.scripts = scripts if "script" in kinds else ()
        if "language" in kinds:
            self.language = zeros((languages, width), ("languages", "embed"))
        if self.scripts:
            self.script = zeros((max(scripts) + 1, width), ("languages", "embed"))

    def __call__(self, x: Hidden, languages: Int[Array, "B #T"]) -> Hidden:
        if hasattr(self, "language"):
            x = x + self.language[...].astype(x.dtype)[languages]
        if self.scripts:
            x = x + self.script[...].astype(x.dtype)[jnp.array(self.scripts)[languages]]
        return x
