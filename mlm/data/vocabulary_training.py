"""Train a SentencePiece vocabulary whose one file holds pieces, language tokens and sentinels."""

import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mlm.data.special_tokens import EXTRA_TOKENS, special_names
from mlm.data.vocabulary import Piece, SentencePieceVocabulary, round_up_size, write_whole
from mlm.registry import Registry
from mlm.types import EOS_ID, PAD_ID, UNK_ID

MODEL_TYPES: Registry[str] = Registry("SentencePiece model type", unigram="unigram", bpe="bpe")


def train_vocabulary(
    lines: Iterable[str],
    path: str | os.PathLike,
    size: int,
    *,
    model_type: str = "unigram",
    languages: Sequence[str] = (),
    sentinels: int = 256,
    extra_tokens: Sequence[str] = EXTRA_TOKENS,
    character_coverage: float = 0.9995,
    normalization: str = "whitespace",
    seed: int = 0,
) -> SentencePieceVocabulary:
    """Train on text lines and write one `.model` file. The same lines and arguments give the same file, byte for byte.

    lines: text in the proportions that training will see, cleaned (`preprocessors.clean_text`); lines longer than
    SentencePiece's limit are cut.
    size: ids in all, specials included, rounded up to a multiple of 128. A corpus too small for it leaves `<unused_i>`
    ids.
    languages: codes that get a token `<2xx>`; sentinels: number of `<extra_id_n>`, at least 100.
    character_coverage: share of the characters with a piece of their own; the others are spelled in bytes (byte
    fallback), so no text
        is unknown. normalization: "whitespace" turns Unicode's space characters into spaces and keeps
        the rest (NFC is the preprocessors' work); or a rule of SentencePiece, "nmt_nfkc" for mT5's.
    Raises ValueError when no text comes, when sentinels < 100, or when the size has no room for pieces.
    """
    if sentinels < 100:
        raise ValueError(f"sentinels={sentinels}: span corruption needs 100 at least (T5's number)")
    names = special_names(sentinels, languages, extra_tokens)
    size = round_up_size(size)
    pieces = size - len(names)
    least = 3 + 256 + 64
    if pieces < least:
        raise ValueError(
            f"size={size} leaves {pieces} ids for text after {len(names)} special tokens ({sentinels} sentinels, "
            f"{len(languages)} languages), at least {least} are needed (3 + 256 bytes + letters); nearest size that "
            f"works: {round_up_size(least + len(names))}"
        )
    text = _Lines(lines)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(text),
            model_writer=model,
            vocab_size=pieces,
            model_type=MODEL_TYPES[model_type],
            byte_fallback=True,
            character_coverage=character_coverage,
            **_normalization(normalization, folder),
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            pad_piece="<pad>",
            hard_vocab_limit=False,  # a small corpus gives fewer pieces instead of an error
            split_digits=True,
            max_sentence_length=_Lines.LIMIT + 1,
            num_threads=2,  # part of the result: threads add floats in their own order
            minloglevel=2,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for n in range(pieces - len(proto.pieces)):
        proto.pieces.add(piece=f"<unused_{n}>", score=0.0, type=Piece.CONTROL)
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=Piece.CONTROL)
    proto.trainer_spec.vocab_size = size
    proto.normalizer_spec.name = normalization
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # a path in a temporary folder
    assert len(proto.pieces) == size, (len(proto.pieces), size)
    write_whole(path, proto.SerializeToString(deterministic=True))
    return SentencePieceVocabulary(path)


# Zs of Unicode, tab, line and paragraph separators.
SPACES = (
    "\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def _normalization(name: str, folder: str) -> dict[str, Any]:
    if name != "whitespace":
        return {"normalization_rule_name": name}
    path = os.path.join(folder, "rules.tsv")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"{ord(space):X}\t20\n" for space in SPACES)
    return {"normalization_rule_tsv": path}


class _Lines:
    """Text lines on their way to the trainer: stripped, cut at LIMIT bytes on a character, empty ones dropped, none at
    all refused.
    """

    LIMIT = 8192

    def __init__(self, lines: Iterable[str]):
        self.lines = lines

    def __iter__(self) -> Iterator[str]:
        count = 0
        for line in self.lines:
            line = line.strip().replace("\n", " ").replace("\0", "")
            if len(line.encode()) > self.LIMIT:
                line = line.encode()[: self.LIMIT].decode("utf-8", errors="ignore")
            if line:
                count += 1
                yield line
        if not count:
            raise ValueError("no text to train a vocabulary on: the corpus gave no line, or only empty ones")
