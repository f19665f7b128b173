"""How to decode, as one frozen record that refuses nonsense and turns itself into a selector and processors."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from mlm.decoding.antirepetition import FSD, ContrastiveSearch, DiscreteFSD
from mlm.decoding.beam import Beam, DiverseBeam
from mlm.decoding.constrained import ConstrainedBeam
from mlm.decoding.coverage import CoveredBeam
from mlm.decoding.guided import Value, ValueGuidedBeam
from mlm.decoding.lexical_units import LexicalUnits
from mlm.decoding.members import MEANS
from mlm.decoding.processors import PROCESSORS
from mlm.decoding.proposers import PROPOSERS
from mlm.decoding.selectors import Greedy, Sample
from mlm.decoding.state import Processor, Proposer, Selector
from mlm.registry import Registry


class Method(NamedTuple):
    """One way to choose tokens: its selector, the options of `DecodeConfig` that mean something to it, and those of
    them whose default is a method's own. needs: what it is told of each text, or cannot do without.
    """

    selector: Callable[["DecodeConfig"], Selector]
    options: tuple[str, ...]
    summary: str
    defaults: Mapping[str, Any] = MappingProxyType({})
    needs: str = ""


T = TypeVar("T")


def _told(value: T | None) -> T:
    assert value is not None  # `DecodeConfig` puts the method's own default there
    return value


def _beam(config: "DecodeConfig") -> Beam:
    return Beam(config.beams, config.alpha, config.n_best)


def _beam_search(config: "DecodeConfig") -> Selector:
    return CoveredBeam(_beam(config), config.coverage) if config.coverage else _beam(config)


_TRUNCATIONS = ("top_k", "top_p", "min_p", "epsilon", "eta", "typical", "mirostat")
_GUESSING = ("proposer", "guesses", "branches", "mask_token")
_RESHAPING = ("repetition_penalty", "contrast", "contrast_alpha", "contrast_beta", "dola_layers", "language_bias")
METHODS: Registry[Method] = Registry(
    "decoding method",
    greedy=Method(lambda c: Greedy(), (*_RESHAPING, *_GUESSING), "the most probable token at every step"),
    sample=Method(
        lambda c: Sample(c.n_best, c.seed),
        ("n_best", "seed", *_RESHAPING, "temperature", *_TRUNCATIONS, *_GUESSING),
        "draws from the model's distribution, reshaped by temperature and truncations",
    ),
    beam=Method(
        _beam_search,
        ("n_best", "beams", "alpha", "coverage"),
        "beam search with the GNMT brevity and coverage penalties (Wu et al. 2016)",
    ),
    diverse_beam=Method(
        lambda c: DiverseBeam(c.beams, c.groups, c.diversity, c.alpha, c.n_best),
        ("n_best", "beams", "groups", "diversity", "alpha"),
        "beam search in groups that avoid each other's tokens (Vijayakumar et al. 2018)",
    ),
    constrained_beam=Method(
        lambda c: ConstrainedBeam(_beam(c)),
        ("n_best", "beams", "alpha"),
        "beam search for texts that hold phrases given of each example; beams=20 is usual (Post & Vilar 2018)",
        needs="phrases of each text",
    ),
    value_guided_beam=Method(
        lambda c: ValueGuidedBeam(_beam(c), cast(Value, c.value), c.likelihood, c.valued),
        ("n_best", "beams", "alpha", "value", "likelihood", "valued"),
        "beam search by likelihood and a function's value of every beginning (Josifoski et al. 2022)",
        needs="a function, which Python alone can give",
    ),
    contrastive_search=Method(
        lambda c: ContrastiveSearch(_told(c.penalty_alpha), c.candidates),
        ("candidates", "penalty_alpha"),
        "a probable token whose decoder state is unlike all earlier ones (Su et al. 2022)",
        {"penalty_alpha": 0.6},
    ),
    fsd=Method(
        lambda c: FSD(_told(c.penalty_alpha), c.candidates, _told(c.ngram)),
        ("candidates", "penalty_alpha", "ngram"),
        "a probable token that no similar states were followed by earlier (Yang et al. 2023)",
        {"penalty_alpha": 0.4, "ngram": 2},
    ),
    fsd_d=Method(
        lambda c: DiscreteFSD(_told(c.penalty_alpha), c.candidates, _told(c.ngram), c.smoothing),
        ("candidates", "penalty_alpha", "ngram", "smoothing"),
        "a probable token that the n-grams written so far make improbable (Yang et al. 2023)",
        {"penalty_alpha": 0.6, "ngram": 3},
    ),
    lexical_units=Method(
        lambda c: LexicalUnits(_told(c.mask_token), c.guesses, c.threshold, _told(c.ngram)),
        ("guesses", "mask_token", "threshold", "ngram"),
        "greedy, several tokens a pass where a model trained by objective lexical_units is sure (Sun et al. 2024)",
        {"ngram": 3},
    ),
)
# What forbids tokens and reshapes nothing means something to every method.
ALWAYS = (
    "method",
    "max_length",
    "min_length",
    "no_repeat_ngram",
    "bad_words",
    "avoid",
    "stop",
    "language_mask",
    "ensemble_mean",
)
CONTRASTS = ("none", "model", "language")
PHRASES = ("bad_words", "stop")  # options that are phrases


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Everything a decode depends on besides the parameters and the inputs. Lengths: tokens, prompt and EOS included.

    An option that the method would ignore must keep its default, so that no result is reported under a setting it
    never had.
    """

    method: str = "greedy"
    max_length: int = 128
    min_length: int = 0  # EOS is not chosen before it would be this token; a stop sequence may end a text earlier
    n_best: int = 1  # results per example; sample: that many draws, beams: at most `beams`
    beams: int = 4
    groups: int = 2  # diverse_beam: parts of `beams`, each a search
    diversity: float = 0.5  # diverse_beam: nats that a token costs for each beam of earlier groups that chose it
    alpha: float = 0.6  # beams: exponent of the brevity penalty; 0 ranks by plain log-probability
    coverage: float = 0.0  # beam: weight of the log of what was looked at of each source token; 0: off
    value: Value | None = None  # value_guided_beam: what says how much a beginning is worth
    likelihood: float = 0.5  # value_guided_beam: weight of the log-likelihood; that of the value is 1 less it
    valued: int = 10  # value_guided_beam: tokens of every beam that are given a value
    candidates: int = 5  # contrastive_search, fsd, fsd_d: most probable tokens that one is chosen of
    penalty_alpha: float | None = None  # the same: weight of the penalty, 0 is greedy; None: the method's own default
    ngram: int | None = None  # fsd, fsd_d, lexical_units: tokens of the n-grams that may not come again; None: the same
    smoothing: float = 0.9  # fsd_d: weight of n-grams against shorter ones
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    epsilon: float = 0.0  # 0: off
    eta: float = 0.0  # 0: off
    typical: float = 1.0  # 1: off
    mirostat: float = 0.0  # bits of surprise a token; 0: off
    repetition_penalty: float = 1.0  # 1: off
    no_repeat_ngram: int = 0  # n-grams that may not occur twice; 0: off
    bad_words: tuple[tuple[int, ...], ...] = ()  # phrases of token ids that may not be written
    avoid: bool = False  # not to write the phrases given of each example
    stop: tuple[tuple[int, ...], ...] = ()  # phrases of token ids behind which a text ends, as behind EOS
    language_mask: bool = False  # only tokens of the language to be written
    language_bias: float = 0.0  # weight of the log-frequency of a token in that language; 0: off
    contrast: str = "none"  # with whom: "model", a weaker one; "language", itself when told another language
    contrast_alpha: float = 0.1  # contrasts choose among tokens at least this share of the best
    contrast_beta: float = 0.5  # (1 + beta) of the model's logits less beta of the others'
    dola_layers: tuple[int, ...] = ()  # counts of decoder layers: contrast with what the head makes of one of these
    ensemble_mean: str = "probabilities"  # of several models, out of `MEANS`
    seed: int = 0
    proposer: str = "none"  # who guesses tokens ahead, out of `PROPOSERS`; results are the same, passes are fewer
    guesses: int = 8  # tokens guessed a pass; lexical_units: placeholders
    branches: int = 1  # guesses behind a guess at most: 1 makes a chain of them, more a tree
    mask_token: int | None = None  # mask_block, lexical_units: the token that drafter or model was trained to fill
    threshold: float = 0.9  # lexical_units: probability above which a token behind a placeholder is taken; 1 is greedy

    def __post_init__(self):
        allowed = (*ALWAYS, *METHODS[self.method].options)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in allowed and value != field.default:
                users = [name for name, method in METHODS.items() if field.name in method.options]
                raise ValueError(
                    f"{field.name}={value!r} means nothing to method={self.method!r}; leave it at {field.default!r} "
                    f"or choose one of {users}"
                )
        for name, default in METHODS[self.method].defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_contrasts()
        MEANS[self.ensemble_mean]
        proposer = PROPOSERS[self.proposer]
        guessing = proposer.options if "proposer" in allowed else allowed  # a method without proposers guesses itself
        for name in ("guesses", "branches", "mask_token"):
            if name not in guessing and getattr(self, name) != getattr(type(self), name):
                able = [able for able, kind in PROPOSERS.items() if name in kind.options]
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing to proposer={self.proposer!r}; name one of {able}"
                )
        for name, rule, holds in _RULES:
            value = getattr(self, name)
            if value is None and name not in allowed:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
                raise ValueError(f"{name}={value!r} must be {rule}")
        if self.method == "value_guided_beam" and not callable(self.value):
            raise ValueError(
                f"value={self.value!r} must be a function (tokens [N, T], length [N], hidden [N, D]) -> value [N]"
            )
        for name in PHRASES:
            phrases = getattr(self, name)
            if not isinstance(phrases, tuple) or not all(map(_phrase, phrases)):
                raise ValueError(
                    f"{name}={phrases!r} must be a tuple of phrases, each a tuple of one token id or more, as "
                    "((17, 4), (23,))"
                )
        if "mask_token" in proposer.options or self.method == "lexical_units":
            self._check_mask_token()
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} exceeds max_length={self.max_length}")
        if self.method == "diverse_beam" and self.beams % self.groups:
            raise ValueError(f"beams={self.beams} must be a multiple of groups={self.groups}, which share them equally")
        if self.method == "fsd" and self.ngram == 1:
            raise ValueError("ngram=1 leaves method='fsd' no states to compare; give 2 or more, or choose 'fsd_d'")
        if "beams" in allowed and self.n_best > self.beams:
            raise ValueError(f"n_best={self.n_best} exceeds beams={self.beams}, all that a beam search keeps")

    def plain(self) -> dict[str, Any]:
        """For JSON: a function by its name."""
        told = dataclasses.asdict(self)
        return told | {n: getattr(v, "__qualname__", repr(v)) for n, v in told.items() if callable(v)}

    def _check_mask_token(self) -> None:
        if not _integer(1)(self.mask_token):
            who = f"proposer={self.proposer!r} needs the token that its drafter"
            if self.method == "lexical_units":
                who = "method='lexical_units' needs the token that the model"
            raise ValueError(
                f"mask_token={self.mask_token!r} must be an integer of at least 1 (0 is padding): {who} was trained to "
                "fill, train.mask_token of that run"
            )

    def _check_contrasts(self) -> None:
        layers = self.dola_layers
        if self.contrast not in CONTRASTS:
            raise ValueError(f"contrast={self.contrast!r} is none of {CONTRASTS}")
        if not isinstance(layers, tuple) or not all(map(_integer(0), layers)) or len(set(layers)) < len(layers):
            raise ValueError(
                f"dola_layers={layers!r} must be a tuple of different numbers of decoder layers, as (2, 4)"
            )
        if layers and self.contrast != "none":
            raise ValueError(f"dola_layers={layers} and contrast={self.contrast!r}: a model has one contrast at a time")
        for option in ("contrast_alpha", "contrast_beta"):
            users = [name for name, kind in PROCESSORS.items() if option in kind.further]
            value, default = getattr(self, option), getattr(type(self), option)
            if value != default and not any(self._is_on(name) for name in users):
                raise ValueError(f"{option}={value!r} means nothing without {' or '.join(users)}")
        proposer = PROPOSERS[self.proposer]
        if (proposer.drafts or proposer.heads) and (layers or self.contrast != "none"):
            raise ValueError(
                f"proposer={self.proposer!r} with a contrast: what guesses here has nobody to be contrasted with, and "
                "would guess other tokens than those chosen; take proposer='input_copy' or none"
            )

    def _is_on(self, option: str) -> bool:
        return getattr(self, option) != getattr(type(self), option)

    def selector(self) -> Selector:
        """The method's selector. `selector().group` decoding rows serve one example."""
        return METHODS[self.method].selector(self)

    @property
    def block(self) -> int:
        """Tokens that a pass reads at most: the newest one, and guesses, of a model or of what drafts for it."""
        return max(1, self._ahead)

    @property
    def slots(self) -> int:
        """Slots that a cache must have: of the longest row, and of the guesses behind it."""
        return self.max_length + self._ahead

    @property
    def _ahead(self) -> int:
        if isinstance(selector := self.selector(), Proposer):
            return selector.tree.size + selector.lag
        return PROPOSERS[self.proposer].blocks * (self.guesses + 1)

    def processors(self) -> tuple[Processor, ...]:
        """The processors that are switched on, in the order of `PROCESSORS`."""
        return tuple(
            kind.make(*(getattr(self, option) for option in (name, *kind.further)))
            for name, kind in PROCESSORS.items()
            if self._is_on(name)
        )


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= low


