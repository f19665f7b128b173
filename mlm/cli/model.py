"""`mlm model list` and `mlm model show PRESET`: what the presets are and need, from shapes, without allocating."""

import argparse
import json
import math
import textwrap
import time
from typing import Any

from mlm.cli import screen
from mlm.cli.main import UsageError

CPU_ESTIMATE = (
    "gradients and activations are XLA:CPU's estimate: accelerators fuse more, and keep bfloat16 where a CPU widens it"
)


def run(arguments: list[str]) -> None:
    options = _parse(arguments)
    if options.command == "list":
        _list(options.json)
        return
    try:
        record = _shown(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        _print(record)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlm model", description="List the model presets, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every preset with its size")
    show = commands.add_parser(
        "show",
        help="the layers of one preset, its parameters by part, its memory and FLOPs",
        description="The layers of one preset, its parameters by part, and what a device of a mesh holds of it. With "
        "--batch a training step is compiled as well, for devices that need not be there; no weights are made.",
        epilog="example: mlm model show mt5_xxl --mesh fsdp=8,tensor=2 --optimizer adamw --batch 64 --dtype bfloat16",
    )
    show.add_argument("preset")
    show.add_argument(
        "--mesh", type=_mesh, default={}, metavar="AXIS=N,…", help="as fsdp=8,tensor=2 (default: 1 device)"
    )
    show.add_argument("--optimizer", default="adafactor", metavar="NAME", help="adafactor (default), adamw, muon, …")
    show.add_argument("--batch", type=int, metavar="ROWS", help="compile a step of a global batch of so many rows")
    show.add_argument("--microbatches", type=int, default=1, metavar="N", help="parts of a batch taken in turn")
    show.add_argument("--lengths", type=_lengths, metavar="SOURCE,TARGET", help="tokens of a row (default: 512,114)")
    show.add_argument("--dtype", metavar="TYPE", help="of activations: float32 (default) or bfloat16")
    show.add_argument("--remat", metavar="POLICY", help="what is computed again: none (default), minimal, dots, full")
    show.add_argument(
        "--attention", metavar="PATH", help="how it is computed: plain (default), blockwise, cudnn, splash"
    )
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="machine-readable")
    return parser.parse_args(arguments)


