"""Model FLOPs against the published per-sequence figures at 512 source and 114 target tokens."""

import pytest

from mlm.models.flops import idle_parameters, training_flops
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


def test_a_mixture_costs_what_its_chosen_experts_cost():
    """Switch Base beside T5 Base: the same networks for a token, and 12 routers of d E more, 6 FLOPs each."""
    dense, switch = (training_flops(preset(name), 1, 512, 114) for name in ("t5_base", "switch_base_128"))
    assert switch - dense == 6 * 6 * 768 * 128 * (512 + 114)


def test_idle_parameters_are_those_of_the_experts_that_do_not_serve():
    """switch_base_8: 12 mixtures, 7 of 8 experts of 2 d f idle. NLLB's have biases, and serve two of 128."""
    assert idle_parameters(preset("t5_base")) == 0
    assert idle_parameters(preset("switch_base_8")) == 12 * 7 * 2 * 768 * 3072
    assert idle_parameters(preset("nllb_moe_54b")) == 12 * 126 * (2 * 2048 * 8192 + 8192 + 2048)
