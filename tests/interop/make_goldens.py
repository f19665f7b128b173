"""Computes the goldens with PyTorch: `python -m tests.interop.make_goldens`, in an environment with the [parity] extra.

Where transformers 5 departs from the release that published a family, the published mathematics is asked for: umT5's
logits without the scale of tied heads, T5Gemma's encoder windows one token narrower (release 4.57).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from tests.interop import recipe
from tests.interop.recipe import NEW_TOKENS, VOCABULARY, Golden

T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2}
T5 |= {"num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
FAIRSEQ = {"vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2, "scale_embedding": True}
FAIRSEQ |= {"encoder_attention_heads": 3, "decoder_attention_heads": 2, "max_position_embeddings": 30}
FAIRSEQ |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 28, "decoder_start_token_id": 2}
GEMMA = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "head_dim": 6}
GEMMA |= {"num_key_value_heads": 2, "query_pre_attn_scalar": 9, "sliding_window": 4}
XLM_R = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3}
XLM_R |= {"num_hidden_layers": 3, "max_position_embeddings": 16, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
IMAGES = {"vision_config": VISION, "mm_tokens_per_image": 4, "eoi_token_index": 97, "boi_token_index": 98}
STRETCHED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _t5(**config: Any):
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**config))


def _umt5():
    model = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**GATED))
    model.config.tie_word_embeddings = False
    return model


def _t5gemma():
    narrow = {**GEMMA, "num_hidden_layers": 3, "sliding_window": 3}  # 4.57 would say 4
    wide = {**GEMMA, "num_hidden_layers": 5, "hidden_size": 16}
    config = transformers.T5GemmaConfig(encoder=narrow, decoder=wide, vocab_size=VOCABULARY)
    return transformers.T5GemmaForConditionalGeneration(config)


def _t5gemma2():
    text = {**GEMMA, "num_hidden_layers": 7, "rope_parameters": STRETCHED}
    config = transformers.T5Gemma2Config(
        encoder={"text_config": text, "image_token_index": 99, **IMAGES}, decoder=text, image_token_index=99
    )
    return transformers.T5Gemma2ForConditionalGeneration(config)


def _switch():
    own = {k: v for k, v in T5.items() if k not in ("num_layers", "num_decoder_layers")}
    sparse = {"num_layers": 5, "num_sparse_encoder_layers": 2, "num_decoder_layers": 3, "num_sparse_decoder_layers": 3}
    config = transformers.SwitchTransformersConfig(**own, **sparse, num_experts=5, decoder_start_token_id=0)
    return transformers.SwitchTransformersForConditionalGeneration(config)


class _Mixture(torch.nn.Module):
    """NLLB-MoE's layer as release 4.57 has it: 5.23 takes the mask of the first choices for their numbers."""

    def __init__(self, layer: Any):
        super().__init__()
        self.router, self.experts = layer.router, layer.experts

    def forward(self, states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        _, gates, _ = self.router(flat, padding_mask)
        count = self.experts.num_experts
        parts = [self.experts[f"expert_{i}"](flat) * gates[:, i : i + 1] for i in range(count)]
        return (sum(parts) * (1 - self.experts.moe_token_dropout)).reshape(states.shape)


def mend_mixtures(model: Any) -> Any:
    for stack in (model.model.encoder, model.model.decoder):
        for layer in stack.layers:
            if layer.is_sparse:
                layer.ffn = _Mixture(layer.ffn)
    return model


def _nllb_moe():
    sparse = {"num_experts": 5, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    return mend_mixtures(transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**FAIRSEQ, **sparse)))


MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: _t5(**T5, decoder_start_token_id=0),
    "t5_1_1": lambda: _t5(**GATED),
    "umt5": _umt5,
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**FAIRSEQ)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**FAIRSEQ)),
    "switch_transformers": _switch,
    "nllb_moe": _nllb_moe,
    "t5gemma": _t5gemma,
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**GEMMA, num_hidden_layers=7, rope_parameters=STRETCHED)
    ),
    "t5gemma2": _t5gemma2,
    "xlm_r": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**XLM_R)),
    "xlm_r_xl": lambda: transformers.XLMRobertaXLForMaskedLM(transformers.XLMRobertaXLConfig(**XLM_R)),
}
MASKED = ("xlm_r", "xlm_r_xl")  # encoders alone
OWN_HEADS = ("t5_1_1", "umt5")  # transformers 5 ties every head of these until it is told