def _mesh(text: str) -> dict[str, int]:
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(size.isdigit() and int(size) for size in sizes.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like fsdp=8,tensor=2: sizes are numbers of devices")
    return {name: int(size) for name, size in sizes.items()}


def _lengths(text: str) -> tuple[int, ...]:
    lengths = text.split(",")
    if not all(length.isdigit() and int(length) for length in lengths) or len(lengths) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512,114: tokens of the source and of the target")
    return tuple(map(int, lengths))


def _list(as_json: bool) -> None:
    from mlm.models.presets import PRESETS, preset

    records = [_record(name, preset(name)) for name in PRESETS]
    if as_json:
        print(json.dumps(records, indent=1))
        return
    columns = ("preset", "family", ">parameters", ">for a token", ">d_model", ">layers", ">vocabulary")
    rows = [
        (
            r["name"],
            r["family"],
            f"{r['parameters']:,}",
            f"{r['active_parameters']:,}" if r["active_parameters"] < r["parameters"] else "all",
            r["d_model"],
            r["layers"],
            f"{r['vocab_size']:,}",
        )
        for r in records
    ]
    screen.table("", columns, rows)


def _record(name: str, config: Any, given: tuple[int, ...] | None = None) -> dict:
    """given: lengths of source and target, as typed; one is enough for a model of one stack."""
    from mlm import trees
    from mlm.models.flops import idle_parameters, training_flops
    from mlm.models.presets import PRESETS
    from mlm.models.transformer import Transformer

    stacks = config.stacks()
    if given and len(given) < len(stacks):
        raise ValueError(f"--lengths={given[0]}: {name} has an encoder and a decoder; give both, as 512,114")
    source, target = (given or (512, 114)) if len(stacks) == 2 else (given or (512,))[-1:] * 2
    lengths = {side: length for side, length in (("encoder", source), ("decoder", target)) if side in stacks}
    shapes = Transformer(config).shapes()
    flops = training_flops(config, 1, source, target)
    return {
        "name": name,
        "family": PRESETS[name].family,
        "parameters": trees.count(shapes),
        "active_parameters": trees.count(shapes) - idle_parameters(config),
        "parts": {part: trees.count(tree) for part, tree in shapes.items()},
        "d_model": config.d_model,
        "layers": "+".join(str(stack.layers) for stack in stacks.values()),
        "vocab_size": config.vocab_size,
        "lengths": lengths,
        "training_flops_per_sequence": flops,
        "training_flops_per_token": flops / sum(lengths.values()),
    }


def _shown(options: argparse.Namespace) -> dict:
    from mlm.models.config import to_json
    from mlm.models.presets import preset
    from mlm.parallel import stand_ins

    mesh = _mesh_config(options.mesh)
    count = math.prod(mesh.asked().values())
    devices = stand_ins(count) if options.batch else None  # before anything else starts jax with what is there
    config = preset(options.preset, dtype=options.dtype, remat=options.remat, attention=options.attention)
    record = _record(options.preset, config, options.lengths)
    memory = _state(config, mesh, count, options)
    if devices:
        memory["step"] = _step(config, mesh, devices, options, record["lengths"])
    return record | {"memory": memory, "plan": to_json(config)}


def _mesh_config(sizes: dict[str, int]) -> Any:
    from mlm.parallel import MeshConfig
    from mlm.parallel.mesh import AXES
    from mlm.registry import nearest

    for name in sizes:
        if name not in ("replica", *AXES):
            raise ValueError(f"--mesh: no axis {name!r}; {nearest(name, ('replica', *AXES))}")
    return MeshConfig(**{"data": 1} | sizes)


def _optimizer(options: argparse.Namespace) -> Any:
    from mlm.training.optimizers import make_optimizer

    return make_optimizer(options.optimizer, learning_rate=1e-3)  # whichever rate: it takes no memory


def _state(config: Any, mesh: Any, devices: int, options: argparse.Namespace) -> dict:
    """Bytes per device, exact."""
    from mlm.models.transformer import Transformer
    from mlm.parallel import abstract_mesh
    from mlm.training.memory import state_memory

    state = state_memory(Transformer(config), _optimizer(options), abstract_mesh(mesh, devices))
    return {"devices": devices, "mesh": options.mesh, "optimizer": options.optimizer, "state": state._asdict()}


def _step(config: Any, mesh: Any, devices: list, options: argparse.Namespace, lengths: dict[str, int]) -> dict:
    """Bytes per device as a compiler sees them."""
    from mlm.parallel import make_mesh
    from mlm.training.memory import abstract_batch, step_memory
    from mlm.training.trainer import TrainConfig, Trainer

    if "decoder" not in lengths:
        raise ValueError("--batch: no objective trains an encoder alone, so there is no step to compile; leave it out")
    train = TrainConfig(steps=1, microbatches=options.microbatches)
    with screen.working("compiling …"):
        start = time.perf_counter()
        # One language: its metrics are a few numbers for each.
        trainer = Trainer(config, train, _optimizer(options), make_mesh(mesh, devices), languages=1)
        trainer.check_batch(options.batch)
        target = lengths["decoder"]
        batch = abstract_batch(options.batch, lengths.get("encoder", target), target, trainer.mesh)
        memory = step_memory(trainer, batch)
    if memory is None:
        raise ValueError(f"the compiler of platform {devices[0].platform!r} does not say what memory a step takes")
    return memory._asdict() | {
        "rows": options.batch,
        "platform": devices[0].platform,
        "compile_seconds": time.perf_counter() - start,
    }


def _print(record: dict) -> None:
    from mlm.models.config import from_json
    from mlm.models.paths import fitting_paths

    config, total = from_json(record["plan"]), record["parameters"]
    parts = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in record["parts"].items()]
    screen.table(
        f"{record['name']} ({record['family']}): {total:,} parameters", ("part", ">parameters", ">share"), parts
    )
    for name, stack in config.stacks().items():
        print(f"{name}: {stack.layers} layers, {_norms(stack)}")
        for number, layer in enumerate(stack.group):
            which = "every layer" if len(stack.group) == 1 else f"layers {number}, {number + len(stack.group)}, …"
            _wrapped(f"  {which}: {' → '.join(map(_sublayer, layer.sublayers))}", "    ")
        if stack.attentions():
            print(f"  attention paths: {', '.join(fitting_paths(stack, 'bfloat16'))}")
    sizes = (
        {"encoder": "source", "decoder": "target"} if len(record["lengths"]) == 2 else dict.fromkeys(record["lengths"])
    )
    row = " and ".join(f"{n}{f' {sizes[side]}' if sizes[side] else ''}" for side, n in record["lengths"].items())
    per_sequence, per_token = record["training_flops_per_sequence"], record["training_flops_per_token"]
    print(
        f"training: {screen.amount(per_token)}FLOP per token, {screen.amount(per_sequence)}FLOP per row of {row} tokens"
    )
    _print_memory(record["memory"])


