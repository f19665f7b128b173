"""Every kind of member runs each way to the same numbers: whole, packed, cached, scanned; and sees what it may."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.models import blockwise
from mlm.models.config import HeadSpec, ModelConfig, StackConfig
from mlm.models.families import (
    bert_style,
    fairseq_style,
    gemma_3,
    glm_style,
    language_aware,
    llama_style,
    rnnsearch,
    sparse,
    t5_style,
    t5gemma,
)
from mlm.models.positions import rotate
from mlm.models.specs import (
    AttentionSpec,
    EmbeddingSpec,
    FFNSpec,
    LayerSpec,
    PositionSpec,
    RecurrentSpec,
    RouterSpec,
    SeqPESpec,
    deep_norm,
)
from mlm.models.transformer import Transformer
from mlm.objectives import head_cross_entropy, token_cross_entropy
from tests.models import rows
from tests.models.rows import logits_of

V, S, T = 23, 9, 7
CODES = HeadSpec(kind="codes", codes=5, groups=2, bias=True, multiply=0.7)
GEMMA = {"d_model": 12, "d_ff": 10, "heads": 4, "kv_heads": 2, "head_dim": 4, "vocab_size": V}


def windowed(config, size):
    """The same model with every window `size` tokens wide, so that it matters in short rows."""

    def narrow(sublayer):
        return dataclasses.replace(sublayer, window=size) if getattr(sublayer, "window", None) else sublayer

    return dataclasses.replace(config, **{name: own.mapped(narrow) for name, own in config.stacks().items()})


def deep():
    """Post-norm with DeepNorm's constants, ALiBi, unit-vector attention on rows of one length, a shrunk gradient."""
    own = AttentionSpec(source="self", heads=3, head_dim=4, qk_norm="l2_scalar", position=PositionSpec(kind="alibi"))
    cross, ffn = AttentionSpec(source="cross", heads=3, head_dim=4), FFNSpec(d_ff=10, activation="swiglu", bias=True)
    residuals = deep_norm(2, 2)
    embedding = EmbeddingSpec(gradient=0.1, fix_norm=True, multiply=12**0.5)
    plain = t5_style(vocab_size=V, d_model=12, d_ff=10, heads=3, head_dim=4, layers=(2, 2))
    stacks = {
        name: StackConfig(
            group=(LayerSpec(sublayers=sublayers),),
            repeats=2,
            causal=name == "decoder",
            residual=residual,
            embedding=embedding,
            final_norm=False,
        )
        for name, sublayers, residual in (
            ("encoder", (own, ffn), residuals[0]),
            ("decoder", (own, cross, ffn), residuals[1]),
        )
    }
    return dataclasses.replace(plain, **stacks)


def factorised():
    """Input tables of rank 5 and 4, one of them tied."""
    config = dataclasses.replace(T5(tied=True), share_embedding=False)
    ranks = {"encoder": 5, "decoder": 4}
    stacks = {n: dataclasses.replace(s, embedding=EmbeddingSpec(rank=ranks[n])) for n, s in config.stacks().items()}
    return dataclasses.replace(config, **stacks)


def languages():
    """All that is kept by target language, between stacks of different widths, in the norms before and after."""
    uneven = t5gemma(**GEMMA, layers=2, encoder=WIDER | {"layers": 2})
    config = language_aware(
        uneven, languages=3, norms=True, bridge=True, offsets=("language", "script"), scripts=(0, 1, 2)
    )
    return windowed(config, 3)


def moe():
    """Every second layer sparse, two experts a token; an odd number of layers."""
    return sparse(T5(layers=(3, 3)), RouterSpec(experts=4, k=2, z=1e-3), every=2)


def moe_kit():
    """Conditional routing, masked outputs, biased experts, kept gates, balancing biases, behind a dense network."""
    router = RouterSpec(experts=3, k=2, gates="kept", shared=10, budget=0.8, output_masking=0.2, bias_rate=0.01)
    plain = FAIRSEQ(vocab_size=V)
    return sparse(plain, router, every=1, extra=True)


def seqpe():
    """Positions read as two digits by a transformer of one layer, in both stacks."""
    reader = SeqPESpec(digits=2, width=32, heads=2, layers=1, trained=32)
    own = AttentionSpec(source="self", heads=3, head_dim=4, position=PositionSpec(kind="seqpe", seqpe=reader))
    plain = T5()
    stacks = {
        name: dataclasses.replace(stack, group=(LayerSpec(sublayers=(own, *stack.group[0].sublayers[1:])),))
        for name, stack in plain.stacks().items()
    }
    return dataclasses.replace(plain, **stacks)


