"""What the model is asked to do. A row objective is a function (hidden, kernel, batch, *, num_languages, …) -> Loss."""

from mlm.objectives.cross_entropy import TokenStats, head_cross_entropy, token_cross_entropy
from mlm.objectives.lexical_units import lexical_units
from mlm.objectives.text_to_text import Loss, text_to_text
from mlm.registry import Registry

# mask_block is text to text on batches that `objectives.mask_block.masked` has prepared, chimera that of several heads,
# which `objectives.chimera.chimera` makes one.
OBJECTIVES = Registry(
    "objective",
    text_to_text=text_to_text,
    mask_block=text_to_text,
    lexical_units=lexical_units,
    chimera=text_to_text,
)

__all__ = ["OBJECTIVES", "Loss", "TokenStats", "head_cross_entropy", "text_to_text", "token_cross_entropy"]
