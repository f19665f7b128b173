"""Tokenizer files of published models as a vocabulary, and back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary, load_vocabulary

SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
FILES = (
    *SENTENCEPIECE,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)


def take_vocabulary(folder: Path, target: Path, config: Mapping[str, Any], first: tuple[int, ...] = ()) -> Vocabulary:
    """The vocabulary of a Hugging Face folder, written into the folder `target` as `vocabulary.*`.

    config: the model's config.json. first: the published ids that ours 0, 1, 2, … stand for.
    Raises FileNotFoundError, with what is there, for a folder without a tokenizer.
    """
    settings = _json(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if kind.startswith("ByT5"):
        vocabulary: Vocabulary = ByteVocabulary(sentinels=settings.get("extra_ids", 125))
        vocabulary.save(target / "vocabulary.json")
        return load_vocabulary(target / "vocabulary.json")
    found = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: none of {', '.join(SENTENCEPIECE)}; give one with --vocabulary FILE "
            f"('bytes' for ByT5). The folder holds: {', '.join(sorted(p.name for p in folder.iterdir()))[:500]}"
        )
    vocabulary = SentencePieceVocabulary(found)
    if not vocabulary.sentinel_ids and str(config.get("model_type")) in ("t5", "mt5", "umt5"):
        vocabulary = SentencePieceVocabulary(found, settings.get("extra_ids", 100))
    vocabulary.save(target / "vocabulary.model")
    return load_vocabulary(target / "vocabulary.model")


def keep_files(folder: Path, target: Path) -> None:
    """Copies the tokenizer files as they are published."""
    for name in FILES:
        if (folder / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def give_vocabulary(run: Path, folder: Path, model_type: str) -> None:
    """The tokenizer files of a run for Hugging Face: those it came with, or its own vocabulary."""
    if (run / "tokenizer").is_dir():
        for path in sorted((run / "tokenizer").iterdir()):
            shutil.copyfile(path, folder / path.name)
        return
    vocabulary = load_vocabulary(run / json.loads((run / "data.json").read_text())["vocabulary"])
    if isinstance(vocabulary, ByteVocabulary):
        settings = {
            "tokenizer_class": "ByT5Tokenizer",
            "extra_ids": 0,
            "additional_special_tokens": list(vocabulary.specials),
        }
    else:
        vocabulary.save(folder / "spiece.model")
        settings = {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": 0,
            "additional_special_tokens": list(vocabulary.specials),
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
