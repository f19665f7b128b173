"""T5Gemma, Gemma 3 text and T5Gemma 2 (its text; image parts are left out): stacks of Gemma layers from one reader."""

from collections.abc import Sequence
from typing import Any

from mlm.interop.family import Family, Ids, Keys, attention, feed_forward
from mlm.interop.rules import ConversionError, Rule
from mlm.models.config import HeadSpec, ModelConfig, StackConfig
from mlm.models.specs import AttentionSpec, EmbeddingSpec, FFNSpec, LayerSpec, NormSpec, PositionSpec, ResidualSpec

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Published: 0 padding, 1 end, 2 beginning, 3 unknown. Ours: 2 unknown, 3 beginning, which the decoder reads first.
IDS = Ids((0, 1, 3, 2))
BOS = 2


def stack(keys: Keys, *, source: str, causal: bool, cross: bool, normed: bool) -> StackConfig:
    """The stack of one Gemma config. normed: queries and keys are normed (Gemma 3), and rotate by kind of layer.

    An encoder's window of w in T5Gemma reaches w - 1 to both sides, 2 w - 1 in all (transformers 4.57, the release
    that published it); in T5Gemma 2 it is w in all.
    """
    keys.expect("hidden_activation", "gelu_pytorch_tanh")
    keys.expect("attention_bias", False)
    keys.expect("use_bidirectional_attention", False)
    width, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    size = keys.get("head_dim", 256)
    shape = {
        "heads": heads,
        "head_dim": size,
        "kv_heads": keys.get("num_key_value_heads", heads),
        "scale": keys.get("query_pre_attn_scalar", 256) ** -0.5,
        "softcap": keys.get("attn_logit_softcapping"),
        "qk_norm": "rms" if normed else "none",
    }
    layers = keys.need("num_hidden_layers")
    kinds = _kinds(keys, layers, 6 if normed else 2)
    window = keys.get("sliding_window", 4096)
    ropes = _ropes(keys, normed)
    if not causal and not normed:
        window = 2 * window - 1
    ffn = FFNSpec(d_ff=keys.need("intermediate_size"))

    def layer(kind: str) -> LayerSpec:
        own = AttentionSpec(source=source, position=ropes[kind], window=window if kind == LOCAL else None, **shape)
        others = (AttentionSpec(source="cross", **shape),) if cross else ()
        return LayerSpec(sublayers=(own, *others, ffn))

    return StackConfig(
        group=tuple(layer(kind) for kind in kinds),
        repeats=layers // len(kinds),
        rest=layers % len(kinds),
        causal=causal,
        norm=NormSpec(offset_one=True, eps=keys.get("rms_norm_eps", 1e-6)),
        residual=ResidualSpec(order="sandwich"),
        embedding=EmbeddingSpec(multiply=width**0.5),
    )


