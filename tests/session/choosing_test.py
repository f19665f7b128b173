"""Choosing among the results of a run: what a session keeps equals the rules on numbers that it gives by other ways."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mlm
from mlm.evaluation.choosing import energy
from mlm.evaluation.choosing.bayes_risk import expected_utilities, some
from mlm.evaluation.choosing.utilities import aggregated_chrf, chrf_table
from mlm.session.choosers import Energy, MinimumBayesRisk, NoisyChannel, Relevance, SelfConsistency
from mlm.session.choosing import POSTPROCESSORS, read_chooser, settings
from mlm.session.fitting import fit_energy, tune_noisy_channel

TEXTS = ["Good morning", "Where is the station?", "Дякую"]
SAMPLES = {"method": "sample", "n_best": 6, "max_length": 10}
SHORT = SAMPLES | {"max_length": 3}  # results that the model can read, whatever special tokens a random one writes


@pytest.fixture(scope="module")
def session(tiny_run) -> mlm.session.Session:
    return mlm.load(tiny_run, devices=jax.devices()[:1], batch_size=8)


@pytest.fixture(scope="module")
def plain(session):
    """The results that every chooser gets."""
    return session.decode(TEXTS, "fr", **SAMPLES)


def by_value(found):
    """Of every source the results as they were given, with their values."""
    return [sorted(results, key=lambda r: -r.score) for results in found]


def values(found) -> np.ndarray:
    return np.array([[r.value for r in results] for results in by_value(found)])


def check_order(found, plain):
    """The same results, by value."""
    for results, given in zip(found, plain, strict=True):
        assert [r.value for r in results] == sorted((r.value for r in results), reverse=True)
        assert sorted(r.text for r in results) == sorted(r.text for r in given)


def test_minimum_bayes_risk_keeps_the_consensus(session, plain):
    found = session.decode(TEXTS, "fr", **SAMPLES, choose="mbr")
    check_order(found, plain)
    texts = [[r.text for r in results] for results in plain]
    np.testing.assert_allclose(values(found), [expected_utilities(t, t, chrf_table) for t in texts])
    assert session.generate(TEXTS, "fr", **SAMPLES, choose="mbr") == [results[0].text for results in found]
    fast = session.decode(TEXTS, "fr", **SAMPLES, choose=MinimumBayesRisk(aggregate=True))
    np.testing.assert_allclose(values(fast), [aggregated_chrf(t, t) for t in texts])


def test_sampled_references_depend_on_the_number_of_the_text(session, plain):
    found = session.decode(TEXTS[1:], "fr", **SAMPLES, ids=[1, 2], choose="mbr,references=2,seed=3")
    for number, results, own in zip((1, 2), plain[1:], values(found), strict=True):
        texts = [r.text for r in results]
        references = [texts[i] for i in some(6, 2, seed=3, example=number)]
        np.testing.assert_allclose(own, expected_utilities(texts, references, chrf_table))


def test_without_results_that_are_chosen_nothing_changes(plain):
    assert all(r.value is None for results in plain for r in results)


def test_self_consistency_counts_answers(session, plain):
    found = session.decode(TEXTS, "fr", **SAMPLES, choose=SelfConsistency(answer="[a-zA-Z]"))
    answers = [
        [([c for c in r.text if c.isascii() and c.isalpha()] or [None])[-1] for r in results] for results in plain
    ]
    want = [[a.count(x) / 6 if x else 0.0 for x in a] for a in answers]
    assert any(share > 0 for shares in want for share in shares)
    np.testing.assert_allclose(values(found), want)


def test_the_noisy_channel_swaps_the_languages(session):
    plain = session.decode(TEXTS, "fr", **SHORT)
    found = session.decode(TEXTS, "fr", **SHORT, choose="noisy_channel,channel=0.5,language_model=0.25,back=en")
    check_order(found, plain)
    pairs = [(text, r) for text, results in zip(TEXTS, plain, strict=True) for r in results]
    back = session.score([(r.text, text) for text, r in pairs], "en", empty=True)
    model = session.score([("", r.text) for _, r in pairs], "fr", empty=True)
    lengths = np.array([len(r.tokens) for _, r in pairs])
    want = (np.array([r.score for _, r in pairs]) + 0.25 * model) / lengths
    want += 0.5 * back / np.array([len(text.encode()) + 1 for text, _ in pairs])
    np.testing.assert_allclose(values(found).ravel(), want, rtol=1e-4)


def test_without_weights_the_channel_keeps_the_models_own_order(session):
    beams = {"method": "beam", "beams": 4, "n_best": 4, "alpha": 0.0, "max_length": 10}
    plain = session.decode(TEXTS, "fr", **beams)
    found = session.decode(TEXTS, "fr", **beams, choose=NoisyChannel(channel=0.0, language_model=0.0))
    for results, given in zip(found, plain, strict=True):
        own = [r.score / len(r.tokens) for r in given]
        assert [r.tokens for r in results] == [given[i].tokens for i in np.argsort(own)[::-1]]
        np.testing.assert_allclose([r.value for r in results], sorted(own, reverse=True), rtol=1e-4)


def test_another_run_can_be_the_channel_and_the_language_model(session, tiny_run):
    """The same run as its own companion, without being told languages that it is not asked for."""
    own = session.decode(TEXTS, "fr", **SHORT, choose=NoisyChannel(back="en"))
    runs = NoisyChannel(back="en", channel_run=str(tiny_run), language_model_run=str(tiny_run))
    other = session.decode(TEXTS, "fr", **SHORT, choose=runs)
    np.testing.assert_allclose(values(own), values(other), rtol=1e-4)
    assert settings(runs, session)["channel_run_step"] == 20
    assert session.companion(str(tiny_run)) is session.companion(str(tiny_run))


def test_relevance_is_the_product_of_tagged_vectors(session, plain):
    found = session.decode(TEXTS, "fr", **SAMPLES, choose="rankgen,prefix_tag=pre ,suffix_tag=suffi ")
    check_order(found, plain)
    prefixes = session.embed(["pre " + text for text in TEXTS])
    for prefix, results, own in zip(prefixes, plain, values(found), strict=True):
        np.testing.assert_allclose(own, session.embed(["suffi " + r.text for r in results]) @ prefix, rtol=1e-4)


def test_energy_weighs_statistics_and_corrects_the_temperature(session):
    hot = {**SAMPLES, "temperature": 1.5}
    mu = {"sr2": 3.0, "coh": -2.0, "eent": 1e-6}
    plain = session.decode(TEXTS, "fr", **hot)
    found = session.decode(TEXTS, "fr", **hot, choose=Energy(mu=mu))
    again = session.decode(TEXTS, "fr", **hot, choose=Energy(mu=mu))
    assert found == again
    alone = session.decode(TEXTS[1:], "fr", **hot, ids=[1, 2], choose=Energy(mu=mu))
    assert [[r.tokens for r in results] for results in alone] == [[r.tokens for r in results] for results in found[1:]]
    every = [r for results in plain for r in results]
    written = [r.tokens[:-1] if r.tokens[-1] == 1 else r.tokens for r in every]
    likeness = energy.coherence(np.repeat(session.embed(TEXTS), 6, axis=0), session.embed([r.text for r in every]))
    spoken = session.score([("", r.text) for r in every], "fr", empty=True)
    entropy = np.exp(-spoken / np.array([len(r.text.encode()) + 1 for r in every]))
    features = np.stack([[energy.repetition(t, 2) for t in written], likeness, entropy], axis=1)
    sources = [source.tokens for source in session.encode(TEXTS, "fr") for _ in range(6)]
    drawn = session.log_probs(session.frame("fr"), sources, [r.tokens for r in every], temperature=1.5)
    base = np.array([r.score for r in every]) - drawn
    assert np.ptp(base) > 1
    for own, its, above in zip(values(found), np.split(features, 3), np.split(base, 3), strict=True):
        np.testing.assert_allclose(np.exp(own).sum(), 1.0)
        np.testing.assert_allclose(own, energy.log_weights(its, np.array(list(mu.values())), above), atol=1e-3)


def test_energy_is_fitted_to_human_texts_and_read_from_a_file(session, tmp_path):
    """Under the weights the samples it was fitted on have the statistics of the humans'."""
    pairs = [("one", "abcdea"), ("two", "ein"), ("three", "noch")]
    options = {"to": "fr", "max_length": 12, "seed": 5}
    fitted = fit_energy(session, pairs, ("tr8",), n_best=12, **options)
    fitted.write(tmp_path / "mu.json")
    chooser = read_chooser(f"energy,mu={tmp_path / 'mu.json'}")
    assert chooser == fitted
    found = session.decode([t for t, _ in pairs], method="sample", n_best=12, **options, choose=chooser)

    def repeated(tokens):
        return energy.recent_repetition([t for t in tokens if t != 1], 8)

    wanted = np.mean([repeated(session.tokens(text, "fr")) for _, text in pairs])
    weighted = [sum(np.exp(r.value) * repeated(r.tokens) for r in results) for results in found]
    before = np.mean([[repeated(r.tokens) for r in results] for results in found])
    np.testing.assert_allclose(np.mean(weighted), wanted, atol=1e-6)
    assert abs(before - wanted) > 1e-3
    assert settings(chooser, session)["mu"] == json.loads((tmp_path / "mu.json").read_text())


