"""Decoding that must not leave a language: its tokens, counted in a run's training text, and what the model would read
for another one.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Int

from mlm.checkpoints import CheckpointError
from mlm.data.templates import Frame
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Reading
from mlm.evaluation.language_loss import unigram_log_probs
from mlm.types import EOS_ID

if TYPE_CHECKING:
    from mlm.session.session import Session

FILE = "token_counts.npz"
EXAMPLES = 1000  # of a task, the first ones

Counts = Mapping[int, Int[np.ndarray, "V"]]  # language id -> how often each token stands in its text


def against(
    session: "Session",
    sources: Sequence[Sequence[int]],
    frame: Frame,
    to: str | None,
    contrast_to: str,
    **told: str | None,
) -> Reading:
    """What the model reads of the same sources when it is told another language than `to`, or "none". told: from_ and
    language_token.

    Raises ValueError where that is the same, KeyError for a language without a token.
    """
    from mlm.data.languages import language_id

    none = contrast_to == "none"
    other = session.frame(None if none else contrast_to, **told)
    if to is None or other == frame:
        raise ValueError(
            f"contrast_to={contrast_to!r} with to={to!r}: name two languages, the one that is to be written by to"
        )
    texts = [source[len(frame.before) : len(source) - len(frame.after)] for source in sources]
    return Reading(
        [[*other.before, *text, *other.after] for text in texts],
        [other.prompt] * len(texts),
        [0 if none else language_id(contrast_to)] * len(texts) if session.asks_language else None,
        other.start,
    )


def allowed_tokens(
    counts: Counts, language: int, special: Sequence[int] = (), *, mass: float = 0.999, shared: float = 0.9
) -> Bool[np.ndarray, "V"]:
    """The most frequent tokens that hold `mass` of a language's text, those that stand in at least `shared` of all
    languages (digits, punctuation), EOS, and special ones.

    Raises KeyError for a language that was not counted.
    """
    own = counts[language]
    order = np.argsort(-own, kind="stable")
    before = np.cumsum(own[order]) - own[order]  # tokens of text that more frequent ones hold
    allowed = np.zeros(own.size, bool)
    allowed[order] = (before < mass * own.sum()) & (own[order] > 0)
    allowed |= np.mean([count > 0 for count in counts.values()], axis=0) >= shared
    allowed[[EOS_ID, *special]] = True
    return allowed


def by_language(session: "Session", config: DecodeConfig, languages: Sequence[int] | None) -> dict[str, np.ndarray]:
    """What the generator reads of each text's language: "language_mask" and "language_bias" [N, V], those asked for.

    Raises ValueError where no language is named, or one that the training text does not have.
    """
    asked = [name for name in ("language_mask", "language_bias") if getattr(config, name)]
    if not asked:
        return {}
    if languages is None:
        raise ValueError(f"{' and '.join(asked)}: name the language to be written, by to='fr'")
    counts = session.token_counts
    if missing := sorted(set(languages) - set(counts)):
        raise ValueError(
            f"{asked[0]}: the training text of {session.data['mixture']!r} has no token of "
            f"{', '.join(_names(missing))}; it has {', '.join(_names(sorted(counts)))}"
        )
    special = set(session.vocabulary.specials.values()) - set(session.vocabulary.language_tokens.values())
    whole = session.spelling._replace(text=np.ones(session.config.vocab_size, bool))
    tables = {
        "language_mask": lambda language: allowed_tokens(counts, language, sorted(special)),
        "language_bias": lambda language: unigram_log_probs(counts[language], whole).astype(np.float32),
    }
    met, place = np.unique(languages, return_inverse=True)
    size = session.config.vocab_size
    found = {name: np.array([tables[name](int(n)) for n in met]).reshape(-1, size) for name in asked}
    if len(met) == 1:  # a view: a row for every text would be large
        return {name: np.broadcast_to(table[0], (len(place), table.shape[1])) for name, table in found.items()}
    return {name: table[place] for name, table in found.items()}


def token_counts(session: "Session") -> Counts:
    """Of the first examples of every task of the run's mixture, inputs and targets; counted once and kept in the run,
    as far as it can be written.

    Raises KeyError for a run whose mixture is not registered, as a converted one, ValueError for one without text.
    """
    about = np.array([session.data["mixture"], session.vocabulary.digest, str(EXAMPLES)])
    damaged = (ValueError, KeyError, EOFError, BadZipFile)
    with suppress(FileNotFoundError, *damaged), open(session.run / FILE, "rb") as file, np.load(file) as kept:
        if np.array_equal(kept["about"], about):
            return dict(zip(kept["languages"].tolist(), kept["counts"], strict=True))
    counts = _counted(session)
    content = io.BytesIO()
    np.savez_compressed(content, about=about, languages=[*counts], counts=[*counts.values()])
    with suppress(CheckpointError):  # a run that cannot be written costs time, not correctness
        session.run.write(FILE, content.getvalue())
    return counts


def _counted(session: "Session") -> Counts:
    from mlm.data.evaluator import read_examples
    from mlm.data.recipes import Lengths

    lengths = Lengths(session.data["inputs_length"], session.data["targets_length"])
    found: dict[int, np.ndarray] = {}
    tasks = session.tasks(split="train")
    read = read_examples(tasks, session.vocabulary, lengths, "train", EXAMPLES, template=session.own_template)
    for _, examples in read:
        texts: dict[int, list[np.ndarray]] = {}
        for example in examples:
            texts.setdefault(example.inputs_language, []).append(example.inputs)
            texts.setdefault(example.language, []).append(example.targets)
        for language, tokens in texts.items():
            counts = np.bincount(np.concatenate(tokens), minlength=session.config.vocab_size)
            found[language] = found.get(language, 0) + counts
    tags = list(session.vocabulary.language_tokens.values())  # which stand before texts of any language
    for counts in found.values():
        counts[tags] = 0
    return {language: found[language] for language in sorted(found) if language}


def _names(languages: Sequence[int]) -> list[str]:
    from mlm.data.languages import LANGUAGES

    return [LANGUAGES[language].code for language in languages]
