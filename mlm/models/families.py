"""Families of published models: a function each, whose arguments are sizes, and what turns a model into another.

A family's differences from T5 1.1 stand in its function.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlm.models.config import HeadSpec, ModelConfig, StackConfig
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
)
from mlm.types import EOS_ID


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


GEMMA_NORM = NormSpec(offset_one=True)


GEMMA_START = 3  # <bos>, in the order of ids here


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
    """T5Gemma (Zhang et al. 2025): Gemma 2 layers, windows of 4,096 in every other one, separate input tables. The
    decoder begins with <bos>.

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
        start_token=GEMMA_START,
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
        start_token=GEMMA_START,
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
    The decoder begins with the end of sequence.

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
        start_token=EOS_ID,
    )


def bert_style(
    *,
    d_model: int,
    d_ff: int,
    heads: int,
    layers: int,
    vocab_size: int,
    length: int = 512,
    order: str = "post",
    eps: float = 1e-5,
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
        norm=NormSpec(kind="layer", eps=eps),
        residual=ResidualSpec(order=order),
        embedding=EmbeddingSpec(
            std=0.02, positions="learned", length=length, offset=2, token_type=True, norm=order == "post"
        ),
        final_norm=order == "pre",
    )
    head = HeadSpec(kind="tied", mlm_transform=True, bias=True)
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, encoder=stack, decoder=None, head=head)


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
