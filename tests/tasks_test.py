"""The shipped registrations: quick to make, equal to the data they describe, and each task gives examples."""

import gzip
import json
import subprocess
import sys

import pytest

from mlm.data.languages import LANGUAGES, language
from mlm.data.once import examples_once
from mlm.data.pipeline import BatchIterator, DataConfig
from mlm.data.recipes import Lengths
from mlm.data.registration import default_vocabulary, get, load_tasks, mixture_rates, owner
from mlm.data.sources import declaration, pairs

load_tasks()

from tasks import embedded, flores, mc4, opus100  # noqa: E402  registered by load_tasks, in its order

LENGTHS = Lengths(64, 32)


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def first_examples(name, split, count=3):
    """Through SeqIO itself, as its Evaluator would read them, and through the shared graphs."""
    dataset = get(name).get_dataset(LENGTHS._asdict(), split, shuffle=False, seed=0).take(count)
    return list(dataset.as_numpy_iterator())


def text(ids):
    return default_vocabulary().decode([int(i) for i in ids if i > 1])


# Embedded corpora.


def test_tables_name_exactly_the_languages_of_the_files():
    for file, codes in embedded.ALIGNED.values():
        assert ["en", *codes.split()] == sorted(pairs(file).languages(), key=lambda c: (c != "en", c))
    assert embedded.DECLARATION[1].split() == declaration(embedded.DECLARATION[0]).languages()


def test_the_quickstart_is_broad():
    rates = mixture_rates("quickstart")
    codes = {owner(get(name)) for name in rates}
    assert len(codes) >= 60
    assert len({language(code).script for code in codes}) >= 15
    assert sum(rates.values()) == pytest.approx(1)
    denoised = {owner(get(name)) for name in rates if ".denoise." in name}
    translated = {owner(get(name)) for name in rates if ".translate." in name}
    assert translated == denoised - {"en"}
    assert sum(rate for name, rate in rates.items() if ".translate." in name) == pytest.approx(0.3)


def test_both_directions_are_equally_likely():
    rates = mixture_rates("quickstart")
    assert rates["help.translate.en.fr"] == pytest.approx(rates["help.translate.fr.en"])


def test_every_task_of_the_embedded_mixtures_gives_held_out_examples():
    names = sorted(mixture_rates("embedded.all"))
    seen = dict(examples_once(names, "validation", default_vocabulary(), LENGTHS))
    assert sorted(seen) == names
    for name, examples in seen.items():
        assert examples, name
        assert all(len(e.inputs) <= 64 and len(e.targets) <= 32 and e.targets[-1] == 1 for e in examples), name


@pytest.mark.parametrize(
    "name",
    ["help.denoise.th", "ui.translate.en.zh_Hant", "tatoeba.translate.uk.en", "udhr.retrieve.am", "uagec.correct.uk"],
)
def test_a_task_works_through_seqio_alone(name):
    for example in first_examples(name, "test"):
        assert {"inputs", "targets", "language", "task"} <= set(example)
        assert example["targets"][-1] == 1
        assert 0 < example["language"] < len(LANGUAGES)


def test_seqio_and_the_shared_graphs_read_the_same_pairs():
    name = "help.translate.en.sr_Latn"
    ((_, fast),) = examples_once([name], "validation", default_vocabulary(), LENGTHS)
    slow = list(get(name).get_dataset(LENGTHS._asdict(), "validation", shuffle=False).as_numpy_iterator())
    assert [(e.inputs.tolist(), e.targets.tolist()) for e in fast] == [
        (e["inputs"].tolist(), e["targets"].tolist()) for e in slow
    ]
    assert {e.language for e in fast} == {int(e["language"]) for e in slow}


def test_the_source_begins_with_the_token_of_the_target_language():
    vocabulary = default_vocabulary()
    for example in first_examples("help.translate.pt_BR.en", "test"):
        assert example["inputs"][0] == vocabulary.language_token("en")
        assert text(example["targets"])[:5] == example["targets_pretokenized"].decode()[:5]


def test_the_quickstart_makes_batches():
    config = DataConfig(mixture="quickstart", inputs_length=64, targets_length=32, batch_size=16)
    batches = BatchIterator(config)
    batch = next(batches)
    assert len(batches.tasks) > 300
    assert len(set(batch["decoder_language_ids"].ravel().tolist())) > 5


