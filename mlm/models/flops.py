"""Model FLOPs of one training step: what the mathematics needs, not what the hardware happens to do (no remat)."""

from mlm.models.config import AttentionSpec, FFNSpec, ModelConfig, StackConfig


def training_flops(config: ModelConfig, rows: int, source: int, target: int) -> float:
    """FLOPs of forward and backward on `rows` rows of `source` and `target` positions.

    6 x (weights x positions they are applied to, cross keys and values at source positions, head at target positions)
    + 12 x layers x heads x head size x (pairs of positions; causal pairs counted half). A multiply-add is 2 FLOPs and
    the backward pass costs twice the forward; padding counts as positions, because the matrices do not know it.
    """
    encoder = _stack(config.encoder, config.d_model, source, 0)
    decoder = _stack(config.decoder, config.d_model, target, source)
    return rows * (encoder + decoder + 6.0 * config.d_model * config.vocab_size * target)


def _stack(stack: StackConfig, d_model: int, length: int, memory: int) -> float:
    total = 0.0
    for layer in stack.group:
        for spec in layer.sublayers:
            total += (
                _ffn(spec, d_model, length)
                if isinstance(spec, FFNSpec)
                else _attention(spec, d_model, length, memory, stack.causal)
            )
    return total * stack.repeats


def _ffn(spec: FFNSpec, d_model: int, length: int) -> float:
    return 6.0 * (3 if spec.gated else 2) * d_model * spec.d_ff * length


def _attention(spec: AttentionSpec, d_model: int, length: int, memory: int, causal: bool) -> float:
    width = spec.heads * spec.head_dim
    looked_at = memory if spec.source == "cross" else length
    pairs = length * looked_at * (0.5 if causal and spec.source == "self" else 1.0)
    return 6.0 * d_model * width * (2 * length + 2 * looked_at) + 12.0 * width * pairs
