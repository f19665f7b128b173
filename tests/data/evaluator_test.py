"""SeqIO's Evaluator on the tasks of a run, with a model that is a plain function."""

import logging

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mlm.data.evaluator import compute_metrics, packed_batches, read_examples, task_names
from mlm.data.languages import language_id
from mlm.data.recipes import Lengths
from mlm.data.spelling import spelled_bytes
from mlm.data.vocabulary import ByteVocabulary
from mlm.evaluation.metrics import log_likelihood, metric_fns, with_source

LENGTHS = Lengths(32, 24)
PAIRS = [("good day", "bon jour"), ("thanks", "merci"), ("one two three", "un deux trois"), ("a", "b")]
OTHER = ByteVocabulary(sentinels=125, languages=["en"])  # what the tasks were registered with
OURS = ByteVocabulary(sentinels=100, languages=["en", "fr"])  # the run's


def source(pairs) -> seqio.FunctionDataSource:
    def read(split, shuffle_files=False, seed=None):
        columns = list(zip(*pairs, strict=True))
        return tf.data.Dataset.from_tensor_slices({"inputs": list(columns[0]), "targets": list(columns[1])})

    return seqio.FunctionDataSource(read, splits=["train", "validation"], num_input_examples={"validation": len(pairs)})


def add(name: str, pairs=PAIRS, first: str = "", **arguments) -> str:
    """A task of text pairs; `first` is a special token that the targets begin with."""

    def prepare(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
        vocabulary = output_features["targets"].vocabulary
        begin = [vocabulary.special(first)] if first else []
        language = tf.constant(language_id("fr"), tf.int32)

        def one(record):
            targets = tf.concat([tf.constant(begin, tf.int32), vocabulary.encode_tf(record["targets"])], 0)
            inputs = vocabulary.encode_tf(record["inputs"])
            kept = {f"{side}_pretokenized": record[side] for side in ("inputs", "targets")}
            return {"inputs": inputs, "targets": targets, "language": language, **kept}

        return dataset.map(one)

    tokens = seqio.Feature(OTHER, add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=source(pairs),
        preprocessors=[prepare, seqio.preprocessors.append_eos],
        output_features={"inputs": tokens, "targets": tokens},
        **arguments,
    )
    return name


@pytest.fixture(scope="module", autouse=True)
def tasks():
    before = set(seqio.TaskRegistry.names())
    add("ev.fr", metric_fns=[*metric_fns("accuracy", "chrf++"), log_likelihood])
    add("ev.plain", metric_fns=[])
    add("ev.forced", first="<2en>", metric_fns=metric_fns("accuracy"))
    add("ev.correct", metric_fns=metric_fns("correction_f05"), postprocess_fn=with_source)
    seqio.MixtureRegistry.add("ev.all", ["ev.fr", "ev.plain"], default_rate=1)
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("ev.all")


class Oracle:
    """Says the targets it was told, in any order of calls; wrong for the sources in `wrong`."""

    def __init__(self, wrong: tuple[str, ...] = ()):
        self.answers = {tuple(OURS.encode(a)): OURS.encode("?" if a in wrong else b) for a, b in PAIRS}
        self.prompts: list = []

    def predict(self, sources, prompts) -> np.ndarray:
        self.prompts = [list(map(int, p)) for p in prompts]
        tokens = np.zeros((len(sources), 30), np.int32)
        for row, source, prompt in zip(tokens, sources, self.prompts, strict=True):
            said = [*prompt, *self.answers[tuple(map(int, source[:-1]))], 1]
            row[: len(said)] = said
        return tokens

    def score(self, sources, targets) -> np.ndarray:
        return -np.array([len(t) for t in targets], np.float32)


def evaluate(name: str, oracle: Oracle, **options):
    return compute_metrics(name, OURS, LENGTHS, predict=oracle.predict, score=oracle.score, **options)


def read(*names: str, **options) -> dict:
    return dict(read_examples(names, OURS, LENGTHS, "validation", **options))


def test_a_perfect_model_is_perfect_and_the_vocabulary_is_the_runs():
    oracle = Oracle()
    outcome = evaluate("ev.fr", oracle)
    assert outcome.metrics["accuracy"] == 100.0
    assert outcome.metrics["chrf++"] == pytest.approx(100.0)
    assert "nw:2" in outcome.metrics["chrf++_signature"]
    # Targets with their end: 9 + 6 + 14 + 2 tokens, in nats by the oracle's own account.
    assert outcome.metrics["log_likelihood"] == pytest.approx(-31 / 4)
    assert outcome.predictions == [b for _, b in PAIRS]
    assert oracle.prompts == [[]] * 4


def test_examples_are_those_of_the_task_in_the_vocabulary_of_the_run():
    found = read("ev.fr", "ev.plain", num_examples=3)
    assert [len(examples) for examples in found.values()] == [3, 3]
    assert found["ev.fr"][0].inputs.tolist() == [*OURS.encode("good day"), 1]
    assert {e.language for e in found["ev.fr"]} == {language_id("fr")}
    assert [e.task for e in found["ev.plain"]] == [2, 2, 2]  # the second of the names


def test_one_wrong_answer_of_four_and_only_the_first_two():
    assert evaluate("ev.fr", Oracle(wrong=("thanks",))).metrics["accuracy"] == 75.0
    outcome = evaluate("ev.fr", Oracle(wrong=("thanks",)), num_examples=2)
    assert outcome.metrics["accuracy"] == 50.0
    assert len(outcome.predictions) == 2


def test_a_task_without_metrics_decodes_nothing():
    def never(*_):
        raise AssertionError("nobody asked for predictions")

    outcome = compute_metrics("ev.plain", OURS, LENGTHS, predict=never, score=never)
    assert (outcome.metrics, outcome.predictions) == ({}, [])


def test_a_forced_language_token_is_given_and_not_compared():
    oracle = Oracle()
    outcome = evaluate("ev.forced", oracle)
    assert oracle.prompts == [[OURS.language_token("en")]] * 4
    assert outcome.metrics["accuracy"] == 100.0
    assert outcome.predictions[1] == "merci"


def test_a_correction_knows_its_source():
    assert evaluate("ev.correct", Oracle()).metrics["f0.5"] == 100.0
    # The four words of "ev.correct" that stay wrong are missed; nothing else is changed: F0.5 < 100.
    worse = evaluate("ev.correct", Oracle(wrong=("one two three",))).metrics
    assert 0 < worse["f0.5"] < 100


def test_the_registry_and_the_screen_are_left_as_they_were(caplog, capfd):
    before = seqio.TaskRegistry.names()
    with caplog.at_level(logging.WARNING):
        evaluate("ev.fr", Oracle())
    assert seqio.TaskRegistry.names() == before
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_names_and_splits_that_are_not_there_are_refused():
    assert task_names("ev.all", "validation") == ["ev.fr", "ev.plain"]
    with pytest.raises(KeyError, match=r"did you mean .ev[.]fr"):
        task_names("ev.rf", "validation")
    with pytest.raises(ValueError, match=r"has a split 'test'; splits: train, validation"):
        task_names("ev.all", "test")


def test_an_empty_split_is_named():
    add("ev.empty", pairs=[("", "")], metric_fns=[])
    with pytest.raises(ValueError, match=r"'ev\.empty' has no example in its validation split"):
        read("ev.empty", num_examples=0)


def test_packed_batches_hold_every_example_once_in_equal_batches():
    examples = read("ev.plain")["ev.plain"]
    batches = list(packed_batches(examples * 5, LENGTHS, rows=4))
    assert {b["decoder_target_tokens"].shape for b in batches} == {(4, 24)}
    wanted = sorted(t for e in examples * 5 for t in e.targets.tolist())
    found = sorted(t for b in batches for t in b["decoder_target_tokens"][b["decoder_segment_ids"] > 0].tolist())
    assert found == wanted
    assert sum(b["decoder_loss_weights"].sum() for b in batches) == len(wanted)


@pytest.mark.parametrize(
    "text", ["plain words", "Ünïcödé  and spaces", "日本語のテキスト", "дякую 123", "مرحبا", "🙂 e\u0301"]
)
def test_spelled_bytes_of_a_text_are_its_utf8_bytes(text, sentencepieces):
    """SentencePiece drops the space it put before the first word; bytes have no such thing."""
    spelled = spelled_bytes(OURS)
    ids = OURS.encode(text)
    assert spelled.size[ids].sum() == len(text.encode())
    assert spelled.text[ids].all()
    ids, spelled = sentencepieces.encode(text), spelled_bytes(sentencepieces)
    assert spelled.size[ids].sum() - spelled.space[ids[0]] == len(sentencepieces.decode(ids).encode())
    assert spelled.text[ids].all()


def test_special_tokens_spell_nothing(sentencepieces):
    for vocabulary in (OURS, sentencepieces):
        spelled = spelled_bytes(vocabulary)
        specials = [0, 1, *vocabulary.specials.values()]
        assert not spelled.text[specials].any()
        assert not spelled.size[specials].any()
        assert np.flatnonzero(spelled.opens).tolist() == sorted(vocabulary.language_tokens.values())
        assert spelled.size[2] == 0  # <unk>: text of unknown length


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory):
    from mlm.data.vocabulary_training import train_vocabulary

    lines = ["plain words and spaces in a text", "дякую за текст", "these are other words"] * 20
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    return train_vocabulary(lines, path, 640, languages=["en", "uk"], sentinels=100)
