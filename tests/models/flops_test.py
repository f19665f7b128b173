"""Model FLOPs against the published per-sequence figures at 512 source and 114 target tokens."""

import pytest

from mlm.models.flops import training_flops
from mlm.models.presets import preset


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("t5_1_1_small", 1.06e11),
        ("t5_1_1_base", 4.25e11),
        ("t5_1_1_large", 1.47e12),
        ("t5_1_1_xl", 5.34e12),
        ("mt5_small", 1.82e11),
        ("mt5_base", 5.40e11),
        ("mt5_xxl", 2.15e13),
    ],
)
def test_flops_per_sequence(name, published):
    assert training_flops(preset(name), 1, 512, 114) == pytest.approx(published, rel=0.01)


def test_rows_add_up():
    config = preset("tiny")
    assert training_flops(config, 8, 64, 32) == 8 * training_flops(config, 1, 64, 32)
