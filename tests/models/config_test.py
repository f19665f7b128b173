"""Configs refuse nonsense with the values and the rule; presets have the published sizes."""

import dataclasses

import pytest

from mlm import trees
from mlm.models.config import HeadSpec, StackConfig, from_json, to_json
from mlm.models.families import sparse, t5_style
from mlm.models.presets import PRESETS, preset
from mlm.models.specs import (
    AttentionSpec,
    EmbeddingSpec,
    FFNSpec,
    LayerSpec,
    NormSpec,
    PositionSpec,
    ResidualSpec,
    RouterSpec,
    deep_norm,
)
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
    # T5 1.0: Vd + L_e(attn + 2 d f + 2d) + L_d(2 attn + 2 d f + 3d) + 2d + 64h; Hugging Face's counts.
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    # mT5 with V = 256384 and (L_e + L_d) 32 h position biases: small 300,176,768 + 2*6272*512 + (16 - 2)*192.
    "umt5_small": 306_601_984,
    "umt5_base": 592_043_520,
    "umt5_large": 1_242_449_920,
    "umt5_xl": 3_768_356_864,
    "umt5_xxl": 12_972_531_712,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    # Vd + L (2 d h d_h + 2 d kv d_h + 3 d f + 4d + 2 d_h) + d for each stack, joint or not.
    # 270M: 262144*640 + 2 * (18 * (2*640*1024 + 2*640*256 + 3*640*2048 + 4*640 + 512) + 640) = 368,424,192.
    "gemma_3_270m": 268_098_176,
    "gemma_3_1b": 999_885_952,
    "gemma_3_4b": 3_880_099_328,
    "t5gemma2_270m": 368_424_192,
    "t5gemma2_1b": 1_697_782_016,
    "t5gemma2_4b": 7_089_110_016,
    # Vd + L_e(4d^2 + 2 d f + 9d + f) + L_d(8d^2 + 2 d f + 15d + f) + 4d with biases; no positions to learn.
    # 600M: 256206*1024 + 12*(4*1024^2 + 2*1024*4096 + 9*1024 + 4096) + 12*(8*1024^2 + ... + 15*1024 + 4096) + 4096.
    "nllb_600m": 615_073_792,
    "nllb_1_3b": 1_370_638_336,
    "nllb_3_3b": 3_344_863_232,
    "m2m_100_418m": 483_905_536,
    "m2m_100_1_2b": 1_239_470_080,
    "mbart_50": 610_879_488,
    # As NLLB: 128009*2048 + 24*(12 d^2 + 4 d f + 24 d + 2 f) + 4d, with d = 2048 and f = 16384.
    "wmt21_dense_24_wide": 4_693_321_728,
    # Vd + L (2 d h d_h + 2 d kv d_h + 3 d f + 4 d) + d for the encoder; the decoder's layers add 2 d h d_h (query and
    # output), 2 D kv d_h (keys and values of the encoder's width D) and 2 d. 9B: 42 layers of 3584, 2B: 26 of 2304:
    # 917,504,000 + 42 * 198,195,200 + 3,584 = 9,241,705,984; 589,824,000 + 26 * (77,865,984 + 16,781,824) + 2,304.
    # s: V = 256000; 2 * 131,072,000 + 8 * (4*512^2 + 3*512*1024 + 4*512) + 8 * (8*512^2 + 3*512*1024 + 6*512) + 1024.
    "t5gemma_s_s": 312_517_632,
    "t5gemma_b_b": 591_490_560,
    "t5gemma_l_l": 1_241_761_792,
    "t5gemma_ml_ml": 2_200_345_344,
    "t5gemma_xl_xl": 3_766_980_608,
    "t5gemma_2b_2b": 5_596_853_760,
    "t5gemma_9b_2b": 12_292_375_296,
    "t5gemma_9b_9b": 20_333_401_088,
    # t5_base with E experts in place of 12 of 24 networks: 222,903,552 + 12 ((E - 1) 2 d f + d E); Switch-C: of all 30.
    "switch_base_8": 619_339_008,
    "switch_base_16": 1_072_397_568,
    "switch_base_32": 1_978_514_688,
    "switch_base_64": 3_790_748_928,
    "switch_base_128": 7_415_217_408,
    "switch_base_256": 14_664_154_368,
    "switch_large_128": 26_309_291_008,
    "switch_xxl": 394_675_073_024,
    "switch_c": 1_571_327_875_360,
    # T5 1.1 and, every fourth layer of each stack, E networks more with their router and a norm: base has
    # 247,577,856 + 6 * (16 * 3*768*2048 + 16*768 + 768), XL 2,849,757,184 + 12 * (16 * 3*2048*5120 + 16*2048 + 2048).
    "st_moe_base": 700_641_024,
    "st_moe_xl": 8_889_972_736,
    "st_moe_32b": 269_104_613_376,
    # 3,344,863,232 of nllb_3_3b + 12 (127 (2 d f + f + d) + 128 d): 54.5 billion, as published.
    "nllb_moe_54b": 54_500_569_088,
    # Vd + 514 d + d (token type) + 2d (norm) + L (4d^2 + 2 d f + 9d + f) + head d^2 + 3d + V; Hugging Face's counts.
    # base: 192,001,536 + 394,752 + 768 + 1,536 + 12 * 7,087,872 + 592,128 + 250,002.
    "xlm_r_base": 278_295_186,
    "xlm_r_large": 560_142_482,
    "xlm_r_xl": 3_482_741_760,
    "xlm_r_xxl": 10_712_994_816,
    # 2 V d + L (2d^2 + 2 d kv d_h + 3 d f + 2d) + d; one V d where the head is tied. 210M is the count without head:
    # 128256*768 = 98,500,608; 12 * (4*768^2 + 3*768*3072 + 1536) + 768 = 113,265,408; 98,500,608 once more.
    "eurobert_210m": 310_266_624,
    "eurobert_610m": 755_625_600,
    "eurobert_2_1b": 2_403_092_736,
    "llama_2_7b": 6_738_415_616,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_1_70b": 70_553_706_496,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    # Vd + L (4d^2 + 3 d f + 9d + 2f) + 2d: 150528*12288 = 1,849,688,064; 70 * 1,812,115,456; 24,576.
    "glm_130b": 128_697_794_560,
    # Not published as a number; d = 620, n = 1000 units. Tables and head 3 * 30000 d; encoder 6 (d n + n^2 + n) gates,
    # 2 n d out, 2 d norms; decoder 3 (2 d n + n^2 + n), context d^2, key, out and start 3 d n, query n^2, score n, 2 d.
    "rnnsearch_50": 55_800_000 + 10_967_240 + 9_969_640,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_the_published_parameter_counts(name):
    assert trees.count(Transformer(preset(name)).shapes()) == PUBLISHED[name]


