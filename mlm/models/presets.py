"""Published models as values, a function per family and a table of its sizes.

A family's differences from T5 1.1 stand in its function; `mlm model show NAME` prints what comes out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlm.models.config import HeadSpec, ModelConfig, StackConfig, positioned
from mlm.models.specs import (
    AttentionSpec,
    EmbeddingSpec,
    FFNSpec,
    LayerSpec,
    NormSpec,
    PositionSpec,
    RecurrentSpec,
    ResidualSpec,
    RouterSpec,
    check_choice,
)
from mlm.registry import Registry

T5_VOCAB = 32_128
MT5_VOCAB = 250_112  # 250,000 pieces + 100 sentinels, padded to a multiple of 128
UMT5_VOCAB = 256_384
BYT5_VOCAB = 384

T5_COLUMNS = "d_model d_ff heads head_dim layers"  # layers: (encoder, decoder)
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


GEMMA_COLUMNS = "d_model d_ff heads kv_heads head_dim layers"  # layers: of each stack
T5GEMMA_SIZES = {
    "s_s": (512, 1024, 8, 8, 64, 8),
    "b_b": (768, 2048, 12, 12, 64, 12),
    "l_l": (1024, 2816, 16, 16, 64, 24),
    "ml_ml": (1152, 6912, 4, 4, 256, 26),
    "xl_xl": (2048, 5120, 32, 32, 64, 24),
    "2b_2b": (2304, 9216, 8, 4, 256, 26),
    "9b_9b": (3584, 14336, 16, 8, 256, 42),
}
GEMMA_3_COLUMNS = f"{GEMMA_COLUMNS} window factor"  # local window; by how much positions of global layers are stretched
GEMMA_3_SIZES = {
    "270m": (640, 2048, 4, 1, 256, 18, 512, 1.0),
    "1b": (1152, 6912, 4, 1, 256, 26, 512, 1.0),
    "4b": (2560, 10240, 8, 4, 256, 34, 1024, 8.0),
}
GEMMA_NORM = NormSpec(offset_one=True)
SANDWICH = ResidualSpec(order="sandwich")


def t5gemma(
    *,
    d_model: int,
    d_ff: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    encoder: Mapping[str, int] | None = None,
    vocab_size: int = 256_000,
) -> ModelConfig:
    """T5Gemma (Zhang et al. 2025): Gemma 2 layers, windows of 4,096 in every other one, separate input tables.

    encoder: its sizes, named as the decoder's, where it is a model of another size.
    """
    own = {"d_model": d_model, "d_ff": d_ff, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    sizes = {False: dict(encoder or {**own, "layers": layers}), True: {**own, "layers": layers}}

    def stack(causal: bool) -> StackConfig:
        size = sizes[causal]
        attention = AttentionSpec(
            source="self",
            heads=size["heads"],
            kv_heads=size["kv_heads"],
            head_dim=size["head_dim"],
            scale=size["head_dim"] ** -0.5,
            softcap=50.0,
        )
        rope, ffn = PositionSpec(kind="rope"), FFNSpec(d_ff=size["d_ff"])
        rest = (replace(attention, source="cross"), ffn) if causal else (ffn,)
        # The encoder's windows reach 4,095 tokens to both sides.
        kinds = [replace(attention, position=rope, window=window) for window in (4096 if causal else 8191, None)]
        group = tuple(LayerSpec(sublayers=(kind, *rest)) for kind in kinds)
        return _gemma_stack(group, size["layers"], causal, size["d_model"])

    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack(False),
        decoder=stack(True),
        encoder_width=sizes[False]["d_model"],
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


FAIRSEQ_COLUMNS = "d_model d_ff heads layers"  # layers: of each stack
M2M_100_SIZES = {"418m": (1024, 4096, 16, 12), "1_2b": (1024, 8192, 16, 24)}
NLLB_SIZES = {"600m": (1024, 4096, 16, 12), "1_3b": (1024, 8192, 16, 24), "3_3b": (2048, 8192, 16, 24)}


def fairseq_style(
    *,
    d_model: int,
    d_ff: int,
    heads: int,
    layers: int,
    vocab_size: int,
    activation: str = "relu",
    learned: bool = False,
) -> ModelConfig:
    """M2M-100 and NLLB (Fan et al. 2020, NLLB team 2022): LayerNorm first, biases, sinusoids, one table for all ends.

    learned: mBART (Liu et al. 2020): 1,024 learned positions and a norm after them. WMT21 (Tran et al. 2021) is a wide
    M2M-100 with the vocabulary of its translation checkpoints.
    """
    head_dim = d_model // heads
    own = AttentionSpec(source="self", heads=heads, head_dim=head_dim, scale=head_dim**-0.5, bias=True)
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


XLM_R_COLUMNS = "d_model d_ff heads layers vocab_size"
XLM_R_SIZES = {"base": (768, 3072, 12, 12, 250_002), "large": (1024, 4096, 16, 24, 250_002)}
XLM_R_XL_SIZES = {"xl": (2560, 10240, 32, 36, 250_880), "xxl": (4096, 16384, 32, 48, 250_880)}


def bert_style(
    *, d_model: int, d_ff: int, heads: int, layers: int, vocab_size: int, length: int = 512, order: str = "post"
) -> ModelConfig:
    """XLM-R (Conneau et al. 2020): BERT's encoder, norms after the sublayers and one after the embedding.

    order "pre": XLM-R XL and XXL (Goyal et al. 2021), norms first and one at the end. Positions start behind the
    padding's, whose id is 1, so the table has two rows more than an example may have tokens.
    """
    head_dim = d_model // heads
    own = AttentionSpec(source="self", heads=heads, head_dim=head_dim, scale=head_dim**-0.5, bias=True)
    stack = StackConfig(
        group=(LayerSpec(sublayers=(own, FFNSpec(d_ff=d_ff, activation="gelu", bias=True))),),
        repeats=layers,
        causal=False,
        norm=NormSpec(kind="layer", eps=1e-5),
        residual=ResidualSpec(order=order),
        embedding=EmbeddingSpec(
            std=0.02, positions="learned", length=length, offset=2, token_type=True, norm=order == "post"
        ),
        final_norm=order == "pre",
    )
    head = HeadSpec(kind="tied", mlm_transform=True, bias=True)
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, encoder=stack, decoder=None, head=head)


LLAMA_COLUMNS = "d_model d_ff heads kv_heads layers"
EUROBERT_SIZES = {
    "210m": (768, 3072, 12, 12, 12),
    "610m": (1152, 4096, 18, 6, 26),
    "2_1b": (2304, 6144, 18, 6, 32),
}
LLAMA_3_2_SIZES = {"1b": (2048, 8192, 32, 8, 16), "3b": (3072, 8192, 24, 8, 28)}
LLAMA_3_1_SIZES = {"8b": (4096, 14336, 32, 8, 32), "70b": (8192, 28672, 64, 8, 80)}
LLAMA_2_7B = (4096, 11008, 32, 32, 32)


def llama_style(
    *,
    d_model: int,
    d_ff: int,
    heads: int,
    kv_heads: int,
    layers: int,
    vocab_size: int,
    rope: PositionSpec,
    encoder: bool = False,
    tied: bool = False,
) -> ModelConfig:
    """Llama (Touvron et al. 2023): rotated positions, RMS norms first, SwiGLU, grouped key heads, no biases.

    encoder: EuroBERT (Boizard et al. 2025), the same layers reading in both directions.
    """
    head_dim = d_model // heads
    own = AttentionSpec(
        source="self", heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, position=rope
    )
    stack = StackConfig(
        group=(LayerSpec(sublayers=(own, FFNSpec(d_ff=d_ff, activation="swiglu"))),),
        repeats=layers,
        causal=not encoder,
        norm=NormSpec(eps=1e-5),
        embedding=EmbeddingSpec(std=0.02),
    )
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack if encoder else None,
        decoder=None if encoder else stack,
        head=HeadSpec(kind="tied" if tied else "linear"),
    )


def glm_style(*, d_model: int, d_ff: int, heads: int, layers: int, vocab_size: int) -> ModelConfig:
    """GLM-130B (Zeng et al. 2023) as a left-to-right decoder: DeepNorm with exponents 1/2, rotated positions, biases.

    The norm that GLM's code applies before its first layer is the embedding's here, the one after its last layer the
    last sublayer's. Not here: GLM lets the given part of a text be read in both directions.
    """
    head_dim = d_model // heads
    own = AttentionSpec(
        source="self",
        heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        position=PositionSpec(kind="rope"),
        bias=True,
    )
    stack = StackConfig(
        group=(LayerSpec(sublayers=(own, FFNSpec(d_ff=d_ff, activation="geglu_erf", bias=True))),),
        repeats=layers,
        causal=True,
        norm=NormSpec(kind="layer", eps=1e-5),
        residual=ResidualSpec(order="post", alpha=(2 * layers) ** 0.5, gain=(2 * layers) ** -0.5),
        embedding=EmbeddingSpec(std=d_model**-0.5, norm=True, gradient=0.1),
        final_norm=False,
    )
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, encoder=None, decoder=stack, head=HeadSpec(kind="tied"))


RNNSEARCH_COLUMNS = "d_model width alignment layers"  # layers: of each stack


def rnnsearch(*, d_model: int, width: int, alignment: int, layers: int, vocab_size: int) -> ModelConfig:
    """RNNsearch (Bahdanau et al. 2015): gated recurrent units in both directions, then some that attend by addition.

    Not as published: norms and residuals as in any stack here, so that the embedding reaches the output by way of the
    residual; the encoder's states are projected to `d_model` before they are attended to; the head is linear, where the
    paper has a maxout layer of 500 before it.
    """

    def stack(causal: bool) -> StackConfig:
        spec = RecurrentSpec(width=width, attends=causal, alignment=alignment if causal else None)
        return StackConfig(group=(LayerSpec(sublayers=(spec,)),), repeats=layers, causal=causal)

    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder=stack(False),
        decoder=stack(True),
        share_embedding=False,
    )


SWITCH_BASE = (768, 3072, 12, 64, (12, 12))
SWITCH_LARGE = (1024, 4096, 16, 64, (24, 24))
SWITCH_XXL = (4096, 10240, 64, 64, (24, 24))
SWITCH_C = (2080, 6144, 30, 64, (15, 15))
ST_MOE_SIZES = {  # … experts, capacity in training and in evaluation
    "base": (768, 2048, 12, 64, (12, 12), 16, 1.25, 2.0, 1e-4),
    "xl": (2048, 5120, 32, 64, (24, 24), 16, 2.0, 4.0, 1e-4),
    "32b": (5120, 20480, 64, 128, (24, 24), 64, 1.25, 2.0, 1e-3),
}
NLLB_MOE_54B = (2048, 8192, 16, 24)


def sparse(config: ModelConfig, router: RouterSpec, *, every: int, extra: bool = False) -> ModelConfig:
    """The model with every `every`-th layer's last feed-forward network a mixture of experts of its width, the last of
    each `every` layers; `extra`: behind a mixture stands the dense network as well (ST-MoE). Expert choice, which looks
    ahead, stays out of a decoder.

    Raises ValueError when a stack is not made of equal layers.
    """

    def stack(own: StackConfig) -> StackConfig:
        if len(own.group) > 1:
            raise ValueError(
                f"a group of {len(own.group)} different layers is not made sparse by every={every}; write it"
            )
        if own.causal and router.kind == "expert_choice":
            return own
        (dense,) = own.group
        *others, ffn = dense.sublayers
        if not isinstance(ffn, FFNSpec):
            raise ValueError("a layer is made sparse in its last sublayer, which must be a feed-forward network")
        mixture = (replace(ffn, router=router), ffn) if extra else (replace(ffn, router=router),)
        group = (dense,) * (every - 1) + (LayerSpec(sublayers=(*others, *mixture)),)
        return replace(own, group=group, repeats=own.repeats // every, rest=own.repeats % every)

    stacks: dict[str, Any] = {name: stack(own) for name, own in config.stacks().items()}
    return replace(config, **stacks)


def switch_style(
    *,
    experts: int,
    every: int = 2,
    k: int = 1,
    capacity: float = 1.25,
    eval_capacity: float | None = None,
    z: float = 0.0,
    extra: bool = False,
    **dense: Any,
) -> ModelConfig:
    """Switch (Fedus et al. 2021) and, with k=2 and extra dense networks, ST-MoE (Zoph et al. 2022): a sparse T5.

    Experts start at 0.1 of the variance. Evaluation drops nothing unless `eval_capacity` is set.
    """
    router = RouterSpec(
        experts=experts, k=k, capacity=capacity, eval_capacity=eval_capacity, balance=0.01, z=z, init=0.1**0.5
    )
    return sparse(t5_style(**dense), router, every=every, extra=extra)


def nllb_moe(*, experts: int, **dense: Any) -> ModelConfig:
    """NLLB's mixture (NLLB team 2022): two experts a token in every fourth layer, output masking."""
    router = RouterSpec(experts=experts, k=2, gates="kept", capacity=2.0, output_masking=0.2)
    return sparse(fairseq_style(**dense), router, every=4)


