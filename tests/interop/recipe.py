"""Small members of every family as numbers: their config.json, their tensors from a rule, how goldens are kept.

A golden file holds the config.json, the names and shapes of the tensors, the inputs, and what PyTorch computed. The
tensors themselves are drawn anew from their names, so that a golden is a few kB and needs no torch to be used.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parent / "goldens"
VOCABULARY, SOURCE, TARGET, NEW_TOKENS = 40, 9, 7, 12
FIRST_TEXT = 4  # ids below are special in every family
MASK, MASKED = VOCABULARY - 1, 3  # of an encoder alone: every third token of a source is this one


class Golden(NamedTuple):
    """source, target: ids of the published model, padded; of an encoder alone, the source with masked places, and
    without. generated: what greedy search adds after the first input.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    source: np.ndarray
    lengths: np.ndarray
    target: np.ndarray
    target_lengths: np.ndarray
    encoded: np.ndarray
    logits: np.ndarray
    loss: np.ndarray
    generated: np.ndarray


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Norms near what they are at first, everything else of a size at which every part of the model matters."""
    return {name: _tensor(name, shape, shapes) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], shapes: Mapping[str, Any]) -> np.ndarray:
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name == "final_logits_bias":
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        gemma = any("pre_feedforward_layernorm" in other for other in shapes)
        return (0.2 * drawn + (1.0 if "norm" in name and name.endswith("weight") and not gemma else 0.0)).astype(
            np.float32
        )
    if "relative_attention_bias" in name:
        return drawn.astype(np.float32)
    # Small tables: with a tied head a large one would have every token follow itself.
    size = 0.5 if any(part in name for part in ("shared", "embed_tokens", "word_embeddings")) else 2.5
    return (size * drawn / np.sqrt(shape[-1])).astype(np.float32)


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows() -> dict[str, np.ndarray]:
    """Two examples, the second one shorter on both sides; filled up with 0."""
    draw = np.random.default_rng(7)
    lengths, target_lengths = np.array([SOURCE, SOURCE - 3]), np.array([TARGET - 2, TARGET])
    found = {"lengths": lengths, "target_lengths": target_lengths}
    for name, width, own in (("source", SOURCE, lengths), ("target", TARGET, target_lengths)):
        ids = draw.integers(FIRST_TEXT, VOCABULARY, (2, width))
        found[name] = np.where(np.arange(width) < own[:, None], ids, 0)
    return found


def masked_rows() -> dict[str, np.ndarray]:
    """The sources of `rows` as targets, and with masked places as sources."""
    given = rows()
    hidden = (np.arange(SOURCE) % MASKED == 1) & (np.arange(SOURCE) < given["lengths"][:, None])
    masked = {"source": np.where(hidden, MASK, given["source"]), "target": given["source"]}
    return {**masked, "lengths": given["lengths"], "target_lengths": given["lengths"]}


def save(path: Path, golden: Golden) -> None:
    arrays = golden._asdict()
    texts = {name: json.dumps(arrays.pop(name)) for name in ("config", "shapes")}
    np.savez_compressed(path, **texts, **arrays)


def load(path: Path) -> Golden:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    config, shapes = (json.loads(str(arrays.pop(name))) for name in ("config", "shapes"))
    return Golden(config, {name: tuple(shape) for name, shape in shapes.items()}, **arrays)
