"""What cannot be converted is refused with the values, the rule and the fix, before anything is written."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlm.checkpoints.streaming import StoredParams
from mlm.interop.family import Keys
from mlm.interop.files import TensorFolder
from mlm.interop.huggingface import FAMILIES, describe, export_params, import_params, open_published
from mlm.interop.rules import Axes, ConversionError, Piece, plan
from mlm.models.comparison import mathematics
from mlm.models.presets import preset
from mlm.models.specs import ResidualSpec
from tests.interop import recipe

T5 = recipe.load(recipe.GOLDENS / "t5_1_1.npz")
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return recipe.write_folder(tmp_path / "hf", T5.config, T5.shapes)


def edit_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "model_type='bart' is no family.*did you mean 'mbart'"),
        ({"model_type": None}, "model_type='None' is no family"),
        ({"num_heads": None}, "has no 'num_heads'"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh', but only relu, gated-gelu"),
        ({"use_magic": 3}, "1 keys that may change the mathematics.*use_magic=3"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder=True, but only False"),
        ({"d_ff": 25}, r"wi_0.weight is \(24, 16\), the config says \(25, 16\)"),
        ({"num_layers": 4}, r"encoder.block.3.layer.\S+ is missing.* and 4 more"),
        ({"num_layers": 2}, r"encoder.block.2.layer.0.SelfAttention.k.weight \(18, 16\) is unknown"),
        ({"model_type": "umt5"}, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight is missing"),
        ({"relative_attention_num_buckets": 7}, "buckets=7 must be a multiple of 4"),
        ({"decoder_start_token_id": 40}, "start_token=40 is no id of the 40"),
    ],
)
def test_another_config_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ConversionError, match=rf"(?s){message}"):
        open_published(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(extra=np.zeros((2, 2), np.float32)), r"extra \(2, 2\) is unknown to the family"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), r"wi_0.weight is \(16, 24\)"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), "is of type I8.*quantised"),
        (lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1}), "differs from shared.weight"),
    ],
)
def test_other_tensors_are_refused(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(ConversionError, match=rf"(?s){message}"):
        open_published(folder)


def test_damaged_and_dangerous_files_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ConversionError, match=r"no whole safetensors file.*truncated"):
            open_published(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"holds neither model.safetensors nor"):
        open_published(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin.*can run any code"):
        open_published(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"2 of 2 files.*are missing"):
        open_published(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"has no 'weight_map' of tensor names and files"):
        open_published(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"holds a list, not a JSON object"):
        open_published(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"is not JSON"):
        open_published(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"no config.json in"):
        open_published(folder)


def test_copies_of_the_table_are_read_over(folder):
    """Old files hold it three times; a tied head that is saved too stays tied."""
    old = recipe.load(recipe.GOLDENS / "t5.npz")
    recipe.write_folder(folder, old.config, old.shapes)
    want = open_published(folder).config

    def repeat(tensors):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"].copy()

    edit_tensors(folder, repeat)
    assert open_published(folder).config == want
    assert want.head.kind == "tied"


XLM_R = recipe.load(recipe.GOLDENS / "xlm_r.npz")
TABLE = "roberta.embeddings.word_embeddings.weight"


def test_old_files_of_encoders_hold_more(tmp_path):
    """The output's matrix and bias again, numbers of positions, and the pooler of another head."""
    folder = recipe.write_folder(tmp_path / "hf", XLM_R.config, XLM_R.shapes)
    want = open_published(folder).config

    def as_it_was(tensors):
        tensors["lm_head.decoder.weight"] = tensors[TABLE].copy()
        tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"].copy()
        tensors["roberta.embeddings.position_ids"] = np.arange(16)[None]
        tensors["roberta.pooler.dense.weight"] = np.ones((24, 24), np.float32)
        tensors["roberta.pooler.dense.bias"] = np.ones(24, np.float32)

    edit_tensors(folder, as_it_was)
    assert open_published(folder).config == want
    edit_tensors(folder, lambda t: t.update({"lm_head.decoder.bias": t["lm_head.bias"] + 1}))
    with pytest.raises(ConversionError, match=r"lm_head.decoder.bias differs from lm_head.bias"):
        open_published(folder)