class Preset(NamedTuple):
    """A published model: call it for its config."""

    family: str
    make: Callable[..., ModelConfig]
    options: dict[str, Any]

    def __call__(self) -> ModelConfig:
        return self.make(**self.options)


PRESETS: Registry[Preset] = Registry("model preset")


def _add(
    family: str, name: str, make: Callable[..., ModelConfig], columns: str, sizes: Mapping[str, tuple], **more: Any
) -> None:
    """Registers a family: `name` filled with each size, `make` called with its row of columns and with `more`."""
    for size, row in sizes.items():
        options = dict(zip(columns.split(), row, strict=True))
        PRESETS[name.format(size)] = Preset(family, make, options | more)


_add("T5 1.1", "{}", t5_style, T5_COLUMNS, {"tiny": TINY}, vocab_size=512)
_add("T5", "t5_{}", t5_style, T5_COLUMNS, T5_1_0_SIZES, vocab_size=T5_VOCAB, activation="relu", tied=True)
_add("T5 1.1", "t5_1_1_{}", t5_style, T5_COLUMNS, T5_1_1_SIZES, vocab_size=T5_VOCAB)
_add("mT5", "mt5_{}", t5_style, T5_COLUMNS, T5_1_1_SIZES, vocab_size=MT5_VOCAB)
_add("umT5", "umt5_{}", t5_style, T5_COLUMNS, T5_1_1_SIZES, vocab_size=UMT5_VOCAB, share="layer")
_add("ByT5", "byt5_{}", t5_style, T5_COLUMNS, BYT5_SIZES, vocab_size=BYT5_VOCAB)
_add("T5Gemma", "t5gemma_{}", t5gemma, GEMMA_COLUMNS, T5GEMMA_SIZES)
_9b = dict(zip(GEMMA_COLUMNS.split(), T5GEMMA_SIZES["9b_9b"], strict=True))
_add("T5Gemma", "t5gemma_9b_{}", t5gemma, GEMMA_COLUMNS, {"2b": T5GEMMA_SIZES["2b_2b"]}, encoder=_9b)
_add("T5Gemma 2", "t5gemma2_{}", gemma_3, GEMMA_3_COLUMNS, GEMMA_3_SIZES, encoder=True)
_add("Gemma 3", "gemma_3_{}", gemma_3, GEMMA_3_COLUMNS, GEMMA_3_SIZES, encoder=False)
_add("M2M-100", "m2m_100_{}", fairseq_style, FAIRSEQ_COLUMNS, M2M_100_SIZES, vocab_size=128_112)
_add("NLLB", "nllb_{}", fairseq_style, FAIRSEQ_COLUMNS, NLLB_SIZES, vocab_size=256_206)
_wide = {"24_wide": (2048, 16384, 32, 24)}
_add("WMT21", "wmt21_dense_{}", fairseq_style, FAIRSEQ_COLUMNS, _wide, vocab_size=128_009)
_mbart = {"vocab_size": 250_054, "activation": "gelu", "learned": True}
_add("mBART", "mbart_{}", fairseq_style, FAIRSEQ_COLUMNS, {"50": (1024, 4096, 16, 12)}, **_mbart)
_add("XLM-R", "xlm_r_{}", bert_style, XLM_R_COLUMNS, XLM_R_SIZES)
_add("XLM-R", "xlm_r_{}", bert_style, XLM_R_COLUMNS, XLM_R_XL_SIZES, order="pre")
_euro = {"vocab_size": 128_256, "rope": PositionSpec(kind="rope", base=250_000.0), "encoder": True}
_add("EuroBERT", "eurobert_{}", llama_style, LLAMA_COLUMNS, EUROBERT_SIZES, **_euro)
_add("GLM", "glm_{}", glm_style, XLM_R_COLUMNS, {"130b": (12288, 32768, 96, 70, 150_528)})
_slow = PositionSpec(kind="rope", base=500_000.0, context=8192)
_rope = {factor: replace(_slow, factor=factor) for factor in (8.0, 32.0)}
_add(
    "Llama",
    "llama_2_{}",
    llama_style,
    LLAMA_COLUMNS,
    {"7b": LLAMA_2_7B},
    vocab_size=32_000,
    rope=PositionSpec(kind="rope"),
)
_add("Llama", "llama_3_1_{}", llama_style, LLAMA_COLUMNS, LLAMA_3_1_SIZES, vocab_size=128_256, rope=_rope[8.0])
_add(
    "Llama",
    "llama_3_2_{}",
    llama_style,
    LLAMA_COLUMNS,
    LLAMA_3_2_SIZES,
    vocab_size=128_256,
    rope=_rope[32.0],
    tied=True,
)
_add("RNNsearch", "rnnsearch_{}", rnnsearch, RNNSEARCH_COLUMNS, {"50": (620, 1000, 1000, 1)}, vocab_size=30_000)
for _experts in (8, 16, 32, 64, 128, 256):
    _switch: dict[str, Any] = {"vocab_size": T5_VOCAB, "activation": "relu", "tied": True, "experts": _experts}
    _add("Switch", "switch_{}_" + str(_experts), switch_style, T5_COLUMNS, {"base": SWITCH_BASE}, **_switch)