def hybrid():
    """Recurrence and attention in turn, in a decoder alone: three layers, the last of half a group."""
    own = AttentionSpec(source="self", heads=3, head_dim=4, window=3)
    recurrent, ffn = RecurrentSpec(width=6), FFNSpec(d_ff=10)
    layers = tuple(LayerSpec(sublayers=(mixer, ffn)) for mixer in (recurrent, own))
    decoder = StackConfig(group=layers, repeats=1, rest=1, causal=True)
    return ModelConfig(vocab_size=V, d_model=12, encoder=None, decoder=decoder)


WIDER = {"d_model": 20, "d_ff": 14, "heads": 6, "kv_heads": 3, "head_dim": 6, "layers": 4}
FAIRSEQ = partial(fairseq_style, d_model=32, d_ff=10, heads=4, layers=2)
BERT = partial(bert_style, d_model=12, d_ff=10, heads=3, layers=2, vocab_size=V, length=S)
LLAMA = partial(llama_style, d_model=16, d_ff=10, heads=4, kv_heads=2, layers=2, vocab_size=V)
T5 = partial(t5_style, vocab_size=V, d_model=12, d_ff=10, heads=3, head_dim=4, layers=(2, 2))
MEMBERS = {
    "t5": partial(T5, activation="relu", tied=True),
    "umt5": partial(T5, share="layer"),
    "t5gemma": lambda: windowed(t5gemma(**GEMMA, layers=4), 3),
    "t5gemma2": lambda: windowed(gemma_3(**GEMMA, layers=8, window=3, factor=2.0, encoder=True), 3),
    "gemma_3": lambda: windowed(gemma_3(**GEMMA, layers=8, window=3, factor=1.0, encoder=False), 3),
    "uneven": lambda: windowed(t5gemma(**GEMMA, layers=2, encoder=WIDER), 3),
    "nllb": partial(FAIRSEQ, vocab_size=V),
    "mbart": partial(FAIRSEQ, vocab_size=V, activation="gelu", learned=True),
    "xlm_r": BERT,
    "xlm_r_xl": partial(BERT, order="pre"),
    "eurobert": partial(LLAMA, rope=PositionSpec(kind="rope", base=250.0), encoder=True),
    "llama": partial(LLAMA, rope=PositionSpec(kind="rope", factor=4.0, context=12), tied=True),
    "codes": lambda: dataclasses.replace(LLAMA(rope=PositionSpec(kind="rope")), head=CODES),
    "factorised": factorised,
    "glm": partial(glm_style, d_model=12, d_ff=10, heads=3, layers=2, vocab_size=V),
    "deep": deep,
    "languages": languages,
    "languages_alone": lambda: language_aware(BERT(), languages=3, norms=True, offsets=("language",)),
    "rnnsearch": partial(rnnsearch, d_model=12, width=10, alignment=8, layers=2, vocab_size=V),
    "hybrid": hybrid,
    "seqpe": seqpe,
    "moe": moe,
    "moe_kit": moe_kit,
}
TELLING = {"t5", "t5gemma2", "nllb", "deep", "llama", "xlm_r", "moe", "languages", "rnnsearch", "seqpe"}
ENCODERS = {"languages_alone", "xlm_r", "xlm_r_xl", "eurobert"}
batch_of = partial(rows.batch_of, source_length=S, target_length=T)
ROWS = [([5, 6, 7, 8, 9, 10, 11, 1], [3, 4, 5, 6, 7, 1]), ([11, 12, 13, 1], [14, 15, 1])]


@cache
def made(name):
    """(model, parameters away from their first values, so that norms and tables matter)."""
    model = Transformer(MEMBERS[name]())
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return model, jax.tree.map(draw, model.shapes())


def each(names, telling=TELLING):
    """Members as parameters; those that add little to the others are slow tests."""
    return [n if n in telling else pytest.param(n, marks=pytest.mark.slow) for n in sorted(names)]


@pytest.fixture(params=each(MEMBERS))
def member(request):
    return made(request.param)


