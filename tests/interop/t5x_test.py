"""T5X's public layout, scanned and not, gives the model that the same weights give through Hugging Face."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from flax import serialization

import mlm
from mlm.checkpoints import Checkpointer
from mlm.cli.main import main
from mlm.interop.huggingface import import_params, open_published, write_pieces
from mlm.interop.rules import ConversionError
from mlm.interop.t5x import open_t5x
from mlm.trees import named_leaves
from tests.interop import recipe

NORMS = {"encoder": ("attention", "mlp"), "decoder": ("self_attention", "cross_attention", "mlp")}


def arrays(name: str, scanned: bool) -> dict[str, np.ndarray]:
    """The golden's tensors under T5X's names, written down independently of the rules: kernels are [in, out]."""
    theirs = recipe.tensors(recipe.load(recipe.GOLDENS / f"{name}.npz").shapes)
    found = {"token_embedder.embedding": theirs["shared.weight"]}
    if "lm_head.weight" in theirs:
        found["decoder.logits_dense.kernel"] = theirs["lm_head.weight"].T
    for side, sublayers in NORMS.items():
        layers = []
        while f"{side}.block.{len(layers)}.layer.0.layer_norm.weight" in theirs:
            block, own = f"{side}.block.{len(layers)}.layer", {}
            for place, sublayer in enumerate(sublayers):
                own[f"pre_{sublayer}_layer_norm.scale"] = theirs[f"{block}.{place}.layer_norm.weight"]
                kind = {"mlp": "DenseReluDense", "cross_attention": "EncDecAttention"}.get(sublayer, "SelfAttention")
                target = "encoder_decoder_attention" if sublayer == "cross_attention" else sublayer
                names = {"q": "query", "k": "key", "v": "value", "o": "out"}
                for short in ("wi", "wi_0", "wi_1", "wo", "q", "k", "v", "o"):
                    weight = theirs.get(f"{block}.{place}.{kind}.{short}.weight")
                    if weight is not None:
                        own[f"{target}.{names.get(short, short)}.kernel"] = weight.T
            if name == "umt5":
                own["relpos_bias.rel_embedding"] = theirs[f"{block}.0.SelfAttention.relative_attention_bias.weight"].T
            layers.append(own)
        if scanned:
            found |= {f"{side}.{side}.{n}": np.stack([own[n] for own in layers], axis=1) for n in layers[0]}
        else:
            found |= {f"{side}.layers_{i}.{n}": x for i, own in enumerate(layers) for n, x in own.items()}
        found[f"{side}.{side}_norm.scale"] = theirs[f"{side}.final_layer_norm.weight"]
        if name != "umt5":
            table = theirs[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            found[f"{side}.relpos_bias.rel_embedding"] = table.T
    return found


def write(folder: Path, content: dict[str, np.ndarray], inline: int = 0) -> Path:
    """inline: arrays of fewer elements stand in the msgpack file itself."""
    folder.mkdir(parents=True)
    tree: dict = {}
    for name, values in content.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        if values.size < inline:
            node[last] = np.ascontiguousarray(values)
            continue
        store = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/target.{name}"}}
        chunks = [max(1, size // 2) for size in values.shape]
        metadata = {"shape": values.shape, "chunks": chunks, "dtype": "<f4", "compressor": {"id": "gzip", "level": 1}}
        ts.open({**store, "metadata": metadata}, create=True).result().write(values).result()
        node[last] = {**store, "metadata": {**metadata, "shape": list(values.shape)}}
    state = {"step": np.int32(1000), "param_states": {"token_embedder": {"embedding": {"v": np.zeros(3, np.float32)}}}}
    content = {"version": 3, "optimizer": {"target": tree, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


@pytest.mark.parametrize(("name", "scanned"), [("t5", False), ("t5_1_1", True), ("umt5", True), ("umt5", False)])
def test_the_same_weights_are_the_same_model(name, scanned, tmp_path):
    golden = recipe.load(recipe.GOLDENS / f"{name}.npz")
    published = open_published(recipe.write_folder(tmp_path / "hf", golden.config, golden.shapes))
    import_params(published, tmp_path / "want")
    folder = write(tmp_path / "run" / "checkpoint_1000", arrays(name, scanned), inline=20)
    (tmp_path / "run" / "config.gin").write_text("relative_attention_max_distance = 20\n")
    found = open_t5x(folder)
    assert (found.config, found.step) == (published.config, 1000)
    write_pieces(found.pieces, found.config, found.arrays.read, tmp_path / "got", lambda blocks: blocks)
    want, got = (dict(named_leaves(Checkpointer(str(tmp_path / n)).restore_params().state)) for n in ("want", "got"))
    assert set(want) == set(got)
    for path, values in want.items():
        np.testing.assert_array_equal(got[path], values, err_msg=path)


def test_it_becomes_a_run(tmp_path, capsys):
    content = arrays("t5_1_1", True)
    content["token_embedder.embedding"] = np.resize(content["token_embedder.embedding"], (384, 16))
    content["decoder.logits_dense.kernel"] = np.resize(content["decoder.logits_dense.kernel"], (16, 384))
    folder = write(tmp_path / "t5x", content)
    assert main(["convert", "from-t5x", str(folder), str(tmp_path / "run")]) == 2
    assert "--vocabulary FILE" in capsys.readouterr().err
    assert main(["convert", "from-t5x", str(folder), str(tmp_path / "run"), "--vocabulary", "bytes"]) == 0
    # Encoder 2 norms + 4 + 3, decoder 3 norms + 8 + 3, and table, head, two final norms, two position tables.
    assert "from 29 arrays of step 1,000" in " ".join(capsys.readouterr().out.split())
    session = mlm.load(tmp_path / "run")
    assert isinstance(session.generate("hi", max_length=4)[0], str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("decoder.decoder_norm.scale"), "decoder.decoder_norm.scale is missing"),
        (
            lambda c: c.update({"decoder.extra.kernel": np.ones((2, 2), np.float32)}),
            "decoder.extra.kernel .2, 2. is unkn",
        ),
        (lambda c: c.update({"encoder.encoder_norm.scale": np.ones(5, np.float32)}), "the others say .16,."),
        (lambda c: c.pop("token_embedder.embedding"), "has no token_embedder.embedding, so it is no T5"),
    ],
)
def test_other_arrays_are_refused(change, message, tmp_path):
    content = arrays("t5_1_1", False)
    change(content)
    with pytest.raises(ConversionError, match=message):
        open_t5x(write(tmp_path / "t5x", content))


def test_activations_that_nobody_knows_are_refused(tmp_path):
    folder = write(tmp_path / "t5x", arrays("t5_1_1", False))
    (folder / "config.gin").write_text("network.T5Config.mlp_activations = ('tanh', 'linear')\n")
    with pytest.raises(ConversionError, match=r"mlp_activations=\('tanh', 'linear'\): known are"):
        open_t5x(folder)


def test_a_pickle_is_no_tree(tmp_path):
    """Nor is it run: msgpack knows no code."""
    import pickle

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    folder = write(tmp_path / "t5x", arrays("t5", False))
    (folder / "checkpoint").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ConversionError, match=r"is no msgpack file of T5X|not the tree"):
        open_t5x(folder)
    assert not (tmp_path / "owned").exists()


def test_incomplete_copies_are_refused(tmp_path):
    import shutil

    folder = write(tmp_path / "checkpoint_7", arrays("t5", False))
    with pytest.raises(ConversionError, match=r"holds checkpoint_7: name one"):
        open_t5x(tmp_path)
    chunk = folder / "target.encoder.layers_0.mlp.wo.kernel" / "1.1"
    chunk.unlink()
    found = open_t5x(folder)
    with pytest.raises(ConversionError, match=r"encoder.layers_0.mlp.wo.kernel cannot be read"):
        write_pieces(found.pieces, found.config, found.arrays.read, tmp_path / "got", lambda blocks: blocks)
    shutil.rmtree(chunk.parent)
    with pytest.raises(ConversionError, match=r"1 arrays that its tree names are not there.*mlp.wo.kernel"):
        open_t5x(folder)
    (folder / "checkpoint").write_bytes(b"\x93nonsense")
    with pytest.raises(ConversionError, match=r"is no msgpack file of T5X|not the tree"):
        open_t5x(folder)
