"""Decoding as the direct optimisation of metrics: the distribution nearest to the model's whose texts have, on average,
the statistics of human ones.

    min_q KL(q || p)  subject to  E_q f = F     has the solution     q(y) ∝ p(y) exp(-μ · f(y))

Under the exact q, human text is never less probable than under p (Pythagoras' theorem of information projections).
Drawn from by sampling-importance-resampling: n samples of the model, one of them taken with these weights.
Source: Ji et al. 2024 (DAEMON, arXiv:2310.01041).
"""

import re
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

STEPS = 100  # Newton converges in a handful, or not at all
CLOSE = 1e-8  # standard deviations between the moments and what they should be
Tokens = Sequence[Hashable]

# Statistics of a text.


def repetition(tokens: Tokens, n: int) -> float:
    """SR-n: 1 - distinct n-grams / all n-grams; 0 for a text without any."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def recent_repetition(tokens: Tokens, window: int) -> float:
    """TR-l: share of tokens that stand among the `window` tokens before them; 0 for an empty text."""
    if not tokens:
        return 0.0
    return sum(token in tokens[max(0, i - window) : i] for i, token in enumerate(tokens)) / len(tokens)


def diversity(tokens: Tokens) -> float:
    """DIV: Π over n = 2, 3, 4 of (1 - SR-n). Source: Su et al. 2022."""
    return float(np.prod([1.0 - repetition(tokens, n) for n in (2, 3, 4)]))


def coherence(prefixes: Float[np.ndarray, "n D"], texts: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n"]:
    """COH: cosine of the embeddings of what was given and what was written; 0 where one of them is 0."""
    scale = np.linalg.norm(prefixes, axis=1) * np.linalg.norm(texts, axis=1)
    return np.divide((prefixes * texts).sum(1), scale, out=np.zeros(len(scale)), where=scale > 0)


def exponential_entropy(log_probs: Float[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """eENT: exp(-log p(y) / |y|) under one fixed language model, its perplexity on each text."""
    return np.exp(-np.asarray(log_probs, np.float64) / lengths)


def check_features(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of "sr2" …, "tr8" …, "div", "coh", "eent"."""
    for name in names:
        if not re.fullmatch(r"(sr|tr)[1-9][0-9]*|div|coh|eent", name):
            raise ValueError(
                f"no statistic of texts named {name!r}; there are sr2, sr3, … (repeated n-grams), tr8, tr16, … (tokens "
                "repeated among the last so many), div, coh, eent"
            )


def of_tokens(name: str, tokens: Tokens) -> float:
    """A statistic that needs the tokens alone: "sr3", "tr16", "div"."""
    if name == "div":
        return diversity(tokens)
    return (repetition if name.startswith("sr") else recent_repetition)(tokens, int(name[2:]))


# Weights, and the draw.


def log_weights(
    features: Float[np.ndarray, "n m"], mu: Float[np.ndarray, "m"], base: Float[np.ndarray, "n"] | None = None
) -> Float[np.ndarray, "n"]:
    """log of the probability that each of n samples is taken: log softmax(base - μ · f), in nats.

    base: log p - log q of samples that were not drawn from the model p itself but from q, e.g. at a temperature.
    """
    energy = -features @ mu if base is None else base - features @ mu
    top = energy.max()
    return energy - top - np.log(np.exp(energy - top).sum())


def resampled(log_weights: Float[np.ndarray, "n"], *, seed: int, example: int) -> Int[np.ndarray, "n"]:
    """A draw of all n without replacement, so that the first is one draw with these weights: by Gumbel noise, which the
    seed and the example's number alone decide.
    """
    noise = np.random.default_rng([seed, example]).gumbel(size=len(log_weights))
    return np.argsort(-(log_weights + noise), kind="stable")


def fitted(
    features: Float[np.ndarray, "P n m"], wanted: Float[np.ndarray, "m"], base: Float[np.ndarray, "P n"] | None = None
) -> Float[np.ndarray, "m"]:
    """The μ whose weights give the samples' features the wanted means, averaged over P prefixes of n samples each.

    Newton's method on the convex dual, mean over prefixes of log Σ_i exp(base - μ · f_i) + μ · F, whose gradient is
    F - E_w f and whose Hessian is Cov_w f; halved steps where a whole one climbs.
    Raises ValueError where no weights give such means: they lie beyond what the samples show.
    """
    scale = features.std((0, 1))
    if not (scale > 0).all():
        raise ValueError(f"features {np.flatnonzero(scale == 0).tolist()} are the same in all samples: leave them out")
    centred = (features - wanted) / scale  # whose wanted means are 0
    base = np.zeros(features.shape[:2]) if base is None else base

    def dual(mu: np.ndarray) -> tuple[float, np.ndarray]:
        energy = base - centred @ mu
        top = energy.max(1, keepdims=True)
        total = np.exp(energy - top).sum(1, keepdims=True)
        return float((top + np.log(total)).mean()), np.exp(energy - top) / total

    mu = np.zeros(features.shape[2])
    value, weights = dual(mu)
    for _ in range(STEPS):
        means = np.einsum("Pn,Pnm->Pm", weights, centred)
        gap = means.mean(0)
        if np.abs(gap).max() < CLOSE:
            return mu / scale
        apart = centred - means[:, None]
        covariance = np.einsum("Pn,Pni,Pnj->ij", weights, apart, apart) / len(features)
        step = np.linalg.lstsq(covariance, gap, rcond=1e-12)[0]
        for _ in range(STEPS):
            tried, of_tried = dual(mu + step)
            if tried <= value:
                break
            step = step / 2
        mu, value, weights = mu + step, tried, of_tried
    raise ValueError(
        f"no weights give these samples the means {wanted.tolist()} (still {(gap * scale).tolist()} above): draw more "
        "samples, or leave out a feature that depends on the others or never comes near its mean"
    )
