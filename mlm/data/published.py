"""Tokenizer files of published models as a vocabulary, and back.

Whatever the file, the result is one SentencePiece `.model`, which SeqIO and TensorFlow read: a tokenizer.json of the
kinds that came from SentencePiece (Unigram, or BPE with merges) says the same in other words. Ids are the published
ones but for the first few: 0 is padding, 1 the end of sequence, 2 unknown, as everywhere here. Tokens of languages
(`__fr__`, `fra_Latn`, `fr_XX`) are called `<2fr>`.
"""

import base64
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from mlm.data.languages import language
from mlm.data.templates import EOS, FROM, TEXT, TO, TOKENIZERS, USUAL, Template
from mlm.data.vocabulary import (
    ByteVocabulary,
    Piece,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    write_whole,
)

SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
FILES = (
    *SENTENCEPIECE,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("generation_config.json",),
)
SENTINEL_FAMILIES = ("t5", "mt5", "umt5", "switch_transformers")  # <extra_id_n> follow the pieces of the file
# Languages of M2M-100's dictionaries, which follow its words in this order, by the `language_codes` of its tokenizer.
FAIRSEQ_LANGUAGES = {
    "m2m100": """
        af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht
        hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps
        pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu
    """,
    "wmt21": "en ha is ja cs ru zh de",
}
_LANGUAGE = re.compile(r"__([a-z]{2,3})__|([a-z]{3}_[A-Z][a-z]{3})|([a-z]{2})_[A-Z]{2}")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Types = dict[str, int]


class Entry(NamedTuple):
    """One id of a published tokenizer."""

    text: str
    score: float
    type: int


