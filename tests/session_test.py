"""`mlm.load`: a run directory is all it needs; what it does equals the rooms below it."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

import mlm
from mlm.checkpoints import CheckpointError
from mlm.session import Session

TEXTS = ["Good morning", "Where is the station?", "Дякую"]


@pytest.fixture(scope="module")
def one_device():
    return jax.devices()[:1]


@pytest.fixture(scope="module")
def session(tiny_run, one_device) -> Session:
    return mlm.load(tiny_run, devices=one_device, batch_size=4)


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_the_latest_checkpoint_and_its_running_mean_are_the_default(tiny_run, session, one_device):
    assert (session.step, session.parameters) == (20, "ema")
    first = mlm.load(tiny_run, 10, devices=one_device)
    plain = mlm.load(tiny_run, 20, devices=one_device, parameters="params")
    assert (first.step, first.parameters) == (10, "params")
    np.testing.assert_array_equal(first.params["embedding"], plain.params["embedding"])
    np.testing.assert_allclose(session.params["embedding"], plain.params["embedding"] + 0.01, rtol=1e-6)
    assert first.extra["tokens_seen"] == {"1": 10}


def test_best_is_by_the_metric(tiny_run, one_device):
    assert mlm.load(tiny_run, "best", devices=one_device).step == 10
    assert mlm.load(tiny_run, "best", devices=one_device, best_mode="max").step == 20
    with pytest.raises(CheckpointError, match="did you mean 'validation/loss'"):
        mlm.load(tiny_run, "best", devices=one_device, best_metric="validation/los")


def test_guesses_change_nothing(tiny_run, session, one_device):
    """The run drafts for itself, at another checkpoint and so not always rightly."""
    drafted = mlm.load(tiny_run, 10, devices=one_device, batch_size=4, draft=tiny_run)
    plain = drafted.decode(TEXTS, to="fr")
    for proposer in ("draft_model", "input_copy", "mask_block"):
        own = {"mask_token": 5} if proposer == "mask_block" else {}
        found = drafted.decode(TEXTS, to="fr", proposer=proposer, guesses=3, **own)
        assert [best.tokens for (best,) in found] == [best.tokens for (best,) in plain]
    with pytest.raises(ValueError, match="name its run, by draft="):
        session.generate("a", proposer="draft_model")


def test_lexical_units_at_threshold_1_are_greedy_search(session):
    plain = session.decode(TEXTS, to="fr")
    found = session.decode(TEXTS, to="fr", method="lexical_units", mask_token=5, threshold=1.0, guesses=2)
    assert [best.tokens for (best,) in found] == [best.tokens for (best,) in plain]


def test_a_decoder_alone_goes_on(tiny_run, tmp_path, one_device):
    """Behind its start token it reads the text; the answer is what follows, and a limit counts both."""
    from mlm.checkpoints import Checkpointer
    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.models.config import to_json
    from mlm.models.families import llama_style
    from mlm.models.specs import PositionSpec
    from mlm.models.transformer import Transformer

    given, run = RunDirectory(tiny_run), RunDirectory(tmp_path / "alone").create()
    shutil.copy(given / "vocabulary.json", run / "vocabulary.json")
    run.write_json("data.json", given.read_json("data.json"))
    config = llama_style(
        vocab_size=given.read_json("model.json")["vocab_size"],
        d_model=16,
        d_ff=16,
        heads=2,
        kv_heads=1,
        layers=1,
        rope=PositionSpec(kind="rope"),
    )
    run.write_json("model.json", to_json(config))
    with Checkpointer(str(run.checkpoints)) as checkpointer:
        checkpointer.save(1, {"params": Transformer(config).init(jax.random.key(0))})
    session = mlm.load(run.path, devices=one_device)
    (best,) = session.decode("The cat", max_length=12)[0]
    assert best.tokens[:7] == [b + 3 for b in b"The cat"]
    assert len(best.tokens) <= 12
    assert best.text == session.vocabulary.decode(best.tokens[7:])
    (prompt,) = session.few_shot("cat", [("dog", "chien")], 1)
    assert prompt == "dog = chien ; cat ="
    (best,) = session.decode(prompt, max_length=22)[0]
    assert best.tokens[:19] == [b + 3 for b in prompt.encode()]
    assert session.encode("The cat", to="fr")[0].tokens[0] == session.vocabulary.language_token("fr")
    with pytest.raises(ValueError, match="no room under the limit of 7 tokens"):
        session.generate("The cat", max_length=7)
    assert session.score_tokens([best.tokens[:19]], [best.tokens[19:]]) == pytest.approx([best.score], abs=1e-4)
    assert session.score([("The cat", " sat")])[0] < 0


def test_layers_can_be_kept_as_integers(tiny_run, session, one_device):
    small = mlm.load(tiny_run, devices=one_device, batch_size=4, quantise="int8")
    assert "layers as int8" in repr(small)
    assert small.about("t", "s")["quantise"] == "int8"
    assert small.params["encoder"]["layers"]["0"]["ffn"]["up"].values.dtype == "int8"
    pairs = [("Hello", "Bonjour")]
    np.testing.assert_allclose(small.score(pairs, to="fr"), session.score(pairs, to="fr"), rtol=0.02)
    assert jax.tree.structure(small.untrained()) == jax.tree.structure(small.params)
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        mlm.load(tiny_run, quantise="int88")


def test_it_says_what_it_is(session):
    text = repr(session)
    for part in (
        "step 20",
        "running mean",
        "'tiny.all'",
        "48 tokens in",
        "4 language tokens",
        '.generate(texts, to="fr")',
    ):
        assert part in text
    assert session.languages == ["en", "fr", "sw", "uk"]


def test_generate_equals_the_decoding_room(session):
    """The source is the language token, the bytes of the text, the end of sequence."""
    from mlm.decoding.config import DecodeConfig
    from mlm.decoding.generate import Generator

    token = session.vocabulary.language_token("fr")
    sources = [[token, *(b + 3 for b in text.encode()), 1] for text in TEXTS]
    found = Generator(session.model, DecodeConfig(max_length=24))(session.params, sources)
    want = [session.vocabulary.decode(t[0].tolist()) for t in found.tokens]
    assert session.generate(TEXTS, to="fr") == want
    assert session.generate(TEXTS[0], to="fr") == want[:1]
    assert session.decode(TEXTS, "fr")[0][0].score == pytest.approx(found.scores[0, 0])


def test_other_languages_and_methods_give_other_texts(session):
    assert session.generate(TEXTS, to="fr") != session.generate(TEXTS, to="sw")
    beams = session.generate(TEXTS, to="fr", method="beam", beams=3, n_best=2)
    assert [len(b) for b in beams] == [2, 2, 2]
    draws = [session.generate(TEXTS, to="fr", method="sample", seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_texts_are_cleaned_as_the_tasks_do_it(session):
    """NFC, and single spaces."""
    assert session.encode("cafe\u0301  au\tlait ", "fr") == session.encode("café au lait", "fr")


def test_special_tokens_are_text_when_a_language_is_given(session):
    sentinel = session.vocabulary.sentinel_ids[0]
    assert sentinel in session.encode("The <extra_id_0> sat")[0].tokens
    assert sentinel not in session.encode("The <extra_id_0> sat", "fr")[0].tokens


def test_score_is_the_sum_of_log_probabilities(session):
    """Against logits of one plain forward pass."""
    source, target = "Hi", "Hallo"
    (got,) = session.score([(source, target)], to="fr")
    tokens = np.array([[*(b + 3 for b in target.encode()), 1]])
    read = np.array([session.encode(source, "fr")[0].tokens])
    batch = {
        "encoder_input_tokens": read,
        "encoder_segment_ids": np.ones_like(read),
        "decoder_input_tokens": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
        "decoder_segment_ids": np.ones_like(tokens),
    }
    batch = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.int32), batch)
    logits = session.model.logits(session.params, session.model(session.params, batch).hidden)
    log_probs = np.asarray(jax.nn.log_softmax(logits)[0])
    want = log_probs[np.arange(tokens.size), tokens[0]].sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_forced_language_token_stands_first_and_costs_nothing(session):
    (best,) = session.decode("Hi", "uk", language_token="target")[0]
    token = session.vocabulary.language_token("uk")
    assert best.tokens[0] == token
    assert "<2uk>" not in best.text
    assert session.encode("Hi", "uk", language_token="target") == session.encode("Hi", "sw", language_token="target")
    (got,) = session.score([("Hi", "Hallo")], to="uk", language_token="target")
    (plain,) = session.score([("Hi", "Hallo")])
    assert got != plain


def test_a_run_keeps_how_its_sources_are_written(copy, session, one_device):
    """mBART's 25 languages: the source ends with its own, and the decoder begins with the target's."""
    from dataclasses import replace

    from mlm.models.transformer import Transformer

    data = json.loads((copy / "data.json").read_text())
    template = {"source": ["{text}", "{eos}", "{from}"], "target": [], "start": "{to}"}
    (copy / "data.json").write_text(json.dumps({**data, "template": template}))
    told = mlm.load(copy, devices=one_device, batch_size=4)
    en, fr = (told.vocabulary.language_token(code) for code in ("en", "fr"))
    (source,) = told.encode("Hi", "fr", from_="en")
    assert source.tokens == [*(b + 3 for b in b"Hi"), 1, en]
    assert told.encode("Hi")[0].tokens == source.tokens[:-1]
    begun = Transformer(replace(told.config, start_token=fr))
    tokens = told.decode("Hi", "fr", from_="en", max_length=5)[0][0].tokens
    target = np.array([[*(b + 3 for b in b"Salut"), 1]], np.int32)
    batch = {"encoder_input_tokens": np.array([source.tokens]), "encoder_segment_ids": np.ones((1, 4), np.int32)}

    def log_probs(target):
        given = {"decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1], "decoder_segment_ids": target**0}
        hidden = begun(told.params, jax.tree.map(jax.numpy.asarray, batch | given)).hidden
        return np.asarray(jax.nn.log_softmax(begun.logits(told.params, hidden)))[0]

    assert log_probs(np.array([tokens], np.int32)).argmax(-1).tolist() == tokens
    want = log_probs(target)[np.arange(6), target[0]].sum()
    np.testing.assert_allclose(told.score([("Hi", "Salut")], "fr", from_="en"), want, rtol=1e-5)
    assert told.score([("Hi", "Salut")]) != pytest.approx(want, rel=1e-3)
    assert '.generate(texts, to="fr", from_="en")' in repr(told)
    # Another place is a matter of the call.
    assert told.encode("Hi", "fr", language_token="source") == session.encode("Hi", "fr")
    assert told.encode("Hi", "fr", from_="en", language_token="both")[0].tokens == [en, *source.tokens[:-1]]


def test_eight_devices_say_what_one_says(tiny_run, session):
    many = mlm.load(tiny_run, batch_size=8)
    assert many.params["embedding"].sharding.num_devices == 8
    assert many.generate(TEXTS, to="fr") == session.generate(TEXTS, to="fr")
    np.testing.assert_allclose(many.score([("Hi", "Hallo")]), session.score([("Hi", "Hallo")]), rtol=1e-5)


def test_long_texts_lose_their_end_with_a_warning(session):
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 48 tokens"):
        encoded = session.encode(["short", "x" * 100], "fr")
    assert [s.trimmed for s in encoded] == [False, True]
    assert len(encoded[1].tokens) == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.encode(["short"], "fr")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.generate(["fine", " \t"], to="fr"), ValueError, "text 1 is empty"),
        (lambda s: s.score([("fine", "")], to="fr"), ValueError, "target 0 is empty"),
        (lambda s: s.generate(["hi"], to="de"), KeyError, "has no token <2de> .German."),
        (lambda s: s.generate(["hi"], to="xyzzy"), KeyError, "no language has the code"),
        (lambda s: s.generate(["hi"], method="gredy"), KeyError, "did you mean 'greedy'"),
        (lambda s: s.generate(["hi"], beems=3), ValueError, "no decoding option 'beems'; did you mean 'beams'"),
        (lambda s: s.generate(["hi"], beams=3), ValueError, "means nothing to method='greedy'"),
        (
            lambda s: s.generate(["hi"], to="fr", language_token="front"),
            KeyError,
            "no place of the language token named 'front'",
        ),
        (
            lambda s: s.generate(["hi"], to="fr", from_="en"),
            ValueError,
            "no place for the token of the language that it r",
        ),
        (
            lambda s: s.generate("hi", to="fr", language_token="both"),
            ValueError,
            "--from en.*tokens of 4: en, fr, sw, uk",
        ),
        (lambda s: s.encode("hi", "fr", from_="swe", language_token="both"), KeyError, "no token <2sv> .Swedish."),
        (lambda s: s.evaluate("tiny.nothing"), KeyError, "no task or mixture named 'tiny.nothing'"),
    ],
)
def test_errors_name_what_is_wrong(session, call, error, message):
    with pytest.raises(error, match=message):
        call(session)


def test_another_vocabulary_is_refused_with_both_hashes(copy):
    from mlm.data.vocabulary import ByteVocabulary

    before = json.loads((copy / "data.json").read_text())["vocabulary_digest"]
    other = ByteVocabulary(sentinels=100, languages=["en", "fr", "sw", "pl"])
    other.save(copy / "vocabulary.json")
    with pytest.raises(ValueError, match=f"(?s){before}.*{other.digest}"):
        mlm.load(copy)


def test_a_folder_without_a_run_or_checkpoint_is_named(copy, tmp_path):
    with pytest.raises(CheckpointError, match="not the directory of a run"):
        mlm.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint (of step )?11 .*complete checkpoints: 10, 20"):
        mlm.load(copy, 11)
    with pytest.raises(ValueError, match="must be a checkpoint's number"):
        mlm.load(copy, "newest")
    with pytest.raises(ValueError, match="did you mean 'ema'"):
        mlm.load(copy, parameters="em")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        mlm.load(copy)


def test_a_damaged_newest_checkpoint_is_passed_over(copy, one_device, caplog):
    for path in sorted((copy / "checkpoints" / "20").rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    session = mlm.load(copy, devices=one_device)
    assert (session.step, session.parameters) == (10, "params")
    assert "is damaged" in caplog.text
    assert (copy / "checkpoints" / "20").exists()  # reading never moves anything


def test_untrained_parameters_are_fresh(session):
    fresh = session.untrained(seed=3)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, session.params)
    assert not np.array_equal(fresh["embedding"], session.params["embedding"])