def _print_memory(memory: dict) -> None:
    state, count = memory["state"], memory["devices"]
    axes = ", ".join(f"{name}={size}" for name, size in memory["mesh"].items())
    where = f"each of {count} devices ({axes})" if count > 1 else "one device"
    sizes = dict(state)
    title = f"memory of {where}, {memory['optimizer']}, float32 masters"
    if step := memory.get("step"):
        # What goes in beyond the state is the batch, and a few numbers.
        inputs = step["arguments"] - state["parameters"] - state["optimizer"]
        del sizes["gradients"]
        sizes |= {"batch": inputs, "gradients and activations": step["temporaries"]}
        title += f", {step['rows']} rows"
    total = sum(sizes.values())
    rows = [(name, f"{screen.amount(float(size))}B", f"{size / total:.0%}") for name, size in sizes.items()]
    screen.table(title, ("part", ">bytes", ">share"), [*rows, ("total", f"{screen.amount(float(total))}B", "")])
    if not step:
        print("without activations: --batch ROWS compiles a step and counts them")
    elif step["platform"] == "cpu":
        _wrapped(f"compiled in {screen.duration(step['compile_seconds'])}; {CPU_ESTIMATE}", "")


def _wrapped(text: str, indent: str) -> None:
    print(textwrap.fill(text, width=100, subsequent_indent=indent, break_on_hyphens=False))


def _norms(stack: Any) -> str:
    order, kind = stack.residual.order, {"rms": "RMS norm", "layer": "LayerNorm"}[stack.norm.kind]
    where = {"pre": "before", "post": "after", "sandwich": "before and after"}[order]
    return f"{kind} {where} each sublayer" + (
        "" if stack.residual.alpha == 1 else f", alpha {stack.residual.alpha:.3f}"
    )


def _router(router: Any) -> str:
    count = f"{router.active:g} of {router.experts} experts"
    return count + (f" beside a shared {router.shared}" if router.shared else "")


def _sublayer(spec: Any) -> str:
    from mlm.models.specs import FFNSpec, RecurrentSpec

    if isinstance(spec, RecurrentSpec):
        attends = f" with additive attention {spec.alignment or spec.width}" if spec.attends else ""
        return f"gated recurrent units {spec.width}{attends}"
    if isinstance(spec, FFNSpec):
        text = f"{spec.activation} {spec.d_ff}"
        return text if spec.router is None else f"{_router(spec.router)} of {text}"
    text = f"{spec.source}-attention {spec.heads}×{spec.head_dim}"
    if spec.key_heads != spec.heads:
        text += f" over {spec.key_heads}"
    details = [] if spec.position.kind == "none" else [spec.position.kind.replace("_", " ")]
    details += [f"window {spec.window}"] if spec.window else []
    details += [f"cap {spec.softcap:g}"] if spec.softcap else []
    details += [f"{spec.qk_norm.replace('_', ' ')} q, k"] if spec.qk_norm != "none" else []
    return f"{text} ({', '.join(details)})" if details else text
