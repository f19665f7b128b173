"""Model FLOPs of one training step: what the mathematics needs, not what the hardware happens to do (no remat)."""

import jax

from mlm.models.config import ModelConfig, StackConfig
from mlm.models.specs import AttentionSpec, FFNSpec, RecurrentSpec
from mlm.models.transformer import Transformer


def training_flops(config: ModelConfig, rows: int, source: int, target: int) -> float:
    """FLOPs of forward and backward on `rows` rows of `source` and `target` positions.

    6 x (weights x positions they are applied to, memory keys and values at source positions, head at the positions of
    the last stack) + 12 x layers x heads x head size x (pairs of positions that a mask without padding allows; causal
    pairs counted half), or what additive attention does with a pair. A multiply-add is 2 FLOPs and the backward pass
    costs twice the forward; padding counts as positions, because the matrices do not know it. A reader of positions
    works once for all rows, and for its losses.
    """
    total = 0.0
    if config.encoder:
        total += _stack(config.encoder, config.memory_width, config.memory_width, source, 0)
    if config.decoder:
        total += _stack(config.decoder, config.d_model, config.memory_width, target, source)
    if config.bridge:
        total += 6.0 * config.memory_width**2 * source
    predicted = target if config.decoder else source
    for name, length in (("encoder", source), ("decoder", target)):
        stack = config.stacks().get(name)
        width = config.memory_width if name == "encoder" else config.d_model
        total += 6.0 * (stack.embedding.rank or 0) * width * length if stack else 0.0
    readers = sum(_reader(own, {"encoder": source, "decoder": target}[n]) for n, own in config.stacks().items())
    return rows * (total + 6.0 * _head(config) * predicted) + readers


def heads_flops(config: ModelConfig, rows: int, source: int, target: int) -> float:
    """FLOPs of a step that trains the model's Chimera heads alone, as `training_flops` counts them.

    The model runs forward, a third of its own step, and without its head. That is asked once for each Chimera head at
    every place, and its backward pass makes no gradient of its matrix: 4 FLOPs for each of its weights.
    """
    spec, width = config.chimera, config.d_model
    assert spec is not None
    places, inner = spec.heads * target, spec.attention_heads * spec.head_dim
    model = (training_flops(config, rows, source, target) - rows * 6.0 * _head(config) * target) / 3.0
    weights = 12 * width**2 * target + 2 * width * inner * target  # trigrams; keys and values of states
    weights += (4 * width * inner + 3 * width * spec.d_ff + 2 * width**2) * places
    pairs = spec.heads * _pairs(target, None, True)
    return model + rows * (6.0 * weights + 12.0 * inner * pairs + 4.0 * _head(config) * places)


def units_flops(config: ModelConfig, rows: int, source: int, target: int) -> float:
    """FLOPs of a step that finds lexical units first: one pass forward more, a third of the others."""
    return training_flops(config, rows, source, target) * 4.0 / 3.0


def _head(config: ModelConfig) -> float:
    """Multiply-adds of the output head per position."""
    last = config.decoder or config.encoder
    rank = config.head.rank if config.head.kind == "linear" else last and last.embedding.rank
    head = float(rank * (config.d_model + config.vocab_size) if rank else config.d_model * config.vocab_size)
    if config.head.kind == "two_level":  # the mean cluster stands for the target's
        members = config.vocab_size / config.head.codes
        head = config.d_model * config.head.codes + (config.head.rank or 0) * (config.d_model + members)
    if config.head.kind == "codes":
        head = config.d_model * config.head.groups * config.head.codes
    return head + (config.d_model**2 if config.head.mlm_transform else 0)


def _stack(stack: StackConfig, d_model: int, memory_width: int, length: int, memory: int) -> float:
    total = 0.0
    for layer in stack.layer_specs():
        for spec in layer.sublayers:
            if isinstance(spec, FFNSpec):
                total += 6.0 * _ffn_products(spec, d_model) * length
            elif isinstance(spec, RecurrentSpec):
                total += 6.0 * _recurrent_products(spec, d_model, memory_width, length, memory, stack.causal)
            else:
                total += _attention(spec, d_model, memory_width, length, memory, stack.causal)
    if own := stack.seqpe():
        total += 6.0 * own.heads * own.head_dim * _pairs(length, None, stack.causal)
    return total


