"""Preprocessors inside SeqIO tasks: whole examples, ids that survive, the same seed and the same examples."""

import unicodedata
from functools import partial

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mlm.data import preprocessors
from mlm.data.languages import language_id
from mlm.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(sentinels=100, languages=["en", "fr"], extra_tokens=["<mask>"])
TOKENS = seqio.Feature(VOCABULARY, add_eos=True)
FEATURES = {"inputs": TOKENS, "targets": TOKENS}
LENGTHS = {"inputs": 64, "targets": 32}
DOCUMENTS = [f"Document {i}: " + " ".join(["lorem ipsum dolor"] * (i % 4)) for i in range(40)]


def records(**columns):
    return tf.data.Dataset.from_tensor_slices(columns)


def examples(dataset, preprocessors, lengths=LENGTHS, seed=0):
    """Applied in order, as seqio.Task does it."""
    with seqio.utils.map_seed_manager(seed):
        for preprocessor in preprocessors:
            arguments = {"sequence_length": lengths, "output_features": FEATURES}
            dataset = seqio.utils.add_kwargs_to_transform(preprocessor, **arguments)(dataset)
    return list(dataset.as_numpy_iterator())


def plain(plan="span_corruption", task=3, language="fr", **options):
    read = partial(preprocessors.tokens, key="text", eos=plan == "causal_lm")
    return [read, partial(preprocessors.denoise, plan=plan, language=language, task=task, **options)]


# Text.

DIRTY = {
    "cafe\u0301": "caf\u00e9",
    "  a \t\n b\u00a0\u3000c\u2028": "a b c",
    "\ufeffx\x00y\x07z\x85": "x y z",
    "نمی\u200cخواهم": "نمی\u200cخواهم",
    "각": "각",
    "": "",
    "\u2003\n": "",
}


@pytest.mark.parametrize("text", DIRTY)
def test_clean_in_tensorflow_and_python(text):
    assert preprocessors.clean_line(text) == DIRTY[text]
    assert preprocessors.clean(tf.constant(text)).numpy().decode() == DIRTY[text]


def test_clean_agrees_with_python_on_every_character():
    characters = [chr(c) for c in range(0x3100) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    texts = [f"a{c}b{c}" for c in characters]
    got = [text.decode() for text in preprocessors.clean(tf.constant(texts)).numpy()]
    assert got == [preprocessors.clean_line(text) for text in texts]


def test_clean_text_drops_empty_records_and_keeps_the_other_columns():
    dataset = records(a=["x ", " ", "y"], b=["1", "2", "\u00a0"], n=[1, 2, 3])
    got = examples(dataset, [partial(preprocessors.clean_text, keys=("a", "b"))])
    assert got == [{"a": b"x", "b": b"1", "n": 1}]


# Plain text.


@pytest.mark.parametrize("plan", ["span_corruption", "prefix_lm", "causal_lm", "text_infilling"])
def test_plain_text_becomes_whole_examples_with_ids(plan):
    got = examples(records(text=DOCUMENTS), plain(plan))
    assert len(got) > 10
    for example in got:
        assert sorted(example) == ["inputs", "language", "targets", "task"]
        assert (example["language"], example["task"]) == (language_id("fr"), 3)
        assert {example[name].dtype for name in example} == {np.dtype(np.int32)}
        for side, length in LENGTHS.items():
            assert len(example[side]) <= length
            assert example[side][-1] == 1


def test_no_text_is_lost_or_repeated():
    got = examples(records(text=["", *DOCUMENTS, " "]), plain())
    letters = lambda ids: [i for i in ids if 3 <= i < 259]  # noqa: E731
    found = [letter for example in got for side in ("inputs", "targets") for letter in letters(example[side].tolist())]
    assert sorted(found) == sorted(i for text in DOCUMENTS for i in VOCABULARY.encode(preprocessors.clean_line(text)))


def test_the_same_seed_gives_the_same_examples_and_the_next_epoch_others():
    documents = ["abcdefgh" * 70] * 2  # every piece of 70 letters … is another cut of the same text
    once = examples(records(text=documents), plain())
    assert repr(once) == repr(examples(records(text=documents), plain()))
    assert repr(once) != repr(examples(records(text=documents), plain(), seed=1))
    twice = examples(records(text=documents[:1]).repeat(2), plain())
    half = len(twice) // 2
    assert repr(twice[:half]) != repr(twice[half : 2 * half])
    assert [len(x["inputs"]) for x in twice[:half]] == [len(x["inputs"]) for x in twice[half : 2 * half]]


def test_tasks_with_one_seed_have_noise_of_their_own():
    first, second = (examples(records(text=DOCUMENTS), plain(task=task)) for task in (1, 2))
    assert [len(x["inputs"]) for x in first] == [len(x["inputs"]) for x in second]
    assert any(x["inputs"].tolist() != y["inputs"].tolist() for x, y in zip(first, second, strict=True))


def test_options_reach_the_plan():
    got = examples(records(text=DOCUMENTS), plain(density=0.3, mean_span=1), {"inputs": 64, "targets": 64})
    hidden = [i for example in got for i in example["targets"] if i in VOCABULARY.sentinel_ids]
    assert len(hidden) / len(got) > 8  # 0.3 · 64 and more, one span each


def test_random_chunks_are_runs_of_their_document():
    read = partial(preprocessors.tokens, key="text")
    text = "".join(chr(ord("a") + i % 26) for i in range(500))
    chunk = partial(preprocessors.random_chunk, length=100)
    got = examples(records(text=[text] * 20 + ["short"]), [read, chunk])
    starts = [text.find(VOCABULARY.decode(ids.tolist())) for ids in got[:20]]
    assert min(starts) >= 0
    assert len(set(starts)) > 8
    assert {len(ids) for ids in got[:20]} == {100}
    assert VOCABULARY.decode(got[20].tolist()) == "short"


def test_a_task_runs_from_its_registration_and_its_iterator_resumes(tmp_path):
    number = seqio.Feature(seqio.PassThroughVocabulary(10_000), add_eos=False, rank=0)
    seqio.TaskRegistry.add(
        "preprocessors_test.fr",
        source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: records(text=DOCUMENTS), ["train"]),
        preprocessors=plain(),
        output_features={**FEATURES, "language": number, "task": number},
    )
    task = seqio.get_mixture_or_task("preprocessors_test.fr")

    def iterator():
        return iter(task.get_dataset(LENGTHS, "train", shuffle=True, seed=5, num_epochs=None))

    first = iterator()
    for _ in range(7):
        next(first)
    path = tf.train.Checkpoint(it=first).save(str(tmp_path / "it"))
    want = [next(first)["inputs"].numpy().tolist() for _ in range(30)]
    again = iterator()
    tf.train.Checkpoint(it=again).restore(path)
    assert [next(again)["inputs"].numpy().tolist() for _ in range(30)] == want