@pytest.fixture(params=each(MEMBERS.keys() - ENCODERS))
def speaker(request):
    """A member with a decoder."""
    return made(request.param)


@pytest.fixture(params=each(ENCODERS))
def reader(request):
    """An encoder alone."""
    return made(request.param)


def test_axes_name_every_dimension(member):
    model, params = member
    axes = model.axes()
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    jax.tree.map(lambda x, names: x.ndim == len(names) or pytest.fail(f"{x.shape} {names}"), params, axes)


def test_scanned_equals_unrolled_in_value_and_gradient(member):
    model, params = member
    stacks = {n: dataclasses.replace(s, scan=False, remat="full") for n, s in model.config.stacks().items()}
    unrolled = Transformer(dataclasses.replace(model.config, **stacks))

    def loss(params, model):
        return jnp.mean(jnp.square(logits_of(model, params, batch_of(ROWS))))

    want, got = (jax.jit(jax.value_and_grad(partial(loss, model=m)))(params) for m in (model, unrolled))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), got, want)


@pytest.mark.parametrize("name", ["t5", "t5gemma", "eurobert", "xlm_r", "factorised", "codes"])
def test_the_loss_by_slices_is_the_loss_of_the_logits(name):
    """Its gradient too: a multiplier, a cap, a matrix of its own, a transform with a bias per token."""
    model, params = made(name)
    ends = {part: value for part, value in params.items() if part not in ("encoder", "decoder")}
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(2, T, model.config.d_model)), jnp.float32)
    targets, weights = jnp.asarray(rng.integers(0, V, (2, T))), jnp.ones((2, T))

    def by_slices(ends, states):
        hidden, kernel, bias = model.head(ends, states)
        softcap = model.config.head.softcap
        return head_cross_entropy(hidden, kernel, targets, weights, bias=bias, softcap=softcap, chunk=2)[0]

    def of_logits(ends, states):
        return token_cross_entropy(model.logits(ends, states), targets, weights)[0]

    got, want = (jax.value_and_grad(loss, argnums=(0, 1))(ends, states) for loss in (by_slices, of_logits))
    assert name != "xlm_r" or set(want[1][0]) == {"embedding", "transform", "head_bias"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["xlm_r", "llama", "glm"])
def test_a_fresh_model_knows_nothing(name):
    """Its logits are of order one, so its loss starts near log V: what ties its tables has said how large they are."""
    model = Transformer(MEMBERS[name]())
    logits = logits_of(model, model.init(jax.random.key(0)), batch_of(ROWS))
    assert 0.02 < float(jnp.std(logits)) < 2.0


