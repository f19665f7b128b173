"""A model made sparse starts as it was; a model with fewer experts keeps those that were chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.adaptation.experts import keep_most_used, merge, prune, upcycle
from mlm.models.depth import join_layers, split_layers
from mlm.models.families import fairseq_style, gemma_3, sparse, t5_style
from mlm.models.specs import RouterSpec
from mlm.models.transformer import Transformer
from tests.models.rows import batch_of, logits_of

V = 23
DENSE = t5_style(vocab_size=V, d_model=12, d_ff=10, heads=3, head_dim=4, layers=(3, 2))
BATCH = batch_of([([5, 6, 7, 8, 1], [3, 4, 1]), ([9, 1], [14, 15, 16, 1])], 6, 5)
KEPT_GATES = RouterSpec(experts=4, k=2, gates="chosen")


def outputs(config, params):
    """Logits of the real positions: experts do not serve padding."""
    return logits_of(Transformer(config), params, BATCH)[BATCH["decoder_segment_ids"] > 0]


def parameters(config, seed=0):
    return Transformer(config).init(jax.random.key(seed))


@pytest.mark.parametrize(
    "dense",
    [DENSE, fairseq_style(d_model=32, d_ff=10, heads=4, layers=3, vocab_size=V)],
    ids=["t5", "biases and LayerNorm"],
)
def test_a_model_made_sparse_gives_the_outputs_it_gave(dense):
    model = sparse(dense, KEPT_GATES, every=2)
    params = parameters(dense)
    upcycled = upcycle(params, dense, model, jax.random.key(1))
    np.testing.assert_allclose(outputs(model, upcycled), outputs(dense, params), rtol=1e-4, atol=1e-4)


def test_noise_parts_the_copies_and_routers_are_fresh():
    model = sparse(DENSE, KEPT_GATES, every=2)
    params = parameters(DENSE)
    upcycled = upcycle(params, DENSE, model, jax.random.key(1), noise=0.1)
    up = upcycled["encoder"]["layers"]["1"]["moe"]["up"][0]
    source = params["encoder"]["layers"]["0"]["ffn"]["up"][1]
    ratio = up / source - 1
    assert 0.08 < float(jnp.std(ratio)) < 0.12
    assert not np.allclose(up[0], up[1])
    router = upcycled["encoder"]["layers"]["1"]["moe"]["router"]
    assert 0.01 < float(jnp.std(router)) < 0.03


def test_models_of_other_shapes_are_refused():
    other = t5_style(vocab_size=V, d_model=12, d_ff=11, heads=3, head_dim=4, layers=(3, 2))
    with pytest.raises(
        ValueError, match=r"encoder layer 1: the dense network's gate is \(12, 10\), an expert's \(12, 11\)"
    ):
        upcycle(parameters(DENSE), DENSE, sparse(other, KEPT_GATES, every=2), jax.random.key(0))
    deeper = t5_style(vocab_size=V, d_model=12, d_ff=10, heads=3, head_dim=4, layers=(4, 2))
    with pytest.raises(ValueError, match="3 dense layers cannot become 4"):
        upcycle(parameters(DENSE), DENSE, sparse(deeper, KEPT_GATES, every=2), jax.random.key(0))


def test_layers_split_and_joined_are_the_same():
    """18 layers in groups of 6 would leave none over: 8 leave two."""
    config = gemma_3(
        d_model=12, d_ff=10, heads=2, kv_heads=1, head_dim=4, vocab_size=V, layers=8, window=4, factor=1.0, encoder=True
    )
    params = parameters(config)
    for name, stack in config.stacks().items():
        layers = split_layers(params[name], stack)
        assert len(layers) == 8
        jax.tree.map(np.testing.assert_array_equal, join_layers(params[name], layers, stack), params[name])


@pytest.fixture(scope="module")
def mixture():
    """(config, parameters, usage) of a model whose routers are forced away from experts 0 and 2."""
    config = sparse(DENSE, dataclasses.replace(KEPT_GATES, bias_rate=0.01), every=1)
    params = parameters(config)

    def forced(stack):
        moe = dict(stack["layers"]["0"]["moe"])
        moe["router_bias"] = moe["router_bias"] - 10.0 * jnp.array([1.0, 0, 1, 0])
        return {**stack, "layers": {"0": {**stack["layers"]["0"], "moe": moe}}}

    params = {**params, **{name: forced(params[name]) for name in ("encoder", "decoder")}}
    languages = {"encoder_language_ids": jnp.ones((2, 6), int), "decoder_language_ids": jnp.ones((2, 5), int)}
    routed = Transformer(config)(params, BATCH | languages, languages=3).routed
    return config, params, {name: np.asarray(r.languages) for name, r in routed.items()}


def test_pruning_experts_that_nobody_chooses_changes_nothing(mixture):
    config, params, usage = mixture
    kept = keep_most_used(usage, 2)
    np.testing.assert_array_equal(kept["encoder"], [[1, 3]] * 3)
    fewer, smaller = prune(params, config, kept)
    assert smaller.encoder.routers()[0].experts == 2
    assert fewer["decoder"]["layers"]["0"]["moe"]["up"].shape[1] == 2
    np.testing.assert_allclose(outputs(smaller, fewer), outputs(config, params), rtol=1e-4, atol=1e-4)


def test_merging_averages_by_usage_into_the_most_similar(mixture):
    """Expert 0 gets expert 1's router column, and is chosen three times for each time that 1 is."""
    config, params, usage = mixture
    moe = dict(params["encoder"]["layers"]["0"]["moe"])
    moe["router"] = moe["router"].at[..., 0].set(2 * moe["router"][..., 1])
    encoder = {**params["encoder"], "layers": {"0": {**params["encoder"]["layers"]["0"], "moe": moe}}}
    counts = {name: np.tile(np.array([[3.0, 1.0, 0.0, 5.0]]), (len(table), 1, 1)) for name, table in usage.items()}
    kept = {name: np.tile([1, 3], (len(table), 1)) for name, table in usage.items()}
    merged, _ = merge({**params, "encoder": encoder}, config, kept, counts)
    old, new = moe["up"][0], merged["encoder"]["layers"]["0"]["moe"]["up"][0]
    joins_one = jnp.allclose(new[0], 0.75 * old[0] + 0.25 * old[1], atol=1e-5)
    assert joins_one, float(jnp.abs(new[0] - (0.75 * old[0] + 0.25 * old[1])).max())
    np.testing.assert_allclose(new[1], old[3], atol=1e-5)


def test_nonsense_is_refused(mixture):
    config, params, usage = mixture
    with pytest.raises(ValueError, match="keep=1 must be between k=2 and 4"):
        prune(params, config, keep_most_used(usage, 1))
    with pytest.raises(ValueError, match=r"encoder has 3 mixtures; experts to keep are \[1, 2\]"):
        prune(params, config, {"encoder": np.array([[0, 1]])})