_switch["experts"] = 128
_add("Switch", "switch_{}_128", switch_style, T5_COLUMNS, {"large": SWITCH_LARGE}, **_switch)
_xxl = {"vocab_size": T5_VOCAB, "experts": 128}
_add("Switch", "switch_{}", switch_style, T5_COLUMNS, {"xxl": SWITCH_XXL}, **_xxl)
_c = {"vocab_size": T5_VOCAB, "activation": "relu", "experts": 2048, "every": 1, "capacity": 1.0}
_add("Switch", "switch_{}", switch_style, T5_COLUMNS, {"c": SWITCH_C}, **_c)
_st_moe = T5_COLUMNS + " experts capacity eval_capacity z"
_add("ST-MoE", "st_moe_{}", switch_style, _st_moe, ST_MOE_SIZES, vocab_size=T5_VOCAB, every=4, k=2, extra=True)
_nllb = {"vocab_size": 256_206, "experts": 128}
_add("NLLB-MoE", "nllb_moe_{}", nllb_moe, FAIRSEQ_COLUMNS, {"54b": NLLB_MOE_54B}, **_nllb)


LANGUAGE_PARTS = ("norms", "bridge", "offsets")


def language_aware(
    config: ModelConfig,
    *,
    languages: int,
    norms: bool = False,
    bridge: bool = False,
    offsets: tuple[str, ...] = (),
    scripts: tuple[int, ...] = (),
) -> ModelConfig:
    """The model with parts of its own for each of that many target languages (ids, 0 for none included).

    norms: every scale and bias of a layer's, embedding's or final norm (LALN). bridge: a matrix between the stacks
    (LALT; both Zhang et al. 2020). offsets: "language" and "script" vectors before the head (LangSAMP; Liu et al.
    2025), the latter by the number of every language's script. At first the model computes what it did without them.
    """
    own: dict[str, Any] = {
        side: replace(stack, norm=replace(stack.norm, languages=languages if norms else None))
        for side, stack in config.stacks().items()
    }
    head = replace(config.head, offsets=offsets)
    aware: dict[str, Any] = {"languages": languages, "bridge": bridge, "scripts": scripts, "head": head}
    return replace(config, **own, **aware)


