"""A session's prompts are those of the format, in its own tokens; its query likelihoods are its scores."""

import numpy as np
import pytest

import mlm
from mlm.data.prompts import Example, Format, Pool

EXAMPLES = [("un", "one"), ("deux", "two"), ("trois", "three")]


@pytest.fixture(scope="module")
def session(tiny_run):
    return mlm.load(tiny_run, batch_size=8)


def test_prompts_fill_what_the_model_reads(session):
    """48 bytes, less the end of sequence and the language. The query takes 6, the examples 16, 13 and 11 more."""
    whole = "un = one ; deux = two ; trois = three ; neuf ="
    assert len(whole) == session.room(to="fr") == session.room() - 1 == 46
    assert session.few_shot("neuf", EXAMPLES, 3, to="fr") == [whole]
    (source,) = session.encode(whole, to="fr")
    assert not source.trimmed
    assert session.few_shot(["neuf", "vingt"], EXAMPLES, 3, to="fr") == [
        whole,
        "deux = two ; trois = three ; vingt =",
    ]
    assert session.few_shot("neuf", EXAMPLES, 3, budget=34) == ["trois = three ; neuf ="]
    assert session.few_shot("neuf", EXAMPLES, 3, budget=6) == ["neuf ="]


def test_prompts_are_for_generate_and_score(session):
    prompts = session.few_shot(["un", "quatre"], Pool(Example(*e) for e in EXAMPLES), 2, "retrieved", to="fr")
    assert "un = one" not in prompts[0]
    assert len(session.generate(prompts, to="fr", max_length=4)) == 2
    assert session.score([(prompts[0], "one")], to="fr").shape == (1,)


def test_ids_and_seed_decide_what_is_drawn(session):
    def drawn(**options):
        return session.few_shot(["a", "b"], EXAMPLES, 1, "random", form=Format("{source}:{target}"), **options)

    assert (
        drawn(ids=[5, 6])[1]
        == session.few_shot("b", EXAMPLES, 1, "random", form=Format("{source}:{target}"), ids=[6])[0]
    )
    assert len({tuple(drawn(seed=seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.few_shot(["a", " "], EXAMPLES, 1), "text 1 is empty"),
        (lambda s: s.few_shot("x" * 60, EXAMPLES, 1), "the query alone takes 62 tokens, more than the 47"),
        (lambda s: s.few_shot("x", EXAMPLES, 1, budget=99), "budget=99 must be between 1 and 47"),
        (lambda s: s.query_likelihood("q", ["a"], form="none"), "must hold {passage} once"),
        (lambda s: s.query_likelihood("q", ["a", " "], form="P: {passage}"), "passage 1 is empty"),
        (lambda s: s.query_likelihood(" ", ["a"]), "target 0 is empty"),
    ],
)
def test_errors_say_what_is_wrong(session, call, message):
    with pytest.raises(ValueError, match=message):
        call(session)


def test_the_session_makes_its_own_examples(session):
    texts = {"fr": ["chat", "chien"], "sw": ["paka"]}
    found = session.synthesise(texts, "en", max_length=6)
    made = dict(
        zip(["chat", "chien", "paka"], session.generate(["chat", "chien", "paka"], "en", max_length=6), strict=True)
    )
    assert found == [Example(s, made[s]) for s in ("chat", "paka", "chien") if made[s].strip()]
    assert found
    both = session.synthesise({"sw": ["paka"]}, "fr", backwards=True, language_token="both", max_length=6)
    want = session.generate("paka", "fr", from_="sw", language_token="both", max_length=6)
    assert both == [Example(want[0], "paka")]


def test_query_likelihood_ranks_passages_by_their_scores(session):
    passages = ["the cat sat", "a dog", "kitten", "a dog"]
    ranked = session.query_likelihood("cat", passages, form="Passage: {passage}")
    scores = session.score([(f"Passage: {p}", "cat") for p in passages])
    np.testing.assert_array_equal([r.score for r in ranked], sorted(scores, reverse=True))
    assert all(r.passage == passages[r.index] and r.score == scores[r.index] for r in ranked)
    twins = [r.index for r in ranked if r.passage == "a dog"]
    assert twins == [1, 3]
    assert session.query_likelihood("cat", []) == []
    told = session.query_likelihood("cat", passages[:1], to="fr")[0].score
    assert told == pytest.approx(float(session.score([(passages[0], "cat")], to="fr")[0]))