def test_every_preset_is_counted():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny"}  # which is nobody's


def test_every_preset_builds_and_survives_json():
    for name in PRESETS:
        config = preset(
            name, dropout=0.1, remat="full", scan=False, attention="blockwise", dtype="bfloat16", vocab_size=1000
        )
        assert from_json(to_json(config)) == config
        assert {(stack.dropout, stack.attention) for stack in config.stacks().values()} == {(0.1, "blockwise")}


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
BUCKETS = dataclasses.replace(ATTENTION, position=PositionSpec())
LAYER = LayerSpec(sublayers=(BUCKETS, FFNSpec(d_ff=8)))
OTHER = LayerSpec(sublayers=(dataclasses.replace(BUCKETS, heads=4), FFNSpec(d_ff=8)))
ROPE = PositionSpec(kind="rope")


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
            lambda: StackConfig(group=(LAYER,), repeats=1, causal=False, attention="block"),
            r"attention='block' is not one of .*did you mean 'blockwise'",
        ),
        (
            lambda: StackConfig(group=(LayerSpec(sublayers=(CROSS,)),), repeats=1, causal=True),
            r"holds self-attention or recurrence, so tokens never meet",
        ),
        (lambda: HeadSpec(kind="lin"), r"HeadSpec.kind='lin' is not one of .*did you mean 'linear'"),
        (lambda: HeadSpec(softcap=0.0), r"HeadSpec.softcap=0.0 must be above 0"),
        (lambda: AttentionSpec(source="self", heads=6, head_dim=4, kv_heads=4), r"kv_heads=4 .*heads=6; .*1, 2, 3, 6"),
        (lambda: AttentionSpec(source="cross", heads=2, head_dim=4, window=3), r"window=3 .*must be None"),
        (lambda: AttentionSpec(source="self", heads=2, head_dim=3, position=ROPE), r"head_dim=3 must be even"),
        (
            lambda: AttentionSpec(source="self", heads=2, head_dim=4, qk_norm="l2_scalar", scale=0.5),
            r"learns its scale; scale=0.5 must be None",
        ),
        (lambda: PositionSpec(kind="alibbi"), r"did you mean 'alibi'"),
        (lambda: PositionSpec(context=512), r"context=512 belongs to kind='rope', not 't5_bucket'"),
        (lambda: EmbeddingSpec(std=0.0), r"EmbeddingSpec.std=0.0 must be above 0"),
        (lambda: NormSpec(kind="layer", offset_one=True), r"offset_one=True belongs to kind='rms'"),
        (lambda: ResidualSpec(order="pre", alpha=2.0), r"alpha=2.0 belongs to order='post'"),
        (lambda: EmbeddingSpec(positions="learned"), r"length=None: a learned table"),
        (lambda: EmbeddingSpec(length=8), r"positions='none' with length=8"),
        (lambda: dataclasses.replace(TINY.encoder, rest=1), r"rest=1 must be less than the group's 1 layers"),
        (lambda: StackConfig(group=(LAYER, OTHER), repeats=1, causal=False), r"heads and buckets must agree"),
        (
            lambda: LayerSpec(sublayers=(AttentionSpec(source="joint", heads=2, head_dim=4), CROSS, FFNSpec(d_ff=8))),
            r"holds no cross-attention as well",
        ),
        (
            lambda: dataclasses.replace(preset("t5gemma2_270m"), head=HeadSpec(kind="tied", multiply=0.5)),
            r"not twice: embedding.multiply=25.2982 .* and head.multiply=0.5",
        ),
        (lambda: dataclasses.replace(TINY, encoder=None, decoder=None), r"found neither"),
        (lambda: dataclasses.replace(TINY, encoder=None), r"there is no encoder to read"),
        (lambda: dataclasses.replace(TINY, encoder_width=64), r"encoder_width=64 .*share_embedding=False"),
        (
            lambda: dataclasses.replace(preset("t5gemma2_270m"), encoder_width=64, share_embedding=False),
            r"joint attention reads encoder and decoder with the same matrices",
        ),
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


