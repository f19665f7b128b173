"""Published models as values, a function per family and a table of its sizes.

A family's differences from T5 1.1 stand in its function; `mlm model show NAME` prints what comes out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mlm.models.config import (
    AttentionSpec,
    EmbeddingSpec,
    FFNSpec,
    HeadSpec,
    LayerSpec,
    ModelConfig,
    NormSpec,
    PositionSpec,
    ResidualSpec,
    StackConfig,
)
from mlm.registry import Registry

T5_VOCAB = 32_128
MT5_VOCAB = 250_112  # 250,000 pieces + 100 sentinels, padded to a multiple of 128
UMT5_VOCAB = 256_384
BYT5_VOCAB = 384

# Columns: d_model, d_ff, heads, head_dim, (encoder, decoder) layers.
TINY = (128, 256, 4, 32, (2, 2))
T5_1_0_SIZES = {
    "small": (512, 2048, 8, 64, (6, 6)),
    "base": (768, 3072, 12, 64, (12, 12)),
    "large": (1024, 4096, 16, 64, (24, 24)),
    "3b": (1024, 16384, 32, 128, (24, 24)),
    "11b": (1024, 65536, 128, 128, (24, 24)),
}
T5_1_1_SIZES = {
    "small": (512, 1024, 6, 64, (8, 8)),
    "base": (768, 2048, 12, 64, (12, 12)),
    "large": (1024, 2816, 16, 64, (24, 24)),
    "xl": (2048, 5120, 32, 64, (24, 24)),
    "xxl": (4096, 10240, 64, 64, (24, 24)),
}
BYT5_SIZES = {
    "small": (1472, 3584, 6, 64, (12, 4)),
    "base": (1536, 3968, 12, 64, (18, 6)),
    "large": (1536, 3840, 16, 64, (36, 12)),
    "xl": (2560, 6720, 32, 64, (36, 12)),
    "xxl": (4672, 12352, 64, 64, (36, 12)),
}


def t5_style(
    *,
    vocab_size: int,
    d_model: int,
    d_ff: int,
    heads: int,
    head_dim: int,
    layers: tuple[int, int],
    activation: str = "geglu",
    tied: bool = False,
    share: str = "stack",
) -> ModelConfig:
    """T5 1.1 (Raffel et al. 2020; Xue et al. 2021): pre-norm, distance buckets, no biases. layers = (encoder, decoder).

    T5 1.0: activation "relu" and a tied head, logits scaled by D^-1/2. umT5: share="layer", a position table a layer.
    """
    own = AttentionSpec(source="self", heads=heads, head_dim=head_dim, position=PositionSpec(share=share))
    cross = AttentionSpec(source="cross", heads=heads, head_dim=head_dim)
    ffn = FFNSpec(d_ff=d_ff, activation=activation)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=StackConfig(group=(LayerSpec(sublayers=(own, ffn)),), repeats=layers[0], causal=False),
        decoder=StackConfig(group=(LayerSpec(sublayers=(own, cross, ffn)),), repeats=layers[1], causal=True),
        head=HeadSpec(kind="tied", multiply=d_model**-0.5) if tied else HeadSpec(),
    )


# Columns: d_model, d_ff, heads, kv_heads, head_dim, layers of each stack, and what a family adds.
T5GEMMA_SIZES = {
    "s_s": (512, 1024, 8, 8, 64, 8),
    "b_b": (768, 2048, 12, 12, 64, 12),
    "l_l": (1024, 2816, 16, 16, 64, 24),
    "ml_ml": (1152, 6912, 4, 4, 256, 26),
    "xl_xl": (2048, 5120, 32, 32, 64, 24),
    "2b_2b": (2304, 9216, 8, 4, 256, 26),
    "9b_9b": (3584, 14336, 16, 8, 256, 42),
}
GEMMA_3_SIZES = {  # … local window, and by how much positions of global layers are stretched
    "270m": (640, 2048, 4, 1, 256, 18, 512, 1.0),
    "1b": (1152, 6912, 4, 1, 256, 26, 512, 1.0),
    "4b": (2560, 10240, 8, 4, 256, 34, 1024, 8.0),
}
GEMMA_NORM = NormSpec(offset_one=True)
SANDWICH = ResidualSpec(order="sandwich")


def t5gemma(
    *, d_model: int, d_ff: int, heads: int, kv_heads: int, head_dim: int, layers: int, vocab_size: int = 256_000
) -> ModelConfig:
    """T5Gemma (Zhang et al. 2025): Gemma 2 layers, windows of 4,096 in every other one, separate input tables."""
    attention = AttentionSpec(
        source="self", heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, softcap=50.0
    )
    rope = PositionSpec(kind="rope")
    cross, ffn = replace(attention, source="cross"), FFNSpec(d_ff=d_ff)

    def stack(causal: bool) -> StackConfig:
        # The encoder's windows reach 4,095 tokens to both sides.
        kinds = [replace(attention, position=rope, window=window) for window in (4096 if causal else 8191, None)]
        group = tuple(LayerSpec(sublayers=(own, cross, ffn) if causal else (own, ffn)) for own in kinds)
        return _gemma_stack(group, layers, causal, d_model)

    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack(False),
        decoder=stack(True),
        share_embedding=False,
        head=HeadSpec(kind="tied", softcap=30.0),
    )


def gemma_3(
    *,
    d_model: int,
    d_ff: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    window: int,
    factor: float,
    encoder: bool,
    vocab_size: int = 262_144,
) -> ModelConfig:
    """Gemma 3's text decoder, or with an encoder T5Gemma 2: five local layers to a global one, normed queries and keys.

    T5Gemma 2's decoder reads itself and the encoder under one softmax (joint attention); one input table serves both
    stacks and the head.
    """
    attention = AttentionSpec(
        source="self", heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=256**-0.5, qk_norm="rms"
    )
    local = replace(attention, position=PositionSpec(kind="rope", base=1e4), window=window)
    far = replace(attention, position=PositionSpec(kind="rope", base=1e6, factor=factor))
    ffn = FFNSpec(d_ff=d_ff)

    def stack(source: str) -> StackConfig:
        group = tuple(LayerSpec(sublayers=(replace(own, source=source), ffn)) for own in (*[local] * 5, far))
        return _gemma_stack(group, layers, source == "joint" or not encoder, d_model)

    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack("self") if encoder else None,
        decoder=stack("joint" if encoder else "self"),
        head=HeadSpec(kind="tied"),
    )


def _gemma_stack(group: tuple[LayerSpec, ...], layers: int, causal: bool, d_model: int) -> StackConfig:
    return StackConfig(
        group=group,
        repeats=layers // len(group),
        rest=layers % len(group),
        causal=causal,
        norm=GEMMA_NORM,
        residual=SANDWICH,
        embedding=EmbeddingSpec(multiply=d_model**0.5),
    )


# Columns: d_model, d_ff, layers of each stack, vocabulary; 16 heads.
FAIRSEQ_SIZES = {
    "m2m_100_418m": (1024, 4096, 12, 128_112),
    "m2m_100_1_2b": (1024, 8192, 24, 128_112),
    "nllb_600m": (1024, 4096, 12, 256_206),
    "nllb_1_3b": (1024, 8192, 24, 256_206),
    "nllb_3_3b": (2048, 8192, 24, 256_206),
}


def fairseq_style(
    *, d_model: int, d_ff: int, layers: int, vocab_size: int, activation: str = "relu", learned: bool = False
) -> ModelConfig:
    """M2M-100 and NLLB (Fan et al. 2020, NLLB team 2022): LayerNorm first, biases, sinusoids, one table for all ends.

    learned: mBART (Liu et al. 2020): 1,024 learned positions and a norm after them.
    """
    head_dim = d_model // 16
    own = AttentionSpec(source="self", heads=16, head_dim=head_dim, scale=head_dim**-0.5, bias=True)
    cross, ffn = replace(own, source="cross"), FFNSpec(d_ff=d_ff, activation=activation, bias=True)
    positions = {"positions": "learned", "length": 1024, "norm": True} if learned else {"positions": "sinusoidal"}
    # Positions start behind the padding's, whose id is 1.
    embedding = EmbeddingSpec(multiply=d_model**0.5, offset=2, **positions)

    def stack(*sublayers: AttentionSpec | FFNSpec) -> StackConfig:
        return StackConfig(
            group=(LayerSpec(sublayers=sublayers),),
            repeats=layers,
            causal=len(sublayers) == 3,
            norm=NormSpec(kind="layer", eps=1e-5),
            embedding=embedding,
        )

    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack(own, ffn),
        decoder=stack(own, cross, ffn),
        head=HeadSpec(kind="tied"),
    )


def _row(make: Callable[..., ModelConfig], columns: str, size: tuple, **more: Any) -> ModelConfig:
    """The family `make` with a row of its table, the columns named in order, and what else sets the member apart."""
    return make(**dict(zip(columns.split(), size, strict=True)), **more)


_t5 = partial(_row, t5_style, "d_model d_ff heads head_dim layers")
PRESETS: Registry[Callable[[], ModelConfig]] = Registry("model preset")
PRESETS["tiny"] = partial(_t5, TINY, vocab_size=512)
for _size, _columns in T5_1_0_SIZES.items():
    PRESETS[f"t5_{_size}"] = partial(_t5, _columns, vocab_size=T5_VOCAB, activation="relu", tied=True)
for _size, _columns in T5_1_1_SIZES.items():
    PRESETS[f"t5_1_1_{_size}"] = partial(_t5, _columns, vocab_size=T5_VOCAB)
    PRESETS[f"mt5_{_size}"] = partial(_t5, _columns, vocab_size=MT5_VOCAB)
    PRESETS[f"umt5_{_size}"] = partial(_t5, _columns, vocab_size=UMT5_VOCAB, share="layer")
for _size, _columns in BYT5_SIZES.items():
    PRESETS[f"byt5_{_size}"] = partial(_t5, _columns, vocab_size=BYT5_VOCAB)
for _size, _columns in T5GEMMA_SIZES.items():
    PRESETS[f"t5gemma_{_size}"] = partial(_row, t5gemma, "d_model d_ff heads kv_heads head_dim layers", _columns)
for _size, _columns in GEMMA_3_SIZES.items():
    _names = "d_model d_ff heads kv_heads head_dim layers window factor"
    PRESETS[f"gemma_3_{_size}"] = partial(_row, gemma_3, _names, _columns, encoder=False)
    PRESETS[f"t5gemma2_{_size}"] = partial(_row, gemma_3, _names, _columns, encoder=True)
for _size, _columns in FAIRSEQ_SIZES.items():
    PRESETS[_size] = partial(_row, fairseq_style, "d_model d_ff layers vocab_size", _columns)
PRESETS["mbart_50"] = partial(
    fairseq_style, d_model=1024, d_ff=4096, layers=12, vocab_size=250_054, activation="gelu", learned=True
)


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
    top: dict[str, Any] = {k: v for k, v in (("vocab_size", vocab_size), ("dtype", dtype)) if v is not None}
    return replace(config, **top | {side: replace(own, **stack) for side, own in config.stacks().items()})