def take_vocabulary(folder: Path, target: Path, config: Mapping[str, Any], first: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a Hugging Face folder, written into the folder `target` as `vocabulary.*`.

    config: the model's config.json. first: the published ids that ours 0, 1, 2, … stand for (none: they are the same).
    Raises FileNotFoundError, with what is there, for a folder without a tokenizer, ValueError for one of another kind.
    """
    settings = _json(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if kind.startswith("ByT5"):
        ByteVocabulary(sentinels=settings.get("extra_ids", 125)).save(target / "vocabulary.json")
        return load_vocabulary(target / "vocabulary.json")
    model = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    whole = folder / "tokenizer.json"
    shifted = bool(first) and first[0] != 0  # fairseq's ids are not those of its SentencePiece file
    if model is None and not whole.is_file():
        raise FileNotFoundError(
            f"no tokenizer in {folder}: neither tokenizer.json nor one of {', '.join(SENTENCEPIECE)}; give one with "
            f"--vocabulary FILE. The folder holds: {', '.join(sorted(p.name for p in folder.iterdir()))[:500]}"
        )
    path = target / "vocabulary.model"
    if model is None or (shifted and whole.is_file()):
        write_whole(path, _from_json(whole, first).SerializeToString())
    elif shifted:
        write_whole(path, _from_fairseq(folder, model, settings, first).SerializeToString())
    else:
        given = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
        named = [Entry(p.piece, p.score, p.type) for p in given.pieces]
        write_whole(path, _proto(given, named, first).SerializeToString() if first else model.read_bytes())
        plain = SentencePieceVocabulary(path)
        if not plain.sentinel_ids and config.get("model_type") in SENTINEL_FAMILIES:
            SentencePieceVocabulary(path, settings.get("extra_ids", 100)).save(path)
    return load_vocabulary(path)


def take_template(folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> Template | None:
    """How the tokenizer of a Hugging Face folder writes sources, and what it has the decoder write first; None where it
    adds nothing but an end.

    From the class where that decides; else what tokenizer_config.json or the template of tokenizer.json say; else as
    the family has it. Raises KeyError for a special token that the vocabulary lacks.
    """
    settings, whole = _json(folder / "tokenizer_config.json"), _json(folder / "tokenizer.json")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    found = TOKENIZERS.get(kind.removesuffix("Fast"))
    if found and settings.get("legacy_behaviour"):  # NLLB's as transformers 4.22 had it
        found = replace(found, source=(TEXT, EOS, FROM))
    found = found or _template_of(settings, whole) or USUAL.get(config.get("model_type", ""), Template())
    for name in (*found.source, *found.target):
        if name not in (TEXT, EOS, FROM, TO):
            vocabulary.special(name)
    return None if found == Template() else found


def _template_of(settings: Mapping[str, Any], whole: Mapping[str, Any]) -> Template | None:
    """What a tokenizer's settings, or its post-processor, put around a text."""
    if {"add_bos_token", "add_eos_token"} & set(settings):
        bos = settings.get("bos_token") or "<s>"
        first = (bos if isinstance(bos, str) else bos["content"],) if settings.get("add_bos_token") else ()
        return Template((*first, TEXT, *([EOS] if settings.get("add_eos_token") else [])))
    steps = whole.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            ends = ("</s>", "<eos>")
            names = [part["SpecialToken"]["id"] if "SpecialToken" in part else TEXT for part in step["single"]]
            source = tuple(EOS if n in ends else FROM if _language_name(n) != n else n for n in names)
            # The same source is written by a tokenizer that is known, and that says how the target begins.
            known = next((one for one in TOKENIZERS.values() if one.source == source), None)
            return known or Template(source, (TO,) if FROM in source else ())
    return None


def keep_files(folder: Path, target: Path) -> None:
    """Copies the tokenizer files as they are published."""
    for name in FILES:
        if (folder / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def give_vocabulary(run: Path, folder: Path) -> None:
    """The tokenizer files of a run for Hugging Face: those it came with, or its own vocabulary."""
    if (run / "tokenizer").is_dir():
        for path in sorted((run / "tokenizer").iterdir()):
            shutil.copyfile(path, folder / path.name)
        return
    vocabulary = load_vocabulary(run / json.loads((run / "data.json").read_text())["vocabulary"])
    settings: dict[str, Any] = {"extra_ids": 0, "additional_special_tokens": list(vocabulary.specials)}
    if isinstance(vocabulary, ByteVocabulary):
        settings["tokenizer_class"] = "ByT5Tokenizer"
    else:
        # Not T5Tokenizer, which makes its own of the pieces, without their bytes.
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        vocabulary.save(folder / "spiece.model")
        (folder / "tokenizer.json").write_text(json.dumps(_to_json(vocabulary), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n")


def _from_json(path: Path, first: Sequence[int]) -> Any:
    """The SentencePiece model that a tokenizer.json describes."""
    content = _json(path)
    model = content.get("model") or {}
    proto = sentencepiece_model_pb2.ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = False, False
    for part in _parts(content.get("normalizer")) + _parts(content.get("pre_tokenizer")):
        _apply(part, normalizer, path)
    if model.get("type") == "Unigram":
        trainer.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
        entries = {i: Entry(text, score, Piece.NORMAL) for i, (text, score) in enumerate(model["vocab"])}
        unknown = model["unk_id"]
    elif model.get("type") == "BPE":
        trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
        entries = dict(_bpe(model))
        unknown = model["vocab"][model["unk_token"]]
    else:
        raise ValueError(
            f"{path}: a tokenizer of type {model.get('type')!r}; only Unigram and BPE, as SentencePiece makes them, "
            "can be converted"
        )
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    if trainer.byte_fallback:
        entries = {i: e._replace(type=Piece.BYTE) if _BYTE.fullmatch(e.text) else e for i, e in entries.items()}
    for token in content.get("added_tokens", ()):
        kind = Piece.CONTROL if token["special"] else Piece.USER_DEFINED
        entries[token["id"]] = Entry(token["content"], 0.0, kind)
    entries[unknown] = entries[unknown]._replace(type=Piece.UNKNOWN)
    gap = [Entry(f"<gap_{i}>", 0.0, Piece.UNUSED) for i in range(max(entries) + 1)]
    return _proto(proto, [entries.get(i, gap[i]) for i in range(max(entries) + 1)], first)


def _bpe(model: Mapping[str, Any]) -> Iterator[tuple[int, Entry]]:
    """Pieces with the scores by which SentencePiece merges in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    for text, i in model["vocab"].items():
        # What no merge makes is reached only whole: a single character, or a token that is added.
        reached = text in ranks or len(text) == 1 or _BYTE.fullmatch(text)
        yield i, Entry(text, -float(ranks.get(text, len(ranks))), Piece.NORMAL if reached else Piece.UNUSED)


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if not step:
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [part for item in inner or () for part in _parts(item)] if step["type"] == "Sequence" else [step]


def _apply(part: Mapping[str, Any], normalizer: Any, path: Path) -> None:
    """What a step of tokenizer.json is in the words of SentencePiece."""
    kind, pattern = part["type"], part.get("pattern", {})
    if kind == "Precompiled":
        normalizer.precompiled_charsmap = base64.b64decode(part["precompiled_charsmap"])
    elif kind == "Metaspace":
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        normalizer.add_dummy_prefix = normalizer.add_dummy_prefix or scheme != "never"
    elif kind == "Prepend" and part.get("prepend") == "▁":
        normalizer.add_dummy_prefix = True
    elif kind in ("Strip", "WhitespaceSplit") or (kind == "Replace" and pattern.get("Regex") in (" {2,}", r"\s+")):
        normalizer.remove_extra_whitespaces = True
    elif not (pattern.get("String") == " " and (kind, part.get("content")) in (("Replace", "▁"), ("Split", None))):
        raise ValueError(f"{path}: the step {json.dumps(part)[:200]} has no counterpart in SentencePiece")


def _from_fairseq(folder: Path, model: Path, settings: Mapping[str, Any], first: Sequence[int]) -> Any:
    """fairseq's own dictionary (vocab.json) or its offset, then languages and <mask>, over a SentencePiece file."""
    given = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    pieces = {p.piece: Entry(p.piece, p.score, p.type) for p in given.pieces}
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    extra = extra or _json(folder / "special_tokens_map.json").get("additional_special_tokens") or []
    names = [token if isinstance(token, str) else token["content"] for token in extra]
    head = ["<s>", "<pad>", "</s>", "<unk>"]
    words: dict[str, int] = _json(folder / "vocab.json")
    if words and not names:
        names = [f"__{code}__" for code in FAIRSEQ_LANGUAGES[settings.get("language_codes", "m2m100")].split()]
    order = sorted(words, key=words.__getitem__) if words else [*head, *(p.piece for p in given.pieces[3:])]
    order += [name for name in names if name not in order]
    if not words and "<mask>" not in order:
        order.append("<mask>")
    control = {name: Entry(name, 0.0, Piece.CONTROL) for name in order if name not in pieces}
    control |= {name: Entry(name, 0.0, Piece.CONTROL) for name in (*head, *names)}
    control["<unk>"] = Entry("<unk>", 0.0, Piece.UNKNOWN)
    return _proto(given, [control.get(name) or pieces[name] for name in order], first)


def _proto(model: Any, entries: Sequence[Entry], first: Sequence[int]) -> Any:
    """The model with these pieces, the first ones in our order, and its special pieces by their names."""
    moved = [entries[i] for i in first] + list(entries[len(first) :])
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(model)
    del proto.pieces[:]
    taken: set[str] = {entry.text for entry in moved}
    for i, (text, score, kind) in enumerate(moved):
        name = _language_name(text) if kind != Piece.NORMAL else text
        if name != text and name in taken:
            name = text
        taken.add(name)
        kind = Piece.CONTROL if i < 2 else Piece.UNKNOWN if i == 2 else Piece.NORMAL if kind == Piece.UNKNOWN else kind
        proto.pieces.add(piece=name, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, 3 if len(first) > 3 else -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = (p.piece for p in proto.pieces[:3])
    trainer.vocab_size = len(proto.pieces)
    return proto


def _language_name(text: str) -> str:
    """`<2fr>` for the token of a language, anything else as it is."""
    match = _LANGUAGE.fullmatch(text)
    try:
        return f"<2{language(next(filter(None, match.groups()))).code}>" if match else text
    except KeyError:
        return text


def _to_json(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """A tokenizer.json of a Unigram or BPE vocabulary of ours."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.sp_model)
    pieces = list(proto.pieces)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    steps: list[dict[str, Any]] = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if proto.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE:
        ids = {piece.piece: i for i, piece in enumerate(pieces)}
        halves = [
            (-piece.score, ids[piece.piece[:cut]], [piece.piece[:cut], piece.piece[cut:]])
            for piece in pieces
            if piece.type == Piece.NORMAL
            for cut in range(1, len(piece.piece))
            if piece.piece[:cut] in ids and piece.piece[cut:] in ids
        ]
        merges = [merge for _, _, merge in sorted(halves)]
        model = {"type": "BPE", "vocab": ids, "merges": merges, "unk_token": "<unk>", "fuse_unk": True}
        model["byte_fallback"] = proto.trainer_spec.byte_fallback
    else:
        model = {"type": "Unigram", "unk_id": 2, "vocab": [[piece.piece, piece.score] for piece in pieces]}
        model["byte_fallback"] = proto.trainer_spec.byte_fallback
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    pair = [*end, {"Sequence": {"id": "B", "type_id": 0}}, end[1]]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags, "special": True}
            for i, piece in enumerate(pieces)
            if piece.type in (Piece.CONTROL, Piece.UNKNOWN)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": end,
            "pair": pair,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        "model": model,
    }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