def test_registering_is_cheap():
    """In a fresh process: beside the imports, all tasks take less than a second (they take about 0.1 s)."""
    code = (
        "import time, seqio, mlm.data.registration as r; r.default_vocabulary();"
        "t = time.process_time(); r.load_tasks(); print(time.process_time() - t, len(seqio.TaskRegistry.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, tasks = done.stdout.split()
    assert int(tasks) > 2000
    assert float(seconds) < 1.0


# Public corpora, on small files of their layout.


def test_mc4_from_json_lines(data_root):
    folder = data_root / "c4" / "multilingual"
    folder.mkdir(parents=True)
    for name in (
        "c4-sw.tfrecord-00000-of-00002.json.gz",
        "c4-sw.tfrecord-00001-of-00002.json.gz",
        "c4-sw-validation.tfrecord-00000-of-00001.json.gz",
    ):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"text": f"ukurasa {i} wa maneno mengi sana", "timestamp": "", "url": ""}) + "\n"
                for i in range(40)
            )
    for split in ("train", "validation"):
        assert "<extra_id_0>" in text(first_examples("mc4.denoise.sw", split)[0]["inputs"])
    config = DataConfig(mixture="mc4.denoise.sw", inputs_length=64, targets_length=32, batch_size=4)
    batches = BatchIterator(config)
    next(batches)
    saved = batches.state()
    expected = next(batches)["encoder_input_tokens"].tolist()
    assert next(BatchIterator(config).restore(saved))["encoder_input_tokens"].tolist() == expected


def test_mc4_has_the_languages_and_the_rates_of_mt5():
    assert len(mc4.SOURCES) == 107
    rates = mixture_rates("mc4.mt5")
    # The sampling table of the mT5 paper: Swahili 0.50 %, Yoruba 0.20 %, German 3.05 % (reproduced within 0.03).
    for code, percent in (("sw", 0.50), ("yo", 0.20), ("de", 3.05)):
        assert 100 * rates[f"mc4.denoise.{code}"] == pytest.approx(percent, abs=0.03)


def test_absent_data_say_what_is_missing_where(data_root):
    with pytest.raises(FileNotFoundError, match=rf"{data_root}/c4/multilingual/c4-yo.tfrecord.*c4/multilingual:3.1.0"):
        first_examples("mc4.denoise.yo", "train")
    with pytest.raises(FileNotFoundError, match=rf"{data_root}/flores200/dev/eng_Latn.dev"):
        first_examples("flores.translate.en.sw", "validation")
    with pytest.raises(FileNotFoundError, match=r"opus-100-corpus/v1.0/supervised/en-sw|opus.en-zu-train.en"):
        BatchIterator(
            DataConfig(mixture="opus100.translate.en.zu", inputs_length=8, targets_length=8, batch_size=1)
        ).__next__()


def test_opus100_from_its_files(data_root):
    folder = data_root / "opus-100-corpus" / "v1.0" / "supervised" / "af-en"
    for part in ("train", "dev", "test"):
        write(folder / f"opus.af-en-{part}.en", [f"{part} sentence {i}" for i in range(9)])
        write(folder / f"opus.af-en-{part}.af", [f"{part} sin {i}" for i in range(9)])
    for split, part in (("train", "train"), ("validation", "dev"), ("test", "test")):
        example = first_examples("opus100.translate.en.af", split)[2]
        assert text(example["inputs"]).endswith(f"{part} sentence 2")
        assert text(example["targets"]) == f"{part} sin 2"
    assert len(opus100.opus100) == 2 * 98
    assert "validation" not in get("opus100.translate.en.yo").splits


def test_flores_from_its_files(data_root):
    for folder in ("dev", "devtest"):
        write(data_root / "flores200" / folder / f"eng_Latn.{folder}", ["One.", "Two."])
        write(data_root / "flores200" / folder / f"zho_Hant.{folder}", ["一。", "二。"])
    example = first_examples("flores.translate.zh_Hant.en", "test")[1]
    assert (text(example["inputs"]), text(example["targets"])) == ("<2en>二。", "Two.")
    assert len(flores.CODES.split()) == 203
    assert set(get("flores.translate.en.zh_Hant").splits) == {"validation", "test"}