def preset(
    name: str,
    *,
    vocab_size: int | None = None,
    dtype: str | None = None,
    dropout: float | None = None,
    remat: str | None = None,
    scan: bool | None = None,
    attention: str | None = None,
    router: RouterSpec | None = None,
    every: int = 2,
    position: PositionSpec | None = None,
    languages: int | None = None,
    language_parts: tuple[str, ...] = (),
) -> ModelConfig:
    """The published model `name`, with what a run may change about it; None keeps the published value.

    router: makes every `every`-th layer's feed-forward network a mixture of experts (`sparse`). position: how all
    self-attention knows distances, in place of what it has (`positioned`).
    language_parts: what is kept for each of so many `languages` ("norms", "bridge", "offsets": `language_aware`).
    Raises KeyError with the nearest names for an unknown preset.
    """
    config = PRESETS[name]()
    if languages is not None or language_parts:
        for part in language_parts:
            check_choice("preset", "language_parts", part, LANGUAGE_PARTS)
        if languages is None:
            raise ValueError(f"language_parts={language_parts} needs languages, the number of language ids")
        kept = {part: part in language_parts for part in LANGUAGE_PARTS}
        config = language_aware(
            config,
            languages=languages,
            norms=kept["norms"],
            bridge=kept["bridge"],
            offsets=("language",) if kept["offsets"] else (),
        )
    config = config if router is None else sparse(config, router, every=every)
    config = config if position is None else positioned(config, position)
    execution = {"dropout": dropout, "remat": remat, "scan": scan, "attention": attention}
    stack: dict[str, Any] = {k: v for k, v in execution.items() if v is not None}
    top: dict[str, Any] = {k: v for k, v in (("vocab_size", vocab_size), ("dtype", dtype)) if v is not None}
    return replace(config, **top | {side: replace(own, **stack) for side, own in config.stacks().items()})
