"""Published tokenizer files become one vocabulary: the published ids but for the first few, whatever the file."""

import json
from pathlib import Path

import pytest
import sentencepiece

from mlm.data.published import give_vocabulary, take_template, take_vocabulary
from mlm.data.templates import EOS, FROM, PLACES, TEXT, TO, TOKENIZERS, Template
from mlm.data.vocabulary import ByteVocabulary, load_vocabulary
from mlm.data.vocabulary_training import train_vocabulary
from tests.data.vocabulary_test import LINES, TEXTS

FAIRSEQ, GEMMA = (1, 2, 3, 0), (0, 1, 3, 2)
LANGUAGES = ["fr_XX", "sw_KE", "my_MM"]


def train(path: Path, **settings) -> Path:
    """A SentencePiece file."""
    lines, quiet = iter(LINES), {"minloglevel": 3, "hard_vocab_limit": False, "vocab_size": 400}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, num_threads=1, **quiet, **settings
        )
    return path


def raw(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "hf"


def test_t5_keeps_its_ids_and_gets_its_sentinels(folder):
    file = train(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    size = raw(file).get_piece_size()
    vocabulary = take_vocabulary(folder, folder.parent / "run", {"model_type": "t5"})
    assert vocabulary.sentinel_ids == tuple(range(size + 99, size - 1, -1))
    for text in TEXTS:
        assert list(vocabulary.encode(text)) == raw(file).encode(text)
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 7}')
    assert len(take_vocabulary(folder, folder.parent / "run", {"model_type": "t5"}).sentinel_ids) == 7
    assert not take_vocabulary(folder, folder.parent / "run", {"model_type": "other"}).sentinel_ids


def test_gemma_swaps_its_beginning_and_its_unknown(folder):
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": ["\n", "<turn>"]}
    file = train(
        folder / "tokenizer.model",
        **names,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "model_type": "bpe", "byte_fallback": True},
        **{"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    )
    vocabulary = take_vocabulary(folder, folder.parent / "run", {}, GEMMA)
    assert vocabulary.special("<bos>") == 3
    for text in TEXTS:
        assert list(vocabulary.encode(text)) == raw(file).encode(text)


@pytest.mark.parametrize("dictionary", [False, True])
def test_fairseq_is_shifted_and_its_languages_are_ours(folder, dictionary):
    file = train(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2, model_type="bpe")
    pieces = raw(file)
    size = pieces.get_piece_size()
    published = [size - 1 - i for i in range(size - 3)] if dictionary else list(range(3, size))
    if dictionary:  # M2M-100 has an order of its own
        words = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in published)]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": LANGUAGES}))
    vocabulary = take_vocabulary(folder, folder.parent / "run", {}, FAIRSEQ)
    assert vocabulary.special("<s>") == 3
    assert vocabulary.language_tokens == {"fr": size + 1, "sw": size + 2, "my": size + 3}
    place = {i: 4 + k for k, i in enumerate(published)} | {0: vocabulary.unk_id}
    for text in TEXTS:
        assert list(vocabulary.encode(text)) == [place[i] for i in pieces.encode(text)]


def test_a_dictionary_without_languages_has_those_of_its_release(folder):
    train(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2, model_type="bpe")
    pieces = raw(folder / "sentencepiece.bpe.model")
    words = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size()))]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    known = take_vocabulary(folder, folder.parent / "run", {}, FAIRSEQ).language_tokens
    assert (known["af"], known["zu"]) == (len(words), len(words) + 99)
    (folder / "tokenizer_config.json").write_text('{"language_codes": "wmt21"}')
    known = take_vocabulary(folder, folder.parent / "run", {}, FAIRSEQ).language_tokens
    assert sorted(known, key=known.__getitem__) == ["en", "ha", "is", "ja", "cs", "ru", "zh", "de"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_of_ours_goes_out_and_comes_back(folder, kind):
    """As tokenizer.json, with its specials, its scores or merges, and its bytes for what it does not know."""
    run = folder.parent / "run"
    ours = train_vocabulary(
        LINES, run / "vocabulary.model", 512, model_type=kind, languages=["fr", "sw"], sentinels=100
    )
    (run / "data.json").write_text(json.dumps({"vocabulary": "vocabulary.model"}))
    give_vocabulary(run, folder)
    (folder / "spiece.model").unlink()
    (folder.parent / "again").mkdir()
    again = take_vocabulary(folder, folder.parent / "again", {"model_type": "t5"})
    assert again.specials == ours.specials
    for text in [*TEXTS, *LINES[:5]]:
        assert list(again.encode(text)) == list(ours.encode(text))
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))


