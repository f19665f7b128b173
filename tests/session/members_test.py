"""Sessions of several models, and texts that stay in their language."""

import json
import shutil

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

import mlm
from mlm.cli.main import main
from mlm.data.languages import language_id
from mlm.session.language_control import FILE, allowed_tokens

TEXTS = ["Good morning", "Where is the station?"]
MIXTURE = "clones.all"
LOWER, UPPER = "the cat sat on the mat", "THE CAT SAT ON THE MAT"  # two languages that share the space alone


@pytest.fixture(scope="module")
def one_device():
    return jax.devices()[:1]


@pytest.fixture(scope="module")
def session(tiny_run, one_device):
    return mlm.load(tiny_run, devices=one_device, batch_size=4)


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copied")


@pytest.fixture(scope="module", autouse=True)
def clones():
    from mlm.data.registration import default_vocabulary

    def add(name, language, text):
        def read(split, shuffle_files=False, seed=None):
            return tf.data.Dataset.from_tensors({"inputs": text, "targets": text})

        def prepare(dataset, output_features):
            encode = output_features["targets"].vocabulary.encode_tf
            number = tf.constant(language_id(language), tf.int32)
            return dataset.map(
                lambda r: {"inputs": encode(r["inputs"]), "targets": encode(r["targets"]), "language": number}
            )

        tokens = seqio.Feature(default_vocabulary(), add_eos=True, dtype=tf.int32)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(read, splits=["train"]),
            preprocessors=[prepare, seqio.preprocessors.append_eos],
            output_features={"inputs": tokens, "targets": tokens},
        )

    add("clones.en", "en", LOWER)
    add("clones.fr", "fr", UPPER)
    seqio.MixtureRegistry.add(MIXTURE, ["clones.en", "clones.fr"], default_rate=1)
    yield
    seqio.MixtureRegistry.remove(MIXTURE)
    for name in ("clones.en", "clones.fr"):
        seqio.TaskRegistry.remove(name)


def tokens(found):
    return [best.tokens for (best,) in found]


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_ensemble_writes_and_scores_as_one(tiny_run, session, one_device):
    """The mean probability of the two checkpoints, of each token of what they write."""
    first = mlm.load(tiny_run, 10, devices=one_device, batch_size=4)
    both = mlm.load(tiny_run, devices=one_device, batch_size=4, ensemble=[f"{tiny_run}@10"])
    assert both.ensemble[0].step == 10
    assert f"{tiny_run}@10" in repr(both)
    assert both.about("t", "s")["ensemble"] == [f"{tiny_run}@10"]
    found = both.decode(TEXTS, to="fr", max_length=8)
    for text, (best,) in zip(TEXTS, found, strict=True):
        source = [both.encode(text, to="fr")[0].tokens]
        own = [m._scorer()(m.params, source, [best.tokens]).tokens[0] for m in (session, first)]
        want = np.log((np.exp(own[0]) + np.exp(own[1])) / 2).sum()
        assert best.score == pytest.approx(want, abs=1e-4)
        np.testing.assert_allclose(both.score_tokens(source, [best.tokens]), [want], atol=1e-4)
    assert first.score_tokens(source, [best.tokens])[0] != pytest.approx(want, abs=1e-3)


def test_a_weaker_model_to_be_contrasted_with(tiny_run, session, one_device):
    contrasting = mlm.load(tiny_run, devices=one_device, batch_size=4, contrast=f"{tiny_run}@10")
    plain = tokens(session.decode(TEXTS, to="fr", max_length=8))
    assert tokens(contrasting.decode(TEXTS, to="fr", max_length=8)) == plain
    options = {"contrast": "model", "contrast_beta": 20.0, "contrast_alpha": 0.5, "max_length": 8}
    assert tokens(contrasting.decode(TEXTS, to="fr", **options)) != plain
    with pytest.raises(ValueError, match="name its run, by contrast="):
        session.decode(TEXTS, to="fr", **options)


@pytest.mark.parametrize("place", ["source", "target"])
def test_away_from_another_language(session, place):
    """What is read in the place of the own tokens; a wrong language changes the text, none is to be had in a source."""
    options = {"language_token": place, "max_length": 8, "contrast_beta": 20.0, "contrast_alpha": 0.5}
    plain = tokens(session.decode(TEXTS, to="fr", language_token=place, max_length=8))
    found = tokens(session.decode(TEXTS, to="fr", contrast_to="sw", **options))
    assert found != plain
    if place == "source":
        assert tokens(session.decode(TEXTS, to="fr", contrast_to="none", **options)) != found
        return
    assert {t[0] for t in found} == {session.vocabulary.language_token("fr")}
    with pytest.raises(ValueError, match="name another language, not none"):
        session.decode(TEXTS, to="fr", contrast_to="none", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "fr", "contrast_to": "fr"}, ValueError, "name two languages"),
        ({"contrast_to": "fr"}, ValueError, "name two languages"),
        ({"to": "fr", "contrast_to": "de"}, KeyError, "has no token <2de> .German."),
        ({"to": "fr", "contrast": "language"}, ValueError, "asks what the model reads"),
        ({"to": "fr", "contrast_to": "sw", "method": "beam"}, ValueError, "means nothing to method='beam'"),
        ({"language_mask": True}, ValueError, "name the language to be written"),
        ({"to": "fr", "language_mask": True}, KeyError, "no task or mixture named 'tiny.all'"),
    ],
)
def test_errors_name_what_is_wrong(session, options, error, message):
    with pytest.raises(error, match=message):
        session.decode("hi", **options)


