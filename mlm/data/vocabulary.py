"""Vocabularies: SentencePiece and UTF-8 bytes, each one local file, both usable wherever SeqIO wants a vocabulary.

Layout of the ids, the same for both kinds:

    0 <pad>   1 </s>   2 <unk>   text pieces (or 256 bytes, id = byte + 3)   <unused_i> …   other special tokens
    language tokens `<2xx>`   sentinels `<extra_id_n>` … `<extra_id_0>`; <extra_id_0> is the last id

The specials are pieces of type CONTROL inside the `.model`, so one file carries everything, and text never reaches
them: a text that literally contains "<2fr>" or "<extra_id_0>" is encoded as ordinary pieces that spell it.
`encode_prompt` is the one way to write specials as text. Decoding shows every special readable except padding and end
of sequence. Source of the layout: T5 (Raffel et al. 2020) for ids 0-2 and the descending sentinels, ByT5 (Xue et al.
2022) for the bytes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import SupportsInt

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from mlm import shipped
from mlm.data.special_tokens import SpecialTokens, special_names
from mlm.data.tensorflow import seqio, tensorflow_text, tf
from mlm.types import EOS_ID, PAD_ID, UNK_ID

SIZE_MULTIPLE = 128  # of every vocabulary, so that it divides over the mesh
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


class SentencePieceVocabulary(SpecialTokens, seqio.SentencePieceVocabulary):
    """A SentencePiece `.model` file with its specials inside (or without any, as published models come).

    sentinels: how many to append at the end in memory when the file holds none (T5: 100).
    Raises ValueError when the file's first three ids are not padding, end of sequence and unknown.
    """

    def __init__(self, path: str | os.PathLike, sentinels: int = 0):
        self.where = os.path.abspath(os.fspath(path))
        self._sentinels = sentinels
        self._model = None
        super().__init__(self.where)
        ids = (self.tokenizer.pad_id(), self.tokenizer.eos_id(), self.tokenizer.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"{self.where}: padding, end of sequence, unknown have the ids {ids}, not {(PAD_ID, EOS_ID, UNK_ID)}"
            )

    def __getstate__(self) -> dict:
        # gin deep-copies what it binds, and SeqIO pickles: all but path and sentinels is read again from the file.
        return {"where": self.where, "_sentinels": self._sentinels}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["where"], state["_sentinels"])  # type: ignore[misc]

    @cached_property
    def _bytes(self) -> bytes:
        try:
            with open(self.where, "rb") as file:
                return file.read()
        except OSError as error:
            raise FileNotFoundError(f"no vocabulary at {self.where} ({error.strerror})") from error

    @cached_property
    def _model_proto(self) -> sentencepiece_model_pb2.ModelProto:
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(self._bytes)
        except Exception as error:  # protobuf's DecodeError has no stable home
            raise ValueError(
                f"{self.where} is not a SentencePiece model (truncated, or another kind of file): {error}"
            ) from error
        if not model.pieces:
            raise ValueError(f"{self.where} is not a SentencePiece model: it holds no pieces")
        for n in reversed(range(self._sentinels)):
            model.pieces.add(piece=f"<extra_id_{n}>", score=0.0, type=Piece.CONTROL)
        return model

    def _model_context(self):  # SeqIO's own keeps one copy per path for ever, also when the file has changed
        if self._model is None:
            serialized = self._model_proto.SerializeToString()
            self._model = seqio.vocabularies._ModelContext(_processor(serialized), serialized)
        return self._model

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the file, and of the number of sentinels where these are added in memory."""
        return hashlib.sha256(self._bytes + (b"+%d" % self._sentinels if self._sentinels else b"")).hexdigest()

    @cached_property
    def specials(self) -> dict[str, int]:
        """Name -> id of the special tokens, without padding, end of sequence and unknown."""
        pieces = enumerate(self._model_proto.pieces)
        return {
            p.piece.removeprefix("▁"): i
            for i, p in pieces
            if i > UNK_ID and p.type in (Piece.CONTROL, Piece.USER_DEFINED)
        }

    @cached_property
    def texts(self) -> list[str]:
        return [p.piece if p.type == Piece.NORMAL else "" for p in self._model_proto.pieces]

    @cached_property
    def _readable(self) -> bytes:
        # SentencePiece prints nothing for a CONTROL piece and the name of a USER_DEFINED one: decode with the latter.
        model = sentencepiece_model_pb2.ModelProto.FromString(self.sp_model)
        for piece in model.pieces[UNK_ID + 1 :]:
            if piece.type == Piece.CONTROL:
                piece.type = Piece.USER_DEFINED
        return model.SerializeToString()

    @cached_property
    def _decoder(self) -> SentencePieceProcessor:
        return _processor(self._readable)

    @cached_property
    def tf_tokenizer(self) -> tensorflow_text.SentencepieceTokenizer:
        """One tokenizer for all graphs of the process: SeqIO makes one, with the whole model in it, for every task."""
        with tf.init_scope():
            return tensorflow_text.SentencepieceTokenizer(model=self.sp_model)

    @cached_property
    def _tf_decoder(self) -> tensorflow_text.SentencepieceTokenizer:
        with tf.init_scope():
            return tensorflow_text.SentencepieceTokenizer(model=self._readable)

    def _decode(self, ids: Sequence[SupportsInt]) -> str:
        return self._decoder.DecodeIds([int(i) for i in ids])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return self._tf_decoder.detokenize(ids)

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as one file, specials included."""
        write_whole(path, self._model_proto.SerializeToString() if self._sentinels else self._bytes)


class ByteVocabulary(SpecialTokens, seqio.Vocabulary):
    """UTF-8 bytes (ByT5): id = byte + 3, specials at the top. Its file is a short JSON.

    The default has 125 sentinels and no language tokens: 384 ids, as the published ByT5 models.
    """

    def __init__(
        self,
        sentinels: int = 125,
        languages: Sequence[str] = (),
        extra_tokens: Sequence[str] = (),
        where: str = "bytes",
    ):
        names = special_names(sentinels, languages, extra_tokens)
        size = round_up_size(3 + 256 + len(names))
        self.where = where
        self._specials = {name: size - len(names) + i for i, name in enumerate(names)}
        self._size = size
        super().__init__()

    def __reduce__(self):
        return type(self), (0, (), tuple(self._specials), self.where)  # cached tensors stay behind

    @property
    def specials(self) -> dict[str, int]:
        return self._specials

    @cached_property
    def _json(self) -> str:
        content = {"type": "bytes", "size": self._size, "specials": list(self.specials)}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "ByteVocabulary":
        """Read a file that `save` wrote. Raises ValueError when its size does not fit its tokens."""
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        specials = stored["specials"]
        vocabulary = cls(0, (), specials, where=os.path.abspath(os.fspath(path)))
        if vocabulary._size != stored["size"]:
            raise ValueError(
                f"{path}: {len(specials)} special tokens give {vocabulary._size} ids, the file says {stored['size']}"
            )
        return vocabulary

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the file."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary as one file."""
        write_whole(path, self._json.encode())

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return EOS_ID

    @property
    def unk_id(self) -> int:
        return UNK_ID

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    @cached_property
    def texts(self) -> list[str]:
        pieces = [chr(b) if b < 128 else "" for b in range(256)]
        return [""] * 3 + ["▁" if p == " " else p for p in pieces] + [""] * (self._size - 259)

    @cached_property
    def _names(self) -> list[bytes]:
        names = [b""] * 3 + [bytes([b]) for b in range(256)] + [b""] * (self._size - 259)
        for name, i in self.specials.items():
            names[i] = name.encode()
        return names

    def _encode(self, s: str) -> list[int]:
        return [byte + 3 for byte in s.encode("utf-8")]

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        if s.shape.rank == 0:
            return tf.cast(tf.io.decode_raw(s, tf.uint8), tf.int32) + 3
        values = tf.io.decode_raw(tf.strings.reduce_join(s), tf.uint8)  # texts of different lengths [n]
        lengths = tf.cast(tf.strings.length(s), tf.int64)
        return tf.RaggedTensor.from_row_lengths(tf.cast(values, tf.int32) + 3, lengths, validate=False)

    def _decode(self, ids: Sequence[SupportsInt]) -> str:
        return b"".join(self._names[int(i)] for i in ids).decode("utf-8", errors="replace")

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.strings.reduce_join(tf.gather(tf.constant(self._names), ids), axis=-1)
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")