def test_deep_norm_has_the_published_constants():
    # N = M = 6: 0.81 (6^5)^(1/16) = 1.418, 0.87 (6^5)^(-1/16) = 0.497, 18^(1/4) = 2.060, 72^(-1/4) = 0.343.
    encoder, decoder = deep_norm(6, 6)
    assert (encoder.alpha, encoder.gain) == pytest.approx((1.418, 0.497), abs=1e-3)
    assert (decoder.alpha, decoder.gain) == pytest.approx((2.060, 0.343), abs=1e-3)
    # One stack of 70: 140^(1/4) = 3.440, 560^(-1/4) = 0.2056.
    assert deep_norm(None, 70)[1].alpha == pytest.approx(3.440, abs=1e-3)
    with pytest.raises(ValueError, match="at least one stack"):
        deep_norm(None, None)


def test_a_dense_preset_becomes_sparse_by_a_router():
    """Every second layer's network; an odd layer stays; a decoder keeps its dense networks where experts choose."""
    config = preset("tiny", router=RouterSpec(experts=4))
    names = [layer.names() for layer in config.encoder.layer_specs()]
    assert names == [("self_attention", "ffn"), ("self_attention", "moe")]
    odd = sparse(
        t5_style(vocab_size=9, d_model=4, d_ff=4, heads=1, head_dim=4, layers=(5, 2)), RouterSpec(experts=2), every=2
    )
    assert [layer.names()[-1] for layer in odd.encoder.layer_specs()] == ["ffn", "moe", "ffn", "moe", "ffn"]
    chosen = preset("tiny", router=RouterSpec(experts=4, kind="expert_choice", capacity=2.0, balance=0.0))
    assert chosen.encoder.routers()
    assert not chosen.decoder.routers()
    with pytest.raises(ValueError, match="6 different layers is not made sparse"):
        preset("gemma_3_270m", router=RouterSpec(experts=4))


def test_a_preset_knows_distances_in_another_way():
    """Self- and joint attention do; cross-attention knows none, and a table that nobody reads goes."""
    alibi = PositionSpec(kind="alibi")
    config = preset("tiny", position=alibi)
    kinds = [spec.position.kind for stack in config.stacks().values() for spec in stack.attentions()]
    assert kinds == ["alibi", "alibi", "none"]
    assert "position" not in Transformer(config).shapes()["encoder"]
    assert preset("t5gemma2_270m", position=alibi).decoder.attentions()[0].position == alibi


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ({"kind": "expert_choice", "capacity": 2.0, "balance": 0.0}, "kind='expert_choice' decides by later tokens"),
        ({"k": 2, "capacity": 1.0, "priority": "score"}, "priority='score' decides by later tokens"),
        ({"k": 2, "capacity": 1.0, "priority": "choice"}, "priority='choice' with k=2 lets first choices of later"),
    ],
)
def test_routers_that_look_ahead_are_refused_in_a_decoder(router, said):
    config = preset("tiny")
    mixture = FFNSpec(d_ff=4, router=RouterSpec(experts=4, **router))
    layer = LayerSpec(sublayers=(*config.decoder.group[0].sublayers[:-1], mixture))
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config.decoder, group=(layer,))
    encoder = LayerSpec(sublayers=(config.encoder.group[0].sublayers[0], mixture))
    assert dataclasses.replace(config.encoder, group=(encoder,)).routers()


def test_mixtures_of_a_stack_have_one_number_of_experts():
    own = preset("tiny").encoder
    layers = tuple(
        LayerSpec(sublayers=(own.group[0].sublayers[0], FFNSpec(d_ff=4, router=RouterSpec(experts=e)))) for e in (2, 4)
    )
    with pytest.raises(ValueError, match=r"must agree; found \[2, 4\]"):
        dataclasses.replace(own, group=layers, repeats=1)
