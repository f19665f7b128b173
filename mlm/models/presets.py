"""Published models by name: tables of sizes for the functions of `families.py`. `mlm model show NAME` prints one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlm.models.config import ModelConfig, positioned
from mlm.models.families import (
    bert_style,
    fairseq_style,
    gemma_3,
    glm_style,
    language_aware,
    llama_style,
    nllb_moe,
    rnnsearch,
    sparse,
    switch_style,
    t5_style,
    t5gemma,
)
from mlm.models.specs import (
    ChimeraSpec,
    PositionSpec,
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

FAIRSEQ_COLUMNS = "d_model d_ff heads layers"  # layers: of each stack
M2M_100_SIZES = {"418m": (1024, 4096, 16, 12), "1_2b": (1024, 8192, 16, 24)}
NLLB_SIZES = {"600m": (1024, 4096, 16, 12), "1_3b": (1024, 8192, 16, 24), "3_3b": (2048, 8192, 16, 24)}

XLM_R_COLUMNS = "d_model d_ff heads layers vocab_size"
XLM_R_SIZES = {"base": (768, 3072, 12, 12, 250_002), "large": (1024, 4096, 16, 24, 250_002)}
XLM_R_XL_SIZES = {"xl": (2560, 10240, 32, 36, 250_880), "xxl": (4096, 16384, 32, 48, 250_880)}

LLAMA_COLUMNS = "d_model d_ff heads kv_heads layers"
EUROBERT_SIZES = {
    "210m": (768, 3072, 12, 12, 12),
    "610m": (1152, 4096, 18, 6, 26),
    "2_1b": (2304, 6144, 18, 6, 32),
}
LLAMA_3_2_SIZES = {"1b": (2048, 8192, 32, 8, 16), "3b": (3072, 8192, 24, 8, 28)}
LLAMA_3_1_SIZES = {"8b": (4096, 14336, 32, 8, 32), "70b": (8192, 28672, 64, 8, 80)}
LLAMA_2_7B = (4096, 11008, 32, 32, 32)

RNNSEARCH_COLUMNS = "d_model width alignment layers"  # layers: of each stack

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
    start_token: int | None = None,
    chimera: ChimeraSpec | None = None,
) -> ModelConfig:
    """The published model `name`, with what a run may change about it; None keeps the published value.

    router: makes every `every`-th layer's feed-forward network a mixture of experts (`sparse`). position: how all
    self-attention knows distances, in place of what it has (`positioned`).
    language_parts: what is kept for each of so many `languages` ("norms", "bridge", "offsets": `language_aware`).
    start_token: what the decoder reads first; published ids mean something else in a vocabulary of one's own.
    chimera: heads that guess ahead, for the objective and the proposer of that name.
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
    whole = {"vocab_size": vocab_size, "dtype": dtype, "start_token": start_token, "chimera": chimera}
    top: dict[str, Any] = {k: v for k, v in whole.items() if v is not None}
    return replace(config, **top | {side: replace(own, **stack) for side, own in config.stacks().items()})
