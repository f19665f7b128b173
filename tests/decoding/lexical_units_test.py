"""Several tokens a pass where the model is sure: against a slow reference, and against greedy search."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.loop import decode
from mlm.decoding.state import Read, Seen
from mlm.models.families import llama_style, rnnsearch, sparse, t5_style
from mlm.models.specs import AttentionSpec, PositionSpec, RouterSpec
from mlm.models.transformer import Transformer
from mlm.parallel import MeshConfig, global_batch, make_mesh
from mlm.training.optimizers import make_optimizer
from mlm.training.trainer import TrainConfig, Trainer
from tests.decoding.conftest import VOCAB, Tiny
from tests.training.toy import rows_of

EOS, MASK, LIMIT = 1, 2, 15
FOREIGN = [4, 7]  # tokens of another language
PROMPTS = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]
LIMITS = [15, 4, 15, 3, 15, 2, 11, 15]
SMALL = t5_style(vocab_size=VOCAB, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 2))
ALONE = llama_style(
    vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=2, rope=PositionSpec(kind="rope")
)


def units(**options):
    return DecodeConfig(method="lexical_units", mask_token=MASK, **{"max_length": LIMIT, **options})


def windowed(config, window=3):
    """Self-attention of the decoder over the newest tokens alone, whose keys lie on a ring."""
    own = lambda s: isinstance(s, AttentionSpec) and s.source == "self"  # noqa: E731
    decoder = config.decoder.mapped(lambda s: replace(s, window=window) if own(s) else s)
    return replace(config, decoder=decoder)


MODELS = {
    "dense": SMALL,
    "window": windowed(SMALL),
    "alone": ALONE,
    "alone, window": windowed(ALONE),
    "experts": sparse(SMALL, RouterSpec(experts=4, k=2, gates="chosen", capacity=4.0), every=1),
    "recurrent": rnnsearch(vocab_size=VOCAB, d_model=16, width=16, alignment=8, layers=1),
}


@pytest.fixture(scope="module")
def sharp():
    """Models that are often sure: their heads are multiplied, so that probabilities come from everywhere in (0, 1)."""
    made = {}

    def model(name) -> Tiny:
        if name not in made:
            tiny = made[name] = Tiny(VOCAB, LIMIT + 1, seed=4)
            tiny.model = Transformer(MODELS[name])
            params = tiny.model.init(jax.random.key(4))
            tiny.params = params | {"head": 2.5 * params["head"]}
        return made[name]

    return model


def asked(name, sources):
    """What a decoder alone begins with are its sources."""
    beginnings = [p or [9] for p in PROMPTS]
    return (beginnings, None) if name.startswith("alone") else (sources, PROMPTS)


def reference(tiny, config, source, prompt, limit):
    """(tokens, score, passes) by the rule, a whole pass over [text, masks] for every token."""
    text, score, passes, n = list(prompt), 0.0, 0, config.ngram
    ended = False
    while len(text) < limit and not ended:
        read, passes = tuple(text), passes + 1
        for masks in range(config.guesses + 1):
            log_probs = tiny.log_probs(source, [*read, *[config.mask_token] * masks])
            allowed = log_probs.copy()
            if len(text) + 1 < config.min_length:
                allowed[EOS] = -np.inf
            if config.language_mask:
                allowed[FOREIGN] = -np.inf
            token = int(allowed.argmax())
            grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
            sure = np.exp(log_probs[token]) > config.threshold and (*text[1 - n :], token)[-n:] not in grams
            if masks and not sure:
                break
            text.append(token)
            score += log_probs[token]
            written = text[len(prompt) :]
            ended = token == EOS or any(tuple(written[-len(phrase) :]) == phrase for phrase in config.stop)
            if ended or len(text) == limit:
                break
    return text, score, passes


def check(found, i, expected):
    tokens, score, passes = expected
    assert found.tokens[i, 0, : found.lengths[i, 0]].tolist() == tokens
    assert not found.tokens[i, 0, len(tokens) :].any()
    assert found.passes[i] == passes
    np.testing.assert_allclose(found.scores[i, 0], score, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "guesses"),
    [
        ("dense", 1),
        ("dense", 4),
        ("window", 3),
        pytest.param("alone", 4, marks=pytest.mark.slow),
        ("alone, window", 2),
        pytest.param("experts", 3, marks=pytest.mark.slow),
        pytest.param("recurrent", 3, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_passes_as_by_the_rule_in_numpy(sharp, sources, name, guesses):
    """Ragged prompts and limits; keys that are read again a pass later, on a ring too, are those of a whole pass."""
    tiny, (read, prompts) = sharp(name), asked(name, sources)
    passes = {}
    for threshold in (0.3, 0.6, 0.9):
        config = units(threshold=threshold, guesses=guesses)
        found = tiny.decode(config, read, prompts=prompts, limits=LIMITS)
        for i in range(8):
            source, prompt = (read[i], prompts[i]) if prompts else ([EOS], read[i])
            check(found, i, reference(tiny, config, source, prompt, LIMITS[i]))
        passes[threshold] = int(found.passes.sum()), int(found.lengths.sum())
    assert len({*passes.values()}) > 1  # thresholds differ in what they take
    given = sum(map(len, prompts or read))
    assert passes[0.3][0] < passes[0.3][1] - given  # and something is taken behind placeholders


def test_ends_and_what_is_forbidden_as_by_the_rule_in_numpy(sharp, sources):
    """Whether it is sure is asked of all tokens: what is left of them is no surer than it was."""
    tiny = sharp("dense")
    config = units(threshold=0.4, guesses=4, min_length=6, stop=((9, 5), (2,)), ngram=2, language_mask=True)
    allowed = ~np.isin(np.arange(VOCAB), FOREIGN)
    found = tiny.decode(config, sources, given={"language_mask": np.tile(allowed, (8, 1))})
    for i in range(8):
        check(found, i, reference(tiny, config, sources[i], (), LIMIT))


@pytest.mark.parametrize("name", ["dense", "window", "alone, window", pytest.param("alone", marks=pytest.mark.slow)])
def test_threshold_1_is_greedy_search(sharp, sources, name):
    tiny, (read, prompts) = sharp(name), asked(name, sources)
    for given in (None, prompts) if prompts else (None,):
        greedy = tiny.decode(DecodeConfig(max_length=LIMIT), read, prompts=given)
        found = tiny.decode(units(threshold=1.0, guesses=3), read, prompts=given)
        np.testing.assert_array_equal(found.tokens, greedy.tokens)
        np.testing.assert_array_equal(found.passes, greedy.passes)
        np.testing.assert_allclose(found.scores, greedy.scores, atol=1e-4)


def test_a_row_is_the_same_alone(sharp, sources):
    tiny, config = sharp("window"), units(threshold=0.4, guesses=3)
    together = tiny.decode(config, sources, prompts=PROMPTS)
    for i in range(8):
        alone = tiny.decode(config, [sources[i]], prompts=[PROMPTS[i]], ids=[i])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        assert alone.passes[0] == together.passes[i]


def test_an_ensemble_is_as_sure_as_its_mean(sharp, sources):
    """Of two equal models: one of them."""
    tiny, config = sharp("dense"), units(threshold=0.6, guesses=4)
    both = Generator(tiny.model, config, ensemble=[tiny.model])(tiny.params, sources, ensemble=[tiny.params])
    one = tiny.decode(config, sources)
    np.testing.assert_array_equal(both.tokens, one.tokens)
    np.testing.assert_array_equal(both.passes, one.passes)


def spelled(script, width, prompt=0, **options):
    """(tokens, passes) of a model that is sure of a text, as long as its cache holds the text so far: every token read
    in its place, or a mask of this very pass.
    """
    text, vocab = np.array(script), 20

    def step(block, cache, tree=None, prefix=None):
        at = cache["length"][:, None] + jnp.arange(block.shape[1])
        put = jax.vmap(lambda row, at, new: row.at[at].set(new))
        kept = put(cache["self"], at, block)
        masks = put(jnp.zeros_like(kept), at, (block == MASK).astype(jnp.int32))
        right = jnp.pad(jnp.asarray(text), (1, kept.shape[1]))[: kept.shape[1]]
        ordered = jnp.cumprod((kept == right) | (masks > 0), axis=1)
        follows = jnp.asarray(text)[jnp.minimum(at, text.size - 1)]
        follows = jnp.where(jnp.take_along_axis(ordered, at, axis=1) > 0, follows, 19)
        return Read(30 * jax.nn.one_hot(follows, vocab), Seen(jnp.zeros((*block.shape, 1)))), {**cache, "self": kept}

    config, one = units(guesses=width, max_length=text.size, **options), jnp.ones(1, jnp.int32)
    cache = {"length": jnp.zeros(1, jnp.int32), "self": jnp.zeros((1, config.slots), jnp.int32)}
    told = {"prompts": jnp.array([script[:prompt]]), "prompt_lengths": prompt * one} if prompt else {}
    found = jax.jit(lambda: decode(step, cache, config, ids=one, limits=text.size * one, **told))()
    return found.tokens[0, 0, : int(found.lengths[0, 0])].tolist(), int(found.passes[0])


COUNT = list(range(3, 17))


@pytest.mark.parametrize(("width", "prompt"), [(5, 0), (3, 2), (1, 0), (1, 1), (20, 3)])
def test_a_sure_model_takes_a_pass_for_each_unit(width, prompt):
    """T tokens take ceil(T / (W + 1)) passes, whatever is read again."""
    assert spelled(COUNT, width, prompt) == (COUNT, -(-(len(COUNT) - prompt) // (width + 1)))


def test_an_end_in_mid_unit_ends_the_text():
    assert spelled([3, 4, 5, 6, EOS, 7, 8, 9], 3) == ([3, 4, 5, 6, EOS], 2)
    assert spelled([3, 4, EOS, 6, 5, 7, 8, 9], 7) == ([3, 4, EOS], 1)
    assert spelled(COUNT, 4, stop=((8, 9),)) == ([3, 4, 5, 6, 7, 8, 9], 2)
    assert spelled(COUNT, 4, bad_words=((5,),), threshold=0.0)[0][:2] == [3, 4]  # and not 5


def test_an_n_gram_that_comes_again_waits_for_the_next_pass():
    """3 4 5 3 4 | 5 …: behind a placeholder the second 5 would make 3 4 5 again; as the first of a pass it may."""
    text = [3, 4, 5, 3, 4, 5, 6, 7]
    assert spelled(text, 7, ngram=9) == (text, 1)
    assert spelled(text, 7, ngram=3) == (text, 2)
    assert spelled(text, 7, ngram=2) == (text, 3)  # 3 4 5 3 | 4 | 5 6 7
    assert spelled(text, 7, ngram=1) == (text, 4)  # 3 4 5 | 3 | 4 | 5 6 7
    assert spelled(text, 7, prompt=3, ngram=3) == (text, 2)  # the prompt's count too
    assert spelled([3] * 6, 7, ngram=1) == ([3] * 6, 6)


WORDS = 5  # of three tokens each: w, w + 5, w + 10


def texts(seed, rows):
    """Three words, the first by the source. Behind a word one other follows with 0.75, else any."""
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(rows):
        first = word = int(draw.integers(WORDS))
        target = []
        for _ in range(3):
            target += [3 + word, 3 + word + WORDS, 3 + word + 2 * WORDS]
            word = (word + 2) % WORDS if draw.random() < 0.75 else int(draw.integers(WORDS))
        examples.append([([3 + first], target, 1)])
    return rows_of(examples, source=4, target=9)


def test_a_trained_model_saves_passes_and_gives_quality_for_more():
    """One that learned text and units at once: at 0.9 all words are spelled as by greedy search, in half of its passes;
    below that it pays for passes with words.
    """
    config = t5_style(vocab_size=24, d_model=32, d_ff=64, heads=2, head_dim=16, layers=(1, 2))
    train = TrainConfig(steps=400, objective="lexical_units", block=9, mask_token=MASK, z_loss=0.0)
    adam = make_optimizer("adamw", learning_rate=3e-3, weight_decay=0.0)
    trainer = Trainer(config, train, adam, make_mesh(MeshConfig(), jax.devices()[:1]), languages=2)
    state, shares = trainer.init(), []
    for step in range(train.steps):
        state, metrics = trainer.step(state, global_batch(texts(step, 32), trainer.mesh))
        shares.append(float(metrics["placeholders"][0] / metrics["placeholders"][1]))
    assert shares[0] == 0.0  # nothing is sure at first
    assert np.mean(shares[-20:]) > 0.1
    passes, right = [], []
    for threshold in (1.0, 0.9, 0.6, 0.0):
        options = {"method": "lexical_units", "mask_token": MASK, "threshold": threshold, "ngram": 9}
        generator = Generator(trainer.model, DecodeConfig(max_length=9, min_length=9, **options))
        found = generator(state.params, [[3 + w] for w in range(WORDS)])
        words = found.tokens[:, 0].reshape(-1, 3)
        passes.append(float(found.passes.mean()))
        right.append(float(np.mean((words[:, 1:] == words[:, :1] + [WORDS, 2 * WORDS]).all(axis=1))))
    assert passes == sorted(passes, reverse=True)
    assert passes[0] == 9
    assert passes[1] < 6
    assert passes[3] == 1
    assert right[:2] == [1.0, 1.0]
    assert min(right) > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mask_token=None must be an integer of at least 1 .* method='lexical_units' needs the token"),
        ({"mask_token": 0}, "mask_token=0 must be an integer of at least 1"),
        ({"mask_token": 2, "threshold": 1.5}, r"threshold=1.5 must be in \[0, 1\]"),
        ({"mask_token": 2, "threshold": -0.1}, r"threshold=-0.1 must be in \[0, 1\]"),
        ({"mask_token": 2, "guesses": 0}, "guesses=0 must be an integer of at least 1"),
        ({"mask_token": 2, "ngram": 0}, "ngram=0 must be an integer of at least 1"),
        ({"mask_token": 2, "proposer": "mask_block"}, "proposer='mask_block' means nothing to method='lexical_units'"),
        ({"mask_token": 2, "branches": 2}, "branches=2 means nothing to method='lexical_units'"),
        ({"mask_token": 2, "contrast": "model"}, "contrast='model' means nothing to method='lexical_units'"),
        ({"method": "greedy", "threshold": 0.5}, r"threshold=0.5 means .* choose one of \['lexical_units'\]"),
        ({"method": "beam", "guesses": 4}, "guesses=4 means nothing to method='beam'"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**{"method": "lexical_units", **options})


def test_a_mask_outside_the_vocabulary_is_refused(tiny):
    with pytest.raises(ValueError, match="mask_token 0 holds token 12, outside the model's vocabulary of 12"):
        Generator(tiny.model, DecodeConfig(method="lexical_units", mask_token=VOCAB))
