"""The weights of choosers, from a development set: pairs of a text and what a human wrote for it.

fit_energy(run, pairs, ("sr3", "tr16", "div")).write("mu.json")
chooser, reached = tune_noisy_channel(run, pairs, NoisyChannel(back="en"), to="fr")
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm.evaluation.choosing import energy
from mlm.evaluation.choosing.noisy_channel import HIGHEST, Weights, tuned
from mlm.evaluation.metrics import metric_fns
from mlm.session.choosers import Energy, NoisyChannel, check_pure, corrections
from mlm.session.choosing import checked
from mlm.session.records import Hypothesis
from mlm.session.session import Session
from mlm.types import EOS_ID

Pairs = Sequence[tuple[str, str]]  # text, what a human wrote


def fit_energy(
    session: Session,
    pairs: Pairs,
    features: Sequence[str] = ("sr2", "sr3", "sr4", "tr8", "tr16", "tr32", "div"),
    *,
    to: str | None = None,
    from_: str | None = None,
    language_token: str | None = None,
    n_best: int = 25,
    embedder: str = "",
    evaluator: str = "",
    **options: Any,
) -> Energy:
    """An `Energy` under which these statistics of samples have the means that they have in the human texts.

    n_best: samples of each text. embedder, evaluator: as in `Energy`. options: temperature, seed, max_length.
    Raises ValueError where no weights can do it: `mlm.evaluation.choosing.energy.fitted`.
    """
    blank = Energy(mu=dict.fromkeys(features, 0.0), embedder=embedder, evaluator=evaluator)
    texts = [text for text, _ in pairs]
    asked = session.ask(texts, to, "sample", from_=from_, language_token=language_token, n_best=n_best, **options)
    check_pure(asked.generator.config)
    found = session.answer(asked)
    alone = session.config.encoder is None  # its results begin with their sources
    before = [source if alone else [] for source in asked.sources]
    human = [
        [Hypothesis(text, 0.0, [*source, *asked.frame.prompt, *session.tokens(text, to), EOS_ID])]
        for source, (_, text) in zip(before, pairs, strict=True)
    ]
    wanted = np.concatenate(blank.features(asked, human)).mean(0)
    mu = energy.fitted(np.stack(blank.features(asked, found)), wanted, np.stack(corrections(asked, found)))
    return dataclasses.replace(blank, mu=dict(zip(features, mu.tolist(), strict=True)))


def tune_noisy_channel(
    session: Session,
    pairs: Pairs,
    chooser: NoisyChannel,
    metric: str = "chrf",
    *,
    method: str = "beam",
    to: str | None = None,
    from_: str | None = None,
    language_token: str | None = None,
    trials: int = 200,
    seed: int = 0,
    **options: Any,
) -> tuple[NoisyChannel, float]:
    """(the chooser with weights that reach the most of a metric, what they reach). A weight of 0 in it stays 0.

    metric: out of `METRICS`, the higher the better. method, options: how the results are made, with n_best. trials,
    seed: of the random search.
    """
    texts, references = [text for text, _ in pairs], [reference for _, reference in pairs]
    asked = session.ask(texts, to, method, from_=from_, language_token=language_token, **options)
    checked(chooser, asked)
    found = session.answer(asked)
    (measure,) = metric_fns(metric, language=to or "")

    def score(taken: list[int]) -> float:
        values = measure(references, [results[i].text for results, i in zip(found, taken, strict=True)])
        return float(next(value for value in values.values() if not isinstance(value, str)))

    free = Weights(*(most if weight else 0.0 for most, weight in zip(HIGHEST, chooser.weights, strict=True)))
    weights, reached = tuned(chooser.parts(asked, found), score, highest=free, trials=trials, seed=seed)
    unused: dict[str, Any] = {"back": "", "channel_run": ""} if not weights.channel else {}
    unused |= {"language_model_run": ""} if not weights.language_model else {}
    return dataclasses.replace(chooser, **weights._asdict(), **unused), reached
