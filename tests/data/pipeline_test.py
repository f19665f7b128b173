"""The same seed gives the same batches: whole or restored, in one process or four, ahead of time or not."""

import dataclasses
import threading
from functools import partial

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mlm.data.languages import LANGUAGES as table_of_languages
from mlm.data.languages import language_id
from mlm.data.once import examples_once
from mlm.data.pipeline import BatchIterator, DataConfig
from mlm.data.prefetch import Prefetcher
from mlm.data.preprocessors import add_ids
from mlm.data.readers import in_template
from mlm.data.recipes import Lengths, with_vocabulary
from mlm.data.registration import (
    add_denoising_tasks,
    add_translation_tasks,
    default_vocabulary,
    features,
    get,
    register_mixture,
)
from mlm.data.sources import Layout, PublishedSource, TableSource, read_aligned_lines
from mlm.data.templates import EOS, FROM, PLACES, TEXT, TO, Template
from mlm.data.vocabulary import ByteVocabulary
from mlm.types import ROW_FEATURES

LANGUAGES = ("fr", "sw", "th", "ru")


def records(code, count):
    return [f"{code} {i:03d} " + "abcdefgh"[: i % 8] for i in range(count)]


def table(code, count):
    english = [f"en {i:03d}".encode() for i in range(count)]
    other = [text.encode() for text in records(code, count)]
    return lambda split: {"english": english, "other": other, "text": other}


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Four languages in memory (denoising and translation), one in files, and one SeqIO task with a pipeline of its
    own.
    """
    root = tmp_path_factory.mktemp("pipeline")
    (root / "de.txt").write_text("\n".join(records("de", 700)))
    texts = {c: TableSource(table(c, 20 + 30 * i), ("text",)) for i, c in enumerate(LANGUAGES)}
    pairs = {c: TableSource(table(c, 20 + 30 * i), ("english", "other")) for i, c in enumerate(LANGUAGES)}
    layout = Layout({"train": (str(root / "de.txt"),)}, read_aligned_lines("text"), "this test")
    names = add_denoising_tasks("pt", texts) + add_translation_tasks("pt", pairs)
    names += add_denoising_tasks("pt", {"de": PublishedSource(layout)})

    def plain(dataset, output_features):
        vocabulary = output_features["targets"].vocabulary
        return dataset.map(
            lambda x: {"inputs": vocabulary.encode_tf(x["text"]), "targets": vocabulary.encode_tf(x["text"])}
        )

    seqio.TaskRegistry.add(
        "pt.plain",
        source=seqio.TextLineDataSource({"train": str(root / "de.txt")}),
        preprocessors=[
            lambda ds: ds.map(lambda line: {"text": line}),
            plain,
            seqio.preprocessors.append_eos,
            partial(add_ids, language="de", task=0),
        ],
        output_features=features(default_vocabulary()),
        metric_fns=[],
    )
    register_mixture("pt.tables", names[:-1], lambda counts: counts / counts.sum())
    register_mixture("pt.few", names[:1], lambda counts: counts / counts.sum())
    register_mixture("pt.all", [("pt.tables", 0.6), (names[-1], 0.2), ("pt.plain", 0.2)])
    return names


CONFIG = DataConfig(mixture="pt.tables", inputs_length=40, targets_length=24, batch_size=8, shards=4)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_batches_have_the_features_and_shapes_of_the_model(registered):
    batch = next(BatchIterator(CONFIG))
    assert set(batch) == set(ROW_FEATURES)
    for name, array in batch.items():
        assert array.shape == (8, 40 if name.startswith("encoder") else 24), name
    tasks = BatchIterator(CONFIG).tasks
    assert batch["decoder_task_ids"].max() <= len(tasks)
    assert tasks == sorted(tasks)


def test_same_seed_same_batches_other_seed_others(registered):
    assert_equal(take(BatchIterator(CONFIG), 3), take(BatchIterator(CONFIG), 3))
    other = next(BatchIterator(dataclasses.replace(CONFIG, seed=1)))
    assert (other["encoder_input_tokens"] != next(BatchIterator(CONFIG))["encoder_input_tokens"]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_what_one_sees(registered, processes):
    one = take(BatchIterator(CONFIG), 3)
    parts = [take(BatchIterator(CONFIG, p, processes), 3) for p in range(processes)]
    joined = [
        {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_equal(one, joined)


@pytest.mark.parametrize(
    ("mixture", "shards", "pack", "taken"),
    [
        ("pt.tables", 4, True, 0),
        ("pt.tables", 2, False, 7),
        ("pt.denoise.de", 2, True, 9),
        ("pt.all", 1, True, 1),
        ("pt.all", 2, False, 12),
    ],
)
def test_a_restored_iterator_continues_exactly(registered, mixture, shards, pack, taken):
    config = dataclasses.replace(CONFIG, mixture=mixture, shards=shards, pack=pack)
    whole = BatchIterator(config)
    take(whole, taken)
    saved = whole.state()
    assert all(isinstance(place, bytes) and len(place) < 40_000 for place in saved.values())
    expected = take(whole, 6)
    assert_equal(expected, take(BatchIterator(config).restore(saved), 6))


def test_four_processes_save_and_two_continue(registered):
    four = [BatchIterator(CONFIG, p, 4) for p in range(4)]
    for batches in four:
        take(batches, 5)
    saved = {shard: place for batches in four for shard, place in batches.state().items()}
    whole = BatchIterator(CONFIG)
    take(whole, 5)
    expected = take(whole, 2)
    halves = [take(BatchIterator(CONFIG, p, 2).restore(saved), 2) for p in range(2)]
    assert_equal(expected, [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)])


def test_restoring_restored_batches_again(registered):
    whole = BatchIterator(CONFIG)
    expected = take(whole, 9)
    batches, seen = BatchIterator(CONFIG), []
    for _ in range(9):  # saved and restored after every batch
        batches = BatchIterator(CONFIG).restore(batches.state())
        seen.append(next(batches))
    assert_equal(expected, seen)


def test_every_record_once_an_epoch_over_all_shards(registered):
    config = dataclasses.replace(CONFIG, mixture="pt.translate.en.ru", pack=False, inputs_length=40, batch_size=4)
    batches = BatchIterator(config)  # 110 records in 4 shards
    vocabulary, seen = batches.vocabulary, []
    for batch in take(batches, 110):
        seen += [vocabulary.decode(row[row > 1].tolist()) for row in batch["decoder_target_tokens"]]
    expected = [text.strip() for text in records("ru", 110)]
    # After 110 records of each shard, every record was seen four times: once in each of four epochs.
    assert sorted(seen) == sorted(expected * 4)


def test_rates_are_what_the_policy_says(registered):
    batches = BatchIterator(dataclasses.replace(CONFIG, mixture="pt.tables", batch_size=32, shards=1, pack=False))
    counts = np.zeros(len(batches.tasks) + 1)
    for batch in take(batches, 100):
        np.add.at(counts, batch["decoder_task_ids"].max(1), 1)
    rates = batches.rates.at(0)
    # 3200 draws: the standard error of a share p is sqrt(p (1 - p) / 3200) < 0.009
    np.testing.assert_allclose(counts[1:] / counts.sum(), rates, atol=0.035)


def test_language_and_task_ids_follow_the_tokens(registered):
    batches = BatchIterator(dataclasses.replace(CONFIG, mixture="pt.tables", pack=False))
    tokens = batches.vocabulary.language_tokens
    for batch in take(batches, 20):
        for row in range(8):
            task = batches.tasks[batch["decoder_task_ids"][row, 0] - 1]
            *_, source, target = (
                ["", task.split(".")[-1], task.split(".")[-1]] if "denoise" in task else task.split(".")
            )
            assert batch["decoder_language_ids"][row, 0] == language_id(target), task
            assert batch["encoder_language_ids"][row, 0] == language_id(source), task
            if "translate" in task:
                assert batch["encoder_input_tokens"][row, 0] == tokens[target]


def test_stages_change_the_rates_at_their_time_also_after_a_restart(registered):
    config = dataclasses.replace(CONFIG, stages=((0.0, "pt.few"), (0.5, "pt.tables")), steps=8, pack=False)
    batches = BatchIterator(config)
    first = batches.tasks.index("pt.denoise.fr") + 1
    expected = []
    for i in range(8):
        saved = batches.state()
        expected.append(next(batches))
        assert_equal([expected[-1]], [next(BatchIterator(config).restore(saved))])
        assert (expected[-1]["decoder_task_ids"].max(1) == first).all() == (i < 4)


def test_a_vocabulary_file_takes_the_place_of_the_default(registered, tmp_path):
    from mlm.data.vocabulary import ByteVocabulary

    ByteVocabulary(20, (*LANGUAGES, "en", "de")).save(tmp_path / "vocabulary.json")
    batches = BatchIterator(dataclasses.replace(CONFIG, vocabulary=str(tmp_path / "vocabulary.json")))
    assert batches.vocabulary.vocab_size == 384
    assert max(batch["encoder_input_tokens"].max() for batch in take(batches, 5)) < 384


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "belongs to other data"),
        ({"mixture": "pt.few"}, "belongs to other data"),
        ({"inputs_length": 48}, "belongs to other data"),
        ({"shards": 8}, "no saved place for virtual shards"),
    ],
)
def test_a_place_in_other_data_is_refused(registered, change, message):
    saved = BatchIterator(CONFIG).state()
    with pytest.raises(ValueError, match=message):
        BatchIterator(dataclasses.replace(CONFIG, **change)).restore(saved)


MBART = Template((TEXT, EOS, FROM), start=TO)
BOS = Template(("<bos>", TEXT))
TOLD = ByteVocabulary(sentinels=100, languages=["en", "fr", "sw", "th", "ru", "de"], extra_tokens=["<bos>"])


@pytest.mark.parametrize(("template", "ends"), [(PLACES["both"], 1), (MBART, 1), (BOS, 0)])
def test_all_that_a_run_reads_is_in_its_template(registered, tmp_path, template, ends):
    """Denoised and translated, from memory, from files and by SeqIO itself; and the batch is as the examples."""
    TOLD.save(tmp_path / "vocabulary.json")
    lengths, codes = Lengths(40, 24), {record.code: i for i, record in enumerate(table_of_languages)}
    names = {"pt.denoise.fr": ("fr", "fr"), "pt.translate.en.sw": ("en", "sw"), "pt.denoise.de": ("de", "de")}
    found = dict(examples_once(list(names), "train", TOLD, lengths, limit=5, template=template))
    for name, (source, target) in names.items():
        told = {FROM: source, TO: target} if template.asks_for else {TO: None, FROM: None}
        frame = template.frame(TOLD, told[TO], told[FROM])
        for example in found[name]:
            inputs, targets = example.inputs.tolist(), example.targets.tolist()
            assert inputs[: len(frame.before)] == frame.before
            assert inputs[len(inputs) - len(frame.after) :] == frame.after
            assert inputs.count(1) == ends
            assert targets[: len(frame.prompt)] == frame.prompt
            assert (targets[-1], targets.count(1)) == (1, 1)
            assert (example.start, example.language) == (frame.start or 0, codes[target])
            assert max(len(inputs) - 40, len(targets) - 24) <= 0
    (english,) = {"".join(filter(str.isdigit, TOLD.decode(e.inputs.tolist()))) for e in found["pt.translate.en.sw"][:1]}
    assert english.endswith("000")
    task = with_vocabulary(in_template(get("pt.translate.en.sw"), template), TOLD)
    by_seqio = next(task.get_dataset(lengths._asdict(), "train", shuffle=False).as_numpy_iterator())
    first = found["pt.translate.en.sw"][0]
    assert by_seqio["inputs"].tolist() == first.inputs.tolist()
    assert (by_seqio["targets"].tolist(), by_seqio["start"]) == (first.targets.tolist(), first.start)

    config = dataclasses.replace(CONFIG, template=template, vocabulary=str(tmp_path / "vocabulary.json"), shards=1)
    batches = BatchIterator(config)
    batch = next(batches)
    begins = (batch["decoder_positions"] == 0) & (batch["decoder_segment_ids"] > 0)
    starts = [
        0 if template.start is None else TOLD.language_token(table_of_languages[i].code)
        for i in batch["decoder_language_ids"][begins]
    ]
    assert batch["decoder_input_tokens"][begins].tolist() == starts
    if template.asks_for:
        begins = (batch["encoder_positions"] == 0) & (batch["encoder_segment_ids"] > 0)
        assert np.isin(batch["encoder_input_tokens"][begins], list(TOLD.language_tokens.values())).all() == (
            template is not MBART
        )
    saved, expected = batches.state(), next(batches)
    assert_equal([next(BatchIterator(config).restore(saved))], [expected])
    with pytest.raises(ValueError, match="belongs to other data"):
        BatchIterator(dataclasses.replace(config, template=None)).restore(saved)


def test_a_template_that_a_task_cannot_follow_is_refused(registered, tmp_path):
    config = dataclasses.replace(CONFIG, mixture="pt.plain", template=MBART)
    with pytest.raises(ValueError, match=r"'pt.plain' has preprocessors of its own.* begin with {to}.*add_task"):
        BatchIterator(config)
    next(BatchIterator(dataclasses.replace(config, template=PLACES["both"], shards=1)))
    ByteVocabulary(sentinels=100, languages=["en"]).save(tmp_path / "vocabulary.json")
    config = dataclasses.replace(CONFIG, vocabulary=str(tmp_path / "vocabulary.json"), mixture="pt.few", template=MBART)
    with pytest.raises(KeyError, match="no token <2fr>"):
        BatchIterator(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10}, r"batch_size=10 rows do not divide over shards=4.*nearest: 8"),
        ({"inputs_length": 0}, "inputs_length=0"),
        ({"stages": ((0.2, "a"),)}, "the first at 0.0"),
    ],
)
def test_nonsense_is_refused_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_unknown_names_get_the_nearest(registered):
    with pytest.raises(KeyError, match=r"no task or mixture named 'pt.tabels'; did you mean 'pt.tables'"):
        BatchIterator(dataclasses.replace(CONFIG, mixture="pt.tabels"))
    with pytest.raises(ValueError, match=r"no task of pt.few has a split 'dev'"):
        BatchIterator(dataclasses.replace(CONFIG, mixture="pt.few", split="dev"))
    with pytest.raises(
        ValueError, match=r"shards=4 .* do not divide over 3 processes; use a multiple of 3 \(nearest: 3\)"
    ):
        BatchIterator(CONFIG, 0, 3)


def test_a_task_without_a_language_is_refused(registered):
    seqio.TaskRegistry.add(
        "pt.no_language",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=0: tf.data.Dataset.from_tensors({"inputs": [3, 1], "targets": [4, 1]}),
            ("train",),
        ),
        preprocessors=[],
        output_features={name: features(default_vocabulary())[name] for name in ("inputs", "targets")},
        metric_fns=[],
    )
    with pytest.raises(ValueError, match=r"'pt.no_language' has no feature language; .*add_ids, language='sw'"):
        next(BatchIterator(dataclasses.replace(CONFIG, mixture="pt.no_language", shards=1)))


def test_prefetching_keeps_the_place_of_the_batch_handed_out_last(registered):
    config = dataclasses.replace(CONFIG, mixture="pt.all", shards=1)
    expected = take(BatchIterator(config), 9)
    with Prefetcher(BatchIterator(config), depth=3) as ahead:
        start = ahead.state()  # before the first batch
        assert_equal(take(ahead, 4), expected[:4])
        saved = ahead.state()
        next(ahead)
    assert_equal([next(BatchIterator(config).restore(saved))], expected[4:5])
    assert_equal([next(BatchIterator(config).restore(start))], expected[:1])


def test_prefetching_passes_on_errors_and_ends_its_thread():
    class Source:
        def __init__(self):
            self.left = 2

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise OSError("disk gone")
            return self.left

        def snapshot(self):
            return self.left

        def encode(self, place):
            return {0: bytes([place])}

    ahead = Prefetcher(Source(), depth=1, prepare=lambda x: x * 10)
    assert (next(ahead), next(ahead), ahead.state()) == (10, 0, {0: b"\0"})
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    ahead.close()
    waiting = Prefetcher(Source(), depth=1)
    waiting.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
