"""`mlm eval`: tables on screen, JSON in the run, the same numbers in both."""

import json
import shutil

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

import mlm
from mlm.cli.main import main
from mlm.evaluation.metrics import log_likelihood, metric_fns


def add(name: str, language: str, pairs, metrics) -> None:
    from mlm.data.languages import language_id
    from mlm.data.registration import default_vocabulary

    def read(split, shuffle_files=False, seed=None):
        columns = list(zip(*pairs, strict=True))
        return tf.data.Dataset.from_tensor_slices({"inputs": list(columns[0]), "targets": list(columns[1])})

    def prepare(dataset, output_features):
        encode = output_features["targets"].vocabulary.encode_tf
        number = tf.constant(language_id(language), tf.int32)
        return dataset.map(
            lambda r: {
                "inputs": encode(r["inputs"]),
                "targets": encode(r["targets"]),
                "language": number,
                "targets_pretokenized": r["targets"],
            }
        )

    tokens = seqio.Feature(default_vocabulary(), add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=["validation"]),
        preprocessors=[prepare, seqio.preprocessors.append_eos],
        output_features={"inputs": tokens, "targets": tokens},
        metric_fns=metric_fns(*metrics),
    )


@pytest.fixture(scope="module", autouse=True)
def tasks():
    add("tiny.en.fr", "fr", [("good day", "bon jour"), ("thanks", "merci"), ("yes", "oui")], ("bleu", "chrf++"))
    add("tiny.uk", "uk", [("a", "дякую"), ("b", "так")], ())
    seqio.MixtureRegistry.add("tiny.all", ["tiny.en.fr", "tiny.uk"], default_rate=1)
    yield
    for name in ("tiny.en.fr", "tiny.uk"):  # and not the shipped ones, which are loaded once in a process
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("tiny.all")


@pytest.fixture(scope="module")
def session(tiny_run):
    return mlm.load(tiny_run)


def test_bits_per_byte_are_those_of_the_scores(session):
    """Bytes are the vocabulary: −log2 P(text) / bytes, the end of sequence left out of both."""
    result = session.evaluate("tiny.uk")
    pairs = [("a", "дякую"), ("b", "так")]
    sources = [[*session.vocabulary.encode(s), 1] for s, _ in pairs]
    targets = [[*session.vocabulary.encode(t), 1] for _, t in pairs]
    scores = session._scorer()(session.params, sources, targets)
    text = sum(scores.tokens[i, : len(t) - 1].sum() for i, t in enumerate(targets))
    size = sum(len(t.encode()) for _, t in pairs)
    assert result["languages"]["uk"]["bytes"] == result["bytes"] == size
    assert result["languages"]["uk"]["tokens"] == size + 2
    assert result["bits_per_byte"] == pytest.approx(-text / np.log(2) / size, rel=1e-5)
    assert result["loss"] == pytest.approx(-scores.totals.sum() / (size + 2), rel=1e-5)
    assert result["metrics"] == {}


def test_a_task_with_metrics_says_how_it_decoded(session):
    result = session.evaluate("tiny.en.fr", num_examples=2, method="beam", beams=2, max_length=8)
    assert result["examples"] == 2
    assert set(result["metrics"]) == {"bleu", "bleu_signature", "chrf++", "chrf++_signature"}
    assert result["decode"]["beams"] == 2
    assert [s["targets"] for s in result["samples"]] == ["bon jour", "merci"]
    (want,) = session.decode(session.encode("good day"), None, "beam", beams=2, max_length=8)
    assert result["samples"][0]["prediction"] == want[0].text


def test_a_mixture_is_the_sum_of_its_tasks(session):
    both = session.evaluate()
    assert sorted(both["tasks"]) == ["tiny.en.fr", "tiny.uk"]
    assert sorted(both["languages"]) == ["fr", "uk"]
    nats = sum(t["loss"] * t["tokens"] for t in both["tasks"].values())
    assert both["loss"] == pytest.approx(nats / both["tokens"])
    json.dumps(both)


@pytest.fixture(scope="module")
def aware(session):
    """The run's session with a model that keeps something for every language of the table."""
    from mlm.data.languages import LANGUAGES
    from mlm.models.families import language_aware
    from mlm.models.transformer import Transformer

    parts = {"norms": True, "bridge": True, "offsets": ("language",)}
    model = Transformer(language_aware(session.config, languages=len(LANGUAGES), **parts))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), model.shapes())
    return with_model(session, model, params)


def with_model(session, model, params):
    """The run's session with another model."""
    from mlm.session import Session

    names = ("run", "step", "parameters", "data", "extra", "vocabulary", "rows")
    kept = {name: getattr(session, name) for name in names}
    return Session(**kept, config=model.config, model=model, params=params, batch_size=8)