def _kinds(keys: Keys, layers: int, usual: int) -> list[str]:
    """The smallest repeating pattern of layer kinds."""
    every = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", usual))
    kinds = keys.get("layer_types") or [GLOBAL if not (i + 1) % every else LOCAL for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {LOCAL, GLOBAL}:
        raise ConversionError(
            f"{keys.where}: layer_types={kinds!r} must name {LOCAL!r} or {GLOBAL!r} for each of {layers} layers"
        )
    size = next(n for n in range(1, layers + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return kinds[:size]


def _ropes(keys: Keys, by_kind: bool) -> dict[str, PositionSpec]:
    """Rotation of local and of global layers, in the words of transformers 5 (rope_parameters) or 4."""
    theta, local = keys.get("rope_theta", 1e6 if by_kind else 1e4), keys.get("rope_local_base_freq", 1e4)
    scaling = keys.get("rope_scaling", {})
    given = keys.get("rope_parameters", {})
    if given and by_kind:
        return {kind: _rope(keys, {"rope_theta": {LOCAL: local, GLOBAL: theta}[kind], **given[kind]}) for kind in given}
    everywhere = _rope(keys, {"rope_theta": theta, **scaling, **given})
    return {GLOBAL: everywhere, LOCAL: _rope(keys, {"rope_theta": local}) if by_kind else everywhere}


def _rope(keys: Keys, parameters: dict[str, Any]) -> PositionSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    known = {"rope_theta", "rope_type", "type"} | ({"factor"} if kind == "linear" else set())
    if kind not in ("default", "linear") or {k for k, v in parameters.items() if v is not None} - known:
        raise ConversionError(
            f"{keys.where}: rotary positions {parameters!r}: only 'default' and 'linear' with a factor can be converted"
        )
    return PositionSpec(kind="rope", base=float(parameters["rope_theta"]), factor=float(parameters.get("factor", 1.0)))


def _start(keys: Keys, bos: int) -> int:
    return IDS.ours(keys.get("decoder_start_token_id", bos))


def _read_t5gemma(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    encoder, decoder = keys.part("encoder"), keys.part("decoder")
    for part in (keys, encoder, decoder):
        part.expect("tie_word_embeddings", True)
    first = stack(encoder, source="self", causal=False, cross=False, normed=False)
    second = stack(decoder, source="self", causal=True, cross=True, normed=False)
    decoder.expect("cross_attention_hidden_size", encoder.need("hidden_size"))
    vocabulary = keys.get("vocab_size", decoder.need("vocab_size"))
    cap = decoder.get("final_logit_softcapping")
    for part in (encoder, decoder):
        part.expect("vocab_size", vocabulary)
        part.get("final_logit_softcapping")  # an encoder has no logits
        part.finish(_LENGTHS)
    width, memory = decoder.need("hidden_size"), encoder.need("hidden_size")
    return ModelConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder=first,
        decoder=second,
        encoder_width=None if memory == width else memory,
        share_embedding=False,
        head=HeadSpec(kind="tied", softcap=cap),
        start_token=_start(keys, decoder.get("bos_token_id", BOS)),
    )


def _read_gemma_3(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    keys.expect("tie_word_embeddings", True)
    return ModelConfig(
        vocab_size=keys.need("vocab_size"),
        d_model=keys.need("hidden_size"),
        encoder=None,
        decoder=stack(keys, source="self", causal=True, cross=False, normed=True),
        head=HeadSpec(kind="tied", softcap=keys.get("final_logit_softcapping")),
        start_token=IDS.ours(keys.get("bos_token_id", BOS)),
    )


def _read_t5gemma2(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    outer = keys.part("encoder")
    encoder, decoder = outer.part("text_config"), keys.part("decoder")
    for part in (keys, outer, encoder, decoder):
        part.expect("tie_word_embeddings", True)
    for part in (keys, outer):
        for name in ("vision_config", "mm_tokens_per_image", *(f"{x}_token_index" for x in ("image", "boi", "eoi"))):
            part.get(name)  # of images
    first = stack(encoder, source="self", causal=False, cross=False, normed=True)
    second = stack(decoder, source="joint", causal=True, cross=False, normed=True)
    vocabulary = decoder.need("vocab_size")
    cap = decoder.get("final_logit_softcapping")
    for part in (keys, encoder):
        part.expect("vocab_size", vocabulary)
        part.get("final_logit_softcapping")
    for part in (outer, encoder, decoder):
        part.finish(_LENGTHS)
    return ModelConfig(
        vocab_size=vocabulary,
        d_model=decoder.need("hidden_size"),
        encoder=first,
        decoder=second,
        head=HeadSpec(kind="tied", softcap=cap),
        start_token=_start(keys, decoder.get("bos_token_id", BOS)),
    )


_LENGTHS = ("max_position_embeddings",)  # how long the training texts were: nothing is computed from it


def _write_stack(config: ModelConfig, side: str, normed: bool) -> dict[str, Any]:
    own = config.stacks()[side]
    first = attention(own.group[0])
    attentions = [attention(layer) for layer in own.layer_specs()]
    local = next((a for a in attentions if a.window is not None), None)
    far = next((a for a in attentions if a.window is None), None)
    window = (local and local.window) or 4096
    ropes: dict[str, dict[str, Any]] = {
        kind: {"rope_theta": a.position.base, "rope_type": "default"}
        | ({"rope_type": "linear", "factor": a.position.factor} if a.position.factor != 1.0 else {})
        for kind, a in ((GLOBAL, far or first), (LOCAL, local or first))
    }
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.memory_width if side == "encoder" else config.d_model,
        "intermediate_size": feed_forward(own.group[0]).d_ff,
        "num_hidden_layers": own.layers,
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.key_heads,
        "head_dim": first.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round((first.scale or 1.0) ** -2),
        "sliding_window": (window + 1) // 2 if side == "encoder" and not normed else window,
        "layer_types": [LOCAL if a.window else GLOBAL for a in attentions],
        "rms_norm_eps": own.norm.eps,
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": config.head.softcap,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": ropes if normed else ropes[GLOBAL],
        **_TOKENS,
    }
    # The same in the words of transformers 4.
    if normed:
        found |= {"rope_theta": ropes[GLOBAL]["rope_theta"], "rope_local_base_freq": ropes[LOCAL]["rope_theta"]}
    else:
        found |= {"rope_theta": ropes[GLOBAL]["rope_theta"]}
    return found


_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": BOS}


def _write_t5gemma(config: ModelConfig) -> dict[str, Any]:
    sides = {side: {**_write_stack(config, side, False), "is_decoder": side == "decoder"} for side in config.stacks()}
    sides["encoder"]["model_type"] = sides["decoder"]["model_type"] = "t5_gemma_module"
    sides["decoder"]["cross_attention_hidden_size"] = config.memory_width
    return {
        **sides,
        **_TOKENS,
        "vocab_size": config.vocab_size,
        "decoder_start_token_id": IDS.theirs(config.start_token),
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }


def _write_gemma_3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_stack(config, "decoder", True), "bos_token_id": IDS.theirs(config.start_token)}


def _write_t5gemma2(config: ModelConfig) -> dict[str, Any]:
    text = {**_write_stack(config, "encoder", True), "model_type": "t5gemma2_text"}
    return {
        "encoder": {"text_config": text, "model_type": "t5gemma2_encoder", "tie_word_embeddings": True},
        "decoder": {**_write_stack(config, "decoder", True), "model_type": "t5gemma2_decoder"},
        **_TOKENS,
        "decoder_start_token_id": IDS.theirs(config.start_token),
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }


def _layer_rules(side: str, prefix: str, attentions: Sequence[tuple[str, str, str, str]]) -> list[Rule]:
    """attentions: (our name, their name, their norm before, their norm after)."""
    ours, layer = f"{side}/{{n}}", f"{prefix}.layers.{{n}}"
    found = [Rule(f"{side}/final_norm/scale", f"{prefix}.norm.weight", "d")]
    for own, theirs, before, after in attentions:
        found += [
            Rule(f"{ours}/{own}/{name}", f"{layer}.{theirs}.{name[0]}_proj.weight", "(h k) d -> d h k")
            for name in ("query", "key", "value")
        ]
        found += [
            Rule(f"{ours}/{own}/out", f"{layer}.{theirs}.o_proj.weight", "d (h k) -> h k d"),
            Rule(f"{ours}/{own}/query_norm/scale", f"{layer}.{theirs}.q_norm.weight", "k"),
            Rule(f"{ours}/{own}/key_norm/scale", f"{layer}.{theirs}.k_norm.weight", "k"),
            Rule(f"{ours}/{own}/norm/scale", f"{layer}.{before}.weight", "d"),
            Rule(f"{ours}/{own}/post_norm/scale", f"{layer}.{after}.weight", "d"),
        ]
    found += [
        Rule(f"{ours}/ffn/gate", f"{layer}.mlp.gate_proj.weight", "f d -> d f"),
        Rule(f"{ours}/ffn/up", f"{layer}.mlp.up_proj.weight", "f d -> d f"),
        Rule(f"{ours}/ffn/down", f"{layer}.mlp.down_proj.weight", "d f -> f d"),
        Rule(f"{ours}/ffn/norm/scale", f"{layer}.pre_feedforward_layernorm.weight", "d"),
        Rule(f"{ours}/ffn/post_norm/scale", f"{layer}.post_feedforward_layernorm.weight", "d"),
    ]
    return found


def _own(ours: str) -> tuple[str, str, str, str]:
    return ours, "self_attn", "pre_self_attn_layernorm", "post_self_attn_layernorm"


CROSS = ("cross_attention", "cross_attn", "pre_cross_attn_layernorm", "post_cross_attn_layernorm")


def _rules_t5gemma(config: ModelConfig) -> list[Rule]:
    return [
        Rule("encoder_embedding", "model.encoder.embed_tokens.weight", "v d"),
        Rule("embedding", "model.decoder.embed_tokens.weight", "v d"),
        *_layer_rules("encoder", "model.encoder", [_own("self_attention")]),
        *_layer_rules("decoder", "model.decoder", [_own("self_attention"), CROSS]),
    ]


def _rules_gemma_3(config: ModelConfig) -> list[Rule]:
    own = ("self_attention", "self_attn", "input_layernorm", "post_attention_layernorm")
    return [Rule("embedding", "model.embed_tokens.weight", "v d"), *_layer_rules("decoder", "model", [own])]


def _rules_t5gemma2(config: ModelConfig) -> list[Rule]:
    return [
        Rule("embedding", "model.encoder.embed_tokens.weight", "v d"),
        *_layer_rules("encoder", "model.encoder", [_own("self_attention")]),
        *_layer_rules("decoder", "model.decoder", [_own("joint_attention")]),
    ]


FAMILIES = (
    Family(
        name="t5gemma",
        read=_read_t5gemma,
        write=_write_t5gemma,
        rules=_rules_t5gemma,
        ids=IDS,
        copies={"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
    ),
    Family(
        name="gemma3_text",
        read=_read_gemma_3,
        write=_write_gemma_3,
        rules=_rules_gemma_3,
        ids=IDS,
        harmless=_LENGTHS,
        copies={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    Family(
        name="t5gemma2",
        read=_read_t5gemma2,
        write=_write_t5gemma2,
        rules=_rules_t5gemma2,
        ids=IDS,
        copies={
            "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
            "lm_head.out_proj.weight": "model.encoder.embed_tokens.weight",
        },
        ignored=(r"model\.encoder\.(vision_tower|multi_modal_projector)\..*", r".*\.eoi_embedding"),
    ),
)
