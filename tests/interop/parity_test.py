"""Every family computes what its PyTorch model computes, in both directions; goldens need no torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.checkpoints import Checkpointer
from mlm.checkpoints.streaming import StoredParams
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.interop.files import TensorFolder
from mlm.interop.huggingface import describe, export_params, import_params, open_published
from mlm.models.transformer import Transformer
from mlm.objectives.cross_entropy import head_cross_entropy
from tests.interop import recipe
from tests.interop.recipe import Golden

MEMBERS = sorted(path.stem for path in recipe.GOLDENS.glob("*.npz"))


class Converted:
    """One golden, its folder, and the model that was made of it."""

    def __init__(self, name: str, folder: Path):
        self.golden = recipe.load(recipe.GOLDENS / f"{name}.npz")
        self.folder = recipe.write_folder(folder / "hf", self.golden.config, self.golden.shapes)
        self.published = open_published(self.folder)
        self.checkpoints = folder / "checkpoints"
        import_params(self.published, self.checkpoints)
        self.config = self.published.config
        self.params = Checkpointer(str(self.checkpoints), read_only=True).restore_params().state
        self.model = Transformer(self.config)

    def ids(self, theirs: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Ours; 0 where there is nothing."""
        return np.where(real, self.order()[theirs], 0).astype(np.int32)

    def order(self) -> np.ndarray:
        """Our id of every published one."""
        return np.array([self.published.family.ids.ours(i) for i in range(recipe.VOCABULARY)])


@pytest.fixture(scope="module", params=MEMBERS)
def converted(request, tmp_path_factory) -> Converted:
    return Converted(request.param, tmp_path_factory.mktemp(request.param))


def relative(got, want: np.ndarray) -> float:
    """Largest error, as a share of the largest value."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def batch_of(converted: Converted) -> tuple[dict, np.ndarray, np.ndarray]:
    """(our batch, which source and which target positions are real)."""
    golden: Golden = converted.golden
    read = np.arange(golden.source.shape[1]) < golden.lengths[:, None]
    told = np.arange(golden.target.shape[1]) < golden.target_lengths[:, None]
    target = converted.ids(golden.target, told)
    batch = {
        "encoder_input_tokens": converted.ids(golden.source, read),
        "encoder_segment_ids": read.astype(np.int32),
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_segment_ids": told.astype(np.int32),
    }
    return {name: jnp.asarray(x) for name, x in batch.items()}, read, told


def test_states_logits_and_loss_equal_pytorch(converted):
    golden, model = converted.golden, converted.model
    batch, read, told = batch_of(converted)
    output = jax.jit(model.__call__)(converted.params, batch)
    logits = np.asarray(model.logits(converted.params, output.hidden))
    errors = {"logits": relative(logits[told][:, converted.order()], golden.logits[told])}
    if converted.config.encoder:
        errors["encoded"] = relative(np.asarray(output.encoded)[read], golden.encoded[read])
    hidden, kernel, bias = model.head(converted.params, output.hidden)
    counted = told if converted.config.decoder else told & (golden.source != golden.target)  # where it was masked
    total, _ = head_cross_entropy(
        hidden,
        kernel,
        batch["decoder_target_tokens"],
        jnp.asarray(counted, jnp.float32),
        bias=bias,
        z_loss=0.0,
        softcap=converted.config.head.softcap,
    )
    errors["loss"] = relative(total / counted.sum(), golden.loss)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-4, errors


def test_greedy_tokens_equal_pytorch(converted):
    golden = converted.golden
    if not golden.generated.size:
        pytest.skip("one stack alone has no source, or nothing that writes")
    batch, _, _ = batch_of(converted)
    sources = [
        row[:length] for row, length in zip(np.asarray(batch["encoder_input_tokens"]), golden.lengths, strict=True)
    ]
    width = golden.generated.shape[1]
    found = Generator(converted.model, DecodeConfig(max_length=width))(converted.params, sources)
    for got, length, want in zip(found.tokens[:, 0], found.lengths[:, 0], golden.generated, strict=True):
        np.testing.assert_array_equal(got[:length], converted.ids(want, np.True_)[:length])
        assert length == width or got[length - 1] == 1  # it stopped only at the end of sequence


def test_a_round_trip_keeps_every_bit(converted, tmp_path):
    family = converted.published.family
    _, files = export_params(
        StoredParams(converted.checkpoints), converted.config, tmp_path, family=family.name, shard_bytes=6000
    )
    assert files > 2
    before, after = TensorFolder(converted.folder), TensorFolder(tmp_path)
    assert set(after.shapes) == {piece.name for piece in converted.published.pieces}
    for name in after.shapes:
        np.testing.assert_array_equal(after.read(name, slice(0, None)), before.read(name, slice(0, None)))
    again = open_published(tmp_path)
    assert (again.family, again.config) == (family, converted.config)
    assert describe(converted.config, family.name)[0] is family