def test_packed_rows_equal_unpacked_ones(speaker):
    model, params = speaker
    first, second = ([5, 6, 7, 8, 1], [3, 4, 5, 1]), ([11, 12, 13, 1], [14, 15, 1])
    alone = logits_of(model, params, batch_of([first, second]))
    together = logits_of(
        model,
        params,
        {
            "encoder_input_tokens": jnp.array([first[0] + second[0]]),
            "encoder_segment_ids": jnp.array([[1] * 5 + [2] * 4]),
            "decoder_input_tokens": jnp.array([[0, 3, 4, 5, 0, 14, 15]]),
            "decoder_segment_ids": jnp.array([[1] * 4 + [2] * 3]),
            "decoder_language_ids": jnp.array([[1] * 4 + [2] * 3]),
        },
    )
    np.testing.assert_allclose(together[0, :4], alone[0, :4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together[0, 4:], alone[1, :3], rtol=1e-4, atol=1e-4)


def test_packed_sources_equal_unpacked_ones(reader):
    """And what stands in the padding is not seen."""
    model, params = reader
    first, second = [5, 6, 7, 8, 1], [11, 12, 13, 1]
    alone = batch_of([(first, [1]), (second, [1])])
    real = alone["encoder_segment_ids"] > 0
    alone["encoder_input_tokens"] = jnp.where(real, alone["encoder_input_tokens"], 21)
    want = logits_of(model, params, alone)
    segments = jnp.array([[1] * 5 + [2] * 4])
    tokens = {"encoder_input_tokens": jnp.array([first + second]), "encoder_segment_ids": segments}
    got = logits_of(model, params, tokens | {"encoder_language_ids": segments})
    np.testing.assert_allclose(got[0, :5], want[0, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0, 5:], want[1, :4], rtol=1e-4, atol=1e-4)


def test_an_encoder_uses_all_that_it_owns_once(reader):
    """Tables, norms, the row of the token type, the head's transform and bias: without any of them logits change."""
    model, params = reader
    batch = batch_of(ROWS)
    want = logits_of(model, params, batch)
    owned = {(name,): value for name, value in params.items() if name != "encoder"}
    owned |= {("encoder", name): value for name, value in params["encoder"].items() if name != "layers"}
    for path, value in owned.items():
        without = {name: dict(part) if name == "encoder" else part for name, part in params.items()}
        (without["encoder"] if len(path) == 2 else without)[path[-1]] = jax.tree.map(jnp.zeros_like, value)
        assert float(jnp.abs(logits_of(model, without, batch) - want).max()) > 1e-2, path


def test_an_encoder_reads_in_both_directions(reader):
    model, params = reader
    batch = batch_of(ROWS)
    changed = dict(batch, encoder_input_tokens=batch["encoder_input_tokens"].at[:, 2].set(20))
    moved = jnp.abs(logits_of(model, params, changed) - logits_of(model, params, batch)).max(axis=-1)
    assert (moved[:, :4] > 1e-4).all()


@pytest.mark.parametrize("blocks", [[1] * T, [3, 1, 3]])
def test_cached_blocks_equal_the_whole(speaker, blocks):
    """Two beams a source: rows 2i and 2i + 1 read source i."""
    model, params = speaker
    batch = {name: jnp.asarray(x) for name, x in batch_of(ROWS).items()}
    # Every position is real: what the cache holds has no padding between.
    batch["decoder_segment_ids"] = jnp.ones_like(batch["decoder_segment_ids"])
    languages = jnp.array([1, 2])
    batch["decoder_language_ids"] = jnp.repeat(languages[:, None], T, axis=1)
    want = jnp.repeat(logits_of(model, params, batch), 2, axis=0)
    encoded = mask = None
    if model.config.encoder:
        mask = batch["encoder_segment_ids"] > 0
        encoded = jax.jit(model.encode)(
            params, batch["encoder_input_tokens"], batch["encoder_segment_ids"], languages=languages
        )
    tokens = jnp.repeat(batch["decoder_input_tokens"], 2, axis=0)
    ready, step = model.unrolled(params), jax.jit(model.step)
    cache, got, start = model.init_cache(ready, encoded, mask, 4, T + 2, languages), [], 0
    for size in blocks:
        logits, _, cache = step(ready, tokens[:, start : start + size], cache)
        cache = {**cache, "length": cache["length"] + size}
        got.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", each(MEMBERS.keys() - {"seqpe"}, telling={"t5", "t5gemma2", "moe"}))
def test_blockwise_attention_equals_plain_in_value_and_gradient(name, monkeypatch):
    """Two examples and padding in a row of three blocks; a decoder alone also has a prefix, if it can read one."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    model, params = made(name)
    segments = jnp.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 20])
    tokens = jax.random.randint(jax.random.key(2), segments.shape, 3, V)
    batch = {
        f"{side}_{name}": x
        for side in ("encoder", "decoder")
        for name, x in (("input_tokens", tokens), ("segment_ids", segments), ("language_ids", segments))
    }
    if not model.config.encoder and all(
        isinstance(s, AttentionSpec | FFNSpec) for s in model.config.decoder.sublayers()
    ):
        batch["decoder_causal_attention"] = jnp.array([[1] * 4 + [0] * 5 + [1] * 3 + [0] * 8, [1] * 11 + [0] * 9])
    stacks = {n: dataclasses.replace(s, attention="blockwise") for n, s in model.config.stacks().items()}

    @partial(jax.jit, static_argnums=1)
    def run(params, model):
        def loss(params):
            logits = jnp.where(segments[..., None] > 0, logits_of(model, params, batch), 0)
            return jnp.mean(jnp.square(logits))

        return jax.value_and_grad(loss)(params)

    blocks = Transformer(dataclasses.replace(model.config, **stacks))
    want, got = run(params, model), run(params, blocks)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale), got, want)


def test_the_future_and_padding_are_not_seen(speaker):
    model, params = speaker
    batch = batch_of(ROWS)
    want = logits_of(model, params, batch)
    t = 2
    changed = batch["decoder_input_tokens"].at[:, t + 1 :].set(20)
    later = logits_of(model, params, dict(batch, decoder_input_tokens=changed))
    np.testing.assert_array_equal(later[:, : t + 1], want[:, : t + 1])
    assert not np.allclose(later[0, t + 1], want[0, t + 1])
    if model.config.encoder:
        padding = jnp.where(batch["encoder_segment_ids"] > 0, batch["encoder_input_tokens"], 21)
        real = batch["decoder_segment_ids"] > 0
        other = logits_of(model, params, dict(batch, encoder_input_tokens=padding))
        np.testing.assert_array_equal(other[real], want[real])
        source = dict(batch, encoder_input_tokens=batch["encoder_input_tokens"].at[0, 0].set(20))
        assert not np.allclose(logits_of(model, params, source)[0], want[0])


def test_an_encoder_alone_gives_its_states():
    config = dataclasses.replace(T5(), decoder=None)
    model, both = Transformer(config), Transformer(T5())
    params = both.init(jax.random.key(0))
    assert set(model.shapes()) == {"embedding", "head", "encoder"}
    batch = batch_of(ROWS)
    want = both(params, batch).encoded
    got = model({name: params[name] for name in model.shapes()}, batch)
    np.testing.assert_array_equal(got.hidden, want)
    assert got.encoded is got.hidden


def test_embedding_gradients_shrink_and_values_do_not():
    def loss(params, gradient):
        stacks = {
            name: dataclasses.replace(stack, embedding=EmbeddingSpec(gradient=gradient))
            for name, stack in T5().stacks().items()
        }
        return jnp.mean(jnp.square(logits_of(Transformer(dataclasses.replace(T5(), **stacks)), params, batch_of(ROWS))))

    params = Transformer(T5()).init(jax.random.key(0))
    whole, tenth = (jax.value_and_grad(loss)(params, gradient) for gradient in (1.0, 0.1))
    np.testing.assert_allclose(tenth[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(tenth[1]["embedding"], 0.1 * whole[1]["embedding"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(tenth[1]["head"], whole[1]["head"], rtol=1e-4, atol=1e-8)


def test_glm_is_the_released_order_of_norms():
    """GLM-130B norms before its first layer and after its last: x = LN(h); h = a x + f(x) for every sublayer f.

    Here the first of those norms is the embedding's and each other one the sublayer's before it.
    """
    model, params = made("glm")
    own, alpha = model.config.decoder.group[0].sublayers[0], model.config.decoder.residual.alpha
    assert alpha == 2.0  # (2 x 2 layers)^1/2
    decoder, tokens = params["decoder"], jnp.array([[3, 4, 5, 6]])
    layers = [jax.tree.map(lambda x, i=i: x[i], decoder["layers"])["0"] for i in range(2)]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attention(x, p):
        q, k, v = (
            jnp.einsum("btd,dhk->bhtk", x, p[n]) + p[f"{n}_bias"][None, :, None] for n in ("query", "key", "value")
        )
        q, k = (rotate(y, jnp.arange(4)[None], own.position) for y in (q, k))
        scores = jnp.where(np.tril(np.ones((4, 4), bool)), jnp.einsum("bhtk,bhsk->bhts", q, k) / 2.0, -1e9)
        return jnp.einsum("bhts,bhsk,hkd->btd", jax.nn.softmax(scores), v, p["out"]) + p["out_bias"]

    def feed_forward(x, p):
        gate, up = (x @ p[n] + p[f"{n}_bias"] for n in ("gate", "up"))
        return (gate * 0.5 * (1 + jax.scipy.special.erf(gate / np.sqrt(2.0))) * up) @ p["down"] + p["down_bias"]

    norms = [decoder["embedding_norm"]] + [p[n]["norm"] for p in layers for n in ("self_attention", "ffn")]
    h = params["embedding"][tokens]
    for number, (layer, name) in enumerate((p, n) for p in layers for n in ("self_attention", "ffn")):
        x = norm(h, norms[number])
        h = alpha * x + {"self_attention": attention, "ffn": feed_forward}[name](x, layer[name])
    want = norm(h, norms[-1]) @ params["embedding"].T
    batch = {"decoder_input_tokens": tokens, "decoder_segment_ids": jnp.ones_like(tokens)}
    np.testing.assert_allclose(logits_of(model, params, batch), want, rtol=1e-5, atol=1e-5)
