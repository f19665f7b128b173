"""Heads with fewer parameters than V D: what they compute, what they cannot, and what they cost."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.evaluation.language_loss import TokenLosses
from mlm.models.codes import codes_of, floor
from mlm.models.config import HeadSpec
from mlm.models.families import t5_style
from mlm.models.flops import training_flops
from mlm.models.specs import EmbeddingSpec
from mlm.models.transformer import Transformer
from mlm.objectives import token_cross_entropy
from mlm.training.trainer import TrainConfig, make_loss
from tests.models import rows
from tests.models.rows import logits_of

V, D = 13, 8
BASE = t5_style(vocab_size=V, d_model=D, d_ff=6, heads=2, head_dim=4, layers=(1, 1))
BATCH = partial(rows.batch_of, source_length=5, target_length=4)([([5, 6, 7, 1], [3, 4, 1]), ([8, 9, 2, 4, 1], [3, 1])])


def with_rank(config, table, **head):
    stacks = {n: dataclasses.replace(s, embedding=EmbeddingSpec(rank=table)) for n, s in config.stacks().items()}
    return dataclasses.replace(config, **stacks, head=HeadSpec(**head))


def test_a_full_rank_with_the_identity_is_the_tied_head():
    plain = Transformer(dataclasses.replace(BASE, head=HeadSpec(kind="tied")))
    factorised = Transformer(with_rank(BASE, D, kind="tied"))
    params = jax.jit(plain.init)(jax.random.key(0))
    got = logits_of(factorised, params | {"embedding_up": jnp.eye(D)}, BATCH)
    np.testing.assert_allclose(got, logits_of(plain, params, BATCH), rtol=1e-5, atol=1e-5)


def test_a_product_is_the_table_it_makes():
    """Input F[ids] P and output y P^T F^T are those of the table F P; a head of its own likewise."""
    model = Transformer(with_rank(BASE, 3, kind="linear", rank=2))
    params = jax.jit(model.init)(jax.random.key(0))
    whole = {name: value for name, value in params.items() if name not in ("embedding_up", "head_down")}
    whole["embedding"] = params["embedding"] @ params["embedding_up"]
    whole["head"] = params["head_down"] @ params["head"]
    want = logits_of(Transformer(BASE), whole, BATCH)
    np.testing.assert_allclose(logits_of(model, params, BATCH), want, rtol=1e-4, atol=1e-5)


def test_parameters_flops_and_first_values_of_a_factorised_table():
    """OFA's XLM-R, V = 400,000 and D = 768: 307.2 million numbers, at rank 100 (V + D) 100."""
    large = dataclasses.replace(with_rank(BASE, 100, kind="tied"), vocab_size=400_000, d_model=768)
    shapes = Transformer(large).shapes()
    assert shapes["embedding"].size + shapes["embedding_up"].size == 40_076_800
    # Head: 6 k (D + V) in place of 6 D V a target; input: 6 k D a token of either side.
    plain = dataclasses.replace(BASE, head=HeadSpec(kind="tied"))
    more = training_flops(with_rank(BASE, 3, kind="tied"), 2, 10, 7) - training_flops(plain, 2, 10, 7)
    assert more == 2 * 6 * (3 * (D + V) * 7 - D * V * 7 + 3 * D * (10 + 7))
    params = jax.jit(Transformer(dataclasses.replace(with_rank(BASE, 50, kind="tied"), vocab_size=500)).init)(
        jax.random.key(0)
    )
    np.testing.assert_allclose(jnp.std(params["embedding"] @ params["embedding_up"]), 1.0, rtol=0.1)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="choose one of them"):
        EmbeddingSpec(rank=3, fix_norm=True)
    with pytest.raises(ValueError, match=r"rank=3 belongs to kind='linear'.*not 'tied'.*EmbeddingSpec.rank"):
        HeadSpec(kind="tied", rank=3)
    ranked = dataclasses.replace(BASE.encoder, embedding=EmbeddingSpec(rank=3))
    with pytest.raises(ValueError, match=r"encoder.embedding.rank=3, decoder.embedding.rank=None"):
        dataclasses.replace(BASE, encoder=ranked)