def _phrase(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(_integer(0), value))


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("max_length", "an integer of at least 1", _integer(1)),
    ("min_length", "an integer of at least 0", _integer(0)),
    ("n_best", "an integer of at least 1", _integer(1)),
    ("beams", "an integer of at least 1", _integer(1)),
    ("groups", "an integer of at least 1", _integer(1)),
    ("diversity", "at least 0", lambda v: 0 <= v < float("inf")),
    ("alpha", "at least 0 (a negative one would make the early stop wrong)", lambda v: v >= 0),
    ("coverage", "at least 0 (0: off)", lambda v: 0 <= v < float("inf")),
    ("likelihood", "in [0, 1]", lambda v: 0 <= v <= 1),
    ("valued", "an integer of at least 2, or a beam whose best token ends would be lost", _integer(2)),
    ("candidates", "an integer of at least 1", _integer(1)),
    ("penalty_alpha", "in [0, 1] (0: greedy)", lambda v: 0 <= v <= 1),
    ("ngram", "an integer of at least 1", _integer(1)),
    ("smoothing", "in [0, 1]", lambda v: 0 <= v <= 1),
    ("temperature", "above 0 (for the most probable token use method='greedy')", lambda v: v > 0),
    ("top_k", "an integer of at least 0 (0: off)", _integer(0)),
    ("top_p", "in (0, 1] (1: off)", lambda v: 0 < v <= 1),
    ("min_p", "in [0, 1] (0: off)", lambda v: 0 <= v <= 1),
    ("epsilon", "in [0, 1) (0: off)", lambda v: 0 <= v < 1),
    ("eta", "in [0, 1) (0: off)", lambda v: 0 <= v < 1),
    ("typical", "in (0, 1] (1: off)", lambda v: 0 < v <= 1),
    ("mirostat", "at least 0 (0: off)", lambda v: 0 <= v < float("inf")),
    ("repetition_penalty", "above 0 (1: off)", lambda v: 0 < v < float("inf")),
    ("language_bias", "at least 0 (0: off)", lambda v: 0 <= v < float("inf")),
    ("contrast_alpha", "in (0, 1]", lambda v: 0 < v <= 1),
    ("contrast_beta", "at least 0", lambda v: 0 <= v < float("inf")),
    ("no_repeat_ngram", "an integer of at least 0 (0: off)", _integer(0)),
    ("guesses", "an integer of at least 1", _integer(1)),
    ("threshold", "in [0, 1] (1: greedy)", lambda v: 0 <= v <= 1),
    ("branches", "an integer of at least 1", _integer(1)),
    ("seed", "an integer of at least 0", _integer(0)),
)
