"""T5X checkpoints in: T5 1.0 and 1.1, mT5, umT5 and ByT5, layers scanned or apart.

    checkpoint                                            msgpack: the tree, small arrays in place, specs of the others
    target.encoder.layers_0.attention.query.kernel/…      a zarr array [D, H K]
    target.encoder.encoder.attention.query.kernel/…       scanned: [D, layers, H K]

The size of the model is that of its arrays; only what no array shows (the activation) is read from config.gin, if there
is one. The optimizer's state is left where it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization

from mlm.interop.rules import ConversionError, Piece, Rule, plan
from mlm.interop.t5 import adjusted
from mlm.models.config import ModelConfig
from mlm.models.families import t5_style
from mlm.registry import nearest

PREFIX = "target."
_ACTIVATIONS = {("gelu", "linear"): "geglu", ("silu", "linear"): "swiglu", ("relu",): "relu"}


@dataclass(frozen=True)
class Checkpoint:
    """A T5X checkpoint that has been checked: it can be converted."""

    config: ModelConfig
    pieces: list[Piece]
    arrays: "Arrays"
    step: int | None


class Arrays:
    """The parameters of a T5X checkpoint by their names without "target."; read a part at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        tree = _tree(folder)
        tree = tree.get("optimizer", tree)
        self.step = _step(tree)
        inline = _flat(tree.get("target", {}))
        self._values = {name: np.asarray(value) for name, value in inline.items() if isinstance(value, np.ndarray)}
        stored = {path.parent.name for path in folder.glob(f"{PREFIX}*/.zarray")}
        self._stores = {name.removeprefix(PREFIX): folder / name for name in stored}
        missing = sorted(name for name in inline if name not in self._values and name not in self._stores)
        if missing:
            raise ConversionError(
                f"{folder}: {len(missing)} arrays that its tree names are not there, e.g. {PREFIX}{missing[0]}: the "
                "copy is incomplete"
            )
        self.shapes = {name: value.shape for name, value in self._values.items()}
        self.shapes |= {name: tuple(self._open(name).shape) for name in self._stores}
        if not self.shapes:
            raise ConversionError(f"{folder} holds no array below {PREFIX!r}: no T5X checkpoint, or an incomplete copy")
        self._current: tuple[str, Any] = ("", None)

    def read(self, piece: Piece, rows: slice) -> np.ndarray:
        """Those rows of the piece's array, of its layer where the array holds all layers."""
        name = piece.name
        if name != self._current[0]:
            self._current = (name, self._values[name] if name in self._values else self._open(name))
        index = tuple(
            rows if axis == 0 else piece.layer if group == ("n",) else slice(None)
            for axis, group in enumerate(piece.axes.theirs)
        )
        part = self._current[1][index]
        try:
            return np.asarray(part if isinstance(part, np.ndarray) else part.read().result()).astype(np.float32)
        except ValueError as error:
            raise ConversionError(f"{self.folder}: {PREFIX}{name} cannot be read ({error}); copy it again") from None

    def _open(self, name: str) -> Any:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(self._stores[name].absolute()) + "/"}}
        # A chunk that holds several blocks is read once, and kept until the next array.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 42}})
        try:
            # A chunk that is not there would read as zeros.
            return ts.open({**spec, "fill_missing_data_reads": False}, context=context, open=True).result()
        except ValueError as error:
            raise ConversionError(f"{self.folder}: {PREFIX}{name} is no zarr array ({error})") from None


def open_t5x(folder: Path) -> Checkpoint:
    """Reads the tree and the shapes. Raises ConversionError for arrays that no T5 model has, and for missing ones."""
    arrays = Arrays(folder)
    shapes = arrays.shapes
    scanned = any(name.startswith("encoder.encoder.") for name in shapes)
    config = _config(shapes, scanned, _gin(folder), folder)
    pieces = plan(config, rules(config, scanned))
    planned = {piece.name: piece.their_shape for piece in pieces}
    lines = [f"{name} is missing; {nearest(name, shapes)}" for name in planned if name not in shapes][:5]
    lines += [f"{name} {shapes[name]} is unknown" for name in sorted(set(shapes) - set(planned))[:5]]
    lines += [
        f"{name} is {shapes[name]}, the others say {shape}"
        for name, shape in planned.items()
        if name in shapes and shapes[name] != shape
    ][:5]
    if lines:
        raise ConversionError(f"{folder}: the arrays are not those of a T5 model:\n  " + "\n  ".join(lines))
    return Checkpoint(config, pieces, arrays, arrays.step)


