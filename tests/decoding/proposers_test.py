"""Guesses save passes and change nothing: the same tokens and scores, whoever guesses, right or wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.proposers import InputCopy
from mlm.decoding.state import State
from mlm.models.families import sparse, t5_style
from mlm.models.specs import RouterSpec
from mlm.models.transformer import Transformer
from tests.decoding.conftest import LENGTH, VOCAB, Tiny

METHODS = {
    "greedy": {},
    "greedy, later": {"min_length": 7},
    "sample": {"method": "sample", "n_best": 2, "top_p": 0.95, "temperature": 0.8, "seed": 5},
}
PROMPTS = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]


def same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


@pytest.fixture(scope="module")
def draft() -> Tiny:
    return Tiny(VOCAB, LENGTH, seed=3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["free", "prompted"])
def test_the_input_copied(tiny, sources, method, prompts):
    """A source that happens to begin as the model writes is read off, three tokens a pass; others cost nothing."""
    plain = tiny.decode(DecodeConfig(max_length=LENGTH, **METHODS[method]), sources, prompts=prompts)
    config = DecodeConfig(max_length=LENGTH, proposer="input_copy", guesses=3, **METHODS[method])
    guessed = tiny.decode(config, sources, prompts=prompts)
    same(guessed, plain)
    assert (guessed.passes > 0).all()
    assert (guessed.passes <= plain.passes).all()


def test_the_input_copied_by_a_model_that_counts(make_tiny):
    """All its layers add nothing, and its head reads token t where the table wrote t - 1: after 2 come 3, 4, 5, …

    The first pass looks for the source's beginning and finds 3 in its place; the second confirms the six that follow.
    """
    tiny = make_tiny(VOCAB, LENGTH, seed=1)
    nothing = jax.tree.map(jnp.zeros_like, tiny.params)
    nothing["decoder"]["final_norm"]["scale"] = jnp.ones(16)
    tiny.params = nothing | {"embedding": jnp.eye(VOCAB, 16), "head": jnp.roll(jnp.eye(VOCAB, 16), 1, axis=0).T}
    source, options = [2, 3, 4, 5, 6, 7, 8, 9], {"max_length": 8}
    plain = tiny.decode(DecodeConfig(**options), [source], prompts=[[2]])
    guessed = tiny.decode(DecodeConfig(proposer="input_copy", guesses=5, **options), [source], prompts=[[2]])
    assert plain.tokens[0, 0].tolist() == source
    same(guessed, plain)
    assert (plain.passes.tolist(), guessed.passes.tolist()) == ([7], [2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["free", "prompted"])
def test_a_draft_model(tiny, draft, sources, method, prompts):
    """A model that knows nothing saves little; the model itself, asked as its own draft, is right until the end."""
    plain = tiny.decode(DecodeConfig(max_length=LENGTH, **METHODS[method]), sources, prompts=prompts)
    config = DecodeConfig(max_length=LENGTH, proposer="draft_model", guesses=3, **METHODS[method])
    for drafting in (draft, tiny):
        generator = Generator(tiny.model, config, draft=drafting.model)
        found = generator(tiny.params, sources, prompts=prompts, draft=drafting.params)
        same(found, plain)
    grown = plain.lengths - (0 if prompts is None else np.array([len(p) for p in prompts])[:, None])
    assert (found.passes == -(-grown.max(1) // 4)).all()


def test_guesses_in_a_mixture_of_experts_and_on_eight_devices(sources):
    config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 2))
    model = Transformer(sparse(config, RouterSpec(experts=4, k=2, gates="chosen", capacity=1.0), every=1))
    params = model.init(jax.random.key(0))
    plain = Generator(model, DecodeConfig(max_length=LENGTH))(params, sources)
    guessing = DecodeConfig(max_length=LENGTH, proposer="draft_model", guesses=2)
    same(Generator(model, guessing, draft=model)(params, sources, draft=params), plain)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = Generator(model, guessing, draft=model, rows=NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    same(spread(everywhere, sources, draft=everywhere), plain)


def place(source, written):
    """What `InputCopy` guesses after those tokens."""
    tokens = jnp.zeros((1, 12), jnp.int32).at[0, : len(written)].set(jnp.array(written, jnp.int32))
    proposer = InputCopy(jnp.array([[*source, 0, 0]]), jnp.array([len(source)]), 3)
    nothing = jnp.zeros(())
    state = State(tokens, jnp.array([len(written)]), nothing, nothing, jnp.array([0]), *(nothing,) * 5)
    return proposer.propose(state, lambda state, *_: state)[0][0].tolist()


@pytest.mark.parametrize(
    ("written", "guesses"),
    [
        ([], [5, 6, 7]),  # the beginning
        ([9, 7], [8, 6, 9]),  # once in the source, with one token
        ([9, 6], [-1, -1, -1]),  # 6 occurs twice, 9 6 never
        ([8, 6], [9, 1, -1]),  # 6 twice, 8 6 once; nothing behind the end
        ([4], [-1, -1, -1]),  # not in the source
        ([1], [-1, -1, -1]),
    ],
)
def test_where_a_row_stands_in_its_source(written, guesses):
    assert place([5, 6, 7, 8, 6, 9, 1], written) == guesses


def test_three_tokens_are_the_most_that_are_looked_at():
    """2 3 4 occurs twice, and 1 2 3 4 would tell: no guess, as published."""
    assert place([1, 2, 3, 4, 9, 2, 3, 4, 8], [1, 2, 3, 4]) == [-1, -1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposer": "input_cpy"}, "did you mean 'input_copy'"),
        ({"guesses": 4}, "guesses=4 means nothing without a proposer"),
        ({"proposer": "input_copy", "guesses": 0}, "guesses=0 must be an integer of at least 1"),
        ({"proposer": "input_copy", "method": "beam"}, "proposer='input_copy' means nothing to method='beam'"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        DecodeConfig(**options)


def test_a_draft_that_does_not_fit_is_refused(tiny, sources):
    guessing = DecodeConfig(max_length=LENGTH, proposer="draft_model")
    with pytest.raises(ValueError, match="needs a draft model and got none"):
        Generator(tiny.model, guessing)
    with pytest.raises(ValueError, match="asks no draft model"):
        Generator(tiny.model, DecodeConfig(), draft=tiny.model)
    with pytest.raises(ValueError, match="a vocabulary of 13 ids and the model one of 12"):
        Generator(tiny.model, guessing, draft=Tiny(VOCAB + 1, LENGTH, seed=0).model)
    with pytest.raises(ValueError, match="belong together"):
        Generator(tiny.model, guessing, draft=tiny.model)(tiny.params, sources)
