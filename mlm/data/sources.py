"""Where text comes from: corpus files shipped with the package, files of published layouts, prepared TFDS datasets.

    >>> pairs("help_mpl.tsv.gz").table("fr", "validation")["english"][0]

Held-out text is held out by document, for every language: in the parallel corpora the English sentence decides
(`split_of`), so a sentence is in the same split in every language and in every corpus; of the Universal Declaration
whole articles are held out, the same ones in all languages; corrections are split by their document. A training record
whose other side also stands in the held-out text of its language is dropped.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import logging
import lzma
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm import shipped
from mlm.data import languages
from mlm.data.tensorflow import seqio, tf
from mlm.registry import nearest

SPLITS = ("train", "validation", "test")
VALIDATION_ARTICLES = frozenset(("7", "14", "24"))  # of the Universal Declaration
TEST_ARTICLES = frozenset(("9", "18", "27"))
SPLIT_SALT = "181"  # with it every language of every shipped corpus has at least two held-out sentences in both splits

Columns = dict[str, list[bytes]]  # UTF-8 records by column, all of one length


class Counts(NamedTuple):
    """How much text there is; 0: not known."""

    examples: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


# The shipped corpora.


class Corpus:
    """Records of one corpus by language and split: `table(language, split) -> Columns`. Languages carry our codes."""

    def __init__(self, rows: Mapping[str, Mapping[str, Columns]]):
        self._rows = rows

    def languages(self) -> list[str]:
        return sorted(self._rows)

    def table(self, language: str, split: str) -> Columns:
        """Columns of one language. Raises KeyError with nearest names for a language or split that is not there."""
        if language not in self._rows:
            raise KeyError(f"the corpus has no language {language!r}; {nearest(language, self._rows)}")
        if split not in SPLITS:
            raise KeyError(f"no split {split!r}; known: {', '.join(SPLITS)}")
        return self._rows[language][split]


@functools.cache
def pairs(file: str) -> Corpus:
    """Aligned sentences: columns `english`, `other`; the language "en" holds the distinct English sides as `text`, the
    others also.
    """
    fields = ("language", "english", "other", "source")
    rows: dict[str, dict[str, dict[tuple[str, str], None]]] = {}
    for code, english, other, _ in read_tsv(corpus_path(file), fields):
        by_split = rows.setdefault(_our_code(code), {s: {} for s in SPLITS})
        by_split[split_of(english)][english, other] = None  # a dict keeps the order and drops repeated pairs
    english_by_split: dict[str, dict[str, None]] = {s: {} for s in SPLITS}
    for by_split in rows.values():
        held_out = {_normal(other) for split in SPLITS[1:] for _, other in by_split[split]}
        by_split["train"] = {pair: None for pair in by_split["train"] if _normal(pair[1]) not in held_out}
        for split in SPLITS:
            english_by_split[split].update(dict.fromkeys(english for english, _ in by_split[split]))
    tables = {
        language: {
            split: {
                "english": [english.encode() for english, _ in pairs],
                "other": [other.encode() for _, other in pairs],
                "text": list(dict.fromkeys(other.encode() for _, other in pairs)),
            }
            for split, pairs in by_split.items()
        }
        for language, by_split in rows.items()
    }
    tables["en"] = {s: {"text": [t.encode() for t in texts]} for s, texts in english_by_split.items()}
    return Corpus(tables)


@functools.cache
def declaration(file: str) -> Corpus:
    """The Universal Declaration of Human Rights: columns `text`, `unit` (t, p, 1 … 30) and `version` (the collection's
    code).
    """
    rows: dict[str, dict[str, Columns]] = {}
    for code, unit, text in read_tsv(corpus_path(file), ("code", "unit", "text")):
        split = "validation" if unit in VALIDATION_ARTICLES else "test" if unit in TEST_ARTICLES else "train"
        empty = {s: {"text": [], "unit": [], "version": []} for s in SPLITS}
        columns = rows.setdefault(_our_code(code, "udhr"), empty)[split]
        for column, value in (("text", text), ("unit", unit), ("version", code)):
            columns[column].append(value.encode())
    return Corpus(rows)


@functools.cache
def corrections(file: str) -> Corpus:
    """Grammatical error correction in Ukrainian: columns `original`, `corrected`."""
    columns = {s: {"original": [], "corrected": []} for s in SPLITS}
    for original, corrected, document in read_tsv(corpus_path(file), ("original", "corrected", "id")):
        table = columns[split_of(document.split(".")[0])]
        table["original"].append(original.encode())
        table["corrected"].append(corrected.encode())
    return Corpus({"uk": columns})


def split_of(text: str) -> str:
    """The split of a document by a hash of its text: 88 % train, 6 % validation, 6 % test. Case and punctuation do not
    matter.
    """
    digest = hashlib.blake2b(f"{SPLIT_SALT}:{_normal(text)}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 100
    return "validation" if bucket < 6 else "test" if bucket < 12 else "train"


@functools.lru_cache(maxsize=1 << 17)
def _normal(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", text).casefold()).split())


@functools.cache
def _our_code(code: str, source: str = "") -> str:
    return languages.language(code, source).code


# Files.


def corpus_path(name: str) -> Path:
    """A file of the shipped corpora, in a checkout as in an installed wheel. Raises FileNotFoundError with nearest
    names.
    """
    folder = shipped.corpora_path()
    if not (folder / name).is_file():
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        raise FileNotFoundError(f"no shipped corpus {name!r} in {folder}; {nearest(name, names)}")
    return folder / name


@functools.cache
def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex; the key of cached statistics."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tsv(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Records of a .tsv, .tsv.gz or .tsv.xz file, one a line, exactly `columns` fields each.

    Lines that are not valid UTF-8 are skipped and counted in a warning. Raises ValueError naming file and line for a
    record with another number of fields or an empty field, and for a file without any record.
    """
    records, skipped, number = [], 0, 0
    for number, line in enumerate(_lines(path), start=1):
        try:
            fields = tuple(line.decode("utf-8").rstrip("\r\n").split("\t"))
        except UnicodeDecodeError:
            skipped += 1
            continue
        if len(fields) != len(columns) or not all(fields):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, {sum(not f for f in fields)} of them empty; "
                f"expected {len(columns)}, none empty: {', '.join(columns)} (separated by tabs)"
            )
        records.append(fields)
    if skipped:
        logging.getLogger(__name__).warning(
            "%s: skipped %d of %d lines that are not valid UTF-8", path, skipped, number
        )
    if not records:
        raise ValueError(f"{path} holds no record ({number} lines, {skipped} of them not UTF-8): the corpus is empty")
    return records