def test_a_language_aware_model_is_told_the_language_of_each_example(aware):
    from mlm.data.languages import language_id

    fr, uk = language_id("fr"), language_id("uk")
    result = aware.evaluate("tiny.en.fr", num_examples=1, max_length=8)
    ((french,),), ((other,),) = (aware.decode("good day", languages=[n], max_length=8) for n in (fr, uk))
    assert result["samples"][0]["prediction"] == french.text
    assert french.tokens != other.tokens
    targets = [[*aware.vocabulary.encode(t), 1] for t in ("дякую", "так")]
    sources = [[*aware.vocabulary.encode(s), 1] for s in "ab"]
    nats = aware.score_tokens(sources, targets, [uk, uk]).sum()
    assert aware.evaluate("tiny.uk")["loss"] == pytest.approx(-nats / sum(map(len, targets)), rel=1e-5)
    assert aware.decode("good day", to="fr", language_token="target", max_length=8)[0][0].text
    with pytest.raises(ValueError, match='session by to="fr"'):
        aware.decode("good day")


@pytest.fixture
def mbart(tiny_run, tmp_path):
    """The run as mBART's 25 languages have it, and two directions of a translation."""
    from mlm.data.registration import add_translation_tasks
    from mlm.data.sources import TableSource

    copy = shutil.copytree(tiny_run, tmp_path / "run")
    data = json.loads((copy / "data.json").read_text())
    template = {"source": ["{text}", "{eos}", "{from}"], "target": [], "start": "{to}"}
    (copy / "data.json").write_text(json.dumps({**data, "template": template}))
    columns = {"english": [b"good day", b"thanks"], "other": [b"bon jour", b"merci"]}
    source = TableSource(lambda split: columns, ("english", "other"), ("validation",))
    metrics = lambda language: [*metric_fns("accuracy"), log_likelihood]  # noqa: E731
    names = add_translation_tasks("mbart", {"fr": source}, metrics=metrics)
    yield mlm.load(copy), names
    for name in names:
        seqio.TaskRegistry.remove(name)


def test_tasks_are_evaluated_as_the_model_was_told(mbart):
    """Each target language is a start token of its own: losses, scores and what is written equal the session's own."""
    session, names = mbart
    pairs = [("good day", "bon jour"), ("thanks", "merci")]
    results = dict(session.evaluate_each(names, max_length=6))
    for name, to, from_, asked in (
        (names[0], "fr", "en", pairs),
        (names[1], "en", "fr", [(b, a) for a, b in pairs]),
    ):
        nats, tokens = session.score(asked, to, from_=from_), sum(len(target) + 1 for _, target in asked)
        assert results[name]["loss"] == pytest.approx(-nats.sum() / tokens, rel=1e-5)
        assert results[name]["metrics"]["log_likelihood"] == pytest.approx(nats.mean(), rel=1e-5)
        written = session.generate([source for source, _ in asked], to, from_=from_, max_length=6)
        assert [sample["prediction"] for sample in results[name]["samples"]] == written
    assert results[names[0]]["loss"] != pytest.approx(results[names[1]]["loss"])


def test_a_decoder_alone_writes_no_answers_to_tasks(session):
    from mlm.models.families import llama_style
    from mlm.models.specs import PositionSpec
    from mlm.models.transformer import Transformer

    rope, size = PositionSpec(kind="rope"), session.config.vocab_size
    model = Transformer(llama_style(vocab_size=size, d_model=8, d_ff=8, heads=1, kv_heads=1, layers=1, rope=rope))
    alone = with_model(session, model, model.init(jax.random.key(0)))
    assert alone.evaluate("tiny.uk")["loss"] > 0
    with pytest.raises(ValueError, match="holds a decoder alone, which is trained on the targets of a task"):
        alone.evaluate("tiny.en.fr")


def test_tables_and_files(tiny_run, session, capsys):
    assert main(["eval", "--run_dir", str(tiny_run), "--max_length", "8"]) == 0
    captured = capsys.readouterr()
    for part in ("step 20, validation", "tiny.en.fr", "bits/byte", "chrf++", "uk", "all"):
        assert part in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    written = json.loads((tiny_run / "eval" / "20" / "tiny.en.fr.json").read_text())
    assert written == json.loads(json.dumps(session.evaluate("tiny.en.fr", max_length=8)))
    assert (tiny_run / "eval" / "20" / "tiny.uk.json").exists()
    assert "written to" in captured.err


def test_json_on_screen_is_what_the_files_hold(tiny_run, capsys):
    flags = ["--tasks", "tiny.uk", "--step", "10", "--num_examples", "1", "--json"]
    assert main(["eval", "--run_dir", str(tiny_run), *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tasks"]["tiny.uk"] == json.loads((tiny_run / "eval" / "10" / "tiny.uk.json").read_text())
    assert printed["tasks"]["tiny.uk"]["examples"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "tiny.ku"], "did you mean 'tiny.uk'"),
        (["--mixture", "tiny.al"], "did you mean 'tiny.all'"),
        (["--split", "test"], "has a split 'test'; splits: validation"),
        (["--num_examples", "0"], "--num_examples=0 must be at least 1"),
        (["--temperature", "2"], "means nothing to method='greedy'"),
    ],
)
def test_wrong_flags_exit_with_2(tiny_run, capsys, flags, message):
    assert main(["eval", "--run_dir", str(tiny_run), *flags]) == 2
    assert message in capsys.readouterr().err
