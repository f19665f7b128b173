"""Configs refuse nonsense with the values and the rule; presets have the published sizes."""

import dataclasses

import pytest

from mlm import trees
from mlm.models.config import AttentionSpec, FFNSpec, LayerSpec, PositionSpec, StackConfig, from_json, to_json
from mlm.models.presets import PRESETS, preset
from mlm.models.transformer import Transformer

# 2Vd + L_e(attn + ffn + 2d) + L_d(2 attn + ffn + 3d) + 2d + 64h; attn = 4 d h d_h, ffn = 3 d f.
# mT5 small: 2*250112*512 + 8*(786432 + 1572864 + 1024) + 8*(1572864 + 1572864 + 1536) + 1024 + 384 = 300,176,768.
PUBLISHED = {
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_the_published_parameter_counts(name):
    assert trees.count(Transformer(preset(name)).shapes()) == PUBLISHED[name]


def test_every_preset_builds_and_survives_json():
    for name in PRESETS:
        config = preset(name, dropout=0.1, remat="full", scan=False, dtype="bfloat16", vocab_size=1000)
        assert from_json(to_json(config)) == config
        assert config.encoder.dropout == config.decoder.dropout == 0.1


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match=r"no model preset named 'mt5_smal'; did you mean 'mt5_small'"):
        preset("mt5_smal")


def test_json_with_an_unknown_field_names_it():
    data = to_json(preset("tiny"))
    data["encoder"]["dropot"] = 0.1
    with pytest.raises(ValueError, match=r"StackConfig has no field 'dropot'; did you mean 'dropout'"):
        from_json(data)


ATTENTION = AttentionSpec(source="self", heads=2, head_dim=4)
CROSS = AttentionSpec(source="cross", heads=2, head_dim=4)
TINY = preset("tiny")
LAYER = LayerSpec(sublayers=(ATTENTION, FFNSpec(d_ff=8)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionSpec(source="slef", heads=2, head_dim=4), r"source='slef' .*did you mean 'self'"),
        (lambda: AttentionSpec(source="self", heads=0, head_dim=4), r"heads=0 must be an integer of at least 1"),
        (lambda: FFNSpec(d_ff=8, activation="geglue"), r"did you mean 'geglu'"),
        (lambda: PositionSpec(buckets=30), r"buckets=30 must be a multiple of 4"),
        (lambda: StackConfig(group=(), repeats=1, causal=False), r"needs at least one layer"),
        (lambda: StackConfig(group=(LAYER,), repeats=1, causal=False, dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (lambda: StackConfig(group=(LAYER,), repeats=1, causal=False, remat="som"), r"remat='som' is not one of"),
        (
            lambda: StackConfig(group=(LayerSpec(sublayers=(CROSS,)),), repeats=1, causal=True),
            r"found no self-attention",
        ),
        (lambda: dataclasses.replace(preset("tiny"), head="lin"), r"head='lin' is not one of"),
        (
            lambda: dataclasses.replace(preset("tiny"), encoder=preset("tiny").decoder),
            r"encoder.causal=True, decoder.causal=True.*set False and True",
        ),
        (
            lambda: dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.encoder, causal=True)),
            r"no decoder layer holds cross-attention",
        ),
    ],
)  # fmt: skip
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_repeated_sublayers_get_distinct_names():
    layer = LayerSpec(sublayers=(ATTENTION, FFNSpec(d_ff=8), CROSS, FFNSpec(d_ff=8)))
    assert layer.names() == ("self_attention", "ffn", "cross_attention", "ffn_2")
