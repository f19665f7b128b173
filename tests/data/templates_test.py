"""What stands around a source and before what is written, for every place of the language tokens."""

import pytest

from mlm.data.templates import EOS, FROM, PLACES, TEXT, TO, TOKENIZERS, USUAL, Frame, Template
from mlm.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(sentinels=0, languages=["en", "fr"], extra_tokens=["<bos>"])
BOS, EN, FR = (VOCABULARY.special(name) for name in ("<bos>", "<2en>", "<2fr>"))


@pytest.mark.parametrize(
    ("template", "to", "from_", "frame"),
    [
        (PLACES["source"], "fr", None, Frame([FR], [1], [], None)),
        (PLACES["target"], "fr", None, Frame([], [1], [FR], None)),
        (PLACES["both"], "fr", "eng_Latn", Frame([EN], [1], [FR], None)),
        (PLACES["both"], None, "en", Frame([EN], [1], [], None)),
        (PLACES["both"], None, None, Frame([], [1], [], None)),
        (TOKENIZERS["MBartTokenizer"], "fr", "en", Frame([], [1, EN], [], FR)),
        (TOKENIZERS["MBartTokenizer"], None, None, Frame([], [1], [], None)),
        (USUAL["t5gemma"], None, None, Frame([BOS], [], [], None)),
    ],
)
def test_the_tokens_of_a_pair_of_languages(template, to, from_, frame):
    assert template.frame(VOCABULARY, to, from_) == frame
    assert Template.from_json(template.to_json()) == template


@pytest.mark.parametrize(
    ("template", "to", "from_", "error", "message"),
    [
        (PLACES["both"], "fr", None, ValueError, r"--from en in a command. It has tokens of 2: en, fr$"),
        (
            PLACES["source"],
            "fr",
            "en",
            ValueError,
            r"from_='en': this model has no place .*reads .*reads {to} {text} {eos}",
        ),
        (
            USUAL["t5gemma"],
            "fr",
            None,
            ValueError,
            r"to='fr': this model has no place .*language_token: source, target, b",
        ),
        (PLACES["both"], "fr", "de", KeyError, r"no token <2de> \(German\).*known: en \(English\), fr \(French\)"),
        (PLACES["both"], "frensh", "en", KeyError, r"no language has the code 'frensh'; did you mean 'fr' \(French\)"),
        (USUAL["xlm-roberta"], None, None, KeyError, r"no special token '<s>'; did you mean '<bos>'"),
    ],
)
def test_what_a_model_is_not_told_or_misses_is_refused(template, to, from_, error, message):
    with pytest.raises(error, match=message):
        template.frame(VOCABULARY, to, from_)


@pytest.mark.parametrize("parts", [((EOS,),), ((TEXT, TEXT),), ((TEXT,), (TEXT,)), ((FROM, TEXT), (TO,), TEXT)])
def test_the_text_stands_once_and_in_the_source(parts):
    with pytest.raises(ValueError, match="must stand once in the source"):
        Template(*parts)
