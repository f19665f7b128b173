"""Recurrence against loops in NumPy, from a cache that goes back, on eight devices, and what it refuses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm import trees
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.scoring import Scorer
from mlm.models.config import from_json, to_json
from mlm.models.families import rnnsearch
from mlm.models.flops import training_flops
from mlm.models.presets import preset
from mlm.models.specs import FFNSpec, LayerSpec, RecurrentSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, MeshPlacement, make_mesh, shardings
from tests.models.rows import logits_of

V, D, H, A = 24, 8, 6, 4
CONFIG = rnnsearch(vocab_size=V, d_model=D, width=H, alignment=A, layers=1)
MODEL = Transformer(CONFIG)
BATCH = {  # two examples and padding in a row, one alone
    "encoder_input_tokens": jnp.array([[5, 6, 7, 1, 8, 9, 1, 0], [11, 12, 13, 14, 15, 16, 17, 1]]),
    "encoder_segment_ids": jnp.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8]),
    "decoder_input_tokens": jnp.array([[0, 3, 4, 0, 9, 0], [0, 5, 6, 7, 8, 9]]),
    "decoder_segment_ids": jnp.array([[1, 1, 1, 2, 2, 0], [1] * 6]),
}
WEIGHTS = "decoder/recurrent/probabilities"


@pytest.fixture(scope="module")
def params():
    """Away from their first values, so that biases matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), MODEL.shapes())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def advanced(unit, x, state, context=None):
    """Cho et al. 2014 and Bahdanau et al. 2015, appendix A: one step of one direction."""

    def given(gate):
        y = x @ unit[gate] + unit[f"{gate}_bias"]
        return y if context is None else y + context @ unit[f"{gate}_context"]

    reset, update = (sigmoid(given(gate) + state @ unit[f"{gate}_state"]) for gate in ("reset", "update"))
    new = np.tanh(given("candidate") + (reset * state) @ unit["candidate_state"])
    return (1 - update) * state + update * new


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def reference(params, source, target):
    """(logits, alignments) of one example alone, in loops."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    own = jax.tree.map(lambda x: x[0], p["encoder"]["layers"]["0"]["recurrent"])
    x = p["encoder_embedding"][source]
    h = normed(x, own["norm"]["scale"])
    ways = {}
    for way, order in (("forward", range(len(source))), ("backward", reversed(range(len(source))))):
        state, ways[way] = np.zeros(H), {}
        for t in order:
            ways[way][t] = state = advanced(own[way], h[t], state)
    states = np.array([[*ways["forward"][t], *ways["backward"][t]] for t in range(len(source))])
    memory = normed(x + states @ own["out"], p["encoder"]["final_norm"]["scale"])

    own = jax.tree.map(lambda x: x[0], p["decoder"]["layers"]["0"]["recurrent"])
    x = p["embedding"][target]
    h = normed(x, own["norm"]["scale"])
    state, rows, alignments = np.tanh(memory[0] @ own["start"]), [], []
    for t in range(len(target)):
        energy = np.tanh(state @ own["query"] + memory @ own["key"]) @ own["score"]
        weights = np.exp(energy) / np.exp(energy).sum()
        context = weights @ memory
        state = advanced(own["forward"], h[t], state, context)
        rows.append(x[t] + state @ own["out"] + context @ own["context_out"])
        alignments.append(weights)
    return normed(np.array(rows), p["decoder"]["final_norm"]["scale"]) @ p["head"], np.array(alignments)


def test_packed_rows_equal_loops_over_each_example(params):
    """Logits and alignments: states begin anew at every border, in both directions, and see their own source alone."""
    got = np.asarray(logits_of(MODEL, params, BATCH))
    shown = jax.jit(lambda params: MODEL(params, BATCH, taps=[WEIGHTS]).taps[WEIGHTS])(params)
    assert shown.shape == (1, 2, 1, 6, 8)
    for row, source, target in ((0, (0, 4), (0, 3)), (0, (4, 7), (3, 5)), (1, (0, 8), (0, 6))):
        read, written = slice(*source), slice(*target)
        want, alignments = reference(
            params,
            np.asarray(BATCH["encoder_input_tokens"][row, read]),
            np.asarray(BATCH["decoder_input_tokens"][row, written]),
        )
        np.testing.assert_allclose(got[row, written], want, rtol=1e-4, atol=1e-5)
        found = np.asarray(shown[0, row, 0, written])
        np.testing.assert_allclose(found[:, read], alignments, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.sum(-1), found[:, read].sum(-1), rtol=1e-6)


def test_padding_is_left_as_it_is(params):
    """What the sublayer adds there is nothing: the state is the embedding."""
    hidden = jax.jit(lambda params: MODEL(params, BATCH, taps=["encoder/hidden"]).taps["encoder/hidden"])(params)
    np.testing.assert_array_equal(hidden[-1, 0, 7], params["encoder_embedding"][0])


def test_gradients_reach_the_past_and_the_whole_source_and_no_future(params):
    t = 2
    moved = {
        "encoder_input_tokens": jnp.arange(8)[None],
        "encoder_segment_ids": jnp.ones((1, 8), jnp.int32),
        "decoder_input_tokens": jnp.arange(6)[None],
        "decoder_segment_ids": jnp.ones((1, 6), jnp.int32),
    }

    def influence(source, target):
        tables = {"encoder_embedding": source, "embedding": target}
        return jnp.sum(MODEL({**params, **tables}, moved).hidden[0, t])

    source, target = jax.jit(jax.grad(influence, (0, 1)))(params["encoder_embedding"][:8], params["embedding"][:6])
    assert (target[t + 1 :] == 0).all()
    assert (jnp.abs(target[: t + 1]).sum(-1) > 0).all()
    assert (jnp.abs(source).sum(-1) > 0).all()


def test_a_cache_goes_back_and_follows_its_beams(params):
    """Prompts of 3 and 1 tokens read as one block, a draft of which 1 and 2 tokens stay, then beams that swap."""
    sources, real = BATCH["encoder_input_tokens"][:, :4], jnp.array([[True] * 4, [True] * 4])
    encoded = MODEL.encode(params, sources)
    step = jax.jit(MODEL.step)
    cache = MODEL.init_cache(params, encoded, real, 4, 9)
    rows = [[0, 3, 4, 9, 5], [0, 7, 8, 2, 6], [0, 2, 3, 3, 3], [0, 4, 4, 6, 6]]  # two beams a source
    prompts, drafts = jnp.array([3, 3, 1, 1]), jnp.array([1, 1, 2, 2])
    read = lambda row, at, n: [rows[row][at + i] if at + i < 5 else 21 for i in range(n)]  # noqa: E731

    def block(lengths, n, kept):
        """The next n tokens of each row, those beyond `kept` others than will stand there."""
        return jnp.array(
            [
                [token if i < k else 20 for i, token in enumerate(read(row, at, n))]
                for row, (at, k) in enumerate(zip(lengths.tolist(), kept.tolist(), strict=True))
            ]
        )

    for kept in (prompts, drafts):
        tokens = block(cache["length"], 3, kept)
        logits, _, cache = step(params, tokens, cache)
        cache = {**cache, "length": cache["length"] + kept}
    swapped = jnp.array([1, 0, 3, 2])
    cache = {**cache, "self": jax.tree.map(lambda x: x[swapped], cache["self"]), "length": cache["length"][swapped]}
    rows = [rows[i] for i in swapped.tolist()]
    logits, _, cache = step(params, block(cache["length"], 1, jnp.ones(4, int)), cache)
    for row, at in enumerate((4, 4, 3, 3)):
        want, _ = reference(params, np.asarray(sources[row // 2]), np.array(rows[row][: at + 1]))
        np.testing.assert_allclose(logits[row, 0], want[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_units_are_keras_s_with_the_reset_before_the_product(params):
    """Whose update gate is the other way round: 1 - sigmoid(a) = sigmoid(-a)."""
    import keras

    unit = jax.tree.map(lambda x: np.asarray(x[0]), params["encoder"]["layers"]["0"]["recurrent"]["backward"])
    layer = keras.layers.GRU(H, reset_after=False, return_sequences=True, go_backwards=True)
    layer.build((None, None, D))
    signs = (("update", -1.0), ("reset", 1.0), ("candidate", 1.0))
    kinds = ("", "_state", "_bias")
    layer.set_weights([np.concatenate([s * unit[f"{gate}{kind}"] for gate, s in signs], axis=-1) for kind in kinds])
    x = np.random.default_rng(1).normal(size=(2, 7, D)).astype(np.float32)
    want = np.asarray(layer(x))[:, ::-1]
    state, got = np.zeros((2, H)), []
    for t in reversed(range(7)):
        state = advanced(unit, x[:, t], state)
        got.insert(0, state)
    np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"method": "greedy"}, {"method": "beam", "beams": 3, "alpha": 0.0}], ids=str)
def test_what_is_decoded_scores_what_the_whole_pass_says(params, options):
    """Prompts of different lengths, and rows that end at different steps."""
    sources, prompts = [[5, 6, 7, 1], [8, 9, 1], [11, 1]], [[4, 3], [], [7]]
    found = Generator(MODEL, DecodeConfig(max_length=7, **options))(params, sources, prompts=prompts)
    targets = [row[0][: n[0]].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
    assert (found.lengths[:, 0] > [2, 0, 1]).all()
    scores = Scorer(MODEL)(params, sources, targets).tokens
    given = [len(prompt) for prompt in prompts]
    totals = [row[n : len(target)].sum() for row, n, target in zip(scores, given, targets, strict=True)]
    np.testing.assert_allclose(found.scores[:, 0], totals, atol=1e-4)


def test_eight_devices_give_the_loss_and_gradients_of_one(params):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = {name: jnp.tile(x, (2, 1)) for name, x in BATCH.items()}

    def loss(params, model):
        return jnp.mean(jnp.square(model.logits(params, model(params, batch).hidden)))

    want = jax.jit(jax.value_and_grad(partial(loss, model=MODEL)))(params)
    model = Transformer(CONFIG, MeshPlacement(mesh))
    placed = jax.device_put(params, shardings(model.shapes(), model.axes(), mesh))
    got = jax.jit(jax.value_and_grad(partial(loss, model=model)))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_dropout_falls_on_states_and_keeps_no_other_number(params):
    stacks = {name: dataclasses.replace(stack, dropout=0.5) for name, stack in CONFIG.stacks().items()}
    model = Transformer(dataclasses.replace(CONFIG, **stacks))
    run = jax.jit(lambda key: model(params, BATCH, key).hidden)
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    evaluated, plain = (jax.jit(lambda params, m=m: m(params, BATCH).hidden)(params) for m in (model, MODEL))
    np.testing.assert_array_equal(evaluated, plain)


def test_bfloat16_keeps_states_in_float32_and_logits_close(params):
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    cache = model.init_cache(params, jnp.zeros((1, 3, D), jnp.bfloat16), jnp.ones((1, 3), bool), 1, 4)
    assert cache["self"][0]["recurrent"]["state"].dtype == jnp.float32
    got, want = (jax.jit(lambda p, m=m: m(p, BATCH).hidden.astype(jnp.float32))(params) for m in (model, MODEL))
    np.testing.assert_allclose(got, want, atol=0.1)


def test_flops_count_every_product():
    """One row of 5 source and 3 target positions: three gates and an output in two directions, then with contexts."""
    encoder = 5 * 2 * (3 * (D * H + H * H) + H * D)
    decoder = 3 * (3 * (D * H + H * H + D * H) + H * A + H * D + D * D) + 5 * D * A + D * H + 15 * (A + D)
    assert training_flops(CONFIG, 1, 5, 3) == 6 * (encoder + decoder + 3 * D * V)


def test_a_config_survives_json():
    assert from_json(to_json(CONFIG)) == CONFIG


def test_a_prefix_is_refused():
    prefix = {**BATCH, "decoder_causal_attention": jnp.ones((2, 6), jnp.int32)}
    with pytest.raises(ValueError, match=r"from left to right alone.*leave out decoder_causal_attention"):
        jax.eval_shape(lambda params: MODEL(params, prefix), MODEL.shapes())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecurrentSpec(width=0), "width=0 must be an integer of at least 1"),
        (lambda: RecurrentSpec(width=4, alignment=3), r"alignment=3 .* set attends=True"),
        (lambda: stacked(encoder=RecurrentSpec(width=4, attends=True)), "no other stack for them to read"),
        (lambda: stacked(decoder=RecurrentSpec(width=4)), "the decoder would never see the source"),
        (lambda: dataclasses.replace(CONFIG, encoder=None, share_embedding=True), "there is no encoder to read"),
        (lambda: stacked(encoder=FFNSpec(d_ff=4)), "so tokens never meet"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def stacked(**change):
    stacks = CONFIG.stacks()
    return dataclasses.replace(
        CONFIG, **{n: dataclasses.replace(stacks[n], group=(LayerSpec(sublayers=(s,)),)) for n, s in change.items()}
    )


def test_the_preset_s_parameters_are_those_of_the_paper_where_its_parts_are():
    """n = 1000 states, m = 620 of embeddings, n' = 1000 of alignment, K = 30,000 words a side (appendix A.2).

    The paper's: W, W_z, W_r of m n and U, U_z, U_r of n n in each of three places, W_a of n n', v_a of n', E of K m
    twice. Ours beside them, the encoder's states being of m in place of 2n: C, C_z, C_r, U_a and W_s of m n, an output
    of (2n m) and of (n + m) m, a head of m K, three biases a unit, two norms a stack.
    """
    n, m, words = 1000, 620, 30_000
    papers = 3 * 3 * (m * n + n * n) + n * n + n + 2 * words * m
    ours = 5 * m * n + 2 * n * m + (n + m) * m + m * words + 3 * 3 * n + 4 * m
    assert trees.count(Transformer(preset("rnnsearch_50")).shapes()) == papers + ours == 76_736_880