def coded(**head):
    return Transformer(dataclasses.replace(BASE, head=HeadSpec(kind="codes", **head)))


def fitted(model, targets):
    """Mean cross-entropy, in nats, of the best head that gradient descent finds for distinct states of the targets."""
    states = 4.0 * jnp.eye(V, D + V)[None, :, :D] + jnp.asarray(np.random.default_rng(0).normal(size=(1, V, D)))
    params = {"codebook": {"columns": jnp.zeros((D, model.config.head.groups * model.config.head.codes))}}
    if model.config.head.bias:
        params["head_bias"] = jnp.zeros(V)

    @jax.value_and_grad
    def loss(params):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model.logits(params, states)), targets, axis=-1))

    def step(params, _):
        value, grads = loss(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

    return float(jax.jit(lambda p: jax.lax.scan(step, p, length=400))(params)[1][-1])


@pytest.mark.filterwarnings("ignore:tokens that share a column")
def test_tokens_of_a_column_share_their_probability_and_cannot_cost_less_than_their_number():
    """12 tokens by fours, and one alone: (12 ln 4 + 0) / 13. The head learns its clusters to perfection and no more."""
    clusters = tuple(i // 4 for i in range(V))
    head = HeadSpec(kind="codes", codes=4, clusters=clusters)
    want = 12 / 13 * np.log(4)
    assert floor(head, V) == pytest.approx(want)
    found = fitted(coded(codes=4, clusters=clusters), jnp.arange(V)[None, :, None])
    assert want < found < want + 0.1
    # The digits of 13 ids in base 4 are 13 columns of 8 numbers: distinct logits, no floor.
    assert floor(HeadSpec(kind="codes", codes=4, groups=2), V) == 0.0
    assert fitted(coded(codes=4, groups=2), jnp.arange(V)[None, :, None]) < 0.7 * want


@pytest.mark.filterwarnings("ignore:tokens that share a column")
def test_a_bias_tells_the_tokens_of_a_column_apart_by_frequency_alone():
    """One cluster of all, targets a, a, a, b: the entropy of (3/4, 1/4), where without a bias it is ln 13."""
    targets = jnp.where(jnp.arange(V) % 4 == 3, 5, 2)[None, :, None]
    share = 3 / 13
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert fitted(coded(codes=1, bias=True), targets) == pytest.approx(entropy, abs=0.02)
    assert fitted(coded(codes=1), targets) == pytest.approx(np.log(V), abs=1e-4)


def test_a_floor_is_said_before_training():
    """13 tokens over 4 columns by runs of ids: 4, 3, 3 and 3 of them. (4 ln 4 + 9 ln 3) / 13 = 1.187."""
    with pytest.warns(UserWarning, match=r"codes=4, groups=1.* at least 1.19 nats; use more groups, or bias=True"):
        coded(codes=4)
    coded(codes=4, groups=2), coded(codes=4, bias=True)  # a warning is an error in this suite


@pytest.mark.filterwarnings("ignore:tokens that share a column")
@pytest.mark.parametrize("head", [{"codes": 3}, {"codes": 4, "groups": 2}, {"codes": 3, "groups": 3}], ids=str)
def test_few_products_are_those_of_the_spread_matrix(head):
    model = coded(**head)
    params = jax.jit(model.init)(jax.random.key(0))
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.float32)
    matrix = model.head(params, states)[1]
    np.testing.assert_allclose(model.logits(params, states), states @ matrix, rtol=1e-4, atol=1e-5)
    assert params["codebook"]["columns"].shape == (D, head["codes"] * head.get("groups", 1))
    assert 0.5 < float(jnp.std(model.logits(params, states))) < 2.0
    if "groups" in head:
        assert len(np.unique(codes_of(model.config.head, V), axis=1).T) == V


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "codes"}, "needs codes of at least 1"),
        ({"kind": "linear", "codes": 4}, "belong to kind='codes'"),
        ({"kind": "codes", "codes": 3, "groups": 2}, "tell 9 tokens apart, and vocab_size=13"),
        ({"kind": "codes", "codes": 3, "clusters": (0, 3)}, "numbers from 0 to 3"),
        ({"kind": "codes", "codes": 3, "clusters": (0, 1)}, "has 2 numbers for vocab_size=13"),
    ],
)
def test_codes_that_do_not_fit_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, head=HeadSpec(**head))


