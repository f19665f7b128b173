"""XLM-R base and large, XL and XXL, with the head of their masked language model: xlm-roberta, xlm-roberta-xl."""

from typing import Any

from mlm.interop import fairseq
from mlm.interop.family import Family, Keys, attention, feed_forward
from mlm.interop.rules import ConversionError, Rule
from mlm.models.config import ModelConfig, StackConfig
from mlm.models.families import bert_style

XL = "xlm-roberta-xl"  # norms first
TABLE, BIAS = "roberta.embeddings.word_embeddings.weight", "lm_head.bias"


def read(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    for name, value in (
        *(("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("tie_word_embeddings", True)),
        *(("is_decoder", False), ("add_cross_attention", False), ("type_vocab_size", 1)),
        ("pad_token_id", fairseq.OFFSET - 1),  # positions start behind it
    ):
        keys.expect(name, value)
    large = keys.get("model_type") == XL
    return bert_style(
        vocab_size=keys.need("vocab_size"),
        d_model=keys.need("hidden_size"),
        d_ff=keys.need("intermediate_size"),
        heads=keys.need("num_attention_heads"),
        layers=keys.need("num_hidden_layers"),
        length=keys.need("max_position_embeddings") - fairseq.OFFSET,
        eps=keys.get("layer_norm_eps", 1e-5 if large else 1e-12),
        order="pre" if large else "post",
    )


def write(config: ModelConfig) -> dict[str, Any]:
    stack = _encoder(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": feed_forward(stack.group[0]).d_ff,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": attention(stack.group[0]).heads,
        "hidden_act": "gelu",
        "max_position_embeddings": (stack.embedding.length or 0) + fairseq.OFFSET,
        "type_vocab_size": 1,
        "layer_norm_eps": stack.norm.eps,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "pad_token_id": fairseq.OFFSET - 1,
        "eos_token_id": fairseq.EOS,
    }


def rules(config: ModelConfig) -> list[Rule]:
    large = _encoder(config).residual.order == "pre"
    ours, layer = "encoder/{n}", "roberta.encoder.layer.{n}"
    found = [
        Rule("embedding", TABLE, "v d"),
        Rule("encoder/absolute", "roberta.embeddings.position_embeddings.weight", "p d"),
        Rule("encoder/token_type", "roberta.embeddings.token_type_embeddings.weight", "1 d -> d"),
        Rule("transform/dense", "lm_head.dense.weight", "e d -> d e"),
        Rule("transform/bias", "lm_head.dense.bias", "e"),
        *fairseq.norm("transform/norm", "lm_head.layer_norm"),
        Rule("head_bias", BIAS, "v"),
        *fairseq.norm("encoder/final_norm", "roberta.encoder.LayerNorm"),
        *fairseq.norm("encoder/embedding_norm", "roberta.embeddings.LayerNorm"),
        Rule(f"{ours}/self_attention/out", f"{layer}.attention.output.dense.weight", "d (h k) -> h k d"),
        Rule(f"{ours}/self_attention/out_bias", f"{layer}.attention.output.dense.bias", "d"),
        Rule(f"{ours}/ffn/up", f"{layer}.intermediate.dense.weight", "f d -> d f"),
        Rule(f"{ours}/ffn/up_bias", f"{layer}.intermediate.dense.bias", "f"),
        Rule(f"{ours}/ffn/down", f"{layer}.output.dense.weight", "d f -> f d"),
        Rule(f"{ours}/ffn/down_bias", f"{layer}.output.dense.bias", "d"),
        *fairseq.norm(
            f"{ours}/self_attention/norm",
            f"{layer}.attention.{'self_attn_layer_norm' if large else 'output.LayerNorm'}",
        ),
        *fairseq.norm(f"{ours}/ffn/norm", f"{layer}.{'LayerNorm' if large else 'output.LayerNorm'}"),
    ]
    for part in ("query", "key", "value"):
        projection = f"{layer}.attention.self.{part}"
        found += [
            Rule(f"{ours}/self_attention/{part}", f"{projection}.weight", "(h k) d -> d h k"),
            Rule(f"{ours}/self_attention/{part}_bias", f"{projection}.bias", "(h k) -> h k"),
        ]
    return found


def _encoder(config: ModelConfig) -> StackConfig:
    if config.encoder is None or config.decoder is not None:
        raise ConversionError("it is an encoder alone")
    return config.encoder


FAMILIES = tuple(
    Family(
        name=name,
        read=read,
        write=write,
        rules=rules,
        ids=fairseq.IDS,
        copies={"lm_head.decoder.weight": TABLE, "lm_head.decoder.bias": BIAS},
        # Numbers that are counted off, and what another head reads, in files of old releases.
        ignored=(r"roberta\.embeddings\.position_ids", r"roberta\.pooler\.dense\.(weight|bias)"),
    )
    for name in ("xlm-roberta", XL)
)
