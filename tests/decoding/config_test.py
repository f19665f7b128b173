"""A config refuses what its method would ignore and what no decode can mean."""

import pytest

from mlm.decoding.antirepetition import FSD, ContrastiveSearch, DiscreteFSD
from mlm.decoding.beam import Beam, DiverseBeam
from mlm.decoding.config import METHODS, DecodeConfig
from mlm.decoding.constrained import ConstrainedBeam
from mlm.decoding.guided import ValueGuidedBeam
from mlm.decoding.lexical_units import LexicalUnits
from mlm.decoding.processors import PROCESSORS
from mlm.decoding.selectors import Greedy, Sample


def test_every_method_builds_its_selector():
    assert DecodeConfig().selector() == Greedy()
    assert DecodeConfig(method="sample", n_best=3, seed=4).selector() == Sample(3, 4)
    assert DecodeConfig(method="beam", beams=5, alpha=1.0, n_best=2).selector() == Beam(5, 1.0, 2)
    options = {"beams": 6, "groups": 3, "diversity": 1.5, "alpha": 0.2, "n_best": 2}
    assert DecodeConfig(method="diverse_beam", **options).selector() == DiverseBeam(6, 3, 1.5, 0.2, 2)
    options, beam = {"beams": 6, "alpha": 0.2, "n_best": 2}, Beam(6, 0.2, 2)
    assert DecodeConfig(method="constrained_beam", **options).selector() == ConstrainedBeam(beam)
    options |= {"value": len, "likelihood": 0.3, "valued": 7}
    assert DecodeConfig(method="value_guided_beam", **options).selector() == ValueGuidedBeam(
        Beam(6, 0.2, 2), len, 0.3, 7
    )
    assert DecodeConfig(method="contrastive_search").selector() == ContrastiveSearch(0.6, 5)
    assert DecodeConfig(method="fsd", penalty_alpha=0.0).selector() == FSD(0.0, 5, 2)
    options = {"penalty_alpha": 0.3, "candidates": 4, "ngram": 5, "smoothing": 0.7}
    assert DecodeConfig(method="fsd_d", **options).selector() == DiscreteFSD(0.3, 4, 5, 0.7)
    options = {"mask_token": 9, "guesses": 4, "threshold": 0.5}
    assert DecodeConfig(method="lexical_units", **options).selector() == LexicalUnits(9, 4, 0.5, 3)
    assert all(method.summary for method in METHODS.values())


def test_a_method_s_own_defaults_are_what_the_record_says():
    assert DecodeConfig(method="fsd") == DecodeConfig(method="fsd", penalty_alpha=0.4, ngram=2)
    assert DecodeConfig(method="fsd_d").ngram == 3
    assert DecodeConfig().penalty_alpha is None


def test_only_what_is_switched_on_is_processed():
    assert DecodeConfig().processors() == ()
    assert len(DecodeConfig(method="sample", top_k=5, top_p=0.9, temperature=0.5, min_p=0.1).processors()) == 4
    assert len(DecodeConfig(method="beam", min_length=3).processors()) == 1
    assert len(DecodeConfig(no_repeat_ngram=3, bad_words=((5,),), repetition_penalty=1.2).processors()) == 3
    assert all(kind.summary for kind in PROCESSORS.values())


def test_options_name_fields():
    fields = DecodeConfig.__dataclass_fields__
    assert set(PROCESSORS) <= set(fields)
    assert {option for method in METHODS.values() for option in method.options} <= set(fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sample", "temperature": 0.0}, "use method='greedy'"),
        ({"method": "sample", "temperature": -1.0}, "above 0"),
        ({"temperature": 0.7}, "means nothing to method='greedy'"),
        ({"beams": 5}, r"choose one of \['beam', 'diverse_beam'"),
        ({"n_best": 2}, r"choose one of \['sample', 'beam', 'diverse_beam'"),
        ({"method": "beam", "top_k": 5}, "means nothing to method='beam'"),
        ({"method": "beam", "beams": 2, "n_best": 3}, "exceeds beams=2"),
        ({"method": "diverse_beam", "n_best": 5}, "exceeds beams=4"),
        ({"method": "diverse_beam", "groups": 3}, "multiple of groups=3"),
        ({"method": "diverse_beam", "groups": 0}, "at least 1"),
        ({"method": "diverse_beam", "diversity": -1.0}, "at least 0"),
        ({"method": "beam", "groups": 4}, r"choose one of \['diverse_beam'\]"),
        ({"method": "beam", "beams": 0}, "at least 1"),
        ({"method": "beam", "alpha": -0.5}, "at least 0"),
        ({"method": "sample", "top_p": 0.0}, r"in \(0, 1\]"),
        ({"method": "sample", "top_p": 95.0}, r"in \(0, 1\]"),
        ({"method": "sample", "min_p": 1.5}, r"in \[0, 1\]"),
        ({"method": "sample", "seed": -1}, "seed=-1"),
        ({"method": "sample", "epsilon": 1.0}, r"in \[0, 1\)"),
        ({"method": "sample", "eta": -0.1}, r"in \[0, 1\)"),
        ({"method": "sample", "typical": 0.0}, r"in \(0, 1\]"),
        ({"method": "sample", "mirostat": -3.0}, "at least 0"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"no_repeat_ngram": -1}, "at least 0"),
        ({"method": "beam", "repetition_penalty": 1.2}, r"choose one of \['greedy', 'sample'\]"),
        ({"typical": 0.9}, r"choose one of \['sample'\]"),
        ({"bad_words": ((5,), ())}, "a tuple of phrases"),
        ({"bad_words": ((-5,),)}, "a tuple of phrases"),
        ({"stop": ((),)}, "a tuple of phrases"),
        ({"penalty_alpha": 0.6}, r"choose one of \['contrastive_search', 'fsd', 'fsd_d'\]"),
        ({"method": "contrastive_search", "penalty_alpha": 1.1}, r"in \[0, 1\]"),
        ({"method": "contrastive_search", "candidates": 0}, "at least 1"),
        ({"method": "contrastive_search", "ngram": 2}, r"choose one of \['fsd', 'fsd_d', 'lexical_units'\]"),
        ({"method": "contrastive_search", "proposer": "input_copy"}, "means nothing to method='contrastive_search'"),
        ({"method": "fsd", "ngram": 1}, "give 2 or more"),
        ({"method": "fsd_d", "ngram": 0}, "at least 1"),
        ({"method": "fsd_d", "smoothing": 1.5}, r"in \[0, 1\]"),
        ({"max_length": 0}, "at least 1"),
        ({"max_length": 10, "min_length": 11}, "exceeds max_length=10"),
    ],
)
def test_nonsense_is_refused_with_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'greedy'"):
        DecodeConfig(method="gredy")
