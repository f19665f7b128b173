"""Published models as values, with their table and size.

T5 1.1 / mT5 (Xue et al. 2021): pre-norm encoder-decoder, gated-GELU feed-forward, untied head, no biases.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mlm.models.config import AttentionSpec, FFNSpec, LayerSpec, ModelConfig, StackConfig
from mlm.registry import Registry

MT5_VOCAB = 250_112  # 250,000 pieces + 100 sentinels, padded to a multiple of 128
T5_VOCAB = 32_128

#                 d_model  d_ff  heads  head_dim  layers (encoder, decoder)
T5_1_1_SIZES = {
    "small": (512, 1024, 6, 64, (8, 8)),
    "base": (768, 2048, 12, 64, (12, 12)),
    "large": (1024, 2816, 16, 64, (24, 24)),
    "xl": (2048, 5120, 32, 64, (24, 24)),
    "xxl": (4096, 10240, 64, 64, (24, 24)),
}
TINY = (128, 256, 4, 32, (2, 2))


def t5_style(
    *, vocab_size: int, d_model: int, d_ff: int, heads: int, head_dim: int, layers: tuple[int, int]
) -> ModelConfig:
    """A T5 1.1 encoder-decoder of the given widths; layers = (encoder, decoder)."""
    self_attention = AttentionSpec(source="self", heads=heads, head_dim=head_dim)
    cross_attention = AttentionSpec(source="cross", heads=heads, head_dim=head_dim)
    ffn = FFNSpec(d_ff=d_ff, activation="geglu")
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=StackConfig(group=(LayerSpec(sublayers=(self_attention, ffn)),), repeats=layers[0], causal=False),
        decoder=StackConfig(
            group=(LayerSpec(sublayers=(self_attention, cross_attention, ffn)),), repeats=layers[1], causal=True
        ),
    )


def _t5_row(size: tuple, vocab_size: int) -> ModelConfig:
    d_model, d_ff, heads, head_dim, layers = size
    return t5_style(vocab_size=vocab_size, d_model=d_model, d_ff=d_ff, heads=heads, head_dim=head_dim, layers=layers)


PRESETS: Registry[Callable[[], ModelConfig]] = Registry("model preset")
PRESETS["tiny"] = partial(_t5_row, TINY, 512)
for _size, _row in T5_1_1_SIZES.items():
    PRESETS[f"t5_1_1_{_size}"] = partial(_t5_row, _row, T5_VOCAB)
    PRESETS[f"mt5_{_size}"] = partial(_t5_row, _row, MT5_VOCAB)


def preset(
    name: str,
    *,
    vocab_size: int | None = None,
    dtype: str | None = None,
    dropout: float | None = None,
    remat: str | None = None,
    scan: bool | None = None,
) -> ModelConfig:
    """The published model `name`, with what a run may change about it; None keeps the published value.

    Raises KeyError with the nearest names for an unknown preset.
    """
    config = PRESETS[name]()
    stack: dict[str, Any] = {k: v for k, v in (("dropout", dropout), ("remat", remat), ("scan", scan)) if v is not None}
    config = replace(config, encoder=replace(config.encoder, **stack), decoder=replace(config.decoder, **stack))
    top: dict[str, Any] = {k: v for k, v in (("vocab_size", vocab_size), ("dtype", dtype)) if v is not None}
    return replace(config, **top)
