"""The axis legend and the array aliases that every signature uses.

Axis letters never change meaning between files:

    B batch rows        T target length     S source length    Q query block of a decoding step
    D model width       H heads             K head size        M cache slots
    F feed-forward      V vocabulary        L languages        R decoding rows (batch x beams)
    W encoder width (D, mostly)
    E experts           C expert capacity   G routing groups   N tokens of a group
    k choices of a token

A batch is a plain dict of arrays. Text-to-text batches hold the features of `ROW_FEATURES`:
packed or not, a token belongs to the example whose number stands in `*_segment_ids` (1, 2, …; 0 is padding),
its place inside that example is `*_positions`, and its language and task are `*_language_ids` and `decoder_task_ids`.
A batch for prefix language models also has `decoder_causal_attention`: 1 where a token belongs to its example's prefix.
A batch for any order has `decoder_ranks`, 0 for a given token and then 1, 2, … in the order of writing,
`decoder_reads`, the rank below which a position may read, and `decoder_query_tokens`, what stands where it is asked.
A batch for lexical units has `decoder_placeholders`: 1 where a mask stands in place of the token.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

Tokens = Int[Array, "B T"]
SourceTokens = Int[Array, "B S"]
Segments = Int[Array, "B T"]  # 1, 2, …: the example a token belongs to; 0: padding
SourceSegments = Int[Array, "B S"]
Weights = Float[Array, "B T"]  # 1: counts in the loss, 0: does not
Hidden = Float[Array, "B T D"]
SourceHidden = Float[Array, "B S W"]
Logits = Float[Array, "B T V"]

Batch = Mapping[str, Array]
PyTree = Any
Params = dict[str, Any]  # nested dict of arrays
Axes = tuple[str | None, ...]  # logical axis names of one array, e.g. ("embed", "mlp")
Constrain = Callable[[Array, Axes], Array]  # pins an activation to the mesh by its logical axes


class Placement:
    """How arrays lie on devices. This one: all on one, where nothing is to be done; `mlm.parallel` has a mesh's."""

    def constrain(self, array: Array, axes: Axes) -> Array:
        """The activation, pinned by its logical axes."""
        return array

    def pieces(self, axis: str) -> int:
        """Into how many the mesh cuts this logical axis of an array."""
        return 1

    def by_expert(self, body: Callable, rows: Params, weights: Params, axes: Mapping[str, Axes]) -> Array:
        """Sum of body(rows, weights held, number of the first expert held) over the owners of experts, [G, …].

        rows: arrays [G, …] and weights: arrays [E, …], by names that `axes` gives logical axes to.
        """
        return body(rows, weights, 0)


ONE_DEVICE = Placement()


ENCODER_FEATURES = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions", "encoder_language_ids")
DECODER_FEATURES = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
    "decoder_language_ids",
    "decoder_task_ids",
)
ROW_FEATURES = ENCODER_FEATURES + DECODER_FEATURES

PAD_ID = 0  # also the decoder's first input, as in T5
EOS_ID = 1
UNK_ID = 2