def _lines(path: Path) -> Iterator[bytes]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


# SeqIO sources.


class TableSource(seqio.DataSource):
    """Records held in memory and addressed by number; loaded when first asked for.

    load: split -> columns; columns: the ones that a record has.
    """

    def __init__(self, load: Callable[[str], Columns], columns: Sequence[str], splits: Sequence[str] = SPLITS):
        super().__init__(splits=splits)
        self._load = load
        self._columns = tuple(columns)

    def table(self, split: str) -> Columns:
        """The records of a split by column. Raises ValueError when there are none."""
        table = self._load(split)
        chosen = {column: table[column] for column in self._columns}
        if not chosen[self._columns[0]]:
            raise ValueError(f"the {split} split is empty; splits: {', '.join(self.splits)}")
        return chosen

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
        columns = self.table(split)
        dataset = tf.data.Dataset.from_tensor_slices({name: tf.constant(values) for name, values in columns.items()})
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset.shuffle(self.num_input_examples(split), seed=seed) if shuffle else dataset

    def num_input_examples(self, split: str) -> int:
        return len(self.table(split)[self._columns[0]])

    def list_shards(self, split: str) -> list[str]:
        return [split]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the files of a split are below $DATA_ROOT, and how a dataset of records is read from them."""

    files: Mapping[str, Sequence[str]]  # split -> patterns below $DATA_ROOT, one for each argument of `read`
    read: Callable[..., tf.data.Dataset]  # one list of paths for each pattern -> dataset of records
    published: str  # who publishes this layout; shown when the files are absent


class PublishedSource(seqio.DataSource):
    """A public dataset: from TFDS when it is prepared below $TFDS_DATA_DIR, else from files below $DATA_ROOT in their
    published layout.

    tfds: dataset name, `name/config:version`; tfds_splits: split -> TFDS split; from_tfds: TFDS record -> our record.
    counts: split -> size, as published. Nothing is looked for before the data are read. Raises FileNotFoundError naming
    both places when the data are in neither.
    """

    def __init__(
        self,
        layout: Layout,
        tfds: str | None = None,
        tfds_splits: Mapping[str, str] | None = None,
        from_tfds: Callable[[dict], dict] = lambda record: record,
        counts: Mapping[str, Counts] | None = None,
    ):
        super().__init__(splits=tuple(layout.files))
        self.counts = dict(counts or {})
        self._layout, self._tfds, self._tfds_splits, self._from_tfds = layout, tfds, tfds_splits or {}, from_tfds

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
        prepared = self._prepared()
        if prepared:
            dataset = prepared.get_dataset(split, shuffle=shuffle, seed=seed, shard_info=shard_info)
            return dataset.map(self._from_tfds, num_parallel_calls=1)
        columns = self._paths(split)
        if shard_info and shard_info.num_shards > 1:
            if len(columns[0]) >= shard_info.num_shards:
                columns = [paths[shard_info.index :: shard_info.num_shards] for paths in columns]
                return self._layout.read(*columns)
            return self._layout.read(*columns).shard(shard_info.num_shards, shard_info.index)
        return self._layout.read(*columns)

    def num_input_examples(self, split: str) -> int | None:
        """None: the size is not known before reading, so SeqIO keeps nothing in memory."""
        prepared = self._prepared()
        return prepared.num_input_examples(split) if prepared else None

    def list_shards(self, split: str) -> list[str]:
        prepared = self._prepared()
        return list(prepared.list_shards(split)) if prepared else self._paths(split)[0]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def _prepared(self) -> seqio.TfdsDataSource | None:
        root = os.environ.get("TFDS_DATA_DIR")
        if not (root and self._tfds):
            return None
        name, _, version = self._tfds.partition(":")
        if not (Path(root) / name / version).is_dir():
            return None
        return seqio.TfdsDataSource(self._tfds, tfds_data_dir=root, splits=self._tfds_splits, read_only=True)

    def _paths(self, split: str) -> list[list[str]]:
        patterns = self._layout.files[split]
        root = Path(os.environ.get("DATA_ROOT", "data"))
        found = [sorted(glob.glob(str(root / pattern))) for pattern in patterns]
        for pattern, paths in zip(patterns, found, strict=True):
            if not paths:
                tried = f" and not prepared as {self._tfds!r} in $TFDS_DATA_DIR" if self._tfds else ""
                raise FileNotFoundError(
                    f"{root.absolute() / pattern} does not exist{tried}; put the files there in the layout of "
                    f"{self._layout.published}, or point $DATA_ROOT at the folder that holds them"
                )
        return found


def read_json_lines(feature: str) -> Callable[[list[str]], tf.data.Dataset]:
    """Reader of gzip-compressed JSON lines that keeps one string field, e.g. the `text` of C4."""
    import json

    def parse(line: bytes) -> bytes:
        return json.loads(line)[feature].encode()

    def read(paths: list[str]) -> tf.data.Dataset:
        lines = tf.data.TextLineDataset(paths, compression_type="GZIP")
        # The parser keeps no state, so iterators over it can be saved.
        text = lines.map(lambda line: tf.ensure_shape(tf.numpy_function(parse, [line], tf.string, stateful=False), []))
        return text.map(lambda text: {feature: text})

    return read


def read_aligned_lines(*features: str) -> Callable[..., tf.data.Dataset]:
    """Reader of plain text files that are aligned line by line, one file for each feature."""

    def read(*columns: list[str]) -> tf.data.Dataset:
        datasets = {name: tf.data.TextLineDataset(paths) for name, paths in zip(features, columns, strict=True)}
        return tf.data.Dataset.zip(datasets)

    return read
