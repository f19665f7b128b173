"""Examples before a query, and queries behind passages: what a session is asked in prompts, without training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlm.data.prompts import Example, Format, Pool, synthesised
from mlm.data.templates import FROM, PLACES
from mlm.session.records import Ranked
from mlm.session.session import Session

PASSAGE = "{passage}"


def few_shot(
    session: Session,
    queries: Sequence[str],
    examples: Pool | Iterable[tuple[str, str]],
    shots: int,
    choice: str,
    *,
    form: Format,
    languages: Mapping[str, str | None],
    seed: int,
    ids: Sequence[int] | None,
    budget: int | None,
) -> list[str]:
    """See `Session.few_shot`. languages: `to`, `from_` and `language_token`."""
    pool = examples if isinstance(examples, Pool) else Pool(Example(*pair) for pair in examples)
    to, room = languages.get("to"), session.room(**languages)
    if budget is not None and not 0 < budget <= room:
        raise ValueError(f"budget={budget} must be between 1 and {room}, the tokens that the model reads of a text")
    session.lengths(queries, to)  # refuses an empty query, which a prompt around it would hide
    numbers = range(len(queries)) if ids is None else ids
    return [
        form.fit(
            pool.choose(choice, query, shots, seed=seed, query_id=number),
            query,
            budget or room,
            lambda text: session.lengths([text], to)[0],
        )
        for number, query in zip(numbers, queries, strict=True)
    ]


def synthesise(
    session: Session,
    texts: Mapping[str, Sequence[str]],
    to: str,
    *,
    backwards: bool,
    language_token: str | None,
    **options: Any,
) -> list[Example]:
    """See `Session.synthesise`."""
    template = session.template if language_token is None else PLACES[language_token]

    def translate(sentences: Sequence[str], code: str) -> list[str]:
        told = code if FROM in template.asks_for else None
        found = session.decode(sentences, to, from_=told, language_token=language_token, **options)
        return [best[0].text for best in found]

    return synthesised(texts, translate, backwards=backwards)


def query_likelihood(
    session: Session, query: str, passages: Sequence[str], *, form: str, languages: Mapping[str, Any]
) -> list[Ranked]:
    """See `Session.query_likelihood`."""
    if form.count(PASSAGE) != 1:
        raise ValueError(f"form={form!r} must hold {PASSAGE} once, as 'Passage: {PASSAGE} Question:'")
    if (index := next((i for i, passage in enumerate(passages) if not passage.strip()), None)) is not None:
        raise ValueError(f"passage {index} is empty: {passages[index]!r}")
    if not passages:
        return []
    scores = session.score([(passage.join(form.split(PASSAGE)), query) for passage in passages], **languages)
    return [Ranked(int(i), passages[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]
