"""T5 1.0 and 1.1, mT5, umT5 and ByT5: `model_type` t5, mt5 and umt5."""

import dataclasses
from typing import Any

from mlm.interop.family import Family, Keys, attention, both, feed_forward
from mlm.interop.rules import ConversionError, Rule
from mlm.models.config import HeadSpec, ModelConfig
from mlm.models.families import t5_style
from mlm.models.specs import AttentionSpec

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}  # feed_forward_proj -> ours
HEAD = "lm_head.weight"


def read(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    """A head of its own shows in the tensors: transformers 5 writes tie_word_embeddings=true into every config.json.

    Logits are scaled by D^-1/2 where `scale_decoder_outputs` says so (transformers 5), or else where the head is tied.
    """
    model_type = keys.get("model_type")
    projection = keys.get("feed_forward_proj", "gated-gelu" if model_type in ("mt5", "umt5") else "relu")
    if projection not in ACTIVATIONS:
        raise ConversionError(
            f"{keys.where}: feed_forward_proj={projection!r}, but only {', '.join(ACTIVATIONS)} can be converted"
        )
    for derived in ("dense_act_fn", "is_gated_act"):
        keys.get(derived)
    declared = keys.get("tie_word_embeddings", True)
    scaled = keys.get("scale_decoder_outputs", declared)
    if model_type == "umt5":  # trained without the scale; transformers 5 declares every umT5 tied
        scaled = False
    layers = keys.need("num_layers")
    d_model, heads = keys.need("d_model"), keys.need("num_heads")
    config = t5_style(
        vocab_size=keys.need("vocab_size"),
        d_model=d_model,
        d_ff=keys.need("d_ff"),
        heads=heads,
        head_dim=keys.get("d_kv", 64),
        layers=(layers, keys.get("num_decoder_layers", layers)),
        activation=ACTIVATIONS[projection],
        share="layer" if model_type == "umt5" else "stack",
    )
    kind = "linear" if HEAD in tensors or not declared else "tied"
    config = dataclasses.replace(
        config,
        head=HeadSpec(kind=kind, multiply=d_model**-0.5 if scaled else 1.0),
        start_token=keys.get("decoder_start_token_id", 0),
    )
    return adjusted(
        config,
        eps=keys.get("layer_norm_epsilon", 1e-6),
        buckets=keys.get("relative_attention_num_buckets", 32),
        max_distance=keys.get("relative_attention_max_distance", 128),
    )


def adjusted(config: ModelConfig, *, eps: float, buckets: int, max_distance: int) -> ModelConfig:
    """The same with other norms and distance buckets."""

    def sublayer(spec):
        if not isinstance(spec, AttentionSpec) or spec.position.kind == "none":
            return spec
        position = dataclasses.replace(spec.position, buckets=buckets, max_distance=max_distance)
        return dataclasses.replace(spec, position=position)

    def stack(own):
        return dataclasses.replace(own.mapped(sublayer), norm=dataclasses.replace(own.norm, eps=eps))

    return dataclasses.replace(config, **{name: stack(own) for name, own in config.stacks().items()})


def write(config: ModelConfig) -> dict[str, Any]:
    encoder, decoder = both(config)
    own, ffn = attention(encoder.group[0]), feed_forward(encoder.group[0])
    tied = config.head.kind == "tied"
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": own.head_dim,
        "d_ff": ffn.d_ff,
        "num_layers": encoder.layers,
        "num_decoder_layers": decoder.layers,
        "num_heads": own.heads,
        "feed_forward_proj": {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(ffn.activation, ffn.activation),
        "layer_norm_epsilon": encoder.norm.eps,
        "relative_attention_num_buckets": own.position.buckets,
        "relative_attention_max_distance": own.position.max_distance,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": config.head.multiply != 1.0,  # transformers 5; release 4 scales where the head is tied
        "is_encoder_decoder": True,
        "dropout_rate": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": config.start_token,
    }


def rules(config: ModelConfig) -> list[Rule]:
    layer = both(config)[0].group[0]
    own, gated = attention(layer), feed_forward(layer).gated
    found = [Rule("embedding", "shared.weight", "v d"), Rule("head", HEAD, "v d -> d v")]
    for side, ffn in (("encoder", 1), ("decoder", 2)):
        block = f"{side}.block.{{n}}.layer"
        attentions = [("self_attention", 0, "SelfAttention"), ("cross_attention", 1, "EncDecAttention")][:ffn]
        for ours, place, theirs in attentions:
            found += [
                Rule(f"{side}/{{n}}/{ours}/{name}", f"{block}.{place}.{theirs}.{letter}.weight", "(h k) d -> d h k")
                for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
            ]
            found += [
                Rule(f"{side}/{{n}}/{ours}/out", f"{block}.{place}.{theirs}.o.weight", "d (h k) -> h k d"),
                Rule(f"{side}/{{n}}/{ours}/norm/scale", f"{block}.{place}.layer_norm.weight", "d"),
            ]
        table = "SelfAttention.relative_attention_bias.weight"
        found += [
            Rule(f"{side}/position", f"{side}.block.0.layer.0.{table}", "b h -> h b")
            if own.position.share == "stack"
            else Rule(f"{side}/{{n}}/self_attention/position", f"{block}.0.{table}", "b h -> h b"),
            Rule(
                f"{side}/{{n}}/ffn/up", f"{block}.{ffn}.DenseReluDense.{'wi_1' if gated else 'wi'}.weight", "f d -> d f"
            ),
            Rule(f"{side}/{{n}}/ffn/gate", f"{block}.{ffn}.DenseReluDense.wi_0.weight", "f d -> d f"),
            Rule(f"{side}/{{n}}/ffn/down", f"{block}.{ffn}.DenseReluDense.wo.weight", "d f -> f d"),
            Rule(f"{side}/{{n}}/ffn/norm/scale", f"{block}.{ffn}.layer_norm.weight", "d"),
            Rule(f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight", "d"),
        ]
    return found


def _family(name: str) -> Family:
    return Family(
        name=name,
        read=read,
        write=write,
        rules=rules,
        copies=dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD), "shared.weight"),
        # A leftover of old files: cross-attention never had a table.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


FAMILIES = tuple(_family(name) for name in ("t5", "mt5", "umt5"))
