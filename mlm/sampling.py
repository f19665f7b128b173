"""How often each language is seen: pure functions from counts to rates. NumPy only.

    >>> temperature([1000, 100, 10, 1], alpha=0.3).round(4)
    array([0.5324, 0.2668, 0.1337, 0.067 ])
    >>> unimax([1000, 100, 10, 1], budget=400, max_epochs=1).round(4)
    array([0.7225, 0.25  , 0.025 , 0.0025])

A policy takes counts (examples, characters or tokens of each language, in any order) and returns rates that sum to 1,
in that order. POLICIES holds them by name; a policy with its options bound (`functools.partial`) is what a mixture
takes. Rates say how often a language is drawn; `expected_epochs` turns them into how often its text is read.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlm.registry import Registry, nearest

Number = int | float
Counts = Sequence[Number] | np.ndarray
Stages = Sequence[tuple[Number, Counts]]  # (share of the training at which a stage begins, its rates)
Policy = Callable[[Counts], np.ndarray]


def proportional(counts: Counts) -> np.ndarray:
    """p_l ∝ c_l: every text is read equally often."""
    return _normalised(_checked(counts))


def temperature(counts: Counts, alpha: Number = 0.3, cap: Number | None = None) -> np.ndarray:
    """p_l ∝ min(c_l, cap)^alpha. alpha 1: proportional, 0: uniform; alpha = 1 / T where papers give a temperature T.

    mT5 and XLM-R: 0.3 on examples; mBERT: 0.7; XLM: 0.5. The cap, in the unit of the counts, comes before the power (as
    in SeqIO).
    Raises ValueError for alpha < 0 or a cap ≤ 0.
    """
    if alpha < 0:
        raise ValueError(
            f"alpha={alpha} must be 0 (uniform) or more; small languages would be drawn more than large ones"
        )
    return _normalised(capped(counts, cap) ** alpha)


def uniform(counts: Counts) -> np.ndarray:
    """Every language equally often, whatever its size."""
    return _normalised(np.ones_like(_checked(counts)))


def unimax(counts: Counts, budget: Number, max_epochs: Number = 1, *, short: str = "raise") -> np.ndarray:
    """As uniform as possible without reading any language more than `max_epochs` times.

    Smallest language first: U_l = min(budget left / languages left, max_epochs · c_l); p_l = U_l / Σ U. Source: UniMax,
    Chung et al. 2023, algorithm 1.
    counts and budget in characters (tokens · 4), the budget being that of the whole training: with another unit or
    budget the limit on epochs does not hold. Languages below their limit get equal shares.
    short: what to do when max_epochs of everything is less than the budget, so that the limit cannot hold: "raise"
    ValueError, or "warn" and read every language equally often (proportional).
    """
    counts = _checked(counts)
    if budget <= 0 or max_epochs <= 0:
        raise ValueError(f"budget={budget} and max_epochs={max_epochs} must be positive")
    most = max_epochs * counts.sum()
    if budget > most * (1 + 1e-9):
        message = (
            f"UniMax cannot spend a budget of {budget:.6g}: {max_epochs:g} epochs of all languages are {most:.6g}; "
            f"lower the budget to that, or raise max_epochs to {budget / counts.sum():.4g}"
        )
        if short not in ("raise", "warn"):
            raise ValueError(f"short={short!r} is neither 'raise' nor 'warn'")
        if short == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    shares, left = np.zeros_like(counts), float(budget)
    for remaining, i in zip(range(len(counts), 0, -1), np.argsort(counts, kind="stable"), strict=True):
        shares[i] = min(left / remaining, max_epochs * counts[i])
        left -= shares[i]
    return _normalised(shares)


POLICIES: Registry[Callable[..., np.ndarray]] = Registry(
    "sampling policy", proportional=proportional, temperature=temperature, uniform=uniform, unimax=unimax
)


def explicit(names: Sequence[str], table: Mapping[str, Number]) -> np.ndarray:
    """Rates from a table name -> weight, in the order of `names`.

    Raises KeyError, with the nearest names, for a weight of nothing or a name without a weight.
    """
    for asked, known, what in (
        (table, names, "mixture has no member"),
        (names, table, "table of rates has no weight for"),
    ):
        if unknown := [n for n in asked if n not in set(known)]:
            raise KeyError(f"the {what} {', '.join(map(repr, unknown[:5]))}; {nearest(unknown[0], known)}")
    return _normalised(_checked([table[name] for name in names], "weight"))


def capped(counts: Counts, cap: Number | None) -> np.ndarray:
    """min(c_l, cap); None is no cap. A large language then counts as one of size `cap`."""
    counts = _checked(counts)
    if cap is not None and cap <= 0:
        raise ValueError(f"cap={cap} must be positive, in the unit of the counts")
    return counts if cap is None else np.minimum(counts, cap)


def stages(table: Stages, progress: Number) -> np.ndarray:
    """The rates at a moment of the training: those of the last stage that has begun, normalised.

    table: (share of the training at which the stage begins, rates), the first at 0.0, growing. progress: share of the
    training that is done, step / steps, 0 … 1. A pure function of progress: a restart at any step finds its stage.
    """
    starts = [start for start, _ in table]
    growing = all(a < b for a, b in itertools.pairwise([*starts, 1.0]))
    if not starts or starts[0] != 0 or not growing:
        raise ValueError(
            f"stages begin at {starts}: the first must begin at 0.0, each later than the last, all before 1.0"
        )
    if len({len(rates) for _, rates in table}) != 1:
        raise ValueError(
            f"stages have {[len(rates) for _, rates in table]} rates; every stage needs one for each language"
        )
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} must lie between 0 (start of the training) and 1 (its end)")
    current = sum(start <= progress for start in starts) - 1
    return _normalised(_checked(table[current][1], "rate"))


def mean_rates(table: Stages) -> np.ndarray:
    """Rates over the whole training: the stages' rates, weighted with their lengths."""
    starts = [start for start, _ in table]
    lengths = np.diff([*starts, 1.0])
    return np.sum([length * stages(table, start) for length, start in zip(lengths, starts, strict=True)], axis=0)


def expected_epochs(rates: Counts, counts: Counts, budget: Number) -> np.ndarray:
    """How often each language's text is read: p_l · budget / c_l, budget and counts in one unit. More than about 4
    overfits.
    """
    return _normalised(_checked(rates, "rate")) * budget / _checked(counts)


def _checked(numbers: Counts, what: str = "count") -> np.ndarray:
    array = np.asarray(numbers, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{what}s must be a list of numbers, one a language, not {numbers!r}")
    allowed = np.isfinite(array) & (array > 0 if what == "count" else array >= 0)
    if not allowed.all():
        i = int(np.flatnonzero(~allowed)[0])
        rule = "positive" if what == "count" else "0 or more"
        raise ValueError(f"{what} number {i} is {array[i]}; every {what} must be {rule}: leave out what has no text")
    if not array.sum():
        raise ValueError(f"all {what}s are 0")
    return array


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