def test_a_tensor_may_be_there_under_the_name_of_its_copy(tmp_path):
    folder = recipe.write_folder(tmp_path / "hf", XLM_R.config, XLM_R.shapes)
    import_params(open_published(folder), tmp_path / "want")
    edit_tensors(folder, lambda t: t.update({"lm_head.decoder.weight": t.pop(TABLE)}))
    import_params(open_published(folder), tmp_path / "got")
    want, got = (
        StoredParams(tmp_path / name).read("embedding", (slice(0, 40), slice(0, 24))) for name in ("want", "got")
    )
    np.testing.assert_array_equal(got, want)
    edit_tensors(folder, lambda t: t.pop("lm_head.decoder.weight"))
    with pytest.raises(ConversionError, match=f"{TABLE} is missing"):
        open_published(folder)


def test_copies_need_no_original(folder):
    """Both input tables and the tied head, and not what they repeat."""
    old = recipe.load(recipe.GOLDENS / "t5.npz")
    recipe.write_folder(folder, old.config, old.shapes)
    want = open_published(folder).config
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

    def repeat(tensors):
        table = tensors.pop("shared.weight")
        tensors.update({name: table.copy() for name in names})

    edit_tensors(folder, repeat)
    assert open_published(folder).config == want
    edit_tensors(folder, lambda t: t.update({names[1]: t[names[0]] + 1}))
    with pytest.raises(ConversionError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        open_published(folder)


def test_a_head_of_its_own_is_no_input_table(folder):
    """The matrix of an untied head must not pass for the table that is missing."""
    edit_tensors(folder, lambda t: t.pop("shared.weight"))
    with pytest.raises(ConversionError, match=r"shared.weight is missing"):
        open_published(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "is_decoder=True, but only False"),
        ({"position_embedding_type": "relative_key"}, "'relative_key', but only 'absolute'"),
        ({"type_vocab_size": 2}, "type_vocab_size=2, but only 1"),
        ({"pad_token_id": 0}, "pad_token_id=0, but only 1"),
        ({"max_position_embeddings": 17}, r"position_embeddings.weight is \(16, 24\), the config says \(17, 24\)"),
        ({"model_type": "xlm-roberta-xl"}, "roberta.encoder.LayerNorm.weight is missing"),
        ({"model_type": "roberta"}, "did you mean 'xlm-roberta'"),
    ],
)
def test_another_encoder_is_refused(tmp_path, changes, message):
    folder = recipe.write_folder(tmp_path / "hf", XLM_R.config, XLM_R.shapes)
    edit_config(folder, **changes)
    with pytest.raises(ConversionError, match=message):
        open_published(folder)


