"""A model's own heads that guess ahead: they guess what training sees, and guesses change nothing but passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.chimera import ChimeraHeads
from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.growth import extension
from mlm.decoding.selectors import Greedy
from mlm.decoding.state import Seen, State
from mlm.models.chimera import Chimera
from mlm.models.families import llama_style, sparse, t5_style
from mlm.models.quantisation import quantised
from mlm.models.specs import AttentionSpec, ChimeraSpec, PositionSpec, RouterSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer
from mlm.trees import named_leaves
from tests.decoding.conftest import LENGTH, VOCAB
from tests.training.toy import rows_of

SPEC = ChimeraSpec(heads=3, attention_heads=2, head_dim=8, d_ff=16)
SMALL = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 1))
ALONE = llama_style(
    d_model=16, d_ff=16, heads=2, kv_heads=1, layers=2, vocab_size=VOCAB, rope=PositionSpec(kind="rope")
)
GUESSING = {"proposer": "chimera", "guesses": 3}
PROMPTS = [[7], [], [2, 9, 4], [3, 3], [8, 2], [5], [6, 7, 8, 9, 10], [11]]


def same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


def windowed(config, window):
    """Self-attention of the decoder over the newest tokens alone."""

    def narrow(spec):
        own = isinstance(spec, AttentionSpec) and spec.source == "self"
        return dataclasses.replace(spec, window=window) if own else spec

    return dataclasses.replace(config, decoder=config.decoder.mapped(narrow))


def made(config, spec=SPEC, seed=0):
    """(model, parameters), the heads' no longer what they begin as: all of them take part in what is guessed."""
    model = Transformer(dataclasses.replace(config, chimera=spec))
    params = model.init(jax.random.key(seed))
    key = jax.random.key(seed + 1)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), params)
    return model, params | {"chimera": moved["chimera"]}


@pytest.mark.parametrize("prompted", [False, True], ids=["free", "prompted"])
def test_its_guesses_are_those_of_training(prompted):
    """Rows of their own lengths, which take 0 to W + 1 tokens of every block and go back behind the others: each guess
    is chosen from the logits of the whole pass over what the row holds and the guesses before it.
    """
    model, params = made(windowed(SMALL, 3))
    random, width, longest, rows = np.random.default_rng(0), 3, 16, 3
    tokens = jnp.asarray(random.integers(3, VOCAB, (rows, longest), dtype=np.int32))
    source = jnp.asarray(random.integers(3, VOCAB, (rows, 4), dtype=np.int32))
    cache = model.init_cache(params, model.encode(params, source), source != 0, rows, longest + width + 1, block=5)
    empty = model.chimera(params).empty(rows, longest + width + 1, jnp.dtype("float32"))
    proposer, extend = ChimeraHeads(model, params, empty, width), extension(Greedy(), (), ())

    @jax.jit
    def whole(inputs):
        told = jnp.ones_like(inputs)
        batch = {
            "encoder_input_tokens": source,
            "encoder_segment_ids": jnp.ones_like(source),
            "decoder_input_tokens": inputs,
            "decoder_segment_ids": told,
        }
        drafted = model.chimera(params).whole(
            model.decoder_rows(params, inputs), model(params, batch).hidden, batch["decoder_segment_ids"]
        )
        return jnp.stack([model.logits(params, mixed) for mixed in drafted.mixed])

    @jax.jit
    def one_pass(state, block, grown):
        said = []
        guesses, own = proposer.propose(state, lambda state, x, active: said.append(x) or extend(state, x, active))
        _, hidden, cache = model.step(params, block, state.cache)
        own = proposer.observe(own, grown, jnp.zeros((rows, 1), jnp.int32), Seen(hidden))
        length = state.length + grown
        return guesses, jnp.stack(said), state._replace(cache={**cache, "length": length}, proposal=own, length=length)

    nothing, begun, read, seen, compared = jnp.zeros(rows), jnp.zeros(rows, jnp.int32), None, None, 0
    shifted = jnp.pad(tokens, ((0, 0), (1, width + 1)))  # what the decoder reads, from its start token on
    if prompted:
        begun, read = jnp.array([4, 1, 0]), shifted[:, :4]
        _, hidden, cache = model.step(params, read, cache)
        seen = Seen(hidden)
    state = State(
        tokens=jnp.pad(tokens, ((0, 0), (0, width + 1))),
        length=begun,
        pending=begun,
        log_prob=nothing,
        start=begun,
        limit=jnp.full(rows, longest + width),
        done=nothing > 0,
        passes=begun,
        cache={**cache, "length": begun},
        search=(),
        proposal=proposer.begin(read, begun, seen),
    )
    for grown in ([1, 2, 0], [4, 1, 3], [2, 3, 1], [1, 4, 2]):
        length = np.asarray(state.length)
        block = jnp.stack([shifted[row, at : at + width + 1] for row, at in enumerate(length)])
        wrong = jnp.arange(width + 1) >= jnp.array(grown)[:, None]
        block = jnp.where(wrong & (jnp.arange(width + 1) > 0), 3, block)  # guesses that turn out to be wrong
        guesses, logits, state = one_pass(state, block, jnp.array(grown))
        for row, at in enumerate(length):
            if at == 0:
                assert guesses[row].tolist() == [-1] * width
                continue
            inputs = shifted.at[row, at + 1 : at + 1 + width].set(guesses[row])
            want = whole(inputs)
            for k in range(1, width + 1):
                if k > 1 and guesses[row, k - 2] in (1, -1):  # the text would end
                    assert guesses[row, k - 1] == -1
                    continue
                np.testing.assert_allclose(logits[k - 1, row], want[k - 1, row, at + k - 1], rtol=1e-4, atol=1e-4)
                assert guesses[row, k - 1] == logits[k - 1, row].argmax()
                compared += 1
    assert compared > 20  # few texts that would end