def _reader(stack: StackConfig, length: int) -> float:
    """A step's FLOPs of a reader of positions, whatever the rows: matrices of 12 E^2 a layer at every digit and at the
    row after them, causal pairs of these, and the projections of what was read.
    """
    own = stack.seqpe()
    spec = own.position.seqpe if own else None
    if own is None or spec is None:
        return 0.0
    drawn = spec.pivots * (1 + spec.candidates) * bool(spec.contrast) + 2 * spec.window * bool(spec.transfer)
    symbols, width = spec.digits + 1, spec.width
    each = 6.0 * (spec.layers * 12 * symbols + 1) * width**2 + 12.0 * spec.layers * width * _pairs(symbols, None, True)
    return each * (length + drawn) + 6.0 * 2 * width * own.heads * own.head_dim * length


def _ffn_products(spec: FFNSpec, d_model: int) -> float:
    """Multiply-adds per position; of a mixture, those of the experts that serve a token, its router and its shared
    network.
    """
    matrices = 3 if spec.gated else 2
    if spec.router is None:
        return float(matrices * d_model * spec.d_ff)
    shared = matrices * d_model * (spec.router.shared or 0)
    return spec.router.active * matrices * d_model * spec.d_ff + d_model * spec.router.experts + shared


def _recurrent_products(
    spec: RecurrentSpec, d_model: int, memory_width: int, length: int, memory: int, causal: bool
) -> float:
    """Multiply-adds of a row: three gates and the output in each direction; with attention also the contexts' part in
    both, and for every pair of a target and a source position `alignment` of its score and one of each number of the
    mean.
    """
    width, units = spec.width, spec.alignment or spec.width
    total = (4 * d_model + 3 * width) * width * length * (1 if causal else 2)
    if spec.attends:
        total += (width * units + memory_width * (3 * width + d_model)) * length
        total += memory_width * units * memory + memory_width * width + (units + memory_width) * length * memory
    return float(total)


def idle_parameters(config: ModelConfig) -> int:
    """Parameters that a token, on average, does not meet: those of the experts that do not serve it, and of
    languages and scripts that are not its own.
    """
    idle = 0.0
    if config.languages:
        model = Transformer(config)
        tables = zip(jax.tree.leaves(model.shapes()), jax.tree.leaves(model.axes(), is_leaf=_is_axes), strict=True)
        idle += sum(x.size - x.size / x.shape[names.index("languages")] for x, names in tables if "languages" in names)
    for name, stack in config.stacks().items():
        width = config.memory_width if name == "encoder" else config.d_model
        for layer in stack.layer_specs():
            for spec in layer.sublayers:
                if isinstance(spec, FFNSpec) and spec.router:
                    matrices = 3 if spec.gated else 2
                    biases = (matrices - 1) * spec.d_ff + width if spec.bias else 0
                    expert = matrices * width * spec.d_ff + biases
                    idle += (spec.router.experts - spec.router.active) * expert
    return round(idle)


def _is_axes(node: object) -> bool:
    return isinstance(node, tuple)


def _attention(spec: AttentionSpec, d_model: int, memory_width: int, length: int, memory: int, causal: bool) -> float:
    heads, groups = spec.heads * spec.head_dim, spec.key_heads * spec.head_dim
    weights = 2 * d_model * heads * length
    pairs = 0.0
    if spec.reads_itself:
        weights += 2 * d_model * groups * length
        pairs += _pairs(length, spec.window, causal)
    if spec.reads_memory:
        weights += 2 * memory_width * groups * memory
        pairs += length * memory
    return 6.0 * weights + 12.0 * heads * pairs


def _pairs(length: int, window: int | None, causal: bool) -> float:
    full = length * length * (0.5 if causal else 1.0)
    return full if window is None else min(full, float(length * window))