def build(name: str) -> tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]:
    """(model in evaluation mode with the recipe's tensors, its config.json, names and shapes of its tensors)."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    if name in OWN_HEADS:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        config |= {"tie_word_embeddings": False}
    if name == "t5gemma":
        config["encoder"] |= {"sliding_window": 4}
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    names = {_saved(n): n for n, p in state.items() if seen.setdefault(p.data_ptr(), n) == n and p.ndim}
    shapes = {saved: tuple(state[n].shape) for saved, n in names.items()}
    with torch.no_grad():
        for saved, values in recipe.tensors(shapes).items():
            state[names[saved]].copy_(torch.tensor(values))
    for module in model.modules():
        if getattr(module, "_attn_implementation", None):
            module._attn_implementation = "eager"
    model.set_attn_implementation("eager")
    return model, config, shapes


def _saved(name: str) -> str:
    """How `save_pretrained` calls a tensor."""
    tied = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}
    return tied.get(name, name).replace("encoder.text_model.", "encoder.")


def compute(name: str) -> Golden:
    model, config, shapes = build(name)
    drawn = recipe.masked_rows() if name in MASKED else recipe.rows()
    rows = {key: torch.tensor(value) for key, value in drawn.items()}
    start = config.get("decoder_start_token_id", config.get("bos_token_id", 2))
    told = torch.arange(rows["target"].shape[1]) < rows["target_lengths"][:, None]
    read = torch.arange(rows["source"].shape[1]) < rows["lengths"][:, None]
    labels = torch.where(told, rows["target"], -100)
    given = torch.cat([torch.full((2, 1), start), rows["target"][:, :-1]], 1)
    with torch.no_grad():
        if name in MASKED:
            labels = torch.where(rows["source"] == rows["target"], -100, rows["target"])
            out = model(rows["source"], attention_mask=read.long(), labels=labels)
            encoded, logits, loss = model.roberta(rows["source"], read.long()).last_hidden_state, out.logits, out.loss
            generated = torch.zeros((2, 0), dtype=torch.long)
        elif name == "gemma3_text":
            out = model(input_ids=given, attention_mask=told.long())
            logits, encoded = out.logits, torch.zeros(2, 0)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            generated = torch.zeros((2, 0), dtype=torch.long)
        else:
            inputs = {"input_ids": rows["source"], "attention_mask": read.long()}
            out = model(**inputs, decoder_input_ids=given, labels=labels)
            encoded, logits, loss = out.encoder_last_hidden_state, out.logits, out.loss
            generated = greedy(model, inputs, start)
    arrays = (np.asarray(x) for x in (encoded, logits, loss, generated))
    return Golden(
        config, shapes, *(rows[n].numpy() for n in ("source", "lengths", "target", "target_lengths")), *arrays
    )


def greedy(model: Any, inputs: dict[str, torch.Tensor], start: int) -> torch.Tensor:
    """[rows, NEW_TOKENS]: what `generate` adds to the first input."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "forced_eos_token_id": None}
    out = model.generate(**inputs, decoder_start_token_id=start, **settings)[:, 1:]
    return torch.nn.functional.pad(out, (0, NEW_TOKENS - out.shape[1]))


if __name__ == "__main__":
    recipe.GOLDENS.mkdir(exist_ok=True)
    for member in MODELS:
        golden = compute(member)
        recipe.save(recipe.GOLDENS / f"{member}.npz", golden)
        print(
            f"{member}: {(recipe.GOLDENS / f'{member}.npz').stat().st_size:,} bytes, loss {golden.loss:.4f}",
            golden.generated.tolist(),
        )