def test_channel_weights_are_tuned_on_pairs(session):
    pairs = [(text, "a b c") for text in TEXTS]
    tuned, reached = tune_noisy_channel(
        session, pairs, NoisyChannel(back="en", language_model=0.0), to="fr", trials=30, **SHORT
    )
    assert tuned.language_model == 0.0
    picked = session.generate(TEXTS, "fr", **SHORT, choose=dataclasses.replace(tuned))
    from mlm.evaluation.metrics import METRICS

    assert METRICS["chrf"]([r for _, r in pairs], picked)["chrf"] == pytest.approx(reached)


def test_the_syntax_of_a_command_holds_every_option():
    assert read_chooser("mbr,utility=bleu,references=8,seed=2") == MinimumBayesRisk(
        utility="bleu", references=8, seed=2
    )
    assert read_chooser("mbr,aggregate=true").aggregate is True
    assert read_chooser(r"self_consistency,answer=\d{1,3}") == SelfConsistency(answer=r"\d{1,3}")
    assert read_chooser("noisy_channel,channel=0.5,length=1e-2,back=en").weights == (0.5, 1.0, 0.01)
    assert read_chooser("rankgen") == Relevance()
    assert set(POSTPROCESSORS) == {"mbr", "noisy_channel", "rankgen", "energy", "self_consistency"}