def test_sixteen_bits_come_in_whole_and_go_out_the_same(folder, tmp_path):
    halves = {n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors")
    published = open_published(folder)
    assert published.record()["dtype"] == "bfloat16"
    mixed = {**halves, GATE: halves[GATE].astype(np.float32)}
    save_file(mixed, folder / "model.safetensors")
    assert open_published(folder).record()["dtype"] == "float32"
    save_file(halves, folder / "model.safetensors")
    published = open_published(folder)
    import_params(published, tmp_path / "checkpoints")
    out = tmp_path / "out"
    out.mkdir()
    export_params(StoredParams(tmp_path / "checkpoints"), published.config, out, dtype="bfloat16")
    again = load_file(out / "model.safetensors")
    assert set(again) == set(halves)
    for name, values in halves.items():
        np.testing.assert_array_equal(again[name].view(np.uint16), values.view(np.uint16))


SAID = {
    **{"t5_small": "t5", "t5_1_1_xxl": "t5", "mt5_small": "t5", "byt5_base": "t5", "umt5_small": "umt5"},
    **{"m2m_100_418m": "m2m_100", "nllb_3_3b": "m2m_100", "mbart_50": "mbart"},
    **{"xlm_r_large": "xlm-roberta", "xlm_r_xxl": "xlm-roberta-xl"},
    **{"switch_base_8": "switch_transformers", "nllb_moe_54b": "nllb-moe"},
    **{
        "t5gemma_2b_2b": "t5gemma",
        "t5gemma_9b_2b": "t5gemma",
        "gemma_3_4b": "gemma3_text",
        "t5gemma2_270m": "t5gemma2",
    },
}


@pytest.mark.parametrize("name", SAID)
def test_published_sizes_are_the_presets(name):
    """config.json of a published size gives exactly the preset, but for what is of training alone."""
    config = preset(name)
    family, content = describe(config)
    assert family.name == SAID[name]
    names = frozenset({"lm_head.weight"} if config.head.kind == "linear" else ())
    keys = Keys({**content, "model_type": family.name}, name)
    assert mathematics(family.read(keys, names)) == mathematics(config)
    keys.finish(family.harmless)
    plan(config, family.rules(config))
    first = "bos_token_id" if family.name == "gemma3_text" else "decoder_start_token_id"
    published = {"t5": 0, "umt5": 0, "switch_transformers": 0, "xlm-roberta": None, "xlm-roberta-xl": None}
    assert content.get(first) == published.get(family.name, 2)  # </s> of fairseq, <bos> of Gemma


def test_a_model_of_no_family_says_what_no_family_says():
    config = preset("tiny")
    odd = replace(config, encoder=replace(config.encoder, residual=ResidualSpec(order="sandwich")))
    with pytest.raises(ConversionError, match=r"(?s)cannot say: encoder.residual.order: 'sandwich', not 'pre'"):
        describe(odd)
    with pytest.raises(KeyError, match=r"did you mean 'umt5'"):
        describe(config, "umt6")
    with pytest.raises(ConversionError, match=r"umt5 cannot say"):
        describe(config, "umt5")


def test_blocks_cover_a_tensor_once_whatever_their_size(monkeypatch):
    from mlm.interop import rules

    theirs = np.arange(5 * 3 * 4, dtype=np.float32).reshape(15, 4)
    piece = Piece("leaf", (), "name", Axes.parse("(h k) d -> d h k"), (4, 5, 3))
    assert piece.their_shape == (15, 4)
    for size in (1, 100, 200, 1 << 20):
        monkeypatch.setattr(rules, "BLOCK_BYTES", size)
        ours = np.full((4, 5, 3), np.nan, np.float32)
        back = np.full((15, 4), np.nan, np.float32)
        for block in piece.blocks():
            ours[block.index] = block.to_ours(theirs[block.rows])
            back[block.rows] = block.to_theirs(ours[block.index])
        np.testing.assert_array_equal(ours, theirs.T.reshape(4, 5, 3))
        np.testing.assert_array_equal(back, theirs)


def test_patterns_with_other_letters_are_refused():
    with pytest.raises(ValueError, match=r"other letters on its two sides"):
        Axes.parse("(h k) d -> d h")


def test_old_words_of_rotary_positions_are_understood():
    """transformers 4 wrote rope_theta, rope_local_base_freq and rope_scaling; 5 writes rope_parameters."""
    gemma = recipe.load(recipe.GOLDENS / "gemma3_text.npz").config
    old = {k: v for k, v in gemma.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    old |= {"sliding_window_pattern": 6}
    read = FAMILIES["gemma3_text"].read
    assert read(Keys(old, "old"), frozenset()) == read(Keys(gemma, "new"), frozenset())
    with pytest.raises(ConversionError, match=r"only 'default' and 'linear'"):
        read(Keys({**old, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "old"), frozenset())


def test_a_folder_without_tensors_of_a_shard_names_it_twice(tmp_path):
    for number in (1, 2):
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"a stands in model-1.safetensors and in model-2.safetensors"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("family", "special"),
    [
        ("t5", (0, 1, 2)),
        ("mbart", (1, 2, 3)),
        ("nllb-moe", (1, 2, 3)),
        ("xlm-roberta", (1, 2, 3)),
        ("t5gemma", (0, 1, 3)),
        ("t5gemma2", (0, 1, 3)),
    ],
)
def test_padding_end_and_unknown_become_0_1_2(family, special):
    """special: their ids in the published vocabularies; nothing else collides with them."""
    ids = FAMILIES[family].ids
    assert [ids.ours(i) for i in special] == [0, 1, 2]
    assert [ids.theirs(ids.ours(i)) for i in range(10)] == list(range(10))
    assert sorted(ids.ours(i) for i in range(10)) == list(range(10))
