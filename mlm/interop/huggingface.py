"""Hugging Face checkpoints: config.json and safetensors <-> a `ModelConfig` and the parameters of a run."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlm.checkpoints.streaming import Layout, StoredParams, write_params
from mlm.interop import fairseq, gemma, mixtures, t5, xlm_r
from mlm.interop.family import Family, Keys
from mlm.interop.files import DTYPES, SHARD_BYTES, TensorFolder, read_json, write_tensors
from mlm.interop.rules import Block, ConversionError, Piece, by_leaf, plan, shapes
from mlm.models.comparison import differences, mathematics
from mlm.models.config import ModelConfig, to_json
from mlm.registry import Registry, nearest

FAMILIES: Registry[Family] = Registry("Hugging Face model_type")
for _family in (*t5.FAMILIES, *fairseq.FAMILIES, *gemma.FAMILIES, *mixtures.FAMILIES, *xlm_r.FAMILIES):
    FAMILIES[_family.name] = _family
Progress = Callable[[Iterator[Block]], Iterator[Block]]  # e.g. a bar around the blocks

# What a run keeps of the config.json it came from, and an export gives back.
_KEPT = re.compile(r".*_token_id|tokenizer_class|.*dropout.*|architectures")
_NO_PROGRESS: Progress = lambda blocks: blocks  # noqa: E731


@dataclass(frozen=True)
class Published:
    """A Hugging Face folder that has been checked against its config: it can be converted."""

    family: Family
    config: ModelConfig
    content: Mapping[str, Any]
    tensors: TensorFolder
    pieces: list[Piece]

    def record(self) -> dict[str, Any]:
        """What an export of the run needs to know."""
        kept = {k: v for k, v in self.content.items() if _KEPT.fullmatch(k) and v is not None}
        dtype = "bfloat16" if self.tensors.dtypes == {"bfloat16"} else "float32"
        return {"family": self.family.name, "dtype": dtype, "config": kept}


def open_published(folder: Path) -> Published:
    """Reads config.json and the headers of the safetensors.

    Raises ConversionError for another family than the known ones, keys that nobody knows, and tensors that are missing,
    unknown or of another shape than the config says.
    """
    content = read_json(folder / "config.json")
    family = _family_of(content, folder)
    tensors = TensorFolder(folder)
    names = frozenset(tensors.shapes)
    kept = _kept(family, names)
    repeated = {
        copy: kept[original]
        for copy, original in family.copies.items()
        if copy in names and copy != kept[original] and _equal(tensors, copy, kept[original])
    }
    keys = Keys(content, str(folder / "config.json"))
    keys.expect("tie_encoder_decoder", False)
    keys.expect("pruned_heads", {})
    try:
        config = family.read(keys, names - frozenset(repeated))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{keys.where}: {error}") from error
    keys.finish(family.harmless)
    pieces = plan(config, family.rules(config))
    planned = {piece.name for piece in pieces}
    kept = {original: name for original, name in kept.items() if name not in planned}
    pieces = [replace(piece, name=kept.get(piece.name, piece.name)) for piece in pieces]
    _check(folder, family, tensors, pieces, repeated)
    return Published(family, config, content, tensors, pieces)


def import_params(published: Published, checkpoints: Path, progress: Progress = _NO_PROGRESS) -> None:
    """Writes the parameters as checkpoint 0. Memory: some blocks, whatever the size of the model."""
    tensors = published.tensors

    def read(piece: Piece, rows: slice) -> np.ndarray:
        return tensors.read(piece.name, rows)

    write_pieces(published.pieces, published.config, read, checkpoints, progress, published.family.ids.first)
    tensors.close()


def write_pieces(
    pieces: list[Piece],
    config: ModelConfig,
    read: Callable[[Piece, slice], np.ndarray],
    checkpoints: Path,
    progress: Progress,
    first_ids: tuple[int, ...] = (),
) -> None:
    """Checkpoint 0 of the pieces. read: (piece, rows of its tensor) -> float32, of one layer where that holds all."""
    sizes, parts = shapes(config), by_leaf(pieces)
    layouts = {leaf: Layout(sizes[leaf], (1,) * len(mine[0].index) + mine[0].chunk()) for leaf, mine in parts.items()}

    def blocks():
        for block in progress(block for piece in pieces for block in piece.blocks()):
            piece = block.piece
            theirs = _renumbered(read(piece, block.rows), block, first_ids)
            yield piece.leaf, block.index, block.to_ours(theirs)

    write_params(checkpoints, 0, layouts, blocks())


def export_params(
    stored: StoredParams,
    config: ModelConfig,
    folder: Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    keep: Mapping[str, Any] | None = None,
    progress: Progress = _NO_PROGRESS,
) -> tuple[Family, int]:
    """Writes config.json and safetensors into a folder; (family, number of files).

    family: `model_type`; None: the first that can express the config. keep: further keys of config.json.
    Raises ConversionError when no family can, naming the fields.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r}; {nearest(dtype, DTYPES)}")
    chosen, content = describe(config, family)
    pieces = plan(config, chosen.rules(config))
    blocks = iter(progress(block for piece in pieces for block in piece.blocks()))
    last = {piece.leaf: piece for piece in pieces}

    def tensor(piece: Piece) -> Iterator[tuple[slice, np.ndarray]]:
        for _ in piece.blocks():
            block = next(blocks)
            theirs = block.to_theirs(stored.read(piece.leaf, block.index))
            yield block.rows, _renumbered(theirs, block, chosen.ids.first, back=True)
        if last[piece.leaf] is piece:
            stored.finish(piece.leaf)

    files = write_tensors(
        folder,
        {piece.name: piece.their_shape for piece in pieces},
        ((piece.name, tensor(piece)) for piece in pieces),
        dtype,
        shard_bytes,
    )
    content = {**content, **(keep or {}), "model_type": chosen.name, "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n")
    return chosen, files


