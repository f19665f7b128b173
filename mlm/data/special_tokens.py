"""What every vocabulary knows about its special tokens: sentinels, language tokens, <mask> and the like."""

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from mlm.data.languages import language, nearest_languages
from mlm.data.tensorflow import tf
from mlm.registry import nearest

# Reserved in every trained vocabulary, since none can grow without breaking its checkpoints: the mask of BART and MLM,
# the modes of UL2, the tokens of GLM, the roles of retrieval.
EXTRA_TOKENS = (
    *("<mask>", "[R]", "[S]", "[X]"),
    *("[gMASK]", "<sop>", "<eop>"),
    *("<query>", "</query>", "<doc>", "</doc>", "<sep>"),
)
# Latin, CJK, Devanagari, Arabic, Ethiopic, Burmese, Khmer, Tibetan, Armenian.
SENTENCE_ENDS = ".!?…。！？।॥؟۔።፧။៕།։"
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_LANGUAGE = re.compile(r"<2([A-Za-z0-9-]+)>")


class SpecialTokens:
    """Mixed into the vocabularies, which provide the first group of members."""

    where: str  # the file, for messages

    if TYPE_CHECKING:  # SeqIO's classes, which come after this one, have these

        @property
        def vocab_size(self) -> int: ...
        def encode(self, text: str) -> Sequence[int]: ...

    @property
    def specials(self) -> Mapping[str, int]:
        """Name -> id of the special tokens, without padding, end of sequence and unknown."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides what an id means: equal digests, equal vocabularies."""
        raise NotImplementedError

    @property
    def texts(self) -> Sequence[str]:
        """Per id: the text of an ordinary piece, ▁ for a space, and "" for the others."""
        raise NotImplementedError

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of <extra_id_0>, <extra_id_1>, …; always first, first - 1, …"""
        found = {int(m[1]): i for name, i in self.specials.items() if (m := _SENTINEL.fullmatch(name))}
        ids = tuple(found[n] for n in sorted(found))
        if sorted(found) != list(range(len(found))) or any(a - b != 1 for a, b in itertools.pairwise(ids)):
            raise ValueError(f"vocabulary {self.where} has sentinels that do not count down one by one: {ids[:5]}…")
        return ids

    @cached_property
    def language_tokens(self) -> dict[str, int]:
        """Language code -> id of its token `<2xx>`."""
        return {m[1]: i for name, i in self.specials.items() if (m := _LANGUAGE.fullmatch(name))}

    def language_token(self, code: str) -> int:
        """Id of the token `<2xx>` of a language, under any code of that language.

        Raises KeyError for an unknown language, and for one that this vocabulary has no token for.
        """
        known = self.language_tokens
        if code in known:
            return known[code]
        try:
            record = language(code)
        except KeyError:
            raise KeyError(
                f"no language has the code {code!r}; {nearest_languages(code, known)} Vocabulary {self.where} has "
                f"tokens of {len(known)} languages"
            ) from None
        if record.code not in known:
            raise KeyError(
                f"vocabulary {self.where} has no token <2{record.code}> ({record.name}) among its {len(known)} "
                f"language tokens; {nearest_languages(record.code, known)} Train one with {record.code!r} among its "
                "languages"
            )
        return known[record.code]

    @cached_property
    def tf_word_starts(self) -> tf.Tensor:
        """Per id, bool: whether the piece begins a word (▁ of SentencePiece, a space among bytes)."""
        with tf.init_scope():  # one tensor for all graphs
            return tf.constant([text.startswith("▁") for text in self.texts])

    @cached_property
    def tf_sentence_ends(self) -> tf.Tensor:
        """Per id, bool: whether the piece's last character is one of SENTENCE_ENDS."""
        with tf.init_scope():
            return tf.constant([text.endswith(tuple(SENTENCE_ENDS)) for text in self.texts])

    def special(self, name: str) -> int:
        """Id of a special token by name, e.g. "<mask>". Raises KeyError with the nearest names."""
        if name not in self.specials:
            raise KeyError(f"vocabulary {self.where} has no special token {name!r}; {nearest(name, self.specials)}")
        return self.specials[name]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are meant as such: "<2fr> The <extra_id_0> sat". No </s> is added.

        Spaces before a special token are dropped; what follows one begins a new word.
        """
        ids: list[int] = []
        for part in filter(None, self._special_pattern.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.encode(part)
        return ids

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        names = sorted(map(re.escape, self.specials), key=len, reverse=True)
        return re.compile(rf"\s*({'|'.join(names)})" if names else r"(?!)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpecialTokens) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r}, {self.vocab_size} ids, sha256 {self.digest[:12]}…)"

    __str__ = __repr__


def special_names(sentinels: int, languages: Sequence[str], extra_tokens: Sequence[str]) -> list[str]:
    """Names in the order of their ids: extra tokens, a token per language, sentinels counting down to <extra_id_0>.

    Raises KeyError for an unknown language, ValueError for a name given twice.
    """
    codes = list(dict.fromkeys(language(code).code for code in languages))
    names = [*extra_tokens, *(f"<2{code}>" for code in codes), *(f"<extra_id_{n}>" for n in reversed(range(sentinels)))]
    if len(set(names)) != len(names):
        raise ValueError(f"special tokens given twice: {sorted({n for n in names if names.count(n) > 1})}")
    return names