TWO_LEVEL = {"kind": "two_level", "codes": 4, "rank": 3, "bias": True, "mlm_transform": True}


@pytest.fixture(scope="module")
def two_level():
    """(model, parameters away from their first values); clusters of 1, 5, 3 and 4 tokens, not in order."""
    clusters = (1, 3, 1, 2, 3, 1, 0, 1, 3, 2, 3, 1, 2)
    model = Transformer(dataclasses.replace(BASE, head=HeadSpec(**TWO_LEVEL, clusters=clusters)))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), model.shapes())


def test_two_levels_are_a_softmax_of_clusters_times_one_within(two_level):
    """In NumPy, cluster by cluster; the probabilities of all tokens sum to 1."""
    model, params = two_level
    states = np.random.default_rng(1).normal(size=(1, 2, D)).astype(np.float32)
    p = jax.tree.map(np.asarray, params)
    y = np.asarray(model._transformed(params, jnp.asarray(states)))
    want, clusters = np.zeros((1, 2, V)), np.array(model.config.head.clusters)
    first = np.exp(y @ p["two_level"]["columns"])
    within = np.exp(y @ p["two_level"]["down"] @ p["two_level"]["tokens"].T + p["head_bias"])
    for i, c in enumerate(clusters):
        want[..., i] = first[..., c] / first.sum(-1) * within[..., i] / within[..., clusters == c].sum(-1)
    got = jnp.exp(model.logits(params, jnp.asarray(states)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(got, axis=-1), 1.0, rtol=1e-5)


def test_the_loss_of_two_levels_is_that_of_its_probabilities(two_level):
    """Its gradient too, accuracy, and the evaluation's losses per token; no logits of all tokens are made."""
    model, params = two_level
    positions = np.broadcast_to(np.arange(4), (2, 4))
    batch = {**BATCH, "decoder_target_tokens": jnp.array([[3, 4, 1, 0], [3, 1, 12, 6]]), "decoder_positions": positions}
    batch["decoder_loss_weights"] = jnp.array([[1.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.0, 1.0]])
    train = make_loss(model, TrainConfig(steps=1, z_loss=0.0, loss_chunk=2), 3)

    def of_log_probs(params):
        log_probs = model.logits(params, model(params, batch).hidden)
        loss, stats = token_cross_entropy(log_probs, batch["decoder_target_tokens"], batch["decoder_loss_weights"])
        return loss, stats

    def of_prediction(params):
        loss = train(params, batch, None)
        return loss.sum, loss.metrics

    (got, metrics), got_grads = jax.jit(jax.value_and_grad(of_prediction, has_aux=True))(params)
    (want, stats), want_grads = jax.jit(jax.value_and_grad(of_log_probs, has_aux=True))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got_grads, want_grads)
    np.testing.assert_allclose(metrics["nll"][0], got, rtol=1e-5)
    np.testing.assert_allclose(
        TokenLosses(model)(params, {name: np.asarray(x) for name, x in batch.items()}), stats.nll, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="no one matrix"):
        model.head(params, jnp.ones((1, 1, D)))
    with pytest.raises(ValueError, match="candidates=9: a head of two levels"):
        make_loss(model, TrainConfig(steps=1, candidates=9), 3)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({**TWO_LEVEL, "rank": None}, "needs the rank of its softmax within clusters, found None"),
        ({**TWO_LEVEL, "softcap": 30.0}, "softcap=30.0 must be 1.0 and None"),
        ({**TWO_LEVEL, "codes": 0}, "'two_level' too needs codes"),
    ],
)
def test_two_levels_that_do_not_fit_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        HeadSpec(**head)
