"""`mlm model list` and `mlm model show PRESET`: what the presets are, counted from shapes without allocating."""

import argparse
import json
from typing import Any

from mlm.cli import screen


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mlm model", description="List the model presets, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every preset with its size")
    show = commands.add_parser("show", help="the layers of one preset and its parameters by part")
    show.add_argument("preset")
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(arguments)

    from mlm.models.config import to_json
    from mlm.models.presets import PRESETS

    if options.command == "list":
        records = [_record(name) for name in PRESETS]
        if options.json:
            print(json.dumps(records, indent=1))
            return
        rows = [(r["name"], f"{r['parameters']:,}", r["d_model"], r["layers"], f"{r['vocab_size']:,}") for r in records]
        screen.table("", ("preset", ">parameters", ">d_model", ">layers", ">vocabulary"), rows)
        return
    record = _record(options.preset) | {"plan": to_json(PRESETS[options.preset]())}
    if options.json:
        print(json.dumps(record, indent=1))
        return
    parts = [(name, f"{count:,}", f"{count / record['parameters']:.1%}") for name, count in record["parts"].items()]
    screen.table(f"{options.preset}: {record['parameters']:,} parameters", ("part", ">parameters", ">share"), parts)
    for name, stack in PRESETS[options.preset]().stacks().items():
        print(f"{name}: {stack.layers} layers, {_norms(stack)}")
        for number, layer in enumerate(stack.group):
            which = "every layer" if len(stack.group) == 1 else f"layers {number}, {number + len(stack.group)}, …"
            print(f"  {which}: {' → '.join(map(_sublayer, layer.sublayers))}")
    flops = record["training_flops_per_sequence"]
    print(f"training: {screen.amount(flops)}FLOP per sequence of 512 source and 114 target tokens")


def _norms(stack: Any) -> str:
    order, kind = stack.residual.order, {"rms": "RMS norm", "layer": "LayerNorm"}[stack.norm.kind]
    where = {"pre": "before", "post": "after", "sandwich": "before and after"}[order]
    return f"{kind} {where} each sublayer" + (
        "" if stack.residual.alpha == 1 else f", alpha {stack.residual.alpha:.3f}"
    )


def _sublayer(spec: Any) -> str:
    from mlm.models.config import FFNSpec

    if isinstance(spec, FFNSpec):
        return f"{spec.activation} {spec.d_ff}"
    text = f"{spec.source}-attention {spec.heads}×{spec.head_dim}"
    if spec.key_heads != spec.heads:
        text += f" over {spec.key_heads}"
    details = [] if spec.position.kind == "none" else [spec.position.kind.replace("_", " ")]
    details += [f"window {spec.window}"] if spec.window else []
    details += [f"cap {spec.softcap:g}"] if spec.softcap else []
    details += [f"{spec.qk_norm.replace('_', ' ')} q, k"] if spec.qk_norm != "none" else []
    return f"{text} ({', '.join(details)})" if details else text


def _record(name: str) -> dict:
    from mlm import trees
    from mlm.models.flops import training_flops
    from mlm.models.presets import preset
    from mlm.models.transformer import Transformer

    config = preset(name)
    shapes = Transformer(config).shapes()
    return {
        "name": name,
        "parameters": trees.count(shapes),
        "parts": {part: trees.count(tree) for part, tree in shapes.items()},
        "d_model": config.d_model,
        "layers": "+".join(str(stack.layers) for stack in config.stacks().values()),
        "vocab_size": config.vocab_size,
        "training_flops_per_sequence": training_flops(config, 1, 512, 114),
    }