@pytest.mark.parametrize("role", ["draft", "contrast", "ensemble"])
def test_another_vocabulary_is_refused_before_parameters_are_read(copy, tiny_run, one_device, role):
    """Neither run has a checkpoint here, and nobody gets so far as to miss it."""
    from mlm.data.vocabulary import ByteVocabulary

    shutil.rmtree(copy / "checkpoints")
    own = shutil.copytree(copy, copy.parent / "own")
    vocabulary = ByteVocabulary(sentinels=99, languages=["en", "fr", "sw", "uk", "de"])
    vocabulary.save(copy / "vocabulary.json")
    given = [copy] if role == "ensemble" else copy
    before = json.loads((own / "data.json").read_text())["vocabulary_digest"]
    edit(copy / "data.json", vocabulary_digest=vocabulary.digest)
    with pytest.raises(ValueError, match=f"(?s)sha256 {before}.*the {role} model .*sha256 {vocabulary.digest}"):
        mlm.load(own, devices=one_device, **{role: given})
    edit(copy / "data.json", vocabulary_digest=before)
    rows = json.loads((copy / "model.json").read_text())["vocab_size"]
    edit(copy / "model.json", vocab_size=rows + 128)
    with pytest.raises(ValueError, match=f"the {role} model .* has a table of {rows + 128} rows and the model one of"):
        mlm.load(own, devices=one_device, **{role: given})


def test_the_tokens_of_a_language():
    """Of 1000 tokens, 7 and 8 hold 999, so 9 is rare; 5 is everybody's; 4 is the other language's."""
    own, other = np.zeros(12, np.int64), np.zeros(12, np.int64)
    own[[5, 7, 8, 9]] = 100, 800, 99, 1
    other[[4, 5]] = 10, 1
    assert np.flatnonzero(allowed_tokens({1: own, 2: other}, 1)).tolist() == [1, 5, 7, 8]
    assert np.flatnonzero(allowed_tokens({1: own, 2: other}, 1, mass=1.0)).tolist() == [1, 5, 7, 8, 9]
    assert np.flatnonzero(allowed_tokens({1: own, 2: other}, 2, special=[11])).tolist() == [1, 4, 5, 11]
    assert np.flatnonzero(allowed_tokens({1: own, 2: other}, 2, shared=0.5)).tolist() == [1, 4, 5, 7, 8, 9]


def letters(found):
    return {chr(t - 3) for (best,) in found for t in best.tokens if ord("A") <= t - 3 <= ord("z")}


def test_a_masked_text_stays_in_its_language(copy, one_device, capsys):
    """Greedy and beams, whose words an untrained model takes from both languages; counted once, and kept."""
    edit(copy / "data.json", mixture=MIXTURE)
    run = mlm.load(copy, devices=one_device, batch_size=8)
    texts = [*TEXTS, "a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    assert letters(run.decode(texts, to="fr", method="beam")) - set(UPPER)
    for options in ({}, {"method": "beam"}):
        assert letters(run.decode(texts, to="fr", language_mask=True, **options)) <= set(UPPER)
    assert letters(run.decode(texts, to="en", method="beam", language_mask=True)) <= set(LOWER)
    byte = {letter: ord(letter) + 3 for letter in UPPER + LOWER}
    counts = run.token_counts[language_id("fr")]
    assert counts[byte["T"]] == 2 * UPPER.count("T")  # inputs and targets
    assert counts[byte["t"]] == 0

    again = mlm.load(copy, devices=one_device, batch_size=8)
    edit(copy / "data.json", task_modules=["nowhere"])  # what is kept needs no task
    np.testing.assert_array_equal(again.token_counts[language_id("fr")], counts)
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:100])
    fresh = mlm.load(copy, devices=one_device, batch_size=8)
    fresh.data["task_modules"] = []
    np.testing.assert_array_equal(fresh.token_counts[language_id("fr")], counts)

    with pytest.raises(ValueError, match=r"has no token of sw; it has en, fr"):
        run.decode("hi", to="sw", language_mask=True)
    flags = ["--run_dir", str(copy), "--to", "fr", "--max_length", "8", "--language_bias", "3"]
    edit(copy / "data.json", task_modules=[])
    assert main(["generate", "Hi", *flags]) == 0
    want = fresh.generate("Hi", to="fr", max_length=8, language_bias=3.0)[0]
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contrast", "x", "--contrast_to", "fr"], "one contrast at a time"),
        (["--contrast_to", "frr"], "did you mean"),
        (["--dola_layers", "1;2"], "must read like 2,4"),
        (["--contrast_to", "sw", "--draft", "x"], "nobody to be contrasted with"),
        (["--contrast_beta", "0.5", "--contrast_alpha", "0.2"], "means nothing without contrast"),
    ],
)
def test_flags_that_make_no_sense(tiny_run, capsys, flags, message):
    assert main(["generate", "Hi", "--run_dir", str(tiny_run), "--to", "fr", *flags]) == 2
    assert message in capsys.readouterr().err


def test_flags_are_the_session_s_options(tiny_run, session, one_device, capsys):
    """An ensemble's scores, and a contrast."""
    flags = ["--run_dir", str(tiny_run), "--to", "fr", "--max_length", "8", "--scores"]
    assert main(["generate", "Hi", *flags, "--ensemble", f"{tiny_run}@10", "--contrast_to", "sw"]) == 0
    both = mlm.load(tiny_run, devices=one_device, ensemble=[f"{tiny_run}@10"])
    (best,) = both.decode("Hi", to="fr", max_length=8, contrast_to="sw")[0]
    assert capsys.readouterr().out == f"{best.score:.4f}\t{best.text}\n"
