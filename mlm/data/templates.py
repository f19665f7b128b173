"""How a model is told what it reads and what it writes: the tokens around a source, and those before what is written.

    Template(("{from}", "{text}", "{eos}"), ("{to}",))     # NLLB: <2en> the text </s>, written behind <2fr>

A run that was converted keeps the template of its family in `data.json`, and so does one that begins with its
parameters: all that these read and write, tasks included, is written so. Any other has its language token where its
translation tasks put it, and PLACES names those that there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mlm.registry import Registry
from mlm.types import EOS_ID

TEXT, EOS, FROM, TO = "{text}", "{eos}", "{from}", "{to}"


@runtime_checkable
class Tokens(Protocol):
    """What of a vocabulary finds special tokens (`SpecialTokens`)."""

    @property
    def language_tokens(self) -> Mapping[str, int]: ...
    def language_token(self, code: str) -> int: ...
    def special(self, name: str) -> int: ...


class Frame(NamedTuple):
    """Ids (in a graph: scalars of it) around the text of a source, and those that everything written begins with.
    start: what the decoder reads first, where that is not the model's own start token.
    """

    before: list[Any]
    after: list[Any]
    prompt: list[Any]
    start: Any


PLAIN = Frame([], [EOS_ID], [], None)


@dataclass(frozen=True)
class Template:
    """source: TEXT among special tokens by name, EOS, and FROM or TO, the tokens of both languages. target: the same
    without TEXT, forced first. start: what the decoder reads first (mBART's 25 languages: TO), where not the model's
    own.

    Raises ValueError where the text does not stand once in the source alone.
    """

    source: tuple[str, ...] = (TEXT, EOS)
    target: tuple[str, ...] = ()
    start: str | None = None

    def __post_init__(self):
        if self.source.count(TEXT) != 1 or TEXT in (*self.target, self.start):
            raise ValueError(f"{TEXT} must stand once in the source of a template, and nowhere else: {self}")

    @classmethod
    def of_run(cls, data: Mapping[str, Any]) -> "Template | None":
        """What the `data.json` of a run keeps; None for one that writes its sources as its tasks say."""
        return cls.from_json(data["template"]) if "template" in data else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Template":
        return cls(tuple(data["source"]), tuple(data["target"]), data["start"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def asks_for(self) -> tuple[str, ...]:
        """FROM, TO: those that stand in it."""
        return tuple(name for name in (FROM, TO) if name in (*self.source, *self.target, self.start))

    def frame(self, vocabulary: Tokens, to: str | None, from_: str | None) -> Frame:
        """The tokens for a pair of languages. Places of a language that is not named stay empty, where none to write
        is named: such a text says itself what is to be done.

        Raises ValueError for a language that the model is not told, or is told and misses, KeyError for one without a
        token.
        """
        for place, code, name in ((TO, to, "to"), (FROM, from_, "from_")):
            if code is not None and place not in self.asks_for:
                raise ValueError(
                    f"{name}={code!r}: this model has no place for the token of the language that it "
                    f"{'writes' if place == TO else 'reads'} ({self}); leave {name} out, or choose another place by "
                    f"language_token: {', '.join(PLACES)}"
                )
        if to is not None and from_ is None and FROM in self.asks_for:
            known = sorted(vocabulary.language_tokens)
            raise ValueError(
                "this model is told which language it reads: name it, by from_='en' in a session, --from en in a "
                f"command. It has tokens of {len(known)}: {', '.join(known[:40])}{', …' * (len(known) > 40)}"
            )
        codes = {TO: to, FROM: from_}
        return self.ids(vocabulary, {p: vocabulary.language_token(c) for p, c in codes.items() if c is not None})

    def ids(self, vocabulary: Tokens, languages: Mapping[str, Any]) -> Frame:
        """The tokens, by those of the languages, TO and FROM; the place of one that is not there stays empty.

        Raises KeyError for a special token that the vocabulary lacks.
        """

        def ids(names: Sequence[str]) -> list[Any]:
            known = [name for name in names if name in languages or name not in (FROM, TO)]
            return [languages[n] if n in languages else EOS_ID if n == EOS else vocabulary.special(n) for n in known]

        place = self.source.index(TEXT)
        start = ids([self.start] if self.start else [])
        return Frame(
            ids(self.source[:place]), ids(self.source[place + 1 :]), ids(self.target), start[0] if start else None
        )

    def __str__(self) -> str:
        behind = [*([self.start] if self.start else []), *self.target]
        return f"reads {' '.join(self.source)}" + (f", writes behind {' '.join(behind)}" if behind else "")


# By where the language token stands, as `preprocessors.TOKENS` has it.
PLACES: Registry[Template] = Registry(
    "place of the language token",
    source=Template((TO, TEXT, EOS)),
    target=Template((TEXT, EOS), (TO,)),
    both=Template((FROM, TEXT, EOS), (TO,)),
)
# By class of a published tokenizer, where that says more than its files: they hold the language of some example.
TOKENIZERS: dict[str, Template] = {
    **dict.fromkeys(("M2M100Tokenizer", "NllbTokenizer", "MBart50Tokenizer"), PLACES["both"]),
    "MBartTokenizer": Template((TEXT, EOS, FROM), start=TO),
}
# By `model_type`, for folders that do not say.
USUAL: dict[str, Template] = {
    **dict.fromkeys(("m2m_100", "nllb-moe"), PLACES["both"]),
    "mbart": TOKENIZERS["MBartTokenizer"],
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), Template(("<s>", TEXT, EOS))),
    **dict.fromkeys(("t5gemma", "t5gemma2", "gemma3_text"), Template(("<bos>", TEXT))),
}
