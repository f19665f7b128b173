"""Guesses save passes and change nothing: the same tokens and scores, whoever guesses, right or wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.ngrams import Trigrams, successors, trigram_table
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


# Who guesses, and what is guessed: chains and trees, by a table, by a smaller model, by both.
TREES = {
    "table, chain": {"proposer": "ngram_table", "guesses": 3},
    "table, tree": {"proposer": "ngram_table", "guesses": 6, "branches": 3},
    "draft, tree": {"proposer": "draft_model", "guesses": 5, "branches": 2},
    "staged": {"proposer": "staged", "guesses": 3, "branches": 2},
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("table, chain", "greedy"),
        ("table, tree", "sample"),
        ("draft, tree", "greedy"),
        ("draft, tree", "sample"),
        ("staged", "sample"),
    ],
)
def test_chains_and_trees_change_nothing(tiny, draft, sources, kind, method):
    """By a draft that knows nothing, and by the model itself, and by a table of what it writes."""
    plain = tiny.decode(DecodeConfig(max_length=LENGTH, **METHODS[method]), sources, prompts=PROMPTS)
    config = DecodeConfig(max_length=LENGTH, **TREES[kind], **METHODS[method])
    drafts = config.proposer != "ngram_table"
    table = trigram_table(t[:n] for t, n in zip(plain.tokens[:, 0], plain.lengths[:, 0], strict=True))
    passes = []
    for drafting, known in ((draft, None), (tiny, table)):
        generator = Generator(tiny.model, config, draft=drafting.model if drafts else None)
        found = generator(tiny.params, sources, prompts=PROMPTS, draft=drafting.params if drafts else None, table=known)
        same(found, plain)
        assert (found.passes <= plain.passes).all()
        passes.append(int(found.passes.sum()))
    assert passes[1] < passes[0] <= plain.passes.sum()
    if kind == "staged":  # the model as its own draft is right until the end, whoever guesses for it
        grown = plain.lengths - np.array([len(p) for p in PROMPTS])[:, None]
        assert (found.passes == -(-grown.max(1) // 4)).all()


def test_a_tree_holds_more_than_a_chain_of_as_many_guesses(make_tiny, draft, sources):
    """A draft whose second choice is often right: the model with noise on its parameters."""
    tiny = make_tiny(VOCAB, LENGTH, seed=1)
    noise = jax.tree.map(
        lambda x: x + 0.15 * jnp.std(x) * jax.random.normal(jax.random.key(x.size), x.shape), tiny.params
    )
    passes = []
    for branches in (1, 3):
        config = DecodeConfig(max_length=LENGTH, proposer="draft_model", guesses=6, branches=branches, min_length=9)
        passes.append(Generator(tiny.model, config, draft=tiny.model)(tiny.params, sources, draft=noise).passes.sum())
    plain = tiny.decode(DecodeConfig(max_length=LENGTH, min_length=9), sources).passes.sum()
    assert passes[1] < passes[0] < plain


def test_what_followed_two_tokens():
    """1 2 -> 3 twice, 4 once: 2/3 and 1/3; in the row 1 2 -> 5 occurs once, 4 once: 0.04 each on top."""
    table = trigram_table([[1, 2, 3], [1, 2, 3], [7, 1, 2, 4]], buckets=64, width=2)
    text = jnp.array([[1, 2, 5, 1, 2, 4, -1, 1, 2, -1], [1, 2, 5, 5, 1, 2, 5, -1, -1, -1]])
    one, two = jnp.array([1, 1]), jnp.array([2, 2])
    assert successors(table, text, one, two, 3).tolist() == [[3, 4, 5], [3, 4, 5]]
    assert successors(None, text, one, two, 3).tolist() == [[5, 4, -1], [5, -1, -1]]
    assert successors(table, text[:, :3], jnp.array([0, 0]), jnp.array([0, 9]), 1).tolist() == [[1], [-1]]
    favoured = Trigrams(table.tokens, table.shares * 0.05)  # 0.0333 and 0.0167 + 0.04, 0.04
    assert successors(favoured, text, one, two, 2).tolist() == [[4, 5], [5, 3]]


def test_the_table_learns_while_it_writes(make_tiny):
    """A model that counts in a circle of nine, without a source or a table to look it up: after one round it flies."""
    tiny = make_tiny(VOCAB, 32, seed=1)
    nothing = jax.tree.map(jnp.zeros_like, tiny.params)
    nothing["decoder"]["final_norm"]["scale"] = jnp.ones(16)
    turn = jnp.eye(VOCAB)[jnp.array([0, 1, 2, *range(4, 12), 3])]  # row t: the token behind t
    tiny.params = nothing | {"embedding": jnp.eye(VOCAB, 16), "head": jnp.pad(turn, ((0, 4), (0, 0)))}
    config = DecodeConfig(max_length=32, proposer="ngram_table", guesses=4)
    plain = tiny.decode(DecodeConfig(max_length=32), [[5, 1]], prompts=[[3]])
    found = tiny.decode(config, [[5, 1]], prompts=[[3]])
    same(found, plain)
    # 3 4 … 11 3 4: ten passes until a pair comes again, then five tokens a pass.
    assert plain.passes.tolist() == [31]
    assert found.passes.tolist() == [10 + -(-21 // 5)]


def test_guesses_in_a_mixture_of_experts_and_on_eight_devices(sources):
    config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 2))
    model = Transformer(sparse(config, RouterSpec(experts=4, k=2, gates="chosen", capacity=1.0), every=1))
    params = model.init(jax.random.key(0))
    plain = Generator(model, DecodeConfig(max_length=LENGTH))(params, sources)
    guessing = DecodeConfig(max_length=LENGTH, proposer="draft_model", guesses=4, branches=2)
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
        ({"guesses": 4}, "guesses=4 means nothing to proposer='none'"),
        ({"proposer": "input_copy", "branches": 2}, r"name one of \['ngram_table', 'draft_model', 'staged'\]"),
        ({"proposer": "ngram_table", "branches": 0}, "branches=0 must be an integer of at least 1"),
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
