"""What a run was trained to fill: the token that stands for what is missing, and texts with it filled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlm.data.preprocessors import clean_line
from mlm.data.templates import Frame
from mlm.decoding.buckets import check_tokens
from mlm.session.records import FilledText, Source
from mlm.session.session import Session
from mlm.types import EOS_ID


@dataclass(frozen=True)
class Masks:
    """objective: that of the training: "mask_block", "lexical_units" or "any_order". block: tokens that it fills at
    once.
    """

    objective: str
    mask_token: int
    block: int | None = None

    @classmethod
    def of_run(cls, data: Mapping[str, Any]) -> "Masks | None":
        """What the `data.json` of a run says; None for one that learned to fill nothing."""
        return cls(**data["masks"]) if "masks" in data else None


def fill(
    session: Session,
    frame: Frame,
    templates: Sequence[str],
    sources: Sequence[Source] | None,
    mask_token: int | str | None,
    languages: Sequence[int] | None,
    ids: Sequence[int] | None,
    **options: Any,
) -> list[FilledText]:
    """See `Session.fill`."""
    if session.ensemble:
        raise ValueError("blanks are filled by one model, and this session has an ensemble: load the run alone")
    alone = session.config.encoder is None
    if alone != (sources is None):
        raise ValueError("sources: what an encoder reads, a text for each template; a decoder alone takes none")
    token, most = blank(session, mask_token), session.data["targets_length"]
    given = [*frame.before, *frame.prompt] if alone else frame.prompt
    written = []
    for index, template in enumerate(templates):
        tokens = [*given, *map(int, session.vocabulary.encode_prompt(clean_line(template))), EOS_ID]
        if token not in tokens:
            raise ValueError(
                f"template {index} holds no blank: {template!r}; write {session.text([token])} for each missing token"
            )
        if len(tokens) > most:
            raise ValueError(
                f"template {index} has {len(tokens)} tokens, and the model writes at most {most}: shorten it"
            )
        written.append(tokens)
    read = None if sources is None else [source.tokens for source in sources]
    found = session.filler(token, **options)(session.params, written, read, ids=ids, languages=languages)
    return [
        FilledText(session.text(row[len(given) : length]), row[:length].tolist(), template.count(token), int(passes))
        for row, length, passes, template in zip(found.tokens, found.lengths, found.passes, written, strict=True)
    ]


def decided(
    method: str,
    options: Mapping[str, Any],
    data: Mapping[str, Any],
    draft: Mapping[str, Any] | None = None,
    heads: int | None = None,
) -> dict[str, Any]:
    """The options of decoding, with those that the runs decide where they are not given: the mask token, and how many
    tokens are guessed at once.

    data, draft: what the `data.json` of the run says, and that of its draft. heads: Chimera heads of the run's model.
    Raises ValueError for more placeholders than the run learned to fill.
    """
    proposer, told = options.get("proposer", "none"), dict(options)
    if proposer == "chimera" and heads:
        told.setdefault("guesses", heads)
    for name, filling in (("lexical_units", data), ("mask_block", draft or {})):
        masks = Masks.of_run(filling)
        if name not in (method, proposer) or masks is None or masks.objective != name:
            continue
        told.setdefault("mask_token", masks.mask_token)
        # Of a unit the first target is predicted from a token, not from a mask.
        most = (masks.block or 1) - (name == "lexical_units")
        if told.setdefault("guesses", most) > most and name == "lexical_units":
            raise ValueError(
                f"guesses={told['guesses']}: the run learned to fill {most} placeholders in a row (train.block="
                f"{masks.block}); set guesses={most}, or fewer"
            )
    return told


def blank(session: Session, mask_token: int | str | None = None) -> int:
    """The token that stands for one that is missing. mask_token: its id or its name, where the run does not say.

    Raises ValueError for a run that did not learn to write in any order, KeyError for an unknown name.
    """
    if isinstance(mask_token, str):
        return session.vocabulary.special(mask_token)
    if mask_token is not None:
        check_tokens("mask_token", [[mask_token]], session.config.vocab_size)
        return mask_token
    masks = Masks.of_run(session.data)
    if masks is None or masks.objective != "any_order":
        raise ValueError(
            f"{session.run.path} does not say that it learned to write in any order (train.any_order): train one that "
            "does, or name its blank by mask_token='<extra_id_0>'"
        )
    return masks.mask_token
