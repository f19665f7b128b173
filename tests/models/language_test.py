"""Parts kept by target language: the target's own, nobody else's, and nothing at first."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.scoring import Scorer
from mlm.models.config import HeadSpec, to_json
from mlm.models.families import fairseq_style, language_aware, t5_style
from mlm.models.flops import idle_parameters
from mlm.models.language import Bridge, languages_of_sources
from mlm.models.layers import Norm
from mlm.models.presets import preset
from mlm.models.specs import NormSpec
from mlm.models.transformer import Transformer
from mlm.types import ONE_DEVICE
from tests.models import rows
from tests.models.rows import logits_of

PLAIN = fairseq_style(vocab_size=23, d_model=8, d_ff=10, heads=2, layers=1)
ALL = {"norms": True, "bridge": True, "offsets": ("language", "script"), "scripts": (0, 1, 1, 2, 0)}
batch_of = partial(rows.batch_of, source_length=6, target_length=5)
ROWS = [([5, 6, 7, 1], [3, 4, 5, 1]), ([11, 12, 1], [14, 1])]  # they write languages 1 and 2


@pytest.fixture(scope="module")
def aware():
    """(model, parameters with tables of different rows)."""
    model = Transformer(language_aware(PLAIN, languages=5, **ALL))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return model, jax.tree.map(draw, model.shapes())


def test_a_model_that_becomes_aware_computes_what_it_did():
    """Equal tables are one norm, identities no bridge, zeros no offsets."""
    plain, model = Transformer(PLAIN), Transformer(language_aware(PLAIN, languages=5, **ALL))
    batch = batch_of(ROWS)
    before, after = (jax.jit(m.init)(jax.random.key(0)) for m in (plain, model))
    np.testing.assert_allclose(logits_of(model, after, batch), logits_of(plain, before, batch), rtol=1e-5, atol=1e-5)


def test_a_norm_by_language_is_the_norm_of_each_language():
    spec = NormSpec(kind="layer", languages=4)
    norm, rng = Norm(6, spec), np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(2, 3, 6)), rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    norm.scale[...], norm.bias[...] = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    languages = np.array([[0, 3, 3], [1, 1, 2]])
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    got = norm(jnp.asarray(x, jnp.float32), jnp.asarray(languages))
    np.testing.assert_allclose(got, y * scale[languages] + bias[languages], rtol=1e-4, atol=1e-5)


def test_the_bridge_is_the_matrix_of_each_token_s_language():
    bridge, rng = Bridge(4, 5), np.random.default_rng(0)
    x, matrices = rng.normal(size=(2, 7, 4)), rng.normal(size=(5, 4, 4))
    languages = rng.integers(0, 5, (2, 7))
    bridge.matrices[...] = jnp.asarray(matrices, jnp.float32)
    got = bridge(jnp.asarray(x, jnp.float32), jnp.asarray(languages), ONE_DEVICE)
    np.testing.assert_allclose(got, np.einsum("btd,btde->bte", x, matrices[languages]), rtol=1e-4, atol=1e-5)


def test_sources_take_the_language_of_their_own_target():
    got = languages_of_sources(jnp.array([[1, 1, 2, 3, 0]]), jnp.array([[1, 2, 2, 0]]), jnp.array([[7, 4, 4, 9]]))
    assert got.tolist() == [[7, 7, 4, 0, 0]]


def test_gradients_touch_the_languages_of_the_batch_alone(aware):
    model, params = aware
    batch = batch_of(ROWS)
    weights = batch["decoder_segment_ids"][..., None] > 0
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.logits(p, model(p, batch).hidden)) * weights)))(params)
    touched = lambda leaf, axis: np.flatnonzero(np.abs(np.moveaxis(leaf, axis, 0)).reshape(leaf.shape[axis], -1).max(1))  # noqa: E731
    checked = []

    def check(names, leaf):
        if "languages" in names:
            found = touched(np.asarray(leaf), names.index("languages")).tolist()
            assert found == ([1] if leaf.shape[0] == 3 else [1, 2]), names  # languages 1 and 2 share script 1
            checked.append(names)

    jax.tree.map(check, model.axes(), grads, is_leaf=lambda x: isinstance(x, tuple))
    # Bridge, two offsets; scale and bias of 5 sublayers and 2 final norms.
    assert len(checked) == 3 + 2 * 7


def test_the_encoder_knows_the_target_and_not_its_own_language(aware):
    model, params = aware
    batch = batch_of(ROWS)
    run = jax.jit(lambda batch: model(params, batch).encoded)
    want = run(batch)
    as_read = run({**batch, "encoder_language_ids": jnp.full((2, 6), 4)})
    as_written = run({**batch, "decoder_language_ids": jnp.full((2, 5), 4)})
    np.testing.assert_array_equal(as_read, want)
    assert not np.allclose(as_written[:, 0], want[:, 0], atol=0.1)


def test_below_offsets_states_know_no_language():
    model = Transformer(language_aware(PLAIN, languages=5, offsets=("language",)))
    params = jax.jit(model.init)(jax.random.key(0))
    params["offsets"] = {"language": jnp.arange(5.0)[:, None] * jnp.ones(8)}
    batch = batch_of(ROWS)
    run = jax.jit(lambda batch: model(params, batch))
    one, other = (run({**batch, "decoder_language_ids": jnp.full((2, 5), i)}) for i in (1, 3))
    np.testing.assert_array_equal(one.encoded, other.encoded)
    np.testing.assert_allclose(other.hidden - one.hidden, 2.0, rtol=1e-4)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_decoding_writes_as_the_language_it_is_told(aware, method):
    """Its scores are those of the whole pass in that language, and another language has others."""
    model, params = aware
    sources, languages = [[5, 6, 7, 1], [5, 6, 7, 1], [9, 1]], [1, 3, 2]
    options = {"beams": 2, "alpha": 0.0} if method == "beam" else {}
    generator = Generator(model, DecodeConfig(method=method, max_length=5, **options))
    found = generator(params, sources, languages=languages)
    targets = [row[0][: n[0]].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
    scorer = Scorer(model)
    np.testing.assert_allclose(scorer(params, sources, targets, languages).totals, found.scores[:, 0], atol=1e-4)
    assert not np.allclose(scorer(params, sources, targets, [2, 2, 3]).totals, found.scores[:, 0], atol=1e-2)


def test_without_a_language_nothing_is_decoded(aware):
    model, params = aware
    with pytest.raises(ValueError, match=r"language-aware.*languages=\[ids\]"):
        Generator(model, DecodeConfig(max_length=4))(params, [[5, 1]])
    with pytest.raises(ValueError, match=r"1 languages for 2 sources"):
        Scorer(model)(params, [[5, 1], [6, 1]], [[1], [1]], [3])
    with pytest.raises(ValueError, match=r"languages=\[5\] must be ids of the model's 5"):
        Scorer(model)(params, [[5, 1]], [[1]], [5])
    with pytest.raises(ValueError, match="needs decoder_language_ids"):
        model(params, {n: x for n, x in batch_of(ROWS).items() if n != "decoder_language_ids"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": 5}, "found nothing that is"),
        ({"bridge": True}, r"languages=None .* found bridge=True"),
        ({"languages": 0}, "must be an integer of at least 1"),
        ({"languages": 2, "bridge": True, "decoder": None}, "one of them alone"),
        ({"languages": 2, "head": HeadSpec(offsets=("script",)), "scripts": (0,)}, r"scripts=\(0,\) must number"),
        ({"languages": 2, "bridge": True, "scripts": (0, 1)}, "be \\(\\) without one"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(t5_style(vocab_size=9, d_model=4, d_ff=4, heads=1, head_dim=4, layers=(1, 1)), **change)


def test_numbers_of_languages_agree_and_offsets_are_known():
    norms = language_aware(PLAIN, languages=5, norms=True)
    with pytest.raises(ValueError, match=r"languages=6 .* found norm.languages=5"):
        dataclasses.replace(norms, languages=6)
    with pytest.raises(ValueError, match="did you mean 'script'"):
        HeadSpec(offsets=("scripts",))
    assert to_json(norms)["decoder"]["norm"]["languages"] == 5


def test_a_preset_becomes_aware():
    config = preset("tiny", languages=5, language_parts=("norms", "offsets"))
    assert config == language_aware(preset("tiny"), languages=5, norms=True, offsets=("language",))
    with pytest.raises(ValueError, match="needs languages"):
        preset("tiny", language_parts=("bridge",))
    with pytest.raises(ValueError, match="did you mean 'bridge'"):
        preset("tiny", languages=5, language_parts=("bridg",))


def test_parameters_of_other_languages_are_idle():
    """The bridge of PLAIN's 8 numbers: 4 of 5 matrices; scales of T5's 5 sublayers and 2 final norms: 4 of 5 rows."""
    assert idle_parameters(language_aware(PLAIN, languages=5, bridge=True)) == 4 * 64
    t5 = t5_style(vocab_size=9, d_model=4, d_ff=4, heads=1, head_dim=4, layers=(1, 1))
    assert idle_parameters(language_aware(t5, languages=5, norms=True)) == 7 * 4 * 4