def test_bytes_come_from_the_name_of_the_class(folder):
    vocabulary = take_vocabulary(folder, folder.parent / "run", {"tokenizer_class": "ByT5Tokenizer"})
    assert vocabulary.digest == load_vocabulary("bytes").digest


def single(*names: str) -> dict:
    """tokenizer.json with a post-processor that writes these names, and the text at None."""
    parts = [{"SpecialToken": {"id": name}} if name else {"Sequence": {"id": "A"}} for name in names]
    return {"post_processor": {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": parts}]}}


BEGUN = Template(("<s>", TEXT, EOS))


@pytest.mark.parametrize(
    ("config", "settings", "whole", "want"),
    [
        # The class decides: its files hold the language of some example, at the place of some release.
        ({}, {"tokenizer_class": "NllbTokenizerFast"}, single(None, "</s>", "eng_Latn"), PLACES["both"]),
        ({"tokenizer_class": "MBart50Tokenizer", "model_type": "mbart"}, {}, {}, PLACES["both"]),
        ({}, {"tokenizer_class": "NllbTokenizer", "legacy_behaviour": True}, {}, Template((TEXT, EOS, FROM), (TO,))),
        # Then the files.
        ({"model_type": "t5gemma"}, {}, single("<s>", None, "<eos>"), BEGUN),
        ({}, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, {}, Template(("<s>", TEXT))),
        ({}, {"add_bos_token": True, "add_eos_token": True}, single("<s>", None), BEGUN),
        ({}, {"tokenizer_class": "TokenizersBackend"}, single("sw_KE", None, "</s>"), PLACES["both"]),
        ({}, {}, single(None, "</s>", "__sw__"), TOKENIZERS["MBartTokenizer"]),
        # Then the family.
        ({"model_type": "mbart"}, {}, {}, TOKENIZERS["MBartTokenizer"]),
        ({"model_type": "xlm-roberta-xl"}, {}, {}, BEGUN),
        # An end alone is what every run does.
        ({"model_type": "t5"}, {}, single(None, "</s>"), None),
        ({}, {}, {}, None),
    ],
)
def test_a_source_is_written_as_the_tokenizer_writes_it(folder, config, settings, whole, want):
    vocabulary = ByteVocabulary(sentinels=0, extra_tokens=["<s>"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert take_template(folder, config, vocabulary) == want


def test_a_source_of_tokens_that_the_vocabulary_lacks_is_refused(folder):
    with pytest.raises(KeyError, match="no special token '<bos>'"):
        take_template(folder, {"model_type": "t5gemma"}, ByteVocabulary())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "type 'WordPiece'; only Unigram and BPE"),
        ({"model": {}, "normalizer": {"type": "Lowercase"}}, "Lowercase.* has no counterpart in SentencePiece"),
        ({"model": {}, "pre_tokenizer": {"type": "ByteLevel"}}, "ByteLevel.* has no counterpart"),
    ],
)
def test_other_tokenizers_are_refused(folder, content, message):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        take_vocabulary(folder, folder.parent / "run", {})


def test_a_folder_without_a_tokenizer_says_what_it_holds(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"--vocabulary FILE. The folder holds: config.json"):
        take_vocabulary(folder, folder.parent / "run", {})
