"""What the ids of a vocabulary write, as arrays: for bits per byte, without decoding anything."""

from typing import NamedTuple

import numpy as np

from mlm.data.vocabulary import ByteVocabulary, Vocabulary
from mlm.types import UNK_ID


class SpelledBytes(NamedTuple):
    """Arrays over the ids: does it spell text; how many UTF-8 bytes; do they begin with a space that vanishes at the
    start of a text; is it a language token.
    """

    text: np.ndarray  # bool [V]
    size: np.ndarray  # int64 [V]
    space: np.ndarray  # bool [V]
    opens: np.ndarray  # bool [V]


def spelled_bytes(vocabulary: Vocabulary) -> SpelledBytes:
    """Σ size over the ids of a text = its UTF-8 bytes, as the vocabulary normalises it. <unk> has size 0."""
    size = vocabulary.vocab_size
    text = np.arange(size) >= UNK_ID
    text[list(vocabulary.specials.values())] = False
    opens = np.zeros(size, bool)
    opens[list(vocabulary.language_tokens.values())] = True
    if isinstance(vocabulary, ByteVocabulary):
        text[UNK_ID + 1 + 256 :] = False
        return SpelledBytes(text, (text & (np.arange(size) > UNK_ID)).astype(np.int64), np.zeros(size, bool), opens)
    pieces = vocabulary.tokenizer
    sizes, spaces = np.zeros(size, np.int64), np.zeros(size, bool)
    for i in np.flatnonzero(text[: pieces.GetPieceSize()]).tolist():
        if i == UNK_ID:
            continue
        piece = pieces.IdToPiece(i)
        spaces[i] = piece.startswith("▁")
        sizes[i] = 1 if pieces.IsByte(i) else len(piece.replace("▁", " ").encode())
    return SpelledBytes(text, sizes, spaces, opens)
