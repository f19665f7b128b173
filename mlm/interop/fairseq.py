"""M2M-100, NLLB (dense) and mBART: `model_type` m2m_100 and mbart, both grown from fairseq."""

from typing import Any

from mlm.interop.family import Family, Ids, Keys, attention, both, feed_forward
from mlm.interop.rules import Rule
from mlm.models.config import HeadSpec, ModelConfig, StackConfig
from mlm.models.specs import AttentionSpec, EmbeddingSpec, FFNSpec, LayerSpec, NormSpec

# Published: 0 beginning, 1 padding, 2 end (which the decoder reads first), 3 unknown. Ours: 3 is the beginning.
IDS = Ids((1, 2, 3, 0))
EOS = 2
OFFSET = 2  # positions start behind the padding's, whose id is 1
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_EPS = 1e-5  # PyTorch's LayerNorm


def read(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    learned = keys.get("model_type") == "mbart"
    # What old files say of the layout that the model classes have had ever since.
    for name, value in (
        *(("normalize_before", True), ("normalize_embedding", True), ("add_final_layer_norm", True)),
        *(("static_position_embeddings", False), ("add_bias_logits", False), ("extra_pos_embeddings", OFFSET)),
    ):
        keys.expect(name, value)
    keys.expect("tie_word_embeddings", True)
    width = keys.need("d_model")
    activation = keys.get("activation_function", "gelu" if learned else "relu")
    keys.expect("activation_function", *ACTIVATIONS)
    multiply = width**0.5 if keys.get("scale_embedding", not learned) else 1.0
    length = keys.get("max_position_embeddings", 1024)
    positions = {"positions": "learned", "length": length, "norm": True} if learned else {"positions": "sinusoidal"}

    def stack(side: str) -> StackConfig:
        heads = keys.need(f"{side}_attention_heads")
        shape = {"heads": heads, "head_dim": width // heads, "scale": (width // heads) ** -0.5, "bias": True}
        own = AttentionSpec(source="self", **shape)
        others = (AttentionSpec(source="cross", **shape),) if side == "decoder" else ()
        ffn = FFNSpec(d_ff=keys.need(f"{side}_ffn_dim"), activation=ACTIVATIONS[activation], bias=True)
        return StackConfig(
            group=(LayerSpec(sublayers=(own, *others, ffn)),),
            repeats=keys.need(f"{side}_layers"),
            causal=side == "decoder",
            norm=NormSpec(kind="layer", eps=_EPS),
            embedding=EmbeddingSpec(multiply=multiply, offset=OFFSET, **positions),
        )

    return ModelConfig(
        vocab_size=keys.need("vocab_size"),
        d_model=width,
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        head=HeadSpec(kind="tied"),
        start_token=IDS.ours(keys.get("decoder_start_token_id", EOS)),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    embedding = both(config)[0].embedding
    found: dict[str, Any] = {}
    for side, stack in config.stacks().items():
        own, ffn = attention(stack.group[0]), feed_forward(stack.group[0])
        found |= {
            f"{side}_layers": stack.layers,
            f"{side}_attention_heads": own.heads,
            f"{side}_ffn_dim": ffn.d_ff,
            "activation_function": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[ffn.activation],
        }
    return {
        **found,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "max_position_embeddings": embedding.length or 1024,
        "scale_embedding": embedding.multiply != 1.0,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": EOS,
        "decoder_start_token_id": IDS.theirs(config.start_token),
    }


def rules(config: ModelConfig) -> list[Rule]:
    found = [Rule("embedding", "model.shared.weight", "v d")]
    for side in ("encoder", "decoder"):
        ours, layer = f"{side}/{{n}}", f"model.{side}.layers.{{n}}"
        for name, theirs in (("self_attention", "self_attn"), ("cross_attention", "encoder_attn")):
            for part in ("query", "key", "value"):
                projection = f"{layer}.{theirs}.{part[0]}_proj"
                found += [
                    Rule(f"{ours}/{name}/{part}", f"{projection}.weight", "(h k) d -> d h k"),
                    Rule(f"{ours}/{name}/{part}_bias", f"{projection}.bias", "(h k) -> h k"),
                ]
            found += [
                Rule(f"{ours}/{name}/out", f"{layer}.{theirs}.out_proj.weight", "d (h k) -> h k d"),
                Rule(f"{ours}/{name}/out_bias", f"{layer}.{theirs}.out_proj.bias", "d"),
                *norm(f"{ours}/{name}/norm", f"{layer}.{theirs}_layer_norm"),
            ]
        found += [
            Rule(f"{ours}/ffn/up", f"{layer}.fc1.weight", "f d -> d f"),
            Rule(f"{ours}/ffn/up_bias", f"{layer}.fc1.bias", "f"),
            Rule(f"{ours}/ffn/down", f"{layer}.fc2.weight", "d f -> f d"),
            Rule(f"{ours}/ffn/down_bias", f"{layer}.fc2.bias", "d"),
            *norm(f"{ours}/ffn/norm", f"{layer}.final_layer_norm"),
            *norm(f"{side}/final_norm", f"model.{side}.layer_norm"),
            *norm(f"{side}/embedding_norm", f"model.{side}.layernorm_embedding"),
            Rule(f"{side}/absolute", f"model.{side}.embed_positions.weight", "p d"),
        ]
    return found


def norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight", "d"), Rule(f"{ours}/bias", f"{theirs}.bias", "d")]


def _family(name: str, **more: Any) -> Family:
    tables = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    return Family(
        name=name,
        read=read,
        write=write,
        rules=rules,
        ids=IDS,
        copies=dict.fromkeys(tables, "model.shared.weight"),
        **more,
    )


FAMILIES = (
    # Sinusoids that older releases saved.
    _family("m2m_100", ignored=(r"model\.(encoder|decoder)\.embed_positions\.weights?",)),
    _family("mbart", zeros=("final_logits_bias",)),
)
