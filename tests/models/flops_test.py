"""Model FLOPs against the published per-sequence figures at 512 source and 114 target tokens."""

import pytest

from mlm.models.flops import heads_flops, idle_parameters, training_flops, units_flops
from mlm.models.presets import preset
from mlm.models.specs import ChimeraSpec, PositionSpec, SeqPESpec


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


def test_heads_cost_themselves_and_a_pass_of_the_model():
    """T5 small, d = 512, 114 targets: a third of its step without the head (6 * 32128 d 114), heads at 342 places."""
    config = preset("t5_1_1_small", chimera=ChimeraSpec(heads=3, attention_heads=8, head_dim=64, d_ff=1024))
    head, places = 32_128 * 512, 3 * 114
    weights = (12 + 2) * 512**2 * 114 + (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512**2) * places
    own = 6 * weights + 12 * 512 * 3 * 114**2 / 2 + 4 * head * places
    model = (training_flops(config, 1, 512, 114) - 6 * head * 114) / 3
    assert heads_flops(config, 2, 512, 114) == pytest.approx(2 * (model + own))
    assert training_flops(config, 1, 512, 114) == training_flops(preset("t5_1_1_small"), 1, 512, 114)


def test_a_step_that_finds_units_runs_forward_twice():
    """2 FLOPs a weight and position more beside 6."""
    config = preset("t5_1_1_small")
    assert units_flops(config, 2, 512, 114) == pytest.approx(8 / 6 * training_flops(config, 2, 512, 114))


def test_a_reader_of_positions_works_once_also_where_heads_learn():
    position = PositionSpec(kind="seqpe", seqpe=SeqPESpec(width=16, heads=2, digits=3, trained=64))
    config = preset("tiny", position=position)
    heads = preset("tiny", position=position, chimera=ChimeraSpec(heads=1, attention_heads=2, head_dim=8, d_ff=16))
    one, two, three = (heads_flops(heads, rows, 64, 32) for rows in (1, 2, 3))
    assert two - one == pytest.approx(three - two)
    once = training_flops(config, 1, 64, 32) - (training_flops(config, 2, 64, 32) - training_flops(config, 1, 64, 32))
    assert 2 * one - two == pytest.approx(once / 3)
