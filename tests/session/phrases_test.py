"""Phrases as texts: what a session's results must hold, may not hold, or end behind."""

import jax
import numpy as np
import pytest

import mlm
from mlm.data.vocabulary import ByteVocabulary, load_vocabulary
from mlm.session.evaluating import Predictions
from mlm.session.phrases import spellings, tokens_of

TEXTS = ["Good morning", "Where is the station?"]
HOLD = {"method": "constrained_beam", "max_length": 20}


@pytest.fixture(scope="module")
def session(tiny_run):
    return mlm.load(tiny_run, devices=jax.devices()[:1], batch_size=4)


def test_results_hold_their_phrases(session):
    texts = session.generate(TEXTS, to="fr", phrases=[["two", "one  more"], []], **HOLD)
    assert "two" in texts[0]
    assert "one more" in texts[0]  # cleaned as texts are
    assert texts[1:] == session.generate(TEXTS[1:], to="fr", method="beam", max_length=20)


def test_a_stop_sequence_is_cut_off_the_text_and_stays_among_the_tokens(session):
    ((best,), _) = session.decode(TEXTS, "fr", phrases=[["so here"], []], stop=["here", "nowhere"], **HOLD)
    assert best.text.endswith("so ")
    assert bytes(t - 3 for t in best.tokens).endswith(b"so here")
    (ids,) = session.decode(TEXTS[0], "fr", phrases=[["so here"]], stop=(tuple(b + 3 for b in b"here"),), **HOLD)
    assert ids[0].tokens == best.tokens


def test_what_is_to_be_avoided_is_not_written(session):
    plain = session.decode(TEXTS, "fr", max_length=20)
    begins = [best.tokens[:2] for (best,) in plain]
    first, second = session.decode(TEXTS, "fr", max_length=20, avoid=[[begins[0]], []])
    assert first[0].tokens[:2] != begins[0]
    assert first[0].tokens[0] == begins[0][0]  # only what would complete the phrase is forbidden
    assert second[0].tokens == plain[1][0].tokens
    (held,) = session.decode(TEXTS[0], "fr", phrases=[["abc"]], avoid=[["cd", "x"]], **HOLD)
    assert "abc" in held[0].text
    assert not {"cd", "x"} & {held[0].text[i : i + n] for i in range(20) for n in (1, 2)}


def test_a_text_is_spelled_at_the_beginning_of_a_word_and_inside_of_one():
    vocabulary = load_vocabulary("quickstart")

    def behind(text, phrase):
        return tuple(vocabulary.encode(text + phrase)[len(vocabulary.encode(text)) :])

    assert spellings(vocabulary, "stop", ["and"]) == (behind("Hello", " and"), behind("Hello.", "and"))
    assert behind("Hello", ".") in spellings(vocabulary, "stop", ["."])
    assert len(spellings(ByteVocabulary(), "stop", ["and", (7, 8)])) == 2  # bytes are spelled in one way, ids stay
    assert tokens_of(ByteVocabulary(), " a ") == [97 + 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": [["a", " "]], **HOLD}, "the phrase ' ' is empty"),
        ({"phrases": [["a" * 20]], **HOLD}, "source 0: its phrases have 20 tokens, .* its text may have 20"),
        ({"phrases": [["a"], ["b"]], **HOLD}, "2 phrases for 1 sources"),
        ({"phrases": [["a"]]}, "method='constrained_beam' and given=constraints.* belong together"),
        ({**HOLD}, "belong together"),
        ({"phrases": [["abc"]], "bad_words": ["b"], **HOLD}, "which bad_words rules out"),
        ({"stop": "here"}, r"stop='here' must be a list of phrases: stop=\['here'\]"),
        ({"bad_words": [""]}, "the phrase '' is empty"),
    ],
)
def test_impossible_phrases_are_refused(session, options, message):
    with pytest.raises(ValueError, match=message):
        session.decode("Good morning", "fr", **options)


def test_predictions_of_a_task_lose_their_stop_sequence(session):
    source = session.encode("Good morning", "fr")[0].tokens
    plain = session.generator("greedy", {"max_length": 12})(session.params, [source]).tokens[0, 0].tolist()
    generator = session.generator("greedy", {"max_length": 12, "stop": [tuple(plain[2:4])]})
    found = Predictions(session, generator)([np.array(source)], [np.array([], int)], [(0, 0)])
    assert found[0].tolist() == [*plain[:2], *[0] * 10]