def describe(config: ModelConfig, family: str | None = None) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) of a config. Raises ConversionError when no family has this mathematics."""
    if config.chimera is not None:
        raise ConversionError(
            "a Hugging Face folder has no place for the chimera heads of this run; export the run that they were "
            "trained on (run.initial in its config.gin), whose other parameters are the same: with --parameters ema "
            "where that kept a running mean"
        )
    wanted = mathematics(config)
    best: tuple[bool, int, list[str]] | None = None
    for candidate in [FAMILIES[family]] if family else FAMILIES.values():
        try:
            content = candidate.write(config)
            names = frozenset({t5.HEAD} if config.head.kind == "linear" else ())
            again = candidate.read(Keys({**content, "model_type": candidate.name}, "config.json"), names)
        except (ValueError, LookupError, AttributeError, TypeError, IndexError) as error:
            failed, lines = True, [str(error)]
        else:
            failed, lines = False, differences(to_json(wanted), to_json(mathematics(again)))
            if not lines:
                return candidate, content
        if best is None or (failed, len(lines)) < best[:2]:
            best = (failed, len(lines), [f"{candidate.name} cannot say: {line}" for line in lines])
    raise ConversionError(
        f"{family or 'no Hugging Face family that is known here'} has this model's mathematics:\n  "
        + "\n  ".join(best[2][:8] if best else ())
        + f"\nknown: {', '.join(FAMILIES)}"
    )


def _family_of(content: Mapping[str, Any], folder: Path) -> Family:
    name = str(content.get("model_type"))
    if name not in FAMILIES:
        raise ConversionError(
            f"{folder / 'config.json'}: model_type={name!r} is no family that can be converted; "
            f"{nearest(name, FAMILIES)}"
        )
    return FAMILIES[name]


def _kept(family: Family, names: frozenset[str]) -> dict[str, str]:
    """Name of a tensor that others repeat -> the name that it has in this file: which one a file keeps of tensors that
    are one is chance.
    """
    kept: dict[str, str] = {}
    for copy, original in family.copies.items():
        if original in names or copy in names:
            kept.setdefault(original, original if original in names else copy)
    return kept


def _check(
    folder: Path, family: Family, tensors: TensorFolder, pieces: list[Piece], repeated: Mapping[str, str]
) -> None:
    planned = {piece.name: piece.their_shape for piece in pieces}
    found = set(tensors.shapes)
    missing = [name for name in planned if name not in found]
    unknown = [
        name
        for name in found.difference(planned, repeated, family.zeros)
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    ]
    wrong = [
        f"{name} is {tensors.shapes[name]}, the config says {shape}"
        for name, shape in planned.items()
        if name in found and tensors.shapes[name] != shape
    ]
    nonzero = [n for n in family.zeros if n in found and _any(tensors, n)]
    lines = [
        f"{name} is missing; {nearest(name, unknown)}" if unknown else f"{name} is missing" for name in missing[:5]
    ]
    lines += [f"… and {len(missing) - 5} more are missing"] if len(missing) > 5 else []
    lines += [
        f"{name} differs from {family.copies[name]}, which it should repeat"
        if name in family.copies
        else f"{name} {tensors.shapes[name]} is unknown to the family"
        for name in sorted(unknown)[:5]
    ]
    lines += [f"… and {len(unknown) - 5} more are unknown"] if len(unknown) > 5 else []
    lines += wrong[:5] + [f"{name} is not zero, and the family here has no such bias" for name in nonzero]
    if lines:
        raise ConversionError(
            f"{folder}: the tensors are not those of a {family.name} model of this config:\n  "
            + "\n  ".join(lines)
            + "\nthe folder may mix two models, hold another head (classification), or be incomplete"
        )


def _rows(tensors: TensorFolder, name: str) -> Iterator[slice]:
    size, *rest = tensors.shapes[name]
    step = max(1, (1 << 22) // max(1, int(np.prod(rest))))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _equal(tensors: TensorFolder, a: str, b: str) -> bool:
    return tensors.shapes[a] == tensors.shapes[b] and all(
        np.array_equal(tensors.read(a, rows), tensors.read(b, rows)) for rows in _rows(tensors, a)
    )


def _any(tensors: TensorFolder, name: str) -> bool:
    return any(bool(tensors.read(name, rows).any()) for rows in _rows(tensors, name))


def _renumbered(theirs: np.ndarray, block: Block, first: tuple[int, ...], back: bool = False) -> np.ndarray:
    """Rows of a table of tokens in the order of the other side's ids; all that move stand in the first block."""
    if not first or block.piece.axes.theirs[0] != ("v",) or block.rows.start:
        return theirs
    if len(theirs) < len(first):
        raise ConversionError(f"a vocabulary of {len(theirs)} ids is smaller than its {len(first)} special tokens")
    moved, order = theirs.copy(), list(first)
    if back:
        moved[order] = theirs[: len(order)]
    else:
        moved[: len(order)] = theirs[order]
    return moved