# Text to text.

PAIRS = {"english": ["The  cat", "", "A dog", "x" * 100], "other": ["Le chat", "vide", "  ", "Y" * 100]}


def translated(token, languages=("en", "fr")):
    columns = {"source": "english", "target": "other", "languages": languages}
    return examples(records(**PAIRS), [partial(preprocessors.translation, **columns, token=token, task=9)])


EN, FR = VOCABULARY.language_token("en"), VOCABULARY.language_token("fr")


@pytest.mark.parametrize(
    ("token", "inputs", "targets"),
    [("source", [FR], []), ("target", [], [FR]), ("both", [EN], [FR]), ("none", [], [])],
)
def test_the_language_token_stands_at_its_side(token, inputs, targets):
    short, long = translated(token)  # the pairs with an empty side are gone
    assert short["inputs"].tolist() == [*inputs, *VOCABULARY.encode("The cat"), 1]
    assert short["targets"].tolist() == [*targets, *VOCABULARY.encode("Le chat"), 1]
    assert short["inputs_pretokenized"] == b"The cat"
    assert short["targets_pretokenized"] == b"Le chat"
    assert (short["language"], short["task"]) == (language_id("fr"), 9)
    for side, first in (("inputs", inputs), ("targets", targets)):  # cut text keeps its tokens
        assert len(long[side]) == LENGTHS[side]
        assert long[side][: len(first)].tolist() == first
        assert long[side][-1] == 1


def test_swapped_sides_are_the_reverse_task():
    forth = translated("none")[0]
    swapped = {"source": "other", "target": "english", "languages": ("fr", "en"), "token": "none"}
    back = examples(records(**PAIRS), [partial(preprocessors.translation, **swapped)])[0]
    assert back["inputs"].tolist() == forth["targets"].tolist()
    assert back["targets"].tolist() == forth["inputs"].tolist()
    assert back["language"] == language_id("en")


def test_text_to_text_copies_corrects_and_prefixes():
    step = partial(
        preprocessors.text_to_text, inputs="other", targets="other", prefix="copy: ", inputs_tokens=("<mask>",)
    )
    got = examples(records(other=["a  b"]), [step])[0]
    assert got["inputs"].tolist() == [VOCABULARY.special("<mask>"), *VOCABULARY.encode("copy: a b"), 1]
    assert got["targets"].tolist() == [*VOCABULARY.encode("a b"), 1]
    assert "language" not in got


def test_add_ids():
    dataset = records(inputs=[[1, 2]])
    got = examples(dataset, [partial(preprocessors.add_ids, language="sw", task=4)])[0]
    assert (got["language"], got["task"]) == (language_id("sw"), 4)
    assert got["language"].dtype == np.int32


@pytest.mark.parametrize(
    ("steps", "lengths", "message"),
    [
        (plain("span_coruption"), LENGTHS, "did you mean 'span_corruption'"),
        (plain(), {"inputs": 64, "targets": 8}, "targets of 14 tokens, the task's hold 8"),
        (plain(), {"inputs": 64}, r"lacks \['targets'\]"),
        (plain(), None, r"lacks \['inputs', 'targets'\]"),
        (plain(language="frr"), LENGTHS, "no language has the code 'frr'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_text_is_read(steps, lengths, message):
    with pytest.raises((KeyError, ValueError), match=message):
        examples(records(text=["x"]), steps, lengths)


def test_unknown_language_tokens_are_refused():
    with pytest.raises(KeyError, match=r"no token <2de> \(German\)"):
        translated("source", ("en", "de"))
    with pytest.raises(KeyError, match="did you mean 'source'"):
        translated("sorce")
