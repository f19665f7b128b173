"""Vocabularies: layout of ids, text and specials kept apart, Python and TensorFlow the same, one file that travels."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mlm.data.special_tokens import EXTRA_TOKENS
from mlm.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, check_same_vocabulary, load_vocabulary
from mlm.data.vocabulary_training import train_vocabulary

LINES = [
    f"{word} {other} the quick brown fox, jumps over {i} lazy dogs; Ελλάδα {i} наука и жизнь 日本語の文章 {word[::-1]}."
    for i in range(40)
    for word, other in [("hello", "wörld"), ("bonjour", "été"), ("Übung", "macht"), ("смех", "мир")]
]
TEXTS = [
    "hello wörld",
    "日本語 ☃ 𝔸 неизвестно",
    "  two  spaces ",
    "",
    "a\u200cb",
    "tab\tnbsp\u00a0x",
    "x\u3000y",
    "0123",
    "▁",
]
LANGUAGES = ["fr", "pt_BR", "zh_Hans", "iw"]


@pytest.fixture(scope="module", params=["unigram", "bpe", "bytes"])
def vocabulary(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "v"
    if request.param == "bytes":
        return ByteVocabulary(sentinels=110, languages=LANGUAGES, extra_tokens=EXTRA_TOKENS)
    return train_vocabulary(LINES, path, 1024, model_type=request.param, languages=LANGUAGES, sentinels=110)


def test_layout(vocabulary):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.vocab_size % 128 == 0
    last = vocabulary.vocab_size - 1
    assert vocabulary.sentinel_ids == tuple(range(last, last - 110, -1))
    tokens = [vocabulary.language_token(code) for code in LANGUAGES]
    assert tokens == list(range(last - 113, last - 109))  # straight before the sentinels, in the given order
    assert vocabulary.special("<2pt-BR>") == vocabulary.language_token("por_BR") == tokens[1]
    assert vocabulary.special("<mask>") < min(tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_python_and_tensorflow_agree(vocabulary, text):
    ids = list(vocabulary.encode(text))
    assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == vocabulary.decode(ids)
    assert vocabulary.unk_id not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(vocabulary, text):
    want = text if isinstance(vocabulary, ByteVocabulary) else " ".join(text.replace("▁", " ").split())
    assert vocabulary.decode(list(vocabulary.encode(text))) == want


@pytest.mark.parametrize("text", ["a <2fr> b", "<extra_id_0>", "x<extra_id_7>y", "<mask> </s> <pad> <unk>", "<0x41>"])
def test_text_never_reaches_special_ids(vocabulary, text):
    ids = list(vocabulary.encode(text))
    assert not set(ids) & {0, 1, 2, *vocabulary.specials.values()}
    assert vocabulary.decode(ids) == text  # and still spells what was written


def test_specials_are_written_as_prompts_and_decoded_readably(vocabulary):
    ids = vocabulary.encode_prompt("<2fr> hello <extra_id_0> world <extra_id_1>")
    assert ids[0] == vocabulary.language_token("fr")
    assert [i for i in ids if i in vocabulary.sentinel_ids] == list(vocabulary.sentinel_ids[:2])
    shown = vocabulary.decode([*ids, 1, *ids])
    assert shown.replace(" ", "") == "<2fr>hello<extra_id_0>world<extra_id_1>"  # and nothing after </s>
    assert vocabulary.decode_tf(tf.constant([*ids, 1, *ids], tf.int32)).numpy().decode() == shown


def test_one_file_travels(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "copy")
    loaded = load_vocabulary(tmp_path / "copy")
    assert loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)
    assert loaded.specials == vocabulary.specials
    assert loaded.encode(LINES[0]) == vocabulary.encode(LINES[0])
    assert loaded.digest == hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_are_equal(vocabulary, clone):  # gin deep-copies, SeqIO pickles
    vocabulary.encode_tf(tf.constant("x"))
    assert clone(vocabulary) == vocabulary
    assert clone(vocabulary).encode("hello") == vocabulary.encode("hello")


def test_many_graphs_share_one_tokenizer(vocabulary):
    sizes = []
    for _ in range(2):
        graph = tf.function(vocabulary.encode_tf).get_concrete_function(tf.TensorSpec([], tf.string)).graph
        sizes.append(graph.as_graph_def().ByteSize())
    assert max(sizes) < 4000


def test_serves_a_seqio_feature(vocabulary):
    feature = seqio.Feature(vocabulary, add_eos=True)
    data = tf.data.Dataset.from_tensors({"inputs": "hello", "targets": "wörld"})
    features = {"inputs": feature, "targets": feature}
    example = next(seqio.preprocessors.tokenize_and_append_eos(data, features).as_numpy_iterator())
    assert example["targets"].tolist() == [*vocabulary.encode("wörld"), 1]


def test_word_starts_and_sentence_ends(vocabulary):
    ids = list(vocabulary.encode("hello wörld."))
    starts = np.flatnonzero(vocabulary.tf_word_starts.numpy()[ids])
    spaces = 1 if isinstance(vocabulary, ByteVocabulary) else 2  # SentencePiece puts one before the first word too
    assert len(starts) == spaces
    assert np.flatnonzero(vocabulary.tf_sentence_ends.numpy()[ids]).tolist() == [len(ids) - 1]


def test_unknown_languages_and_specials_are_named(vocabulary):
    with pytest.raises(KeyError, match=r"no token <2de> \(German\) among its 4 language tokens"):
        vocabulary.language_token("deu")
    with pytest.raises(KeyError, match="no language has the code 'frr'"):
        vocabulary.language_token("frr")
    with pytest.raises(KeyError, match="no special token '<msk>'; did you mean '<mask>'"):
        vocabulary.special("<msk>")


def test_a_mismatch_names_both_hashes_and_places(vocabulary):
    other = ByteVocabulary(sentinels=100)
    check_same_vocabulary(vocabulary, vocabulary.digest, "model", "checkpoint")
    with pytest.raises(ValueError, match="two vocabularies") as error:
        check_same_vocabulary(vocabulary, other, "the checkpoint in runs/x", "the task help.denoise.fr")
    for part in (vocabulary.digest, other.digest, "runs/x", "help.denoise.fr"):
        assert part in str(error.value)


def test_training_is_deterministic_and_reads_every_option(tmp_path):
    def digest(**options):
        arguments = {"size": 1024, "languages": ["fr"], "sentinels": 100} | options
        return train_vocabulary(LINES, tmp_path / "v.model", **arguments).digest

    first = digest()
    assert digest() == first
    others = [digest(size=1100), digest(languages=["de"]), digest(sentinels=101), digest(model_type="bpe")]
    others.append(digest(normalization="nmt_nfkc"))
    assert len({first, *others}) == 6


def test_a_small_corpus_leaves_unused_ids(tmp_path):
    vocabulary = train_vocabulary(["a b c"] * 20, tmp_path / "v.model", 1000, sentinels=100, extra_tokens=())
    assert vocabulary.vocab_size == 1024  # the next multiple of 128
    unused = [name for name in vocabulary.specials if name.startswith("<unused_")]
    assert len(unused) > 500
    assert vocabulary.sentinel_ids[0] == 1023


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["", "  "], {}, "no text to train"),
        (["a"], {"sentinels": 99}, "sentinels=99"),
        (["a"], {"size": 512}, r"size=512 leaves .* ids for text .* works: 640"),
        (["a"], {"model_type": "bpee"}, "did you mean 'bpe'"),
        (["a"], {"languages": ["qqq"]}, "no language has the code 'qqq'"),
    ],
)
def test_bad_training_arguments(tmp_path, lines, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        train_vocabulary(lines, tmp_path / "v.model", **({"size": 1024, "sentinels": 200} | options))
    assert not list(tmp_path.iterdir())


def test_bytes_have_the_ids_of_byt5():
    vocabulary = load_vocabulary("bytes")
    assert vocabulary.vocab_size == 384
    assert vocabulary.encode("é") == [0xC3 + 3, 0xA9 + 3]
    assert vocabulary.sentinel_ids[:2] == (383, 382)
    assert vocabulary.decode([0xC3 + 3]) == "\ufffd"


def test_sentinels_are_added_to_a_model_without_any(tmp_path):
    vocabulary = train_vocabulary(LINES, tmp_path / "v.model", 1024, sentinels=100)
    model = copy.deepcopy(vocabulary._model_proto)
    del model.pieces[-100:]
    (tmp_path / "bare.model").write_bytes(model.SerializeToString())
    bare, added = (
        load_vocabulary(tmp_path / "bare.model"),
        SentencePieceVocabulary(tmp_path / "bare.model", sentinels=100),
    )
    assert bare.sentinel_ids == ()
    assert added.sentinel_ids == vocabulary.sentinel_ids
    assert added.digest != bare.digest
    added.save(tmp_path / "saved.model")
    assert load_vocabulary(tmp_path / "saved.model").sentinel_ids == vocabulary.sentinel_ids


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at .*nowhere.model"):
        load_vocabulary(tmp_path / "nowhere.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken.model is not a SentencePiece model"):
        load_vocabulary(tmp_path / "broken.model")
    good = train_vocabulary(LINES, tmp_path / "v.model", 1024, sentinels=100)
    (tmp_path / "cut.model").write_bytes((tmp_path / "v.model").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut.model"):
        load_vocabulary(tmp_path / "cut.model")
    assert load_vocabulary(good.where) == good
