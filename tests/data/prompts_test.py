"""Prompts: what stands in them, what is dropped, and which examples are chosen."""

import math
from collections import Counter

import numpy as np
import pytest

from mlm.data.prompts import CHOICES, USUAL_FORM, Example, Format, Nearness, Pool, synthesised
from mlm.registry import UnknownName

PAIRS = [Example(f"source {word}", f"target {word}") for word in ("one", "two", "three", "four", "five")]


def words(text: str) -> int:
    return len(text.split())


def test_examples_stand_before_the_query():
    assert USUAL_FORM.text(PAIRS[:2], "ask") == "source one = target one ; source two = target two ; ask ="
    form = Format("Q: {source} A: {target}.", " | ", "Q: {source} A: <extra_id_0>")
    assert form.text(PAIRS[:1], "ask") == "Q: source one A: target one. | Q: ask A: <extra_id_0>"
    assert form.text([], "ask") == "Q: ask A: <extra_id_0>"


def test_text_that_looks_like_a_place_stays():
    shots = [Example("{target} and {source}", "{source}")]
    assert USUAL_FORM.text(shots, "{target}{source}") == "{target} and {source} = {source} ; {target}{source} ="


@pytest.mark.parametrize("budget", range(2, 30))
def test_whole_examples_are_dropped_the_furthest_first(budget):
    """The query takes 2 words, every example 6 more."""
    text = USUAL_FORM.fit(PAIRS[:3], "ask", budget, words)
    kept = min((budget - 2) // 6, 3)
    assert text == USUAL_FORM.text(PAIRS[3 - kept : 3], "ask")
    assert words(text) <= budget


def test_a_query_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="the query alone takes 2 tokens, more than the 1"):
        USUAL_FORM.fit(PAIRS, "ask", 1, words)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"example": "{source}"}, "behind it {target}"),
        ({"example": "{target} {source}"}, "behind it {target}"),
        ({"example": "{source} {source} {target}"}, "once each"),
        ({"query": "ask"}, "query='ask' must hold {source} once"),
        ({"query": "{source} {target}"}, "no {target}"),
    ],
)
def test_a_format_needs_its_places(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_every_choice_gives_as_many_as_asked_and_never_the_query(choice):
    pool = Pool(PAIRS)
    for query in [*(p.source for p in PAIRS), " source   two ", "something else"]:
        for shots in range(6):
            found = pool.choose(choice, query, shots, seed=3, query_id=7)
            own = any(p.source == " ".join(query.split()) for p in PAIRS)
            assert len(found) == min(shots, 5 - own)
            assert len(set(found)) == len(found)
            assert all(p.source != " ".join(query.split()) for p in found)
            assert found == pool.choose(choice, query, shots, seed=3, query_id=7)


def test_fixed_are_the_first():
    assert Pool(PAIRS).choose("fixed", "x", 3) == PAIRS[:3]


def test_random_depends_on_seed_and_query():
    pool = Pool(PAIRS)
    drawn = [[pool.choose("random", "x", 3, seed=s, query_id=q) for q in range(8)] for s in range(2)]
    assert drawn[0] != drawn[1]
    assert len({tuple(d) for d in drawn[0]}) > 3


def test_the_nearest_stands_last_and_of_equals_the_first_is_nearer():
    pool = Pool([Example(s, str(i)) for i, s in enumerate(["a dog ran", "the cat sat", "zzz", "the cat sat", "a cat"])])
    found = [e.target for e in pool.choose("retrieved", "the cat sits", 5)]
    assert found[-2:] == ["3", "1"]
    assert found[0] == "2"


def test_nearness_is_the_cosine_of_tf_idf():
    """Against the formula written out over all n-grams."""
    texts = ["The cat", "the  dog", "un chat", "猫が好き", "the cat"]
    queries = [*texts, "cats and dogs", "猫", "qq"]

    def grams(text):
        text = f" {' '.join(text.casefold().split())} "
        return Counter(text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n + 1))

    def vector(text, known):
        df = {g: sum(g in grams(t) for t in texts) for g in known}
        return np.array([grams(text)[g] * (1 + math.log((1 + len(texts)) / (1 + df[g]))) for g in known])

    nearness = Nearness(texts)
    for query in queries:
        known = sorted(set().union(*map(grams, [*texts, query])))
        asked = vector(query, known)
        want = [asked @ v / np.linalg.norm(asked) / np.linalg.norm(v) for v in (vector(t, known) for t in texts)]
        np.testing.assert_allclose(nearness(query), want, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(nearness("qq"), 0)
    assert nearness("THE CAT")[0] == pytest.approx(1)


def test_synthesised_examples_take_turns_between_languages():
    texts = {"fr": ["chat", "chien", "vide"], "sw": ["paka"], "uk": ["кіт", "пес"]}
    told = []

    def translate(sentences, code):
        told.append(code)
        return ["" if s == "vide" else f"{code}:{s}" for s in sentences]

    found = synthesised(texts, translate)
    assert told == ["fr", "sw", "uk"]
    assert [e.source for e in found] == ["chat", "paka", "кіт", "chien", "пес"]
    assert found[1] == Example("paka", "sw:paka")
    assert synthesised(texts, translate, backwards=True) == [Example(e.target, e.source) for e in found]
    with pytest.raises(ValueError, match="fr: 1 translations of 3 sentences"):
        synthesised(texts, lambda sentences, code: ["one"])
    with pytest.raises(ValueError, match="no translation of 6 sentences has any text"):
        synthesised(texts, lambda sentences, code: [" "] * len(sentences))


def test_wrong_choices_are_named():
    with pytest.raises(UnknownName, match="did you mean 'retrieved'"):
        Pool(PAIRS).choose("retreived", "x", 1)
    with pytest.raises(ValueError, match="shots=6 must be between 0 and the 5 examples"):
        Pool(PAIRS).choose("fixed", "x", 6)
    with pytest.raises(ValueError, match="no example to choose from"):
        Pool([])
