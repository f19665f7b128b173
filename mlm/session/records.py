"""What a session is asked and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlm.data.templates import Frame
from mlm.decoding.generate import Generator, Reading

if TYPE_CHECKING:
    from mlm.session.session import Session


@dataclass(frozen=True)
class Hypothesis:
    """text: decoded, without a stop sequence at its end. score: log-probability in nats, for beam search over its
    length penalty. tokens: all, EOS or the stop sequence included.
    passes: of the decoder, for all results of the text. given: tokens that it had to begin with.
    value: what it was chosen by, where the results were chosen among (`mlm.session.choosing`).
    """

    text: str
    score: float
    tokens: list[int]
    passes: int = 0
    given: int = 0
    value: float | None = None


@dataclass(frozen=True)
class FilledText:
    """text: the template with its blanks filled. tokens: all, EOS included. blanks: how many there were. passes: of the
    decoder, at most one a blank.
    """

    text: str
    tokens: list[int]
    blanks: int
    passes: int


@dataclass(frozen=True)
class Source:
    """tokens: what the encoder reads. trimmed: the text was longer than the model's inputs, and lost its end."""

    tokens: list[int]
    trimmed: bool


@dataclass(frozen=True)
class Asked:
    """One call of `Session.decode`: the sources as the model reads them, and everything that was said of them."""

    session: "Session"
    generator: Generator
    frame: Frame
    to: str | None
    from_: str | None
    language_token: str | None
    sources: list[list[int]]
    ids: Sequence[int]
    languages: Sequence[int] | None
    given: Mapping[str, np.ndarray]
    against: Reading | None = None  # what the model reads to be contrasted with itself

    @property
    def skips(self) -> list[int]:
        """Tokens at the beginning of each result that were given: the prompt, and for a decoder alone the source."""
        alone = self.session.config.encoder is None
        return [len(self.frame.prompt) + (len(source) if alone else 0) for source in self.sources]

    @property
    def texts(self) -> list[str]:
        """What the model read of each text."""
        before, after = len(self.frame.before), len(self.frame.after)
        return [self.session.text(source[before : len(source) - after]) for source in self.sources]


@dataclass(frozen=True)
class Ranked:
    """index: of the passage as given. score: log P(query, EOS | passage), nats."""

    index: int
    passage: str
    score: float