@pytest.mark.parametrize(
    ("choose", "change", "message"),
    [
        ("mbrr", {}, "no way to choose named 'mbrr'; did you mean 'mbr'"),
        ("mbr,utilty=bleu", {}, "mbr has no option 'utilty'; did you mean 'utility'"),
        ("mbr,references=many", {}, "references=many must be a whole number"),
        ("mbr,aggregate=1", {}, "must be true or false"),
        ("mbr,utility=chrff", {}, "no metric named 'chrff'"),
        ("mbr,utility=bleu,aggregate=true", {}, "aggregate=True is for utility='chrf'"),
        ("mbr,seed=3", {}, "give a number, or no seed"),
        ("mbr", {"n_best": 1}, "nothing to choose from one result"),
        ("self_consistency", {}, "say what an answer looks like"),
        ("self_consistency,answer=(", {}, "is no regular expression"),
        ("noisy_channel", {}, "translates back: name both languages"),
        ("noisy_channel,channel=0,back=en", {}, "back='en' means nothing to channel=0"),
        ("noisy_channel,back=de", {}, "no token <2de>"),
        ("noisy_channel,back=en,channel=inf", {}, "weights must be finite"),
        ("rankgen,embedder=/nowhere", {}, "is not the directory of a run"),
        ("energy", {}, "say what the energy weighs"),
        ("energy,mu=/nowhere.json", {}, "cannot be read as JSON"),
        (lambda: Energy(mu={}), {}, "must give each statistic of a text a finite number"),
        (lambda: Energy(mu={"srx": 1.0}), {}, "no statistic of texts named 'srx'"),
        (lambda: Energy(mu={"sr2": 1.0}, evaluator="r"), {}, "evaluator='r' is for 'eent'"),
        (lambda: Energy(mu={"sr2": 1.0}), {"top_k": 4}, "leave out top_k=4"),
        (lambda: Energy(mu={"sr2": 1.0}), {"method": "beam", "beams": 6}, "leave out method='beam'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_decoded(session, choose, change, message, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(type(session), "answer", never)
    with pytest.raises((ValueError, KeyError, mlm.checkpoints.CheckpointError), match=message):
        session.decode(TEXTS, "fr", **SAMPLES | change, choose=choose if isinstance(choose, str) else choose())
