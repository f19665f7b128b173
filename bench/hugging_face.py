"""The PyTorch peer: Hugging Face's T5 with the weights of one of our models, and its training step."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mlm.models.config import ModelConfig

Batch = dict[str, np.ndarray]  # mlm.types.ROW_FEATURES, one example a row

# Ours -> Hugging Face, inside one layer: sublayer, its matrices, and the two names of its attention or feed-forward.
ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
GATED, PLAIN = {"gate": "wi_0", "up": "wi_1", "down": "wo"}, {"up": "wi", "down": "wo"}
SUBLAYERS = {
    "self_attention": ("SelfAttention", ATTENTION),
    "cross_attention": ("EncDecAttention", ATTENTION),
    "ffn": ("DenseReluDense", GATED),
}


def t5(config: ModelConfig, params: dict[str, Any], attention: str, threads: int) -> Any:
    """`T5ForConditionalGeneration` in training mode, dropout 0, holding `params`. attention: "sdpa" or "eager"."""
    import torch
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(threads)
    theirs = t5_config(config)
    theirs._attn_implementation = attention
    model = T5ForConditionalGeneration(theirs)
    if config.head.kind == "linear":
        # Release 5 ties the head to the input table, whatever the configuration says; T5 1.1 has two matrices.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    named = dict(weights(config, params))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(named.pop(name)))
    if named:
        raise ValueError(f"Hugging Face's T5 has no place for {sorted(named)}")
    return model.train()


def t5_config(config: ModelConfig) -> Any:
    """Their configuration of the same model, dropout 0."""
    from transformers import T5Config

    sublayers = config.decoder.group[0].sublayers
    own, ffn = sublayers[0], sublayers[-1]
    return T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=own.head_dim,
        d_ff=ffn.d_ff,
        num_layers=config.encoder.repeats,
        num_decoder_layers=config.decoder.repeats,
        num_heads=own.heads,
        relative_attention_num_buckets=own.position.buckets,
        relative_attention_max_distance=own.position.max_distance,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if ffn.gated else "relu",
        tie_word_embeddings=config.head.kind == "tied",
        decoder_start_token_id=0,
        use_cache=False,
    )


def weights(config: ModelConfig, params: dict[str, Any]):
    """(their name, matrix as they store it: outputs x inputs) of every parameter."""
    yield "shared.weight", np.array(params["embedding"])
    if "head" in params:
        yield "lm_head.weight", np.ascontiguousarray(np.array(params["head"]).T)
    for stack, spec in (("encoder", config.encoder), ("decoder", config.decoder)):
        tree = params[stack]
        yield f"{stack}.final_layer_norm.weight", np.array(tree["final_norm"]["scale"])
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield bias, np.ascontiguousarray(np.array(tree["position"]).T)
        names = spec.group[0].names()
        for i in range(spec.repeats):
            for j, name in enumerate(names):
                place, (module, matrices) = f"{stack}.block.{i}.layer.{j}", SUBLAYERS[name]
                body = tree["layers"]["0"][name]
                yield f"{place}.layer_norm.weight", np.array(body["norm"]["scale"][i])
                if name == "ffn":
                    matrices = GATED if "gate" in body else PLAIN
                for ours, theirs in matrices.items():
                    matrix = np.array(body[ours][i])
                    rows = matrix.shape[0] * matrix.shape[1] if ours == "out" else matrix.shape[0]
                    yield f"{place}.{module}.{theirs}.weight", np.ascontiguousarray(matrix.reshape(rows, -1).T)


def adamw(model: Any, learning_rate: float, weight_decay: float) -> Any:
    """PyTorch's fused AdamW; like ours it leaves norm scales alone."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def training_step(
    model: Any, optimizer: Any, *, bfloat16: bool = False, compiled: bool = False
) -> Callable[[Batch], float]:
    """step(batch) -> mean loss per target token in nats, before the update.

    bfloat16: matrix products in that type under autocast. compiled: through `torch.compile`.
    """
    import torch

    if compiled:
        model = torch.compile(model)

    def step(batch: Batch) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = model(**_inputs(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def mean_loss(model: Any, batches: list[Batch]) -> float:
    """Loss per target token over all batches, in nats."""
    import torch

    weights = [float(batch["decoder_loss_weights"].sum()) for batch in batches]
    with torch.no_grad():
        losses = [float(model(**_inputs(batch)).loss) for batch in batches]
    return float(np.average(losses, weights=weights))


def _inputs(batch: Batch) -> dict[str, Any]:
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
    weights, segments = tensors["decoder_loss_weights"], tensors["encoder_segment_ids"]
    return {
        "input_ids": tensors["encoder_input_tokens"],
        "attention_mask": None if bool((segments > 0).all()) else segments,
        "decoder_input_ids": tensors["decoder_input_tokens"],
        "labels": torch.where(weights > 0, tensors["decoder_target_tokens"].long(), -100),
        "use_cache": False,
    }
