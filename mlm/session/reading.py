"""What texts are to a run: tokens among those that its template puts around them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlm.data.templates import PLACES, Frame, Template
from mlm.models.config import ModelConfig
from mlm.session.records import Source


class Reader:
    """The part of a session that knows texts, and no parameters.

    Texts are cleaned and encoded as the training tasks do it. A text longer than the run's inputs loses its end, with a
    warning. `to` and `from_` name the language to be written and, where the model is told, the one that is read. Their
    tokens stand where the run says (`own_template`: a converted one keeps its family's way, and evaluates tasks in it),
    or else, or by language_token, where translation tasks put them: `to` in the "source", or forced first in the
    "target", or "both", `from_` first in the source and `to` in the target.
    """

    def __init__(self, config: ModelConfig, data: Mapping[str, Any], vocabulary: Any):
        self.config, self.data, self.vocabulary = config, data, vocabulary
        self.own_template = Template.of_run(data)
        self.template = self.own_template or PLACES["source"]

    @property
    def languages(self) -> list[str]:
        """Codes that `to` and `from_` accept: the languages that have a token."""
        return sorted(self.vocabulary.language_tokens)

    def encode(
        self,
        texts: str | Sequence[str],
        to: str | None = None,
        *,
        from_: str | None = None,
        language_token: str | None = None,
    ) -> list[Source]:
        """What the encoder reads for each text: its tokens, among what the template puts around them."""
        return self._encode([texts] if isinstance(texts, str) else texts, to, self.frame(to, from_, language_token))

    def frame(self, to: str | None = None, from_: str | None = None, language_token: str | None = None) -> Frame:
        """The tokens around a source, and before what is written. language_token: a name of PLACES; None: the run's."""
        template = self.template if language_token is None else PLACES[language_token]
        frame = template.frame(self.vocabulary, to, from_)
        if self.config.encoder is not None:
            return frame
        # A decoder goes on with its source: that does not end, and begins with the start token anyway.
        return frame._replace(before=[t for t in frame.before if t != self.config.start_token], after=[])

    def room(self, to: str | None = None, from_: str | None = None, language_token: str | None = None) -> int:
        """Tokens of a text that the model reads, at most."""
        return self._room(self.frame(to, from_, language_token))

    def lengths(self, texts: Sequence[str], to: str | None = None) -> list[int]:
        """Tokens of the texts alone. Raises ValueError for an empty one."""
        return [len(self._tokens(index, "text", text, to)) for index, text in enumerate(texts)]

    def _room(self, frame: Frame) -> int:
        return self.data["inputs_length"] - len(frame.before) - len(frame.after)

    def _encode(self, texts: Sequence[str], to: str | None, frame: Frame, empty: bool = False) -> list[Source]:
        room = self._room(frame)
        sources = []
        for index, text in enumerate(texts):
            tokens = self._tokens(index, "text", text, to, empty)
            sources.append(Source([*frame.before, *tokens[:room], *frame.after], len(tokens) > room))
        trimmed = [i for i, source in enumerate(sources) if source.trimmed]
        if trimmed:
            warnings.warn(
                f"{len(trimmed)} of {len(sources)} texts are longer than the {self.data['inputs_length']} tokens that "
                f"the model reads and lose their ends (first: text {trimmed[0]})",
                stacklevel=3,
            )
        return sources

    def _tokens(self, index: int, kind: str, text: str, to: str | None, empty: bool = False) -> list[int]:
        tokens = self.tokens(text, to)
        if not tokens and not empty:
            raise ValueError(f"{kind} {index} is empty: {text!r}")
        return tokens

    def tokens(self, text: str, to: str | None = None) -> list[int]:
        """A text's own tokens, cleaned. Without a language special tokens in it are meant as such."""
        from mlm.data.preprocessors import clean_line

        cleaned = clean_line(text)
        tokens = self.vocabulary.encode(cleaned) if to is not None else self.vocabulary.encode_prompt(cleaned)
        return [int(token) for token in tokens]

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """What tokens spell."""
        return self.vocabulary.decode([int(token) for token in tokens])