Vocabulary = SentencePieceVocabulary | ByteVocabulary


def load_vocabulary(path_or_name: str | os.PathLike, sentinels: int = 0) -> Vocabulary:
    """The vocabulary in a file (SentencePiece `.model` or the JSON of bytes), "bytes" for ByT5's, or the name
    of a shipped one, such as "quickstart".

    sentinels: appended to a SentencePiece model that has none of its own.
    Raises FileNotFoundError naming the path, ValueError for a file that is neither.
    """
    if os.fspath(path_or_name) == "bytes":
        return ByteVocabulary()
    if os.sep not in os.fspath(path_or_name) and (own := shipped.vocabulary_path(os.fspath(path_or_name))).is_file():
        path_or_name = own
    if not os.path.isfile(path_or_name):
        names = sorted(p.stem for p in shipped.vocabulary_path("").parent.glob("*.model"))
        raise FileNotFoundError(
            f"no vocabulary at {os.path.abspath(path_or_name)}; give a SentencePiece .model file, 'bytes', or a "
            f"shipped name: {', '.join(names)}"
        )
    with open(path_or_name, "rb") as file:
        if file.read(1) == b"{":
            return ByteVocabulary.from_file(path_or_name)
    return SentencePieceVocabulary(path_or_name, sentinels)


def check_same_vocabulary(a: Vocabulary | str, b: Vocabulary | str, where_a: str, where_b: str) -> None:
    """Raises ValueError naming both hashes when two vocabularies (or their digests) differ."""
    digest_a, digest_b = (v if isinstance(v, str) else v.digest for v in (a, b))
    if digest_a != digest_b:
        shown = [
            d if isinstance(v, str) else f"{d} ({v.where}, {v.vocab_size} ids)"
            for v, d in ((a, digest_a), (b, digest_b))
        ]
        raise ValueError(
            f"two vocabularies where one is needed:\n  {where_a}: sha256 {shown[0]}\n  {where_b}: sha256 {shown[1]}\n"
            "ids mean different text in the two; use the vocabulary that the checkpoint was trained with (the file in "
            "its run directory)"
        )


def _processor(serialized: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(serialized)
    return processor


def round_up_size(size: int) -> int:
    return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    temporary = f"{os.fspath(path)}.partial"  # a reader never sees half a vocabulary
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