IDENTITY = {
    "greedy, prompted": (SMALL, {"min_length": 7}, PROMPTS),
    "greedy, experts": (
        sparse(SMALL, RouterSpec(experts=4, k=2, gates="chosen", capacity=1.0), every=1),
        {},
        None,
    ),
    "sampled, a decoder alone with a window": (
        windowed(ALONE, 3),
        {"method": "sample", "n_best": 2, "top_p": 0.95, "temperature": 0.8, "seed": 5},
        PROMPTS,
    ),
}


@pytest.mark.parametrize("kind", IDENTITY)
def test_guesses_change_nothing(sources, kind):
    config, options, prompts = IDENTITY[kind]
    model, params = made(config)
    if config.encoder is None:
        sources, prompts, options = PROMPTS, None, options | {"max_length": 2 * LENGTH}
        sources = [prompt or [4] for prompt in sources]
    options = {"max_length": LENGTH} | options
    plain = Generator(model, DecodeConfig(**options))(params, sources, prompts=prompts)
    guessed = Generator(model, DecodeConfig(**GUESSING, **options))(params, sources, prompts=prompts)
    same(guessed, plain)
    assert (guessed.passes <= plain.passes).all()
    assert guessed.passes.sum() < plain.passes.sum()


def test_guesses_on_eight_devices_in_an_ensemble_and_of_integers(sources):
    model, params = made(SMALL)
    other = model.init(jax.random.key(7))
    config, guessing = DecodeConfig(max_length=LENGTH), DecodeConfig(max_length=LENGTH, **GUESSING)
    plain = Generator(model, config)(params, sources)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = Generator(model, guessing, rows=NamedSharding(mesh, P("data")))
    same(spread(jax.device_put(params, NamedSharding(mesh, P())), sources), plain)
    together, ahead = (Generator(model, each, ensemble=[model]) for each in (config, guessing))
    same(ahead(params, sources, ensemble=[other]), together(params, sources, ensemble=[other]))
    small = quantised(params, "int8")
    same(Generator(model, guessing)(small, sources), Generator(model, config)(small, sources))


def counting(length):
    """A model all of whose layers add nothing, and whose head reads token t where the table wrote t - 1; so do heads
    that read the last token alone.
    """
    model = Transformer(dataclasses.replace(SMALL, chimera=SPEC))
    nothing = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    nothing["decoder"]["final_norm"]["scale"] = jnp.ones(16)
    nothing["chimera"]["down"] = jnp.eye(48, 16, -32)
    nothing["chimera"]["mix"] = jnp.stack([jnp.eye(32, 16, -16)] * 3)
    table, head = jnp.eye(VOCAB, 16), jnp.roll(jnp.eye(VOCAB, 16), 1, axis=0).T
    return model, nothing | {"embedding": table, "head": head}, [[2 + i for i in range(length)]]


@pytest.mark.parametrize(("prompt", "passes"), [(1, 2), (3, 2), (8, 1)])
def test_heads_that_are_right_take_a_pass_for_four_tokens(prompt, passes):
    """T tokens behind a prompt take ceil(T / 4)."""
    model, params, (text,) = counting(9)
    config = DecodeConfig(max_length=9, **GUESSING)
    found = Generator(model, config)(params, [[5, 1]], prompts=[text[:prompt]])
    assert found.tokens[0, 0].tolist() == text
    assert found.passes.tolist() == [passes]


