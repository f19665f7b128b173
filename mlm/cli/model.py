"""`mlm model list` and `mlm model show PRESET`: what the presets are, counted from shapes without allocating."""

import argparse
import json

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
    for side in ("encoder", "decoder"):
        stack = record["plan"][side]
        layer = " → ".join(
            f"{s['source']}-attention {s['heads']}×{s['head_dim']}"
            if "source" in s
            else f"{s['activation']} {s['d_ff']}"
            for spec in stack["group"]
            for s in spec["sublayers"]
        )
        print(f"{side}: {stack['repeats'] * len(stack['group'])} layers of {layer}")
    flops = record["training_flops_per_sequence"]
    print(f"training: {screen.amount(flops)}FLOP per sequence of 512 source and 114 target tokens")


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
        "layers": f"{config.encoder.layers}+{config.decoder.layers}",
        "vocab_size": config.vocab_size,
        "training_flops_per_sequence": training_flops(config, 1, 512, 114),
    }
