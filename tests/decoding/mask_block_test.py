"""A drafter that fills a block of masks in one pass: it saves passes and changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.loop import decode
from mlm.decoding.proposers import MaskBlock
from mlm.decoding.state import Read, Seen, State
from mlm.models.families import sparse, t5_style
from mlm.models.specs import AttentionSpec, RouterSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer
from tests.decoding.conftest import LENGTH, VOCAB, Tiny
from tests.training.toy import rows_of

MASK = 2
SMALL = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 1))
BLOCK = {"proposer": "mask_block", "guesses": 4, "mask_token": MASK}
PROMPTS = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]


def same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"min_length": 7}, {"method": "sample", "n_best": 2, "top_p": 0.95, "temperature": 0.8, "seed": 5}],
    ids=["greedy", "sample"],
)
def test_whatever_it_guesses_the_tokens_are_the_same(tiny, sources, options):
    """A drafter that knows nothing, and the model itself, whose first guess at least is its greedy choice."""
    plain = tiny.decode(DecodeConfig(max_length=LENGTH, **options), sources, prompts=PROMPTS)
    passes = []
    for drafting in (Tiny(VOCAB, LENGTH, seed=3), tiny):
        generator = Generator(tiny.model, DecodeConfig(max_length=LENGTH, **BLOCK, **options), draft=drafting.model)
        found = generator(tiny.params, sources, prompts=PROMPTS, draft=drafting.params)
        same(found, plain)
        assert (found.passes <= plain.passes).all()
        passes.append(int(found.passes.sum()))
    assert passes[1] < passes[0]


def test_a_mixture_of_experts_and_a_drafter_with_a_window(sources):
    model = Transformer(sparse(SMALL, RouterSpec(experts=4, k=2, gates="chosen", capacity=1.0), every=1))
    draft = Transformer(windowed(SMALL, 3))
    params, small = model.init(jax.random.key(0)), draft.init(jax.random.key(1))
    plain = Generator(model, DecodeConfig(max_length=LENGTH))(params, sources)
    drafted = Generator(model, DecodeConfig(max_length=LENGTH, **BLOCK), draft=draft)
    same(drafted(params, sources, draft=small), plain)
    # The windowed model as its own drafter: what it guesses at the newest token is what it chooses.
    alone = Generator(draft, DecodeConfig(max_length=LENGTH))(small, sources)
    itself = Generator(draft, DecodeConfig(max_length=LENGTH, **BLOCK), draft=draft)(small, sources, draft=small)
    same(itself, alone)
    assert itself.passes.sum() <= (alone.passes.sum() + len(sources)) / 2


def windowed(config, window):
    """Self-attention of the decoder over the newest tokens alone."""

    def narrow(layer):
        return dataclasses.replace(
            layer,
            sublayers=tuple(
                dataclasses.replace(s, window=window) if isinstance(s, AttentionSpec) and s.source == "self" else s
                for s in layer.sublayers
            ),
        )

    decoder = config.decoder
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, group=tuple(map(narrow, decoder.group))))


def test_its_guesses_are_those_of_a_whole_pass():
    """Rows that grow by 1 to W + 1 tokens between passes: what the drafter says from its cache is what it says of
    [tokens, masks] at once, read as in training; so the tokens are kept as training shows them.
    """
    model, width, longest = Transformer(windowed(SMALL, 3)), 3, 14
    params, random = model.init(jax.random.key(0)), np.random.default_rng(0)
    tokens = random.integers(3, VOCAB, (2, longest), dtype=np.int32)
    source = jnp.asarray(random.integers(3, VOCAB, (2, 4), dtype=np.int32))
    empty = model.init_cache(params, model.encode(params, source), source != 0, 2, longest + 8, block=8)

    @jax.jit
    def step(block, cache, tree=None, prefix=None):
        logits, hidden, cache = model.step(params, block, cache, prefix, tree)
        return Read(logits, Seen(hidden)), cache

    def whole(length):
        places = jnp.arange(longest + width)[None]
        masks = (places > length[:, None]) & (places < length[:, None] + width)
        batch = {
            "encoder_input_tokens": source,
            "encoder_segment_ids": jnp.ones((2, 4), jnp.int32),
            "decoder_input_tokens": jnp.where(masks, MASK, jnp.pad(tokens, ((0, 0), (1, width - 1)))),
            "decoder_segment_ids": (places < length[:, None] + width).astype(jnp.int32),
            "decoder_causal_attention": masks.astype(jnp.int32),
        }
        best = model.logits(params, model(params, batch).hidden).argmax(-1)
        return jnp.take_along_axis(best, length[:, None] + jnp.arange(width), axis=1)

    whole, proposer = jax.jit(whole), MaskBlock(step, empty, MASK, width)
    begun = proposer.begin(jnp.pad(jnp.asarray(tokens[:, :2]), ((0, 0), (1, 0))), jnp.array([2, 1]), None)
    nothing = jnp.zeros(2, jnp.int32)
    state = State(jnp.asarray(tokens), *(nothing,) * 7, cache=(), search=(), proposal=begun)
    for lengths in ([2, 1], [3, 5], [7, 6], [11, 10]):
        state = state._replace(length=jnp.array(lengths))
        guesses, own = proposer.propose(state, lambda state, *_: state)
        np.testing.assert_array_equal(guesses, whole(state.length))
        state = state._replace(proposal=own)


@pytest.mark.parametrize(("width", "prompt"), [(5, 0), (3, 2), (1, 0)])
def test_a_perfect_drafter_takes_a_pass_for_each_block(width, prompt):
    """T tokens take ceil(T / (W + 1)) passes. Model and drafter count, 0 2 3 4 …, as long as every place of the cache
    up to where they stand holds what was to be written there, or a mask of this very pass.
    """
    length, vocab = 16, 40

    def count(block, cache, tree=None, prefix=None):
        at = cache["length"][:, None] + jnp.arange(block.shape[1])
        put = jax.vmap(lambda row, at, new: row.at[at].set(new))
        slots = jnp.arange(cache["self"].shape[1])
        kept = put(cache["self"], at, block)
        masks = put(jnp.zeros_like(kept), at, jnp.zeros_like(block) if prefix is None else prefix.astype(jnp.int32))
        ordered = jnp.cumprod((kept == jnp.where(slots > 0, slots + 1, 0)) | (masks > 0), axis=1)
        follows = jnp.where(jnp.take_along_axis(ordered, at, axis=1) > 0, at + 2, 0)
        return Read(jax.nn.one_hot(follows, vocab), Seen(jnp.zeros((*block.shape, 1)))), {**cache, "self": kept}

    config = DecodeConfig(max_length=length, proposer="mask_block", guesses=width, mask_token=39)
    cache = {"length": jnp.zeros(1, jnp.int32), "self": jnp.zeros((1, config.slots), jnp.int32)}
    told = {"prompts": jnp.array([[2, 3]]), "prompt_lengths": jnp.array([2])} if prompt else {}
    proposer, one = MaskBlock(count, cache, 39, width), jnp.ones(1, jnp.int32)
    found = jax.jit(lambda: decode(count, cache, config, ids=one, limits=length * one, proposer=proposer, **told))()
    assert found.tokens[0, 0].tolist() == list(range(2, length + 2))
    assert int(found.passes[0]) == -(-(length - prompt) // (width + 1))


def test_training_lowers_its_loss_and_then_it_saves_passes():
    """A model that repeats what it reads, as its layers add nothing; a drafter trained on words eight times over."""
    words, model = list(range(3, VOCAB)), Transformer(SMALL)
    batch = rows_of([[([w], [w] * 8, 1)] for w in words for _ in range(4)], source=4, target=12)
    options = TrainConfig(steps=60, objective="mask_block", block=4, mask_token=MASK, z_loss=0.0)
    adam = make_optimizer("adamw", learning_rate=1e-2, weight_decay=0.0)
    trainer = Trainer(SMALL, options, adam, make_mesh(MeshConfig(), jax.devices()[:1]), languages=2)
    state, losses = trainer.init(), []
    for _ in range(options.steps):
        state, metrics = trainer.step(state, global_batch(batch, trainer.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    same_table = {"embedding": jnp.eye(VOCAB, 16), "head": jnp.eye(VOCAB, 16).T}
    repeats = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0))) | same_table
    repeats["decoder"]["final_norm"]["scale"] = jnp.ones(16)
    drafted = Generator(model, DecodeConfig(max_length=8, **BLOCK | {"guesses": 3}), draft=model)
    asked = {"sources": [[w] for w in words], "prompts": [[w] for w in words]}
    found = drafted(repeats, **asked, draft=state.params)
    assert found.tokens[:, 0].tolist() == [[w] * 8 for w in words]
    assert found.passes.mean() < 3.5  # 7 without guesses, 2 at best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposer": "mask_block"}, "mask_token=None must be an integer of at least 1"),
        ({"proposer": "mask_block", "mask_token": 0}, "mask_token=0 must be an integer of at least 1"),
        ({"mask_token": 4}, r"mask_token=4 means nothing to proposer='none'; name one of \['mask_block'\]"),
        ({**BLOCK, "branches": 2}, "branches=2 means nothing to proposer='mask_block'"),
        ({**BLOCK, "method": "beam"}, "means nothing to method='beam'"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_a_mask_outside_the_vocabulary_is_refused(tiny):
    config = DecodeConfig(proposer="mask_block", mask_token=VOCAB)
    with pytest.raises(ValueError, match="mask_token 0 holds token 12, outside the model's vocabulary of 12"):
        Generator(tiny.model, config, draft=tiny.model)