def test_without_a_prompt_the_first_pass_guesses_nothing():
    """The start token is 0, and 1 would end the text: 2 4 6 8 10 0 2 4 6, first one token, then two times four."""
    model, params, _ = counting(9)
    params["head"] = jnp.roll(params["head"], 1, axis=1)
    plain = Generator(model, DecodeConfig(max_length=9))(params, [[5, 1]])
    found = Generator(model, DecodeConfig(max_length=9, **GUESSING))(params, [[5, 1]])
    same(found, plain)
    assert found.passes.tolist() == [1 + 2]


WORDS, STEPS = 20, 100


def walks(seed, length=10):
    """Texts of which every token leaves two equally probable ones for the next: 3 + (3 w + 0 or 1) mod 20."""
    random = np.random.default_rng(seed)
    texts = [random.integers(0, WORDS, 32)]
    for _ in range(length - 1):
        texts.append((3 * texts[-1] + random.integers(0, 2, 32)) % WORDS)
    return rows_of([[([5], 3 + text, 1)] for text in np.stack(texts, axis=1)], source=1, target=length)


def trained(config, train, params=None):
    optimizer = make_optimizer("adamw", learning_rate=5e-3, weight_decay=0.01)
    trainer = Trainer(config, train, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), languages=2)
    state, said = trainer.init(params), []
    for step in range(train.steps):
        state, metrics = trainer.step(state, global_batch(walks(step), trainer.mesh))
        said.append({n: float(x[0] / x[1]) for n, x in metrics.items() if isinstance(x, tuple) and x[0].ndim == 0})
    return state.params, said


def test_heads_learn_on_a_model_that_stays_and_guess_more_than_heads_without_a_layer(monkeypatch):
    """A drawn token cannot be told from the states before it, and what follows it is told by it: heads that see the
    states alone guess blindly, Chimera's read the token.
    """
    base = t5_style(vocab_size=3 + WORDS, d_model=32, d_ff=64, heads=2, head_dim=16, layers=(1, 1))
    params, _ = trained(base, TrainConfig(steps=STEPS, z_loss=0.0))
    before = jax.device_get(params)
    config = dataclasses.replace(base, chimera=dataclasses.replace(SPEC, d_ff=64))
    train = TrainConfig(steps=STEPS, z_loss=0.0, objective="chimera")
    sampling = {"method": "sample", "max_length": 24, "min_length": 24, "seed": 3}
    plain = Generator(Transformer(base), DecodeConfig(**sampling))(params, [[5]] * 16)
    passes, mixed = {}, Chimera._mixed
    for kind in ("chimera", "independent"):
        if kind == "independent":
            monkeypatch.setattr(Chimera, "_mixed", lambda self, h, o, number: mixed(self, h, 0.0 * o, number))
        heads, said = trained(config, train, jax.tree.map(jnp.asarray, before))
        for name, leaf in named_leaves(before):
            found = dict(named_leaves(heads))[name]
            assert np.asarray(found).tobytes() == leaf.tobytes(), name
        found = Generator(Transformer(config), DecodeConfig(**GUESSING, **sampling))(heads, [[5]] * 16)
        same(found, plain)
        passes[kind] = found.passes.mean()
        if kind == "chimera":
            assert np.mean([s["state_error"] for s in said[-10:]]) < 0.3 * said[0]["state_error"]
            assert np.mean([s["nll"] for s in said[-10:]]) < 0.5 * said[0]["nll"]
    assert passes["chimera"] < 0.6 * passes["independent"] < 0.6 * plain.passes.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**GUESSING, "guesses": 0}, "guesses=0 must be an integer of at least 1"),
        ({**GUESSING, "branches": 2}, "branches=2 means nothing to proposer='chimera'"),
        ({**GUESSING, "method": "beam"}, "means nothing to method='beam'"),
        ({**GUESSING, "dola_layers": (0,)}, "proposer='chimera' with a contrast"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_a_model_without_heads_and_guesses_without_a_head_are_refused():
    with pytest.raises(ValueError, match=r"proposer='chimera' asks heads that this model has not: .*chimera.gin"):
        Generator(Transformer(SMALL), DecodeConfig(**GUESSING))
    model = Transformer(dataclasses.replace(SMALL, chimera=SPEC))
    with pytest.raises(ValueError, match="guesses=8: each is another head's, and the model has 3; set guesses=3"):
        Generator(model, DecodeConfig(proposer="chimera"))
