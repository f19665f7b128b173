"""Mixtures of experts: Switch (`switch_transformers`) and NLLB-MoE (`nllb-moe`), a tensor for every expert.

transformers drops tokens beyond a fixed number per expert (`expert_capacity`), also in evaluation for Switch; here
nothing is dropped unless a run says so. Both are the same where no expert is that full.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mlm.interop import fairseq, t5
from mlm.interop.family import Keys, both, feed_forward
from mlm.interop.rules import ConversionError, Rule
from mlm.models.config import ModelConfig, StackConfig
from mlm.models.specs import FFNSpec, LayerSpec, RouterSpec

SIDES = ("encoder", "decoder")
Sparse = Callable[[int, int], bool]  # (layer, step) -> does the layer hold experts


def with_experts(stack: StackConfig, sparse: Sequence[bool], router: RouterSpec) -> StackConfig:
    """The stack of equal dense layers with experts in those layers, as the smallest repeating group."""
    layers = [_with_router(stack.group[0], router) if one else stack.group[0] for one in sparse]
    size = next(n for n in range(1, len(layers) + 1) if all(one == layers[i % n] for i, one in enumerate(layers)))
    return dataclasses.replace(stack, group=tuple(layers[:size]), repeats=len(layers) // size, rest=len(layers) % size)


def _with_router(layer: LayerSpec, router: RouterSpec) -> LayerSpec:
    return LayerSpec(
        sublayers=tuple(
            dataclasses.replace(spec, router=router) if isinstance(spec, FFNSpec) else spec for spec in layer.sublayers
        )
    )


def _router(config: ModelConfig) -> RouterSpec:
    """Of the first mixture. Raises ConversionError when there is none."""
    for stack in config.stacks().values():
        for layer in stack.group:
            if (router := feed_forward(layer).router) is not None:
                return router
    raise ConversionError("some of its layers are mixtures of experts")


def _holds_experts(stack: StackConfig) -> list[bool]:
    return [feed_forward(layer).router is not None for layer in stack.layer_specs()]


def _is_switch(layer: int, step: int) -> bool:
    return step == 1 or (step > 0 and layer % step == 1)


def _is_nllb(layer: int, step: int) -> bool:
    return step > 0 and (layer + 1) % step == 0


def _step(stack: StackConfig, sparse: Sparse, steps: Sequence[int]) -> int:
    """The step that puts experts where the stack has them."""
    wanted = _holds_experts(stack)
    for step in steps:
        if [sparse(layer, step) for layer in range(stack.layers)] == wanted:
            return step
    raise ConversionError(f"experts in layers {[i for i, one in enumerate(wanted) if one]} follow no step of its")


def _read_switch(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    keys.expect("dense_act_fn", "relu")
    keys.expect("router_bias", False)
    config = t5.read(keys, tensors)
    router = RouterSpec(
        experts=keys.need("num_experts"),
        balance=keys.get("router_aux_loss_coef", 0.001),
        z=keys.get("router_z_loss_coef", 0.001),
        jitter=keys.get("router_jitter_noise", 0.01),
        init=0.1**0.5,
    )
    stacks = {}
    for side, stack in zip(SIDES, both(config), strict=True):
        sparse = keys.get(f"num_sparse_{side}_layers", 3)
        keys.get(f"{side}_sparse_step")  # derived from it
        step = stack.layers // sparse if sparse > 0 else stack.layers
        stacks[side] = with_experts(stack, [_is_switch(layer, step) for layer in range(stack.layers)], router)
    return dataclasses.replace(config, encoder=stacks["encoder"], decoder=stacks["decoder"])


def _write_switch(config: ModelConfig) -> dict[str, Any]:
    router = _router(config)
    content = {k: v for k, v in t5.write(config).items() if k not in ("feed_forward_proj", "scale_decoder_outputs")}
    for side, stack in zip(SIDES, both(config), strict=True):
        count = stack.layers
        step = _step(stack, _is_switch, [count // n for n in range(1, count + 1)] + [count])
        content[f"num_sparse_{side}_layers"] = count // step if any(_holds_experts(stack)) else 0
        content[f"{side}_sparse_step"] = step
    return content | {
        "dense_act_fn": feed_forward(both(config)[0].group[0]).activation,
        "num_experts": router.experts,
        "expert_capacity": 64,
        "router_bias": False,
        "router_aux_loss_coef": router.balance,
        "router_z_loss_coef": router.z,
        "router_jitter_noise": router.jitter,
    }


def _rules_switch(config: ModelConfig) -> list[Rule]:
    found = [
        dataclasses.replace(rule, theirs=rule.theirs.replace("DenseReluDense", "mlp")) for rule in t5.rules(config)
    ]
    for side, place in (("encoder", 1), ("decoder", 2)):
        ours, layer = f"{side}/{{n}}/moe", f"{side}.block.{{n}}.layer.{place}"
        found += [
            Rule(f"{ours}/router", f"{layer}.mlp.router.classifier.weight", "e d -> d e"),
            Rule(f"{ours}/up", f"{layer}.mlp.experts.expert_{{e}}.wi.weight", "f d -> d f"),
            Rule(f"{ours}/down", f"{layer}.mlp.experts.expert_{{e}}.wo.weight", "d f -> f d"),
            Rule(f"{ours}/norm/scale", f"{layer}.layer_norm.weight", "d"),
        ]
    return found


def _read_nllb(keys: Keys, tensors: frozenset[str]) -> ModelConfig:
    keys.expect("router_bias", False)
    keys.expect("second_expert_policy", "all")
    keys.expect("moe_eval_capacity_token_fraction", 1.0)  # nothing is dropped in evaluation
    config = fairseq.read(keys, tensors)
    before = keys.get("normalize_router_prob_before_dropping", False)
    router = RouterSpec(
        experts=keys.need("num_experts"),
        k=2,
        gates="chosen" if before else "kept",
        balance=keys.get("router_aux_loss_coef", 0.001),
        z=keys.get("router_z_loss_coef", 0.001),
        output_masking=keys.get("moe_token_dropout", 0.2),
    )
    stacks = {}
    for side, stack in zip(SIDES, both(config), strict=True):
        step = keys.get(f"{side}_sparse_step", 4)
        stacks[side] = with_experts(stack, [_is_nllb(layer, step) for layer in range(stack.layers)], router)
    return dataclasses.replace(config, encoder=stacks["encoder"], decoder=stacks["decoder"])


def _write_nllb(config: ModelConfig) -> dict[str, Any]:
    router = _router(config)
    steps = {
        f"{side}_sparse_step": _step(stack, _is_nllb, [*range(1, stack.layers + 1), 0])
        for side, stack in zip(SIDES, both(config), strict=True)
    }
    return {
        **fairseq.write(config),
        **steps,
        "num_experts": router.experts,
        "expert_capacity": 64,
        "router_bias": False,
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": router.gates == "chosen",
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": router.output_masking,
        "router_aux_loss_coef": router.balance,
        "router_z_loss_coef": router.z,
    }


_RENAMED = {"encoder_attn": "cross_attention", ".fc": ".ffn.fc", "final_layer_norm": "ff_layer_norm"}


def _rules_nllb(config: ModelConfig) -> list[Rule]:
    found = []
    for rule in fairseq.rules(config):
        theirs = rule.theirs
        for old, new in _RENAMED.items():
            theirs = theirs.replace(old, new)
        found.append(dataclasses.replace(rule, theirs=theirs))
    for side in SIDES:
        ours, layer = f"{side}/{{n}}/moe", f"model.{side}.layers.{{n}}"
        expert = f"{layer}.ffn.experts.expert_{{e}}"
        found += [
            Rule(f"{ours}/router", f"{layer}.ffn.router.classifier.weight", "e d -> d e"),
            Rule(f"{ours}/up", f"{expert}.fc1.weight", "f d -> d f"),
            Rule(f"{ours}/up_bias", f"{expert}.fc1.bias", "f"),
            Rule(f"{ours}/down", f"{expert}.fc2.weight", "d f -> f d"),
            Rule(f"{ours}/down_bias", f"{expert}.fc2.bias", "d"),
            Rule(f"{ours}/norm/scale", f"{layer}.ff_layer_norm.weight", "d"),
            Rule(f"{ours}/norm/bias", f"{layer}.ff_layer_norm.bias", "d"),
        ]
    return found


# Of training, of numeric types, or of dropping (see above).
_HARMLESS = ("expert_capacity", "router_dtype", "router_ignore_padding_tokens", "batch_prioritized_routing")
_HARMLESS += ("add_router_probs", "output_router_logits")

FAMILIES = (
    dataclasses.replace(
        t5.FAMILIES[0],
        name="switch_transformers",
        read=_read_switch,
        write=_write_switch,
        rules=_rules_switch,
        harmless=_HARMLESS,
    ),
    dataclasses.replace(
        fairseq.FAMILIES[0],
        name="nllb-moe",
        read=_read_nllb,
        write=_write_nllb,
        rules=_rules_nllb,
        harmless=(*_HARMLESS, *fairseq.FAMILIES[0].harmless),
    ),
)