def rules(config: ModelConfig, scanned: bool) -> list[Rule]:
    found = [Rule("embedding", "token_embedder.embedding", "v d"), Rule("head", "decoder.logits_dense.kernel", "d v")]
    for side, stack in config.stacks().items():
        ours, layer = f"{side}/{{n}}", f"{side}.{side}" if scanned else f"{side}.layers_{{n}}"
        first, second = ("d n", " n") if scanned else ("d", "")

        def weights(inner: str, outer: str, ours: str, n: str = second) -> str:
            return f"{inner}{n} {outer} -> {ours}"

        own = "attention" if side == "encoder" else "self_attention"
        kinds = [("self_attention", own, f"pre_{own}_layer_norm")]
        kinds.append(("cross_attention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"))
        for name, theirs, norm in kinds:
            found += [
                Rule(f"{ours}/{name}/{part}", f"{layer}.{theirs}.{part}.kernel", weights("d", "(h k)", "d h k"))
                for part in ("query", "key", "value")
            ]
            found += [
                Rule(f"{ours}/{name}/out", f"{layer}.{theirs}.out.kernel", weights("(h k)", "d", "h k d")),
                Rule(f"{ours}/{name}/norm/scale", f"{layer}.{norm}.scale", f"{first} -> d"),
            ]
        gated = any(getattr(spec, "gated", False) for spec in stack.group[0].sublayers)
        found += [
            Rule(f"{ours}/ffn/gate", f"{layer}.mlp.wi_0.kernel", weights("d", "f", "d f")),
            Rule(f"{ours}/ffn/up", f"{layer}.mlp.{'wi_1' if gated else 'wi'}.kernel", weights("d", "f", "d f")),
            Rule(f"{ours}/ffn/down", f"{layer}.mlp.wo.kernel", weights("f", "d", "f d")),
            Rule(f"{ours}/ffn/norm/scale", f"{layer}.pre_mlp_layer_norm.scale", f"{first} -> d"),
            Rule(f"{side}/final_norm/scale", f"{side}.{side}_norm.scale", "d"),
            Rule(f"{side}/position", f"{side}.relpos_bias.rel_embedding", "h b"),
            Rule(f"{ours}/self_attention/position", f"{layer}.relpos_bias.rel_embedding", weights("h", "b", "h b")),
        ]
    return found


def _config(shapes: Mapping[str, tuple[int, ...]], scanned: bool, gin: str, folder: Path) -> ModelConfig:
    """The config that the shapes tell."""

    def need(*names: str) -> tuple[str, tuple[int, ...]]:
        for name in names:
            if name in shapes:
                return name, shapes[name]
        raise ConversionError(
            f"{folder} has no {' or '.join(names)}, so it is no T5 encoder-decoder; {nearest(names[0], shapes)}"
        )

    vocabulary, d_model = need("token_embedder.embedding")[1]
    layer = "encoder.encoder" if scanned else "encoder.layers_0"
    table, (heads, *_) = need("encoder.relpos_bias.rel_embedding", f"{layer}.relpos_bias.rel_embedding")
    joined = need(f"{layer}.attention.query.kernel")[1][-1]
    inner, d_ff = need(f"{layer}.mlp.wi_0.kernel", f"{layer}.mlp.wi.kernel")
    layers = []
    for side in ("encoder", "decoder"):
        if scanned:
            layers.append(need(f"{side}.{side}.mlp.wo.kernel")[1][1])
        else:
            layers.append(len({m[1] for name in shapes if (m := re.match(rf"{side}\.layers_(\d+)\.", name))}))
    said = re.search(r"mlp_activations\s*=\s*[(\[]([^)\]]*)[)\]]", gin)
    words = tuple(re.findall(r"\w+", said[1])) if said else None
    activation = _ACTIVATIONS.get(words) if words else "geglu" if inner.endswith("wi_0.kernel") else "relu"
    if activation is None:
        raise ConversionError(f"{folder}/config.gin: mlp_activations={words}: known are {sorted(_ACTIVATIONS)}")
    config = t5_style(
        vocab_size=vocabulary,
        d_model=d_model,
        d_ff=d_ff[-1],
        heads=heads,
        head_dim=joined // heads,
        layers=(layers[0], layers[1]),
        activation=activation,
        tied="decoder.logits_dense.kernel" not in shapes,
        share="stack" if table == "encoder.relpos_bias.rel_embedding" else "layer",
    )
    distance = re.search(r"(?:relative_attention_)?max_distance\s*=\s*(\d+)", gin)
    far = int(distance[1]) if distance else 128
    return adjusted(config, eps=1e-6, buckets=shapes[table][-1], max_distance=far)


def _gin(folder: Path) -> str:
    for path in (folder / "config.gin", folder.parent / "config.gin"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def _tree(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoint"
    if not path.is_file():
        inner = sorted(p.name for p in folder.glob("checkpoint_*") if (p / "checkpoint").is_file())
        hint = f"it holds {', '.join(inner)}: name one of them" if inner else "a T5X checkpoint has that file"
        raise ConversionError(f"no file 'checkpoint' in {folder}; {hint}")
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # of msgpack, many kinds
        raise ConversionError(f"{path} is no msgpack file of T5X ({type(error).__name__}: {error})") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} holds a {type(tree).__name__}, not the tree of a checkpoint")
    return tree


def _step(tree: Mapping[str, Any]) -> int | None:
    step = (tree.get("state") or {}).get("step")
    return int(step) if isinstance(step, int | np.ndarray | np.integer) else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """ "a.b" -> leaf; the spec of an array elsewhere counts as a leaf."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "driver" not in value:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found
