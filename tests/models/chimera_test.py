"""Chimera heads as parts of a model: what they begin as, what they see, and that nothing else knows of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models.chimera import Chimera
from mlm.models.config import from_json, to_json
from mlm.models.presets import preset
from mlm.models.specs import ChimeraSpec
from mlm.models.transformer import Transformer
from mlm.trees import count
from tests.models.rows import batch_of, logits_of
from tests.training.toy import MODEL

SPEC = ChimeraSpec(heads=2, attention_heads=2, head_dim=8, d_ff=24)
CONFIG = dataclasses.replace(MODEL, chimera=SPEC)
LENGTH, WIDTH = 7, 16


@pytest.fixture(scope="module")
def heads():
    """The heads with random parameters, all of which take part."""
    model = Transformer(CONFIG)
    params = model.init(jax.random.key(0))
    key = jax.random.key(1)
    params["chimera"] = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), params["chimera"]
    )
    return model.chimera(params)


def test_the_rest_of_a_model_is_what_it_is_without_them():
    key, batch = jax.random.key(0), batch_of([([5, 6, 7], [8, 9, 1]), ([9], [3, 1])], 4, 4)
    plain, model = Transformer(MODEL), Transformer(CONFIG)
    params = model.init(key)
    want = plain.init(key)
    jax.tree.map(np.testing.assert_array_equal, {n: x for n, x in params.items() if n != "chimera"}, want)
    np.testing.assert_array_equal(logits_of(model, params, batch), logits_of(plain, want, batch))
    # Trigrams 9 d^2 + 3 d^2; norms 2 d; query, key, value, output 4 d H K; network 3 d F; matrices n 2 d^2.
    size = 12 * 16**2 + 2 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 2 * 2 * 16**2
    assert count(model.shapes()) - count(plain.shapes()) == count(params["chimera"]) == size
    assert jax.tree.structure(model.axes(), is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="no chimera heads"):
        plain.chimera(want)


def test_at_first_a_head_says_what_state_and_layer_say_together():
    model = Transformer(CONFIG)
    params = model.init(jax.random.key(0))
    rows, hidden = jax.random.normal(jax.random.key(2), (2, 1, LENGTH, WIDTH))
    drafted = model.chimera(params).whole(rows, hidden, jnp.ones((1, LENGTH), jnp.int32))
    for k in (1, 2):
        want = drafted.states[k - 1, :, k:] + hidden[:, :-k]
        np.testing.assert_allclose(drafted.mixed[k - 1, :, k:], want, rtol=1e-5, atol=1e-6)
        assert drafted.known[k - 1, 0].tolist() == [False] * k + [True] * (LENGTH - k)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("place", [2, 5])
def test_a_head_sees_states_up_to_its_own_and_three_tokens(heads, k, place):
    segments = jnp.ones((1, LENGTH), jnp.int32)

    def said(rows, hidden):
        return heads.whole(rows, hidden, segments).mixed[k - 1, 0, place].sum()

    rows, hidden = jax.random.normal(jax.random.key(2), (2, 1, LENGTH, WIDTH))
    of_rows, of_states = (jnp.abs(g[0]).sum(-1) > 0 for g in jax.grad(said, (0, 1))(rows, hidden))
    assert of_rows.tolist() == [place - 2 <= p <= place for p in range(LENGTH)]
    assert of_states.tolist() == [p <= place - k for p in range(LENGTH)]


def test_the_first_two_places_repeat_their_first_embedding(heads, monkeypatch):
    """A text w x … has at its first two places the trigrams of w w w and w w x."""
    rows = jax.random.normal(jax.random.key(2), (1, LENGTH, WIDTH))
    w, x = rows[:, :1], rows[:, 1:2]
    z = heads._trigrams(jnp.stack([jnp.concatenate(three, axis=1)[0] for three in ([w, w, w], [w, w, x])])[None])
    hidden, segments = jnp.zeros_like(rows), jnp.ones((1, LENGTH), jnp.int32)
    seen, looked = [], Chimera._looked
    monkeypatch.setattr(Chimera, "_looked", lambda self, z, *rest: seen.append(z) or looked(self, z, *rest))
    heads.whole(rows, hidden, segments)
    np.testing.assert_allclose(seen[0][:, :2], z, rtol=1e-5, atol=1e-5)


def test_a_packed_row_is_its_examples(heads):
    """Examples of 3 and 4 tokens in one row, behind them padding."""
    rows, hidden = jax.random.normal(jax.random.key(2), (2, 1, 9, WIDTH))
    packed = heads.whole(rows, hidden, jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]]))
    for start, stop in ((0, 3), (3, 7)):
        own = np.s_[:, start:stop]
        alone = heads.whole(rows[own], hidden[own], jnp.ones((1, stop - start), jnp.int32))
        np.testing.assert_array_equal(packed.known[:, :, start:stop], alone.known)
        np.testing.assert_allclose(packed.states[:, :, start:stop], alone.states, rtol=1e-5, atol=1e-5)
        for k in (1, 2):
            there, want = packed.mixed[k - 1, 0, start + k : stop], alone.mixed[k - 1, 0, k:]
            np.testing.assert_allclose(there, want, rtol=1e-5, atol=1e-5)
    assert not packed.known[:, :, 7:].any()


def test_a_config_with_heads_survives_json_and_comes_from_a_preset():
    config = preset("tiny", chimera=SPEC)
    assert config.chimera == SPEC
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChimeraSpec(heads=0), "ChimeraSpec.heads=0 must be an integer of at least 1"),
        (lambda: ChimeraSpec(head_dim=7), "head_dim=7 must be even"),
        (lambda: preset("eurobert_210m", chimera=SPEC), "read a decoder's states, and this model has no decoder"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
