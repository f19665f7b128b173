"""Several models as one: what they say together, from whole passes of each; and whom a model is contrasted with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator, Reading
from mlm.models.families import llama_style, sparse, t5_style
from mlm.models.specs import PositionSpec, RouterSpec
from mlm.models.transformer import Transformer
from tests.decoding.conftest import LENGTH, VOCAB, Tiny

NEVER = -1.0e7
PROMPTS = [[7], [8], [2], [3], [8], [5], [6], [11]]


def same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


def greedy(choose, start=(), length=LENGTH):
    """Tokens by `choose(tokens so far)`, until EOS or the limit."""
    written = list(start)
    while len(written) < length and (len(written) == len(start) or written[-1] != 1):
        written.append(int(choose(written)))
    return written


def near_best(log_probs, alpha):
    return log_probs >= log_probs.max() + np.log(alpha)


def written(found, index):
    return found.tokens[index, 0, : found.lengths[index, 0]].tolist()


@pytest.fixture(scope="module")
def other() -> Tiny:
    return Tiny(VOCAB, LENGTH, seed=3)


@pytest.fixture(scope="module")
def experts() -> Tiny:
    """A mixture of experts, to be asked as the dense one is."""
    config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(1, 2))
    tiny = Tiny(VOCAB, LENGTH, seed=2)
    tiny.model = Transformer(sparse(config, RouterSpec(experts=4, k=2, gates="chosen", capacity=4.0), every=1))
    tiny.params = tiny.model.init(jax.random.key(4))
    return tiny


class TestEnsembles:
    def test_a_model_with_itself_is_itself(self, tiny, sources, config):
        """Under every method, with prompts, and with guesses."""
        twice = Generator(tiny.model, config, ensemble=[tiny.model])
        same(twice(tiny.params, sources, ensemble=[tiny.params]), tiny.decode(config, sources))

    def test_guesses_and_prompts_stay_what_they_are(self, tiny, other, sources):
        def found(**options):
            config = DecodeConfig(max_length=LENGTH, **options)
            drafting = {"draft": tiny.model} if options.get("proposer") == "draft_model" else {}
            generator = Generator(tiny.model, config, ensemble=[other.model], **drafting)
            given = {"draft": tiny.params} if drafting else {}
            return generator(tiny.params, sources, prompts=PROMPTS, ensemble=[other.params], **given)

        plain = found()
        for proposer in ("input_copy", "draft_model"):
            guessed = found(proposer=proposer, guesses=2)
            same(guessed, plain)
        assert guessed.passes.sum() < plain.passes.sum()

    @pytest.mark.parametrize("mean", ["probabilities", "log_probabilities"])
    def test_a_dense_and_a_sparse_member(self, tiny, experts, sources, mean):
        """Greedy: the tokens, and the log-probability of what all say together; on eight devices, too."""

        def together(source, prefix):
            each = np.stack([member.log_probs(source, prefix) for member in (tiny, experts)])
            if mean == "probabilities":
                return np.log(np.exp(each).mean(0))
            joint = each.mean(0)
            return joint - np.log(np.exp(joint).sum())

        config = DecodeConfig(max_length=LENGTH, ensemble_mean=mean)
        found = Generator(tiny.model, config, ensemble=[experts.model])(tiny.params, sources, ensemble=[experts.params])
        for i, source in enumerate(sources):
            want = greedy(lambda prefix, source=source: together(source, prefix).argmax())
            assert written(found, i) == want
            total = sum(together(source, want[:t])[token] for t, token in enumerate(want))
            np.testing.assert_allclose(found.scores[i, 0], total, atol=1e-4)
        assert any(
            written(found, i) != written(tiny.decode(DecodeConfig(max_length=LENGTH), sources), i) for i in range(8)
        )
        if mean == "probabilities":
            mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            spread = Generator(tiny.model, config, ensemble=[experts.model], rows=NamedSharding(mesh, P("data")))
            params, member = (jax.device_put(p, NamedSharding(mesh, P())) for p in (tiny.params, experts.params))
            same(spread(params, sources, ensemble=[member]), found)

    def test_beams_follow_what_all_say(self, tiny, other, sources):
        """The scores of a beam search are those of whole passes of both."""
        config = DecodeConfig(method="beam", beams=3, alpha=0.0, max_length=6)
        found = Generator(tiny.model, config, ensemble=[other.model])(tiny.params, sources[:2], ensemble=[other.params])
        for i, source in enumerate(sources[:2]):
            tokens = written(found, i)
            total = 0.0
            for t, token in enumerate(tokens):
                each = [member.log_probs(source, tokens[:t])[token] for member in (tiny, other)]
                total += np.log(np.exp(each).mean())
            np.testing.assert_allclose(found.scores[i, 0], total, atol=1e-4)


class TestContrastiveDecoding:
    def found(self, tiny, amateur, sources, prompts=None, **options):
        config = DecodeConfig(max_length=LENGTH, contrast="model", **options)
        generator = Generator(tiny.model, config, contrast=amateur.model)
        return generator(tiny.params, sources, contrast=amateur.params, prompts=prompts)

    def test_no_weight_and_no_difference_change_nothing(self, tiny, other, sources):
        plain = tiny.decode(DecodeConfig(max_length=LENGTH), sources)
        same(self.found(tiny, other, sources, contrast_beta=0.0), plain)
        same(self.found(tiny, tiny, sources), plain)

    def test_it_is_the_formula_over_whole_passes(self, tiny, other, sources):
        """Also where tokens are guessed ahead."""
        alpha, beta = 0.05, 1.5
        found = self.found(
            tiny, other, sources, prompts=PROMPTS, proposer="input_copy", contrast_alpha=alpha, contrast_beta=beta
        )

        def choose(source, prefix):
            own, less = (member.log_probs(source, prefix) for member in (tiny, other))
            return np.where(near_best(own, alpha), (1 + beta) * own - beta * less, NEVER).argmax()

        for i, source in enumerate(sources):
            want = greedy(lambda prefix, source=source: choose(source, prefix), PROMPTS[i])
            assert written(found, i) == want
            total = sum(tiny.log_probs(source, want[:t])[want[t]] for t in range(1, len(want)))
            np.testing.assert_allclose(found.scores[i, 0], total, atol=1e-4)  # scores are the model's own
        plain = tiny.decode(DecodeConfig(max_length=LENGTH), sources, prompts=PROMPTS)
        assert (found.tokens != plain.tokens).any()


class TestAgainstAnotherReading:
    """The model itself, which reads other sources, other prompts, or begins with another token."""

    CONFIG = DecodeConfig(max_length=LENGTH, contrast="language", contrast_beta=2.0)

    def choose(self, tiny, source, prefix, other_source, other_prefix):
        own, less = tiny.log_probs(source, prefix), tiny.log_probs(other_source, other_prefix)
        return np.where(near_best(own, 0.1), 3 * own - 2 * less, NEVER).argmax()

    def test_another_source(self, tiny, sources):
        """Shorter or longer than the own one."""
        others = [([10, *source] if i % 2 else source[1:])[:8] for i, source in enumerate(sources)]
        found = tiny.decode(self.CONFIG, sources, against=Reading(others))
        for i, (source, other) in enumerate(zip(sources, others, strict=True)):
            want = greedy(lambda p, source=source, other=other: self.choose(tiny, source, p, other, p))
            assert written(found, i) == want
        same(
            tiny.decode(self.CONFIG, sources, against=Reading(sources)),
            tiny.decode(DecodeConfig(max_length=LENGTH), sources),
        )

    def test_another_prompt(self, tiny, sources):
        """What is written follows the one prompt in the one reading, and the other in the other; also in blocks."""
        config = DecodeConfig(
            max_length=LENGTH, contrast="language", contrast_beta=2.0, proposer="input_copy", guesses=3
        )
        prompts = [[7, 3, 9][: 1 + i % 3] for i in range(8)]
        others = [[4, *prompt[1:]] for prompt in prompts]
        found = tiny.decode(config, sources, prompts=prompts, against=Reading(sources, others))
        for i, source in enumerate(sources):
            n = len(prompts[i])
            want = greedy(
                lambda p, source=source, i=i, n=n: self.choose(tiny, source, p, source, [*others[i], *p[n:]]),
                prompts[i],
            )
            assert written(found, i) == want

    def test_another_start_token(self, tiny, sources):
        start = Tiny(VOCAB, LENGTH, seed=1)
        start.model = tiny.model.starting_with(9)
        found = tiny.decode(self.CONFIG, sources, against=Reading(sources, start=9))
        for i, source in enumerate(sources):

            def choose(prefix, source=source):
                own, less = tiny.log_probs(source, prefix), start.log_probs(source, prefix)
                return np.where(near_best(own, 0.1), 3 * own - 2 * less, NEVER).argmax()

            assert written(found, i) == greedy(choose)


class TestEarlyLayers:
    """DoLa, against the formula over whole passes whose states are those after each layer."""

    def choose(self, log_probs, early, alpha=0.1):
        """log_probs [V], early: of the candidates [n, V]."""
        middle = np.log((np.exp(log_probs) + np.exp(early)) / 2)
        divergence = [
            (np.sum(np.exp(log_probs) * (log_probs - m)) + np.sum(np.exp(e) * (e - m))) / 2
            for e, m in zip(early, middle, strict=True)
        ]
        chosen = early[np.argmax(divergence)]
        return np.where(near_best(log_probs, alpha), log_probs - chosen, NEVER).argmax(), np.argmax(divergence)

    def by_depth(self, model, params, batch, place):
        """[1 + layers, V]: log-probabilities after 0, 1, 2, … layers at a place of a whole pass."""
        hidden = model(params, batch, taps=["decoder/hidden"]).taps["decoder/hidden"]
        hidden = jnp.concatenate([params["embedding"][batch["decoder_input_tokens"]][None], hidden])
        normed = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6)
        normed = normed * params["decoder"]["final_norm"]["scale"]
        return jax.nn.log_softmax(jax.vmap(lambda h: model.logits(params, h))(normed)[:, 0, place])

    @pytest.mark.parametrize("alone", [False, True], ids=["encoder-decoder", "decoder alone"])
    def test_it_is_the_formula_over_whole_passes(self, sources, alone):
        if alone:
            rope = PositionSpec(kind="rope")
            config = llama_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=3, rope=rope)
        else:
            config = t5_style(vocab_size=VOCAB, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(1, 3))
        model = Transformer(config)
        params = jax.tree.map(lambda x: 1.5 * x, model.init(jax.random.key(6)))
        candidates = (0, 2)
        depth = jax.jit(lambda batch, place: self.by_depth(model, params, batch, place))
        guessing = {} if alone else {"proposer": "input_copy", "guesses": 2}
        found = Generator(model, DecodeConfig(max_length=LENGTH, dola_layers=candidates, **guessing))(params, sources)
        met = set()
        for i, source in enumerate(sources):

            def choose(prefix, source=source):
                fed = np.zeros((1, LENGTH + 1), np.int32)
                fed[0, 1 : len(prefix) + 1] = prefix
                batch = {"decoder_input_tokens": fed, "decoder_segment_ids": np.ones_like(fed)}
                if not alone:
                    read = np.zeros((1, 8), np.int32)
                    read[0, : len(source)] = source
                    batch |= {"encoder_input_tokens": read, "encoder_segment_ids": (read != 0).astype(np.int32)}
                after = np.asarray(depth(batch, len(prefix)), np.float64)
                token, layer = self.choose(after[-1], after[list(candidates)])
                met.add(int(layer))
                return token

            assert written(found, i) == greedy(choose, source if alone else ())
        assert met == {0, 1}  # both layers are chosen somewhere
        plain = Generator(model, DecodeConfig(max_length=LENGTH))(params, sources)
        assert (plain.tokens != found.tokens).any()


@pytest.mark.parametrize(
    ("options", "models", "message"),
    [
        ({"contrast": "model"}, {}, "needs a contrast model and got none"),
        ({}, {"contrast": VOCAB}, "asks no contrast model"),
        ({"contrast": "model"}, {"contrast": VOCAB + 1}, "the contrast model has a vocabulary of 13 ids and the model"),
        ({}, {"ensemble": VOCAB + 1}, "the ensemble model has a vocabulary of 13 ids"),
        ({"ensemble_mean": "log_probabilities"}, {}, "means nothing to one model"),
        ({"dola_layers": (1,)}, {"ensemble": VOCAB}, "no layers in common"),
        ({"dola_layers": (2,)}, {}, "the decoder has 2 layers"),
    ],
)
def test_models_that_do_not_fit_are_refused(tiny, options, models, message):
    made = {name: Tiny(vocab, LENGTH, seed=0).model for name, vocab in models.items()}
    if "ensemble" in made:
        made["ensemble"] = [made["ensemble"]]
    with pytest.raises(ValueError, match=message):
        Generator(tiny.model, DecodeConfig(**options), **made)


def test_a_decoder_alone_is_no_member(tiny):
    rope = PositionSpec(kind="rope")
    alone = Transformer(llama_style(vocab_size=VOCAB, d_model=16, d_ff=16, heads=2, kv_heads=1, layers=1, rope=rope))
    with pytest.raises(ValueError, match="the ensemble model must have an encoder where the model has one"):
        Generator(tiny.model, DecodeConfig(), ensemble=[alone])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"ensemble": [{}]}, "parameters of 1 members for an ensemble with 0 others"),
        ({"contrast": "language"}, {}, "asks what the model reads"),
        ({}, {"against": Reading([[3]])}, "does not ask what the model reads"),
        ({"contrast": "language"}, {"against": Reading([[3]], [[4]])}, "equally long ones"),
        ({"contrast": "language"}, {"against": Reading([[3], [4]])}, "equally long ones"),
        ({"contrast": "language"}, {"against": Reading([[99]])}, "source 0 holds token 99"),
        ({"language_mask": True}, {}, r"language_mask reads given\['language_mask'\].* is missing"),
        ({"language_bias": 0.5}, {"given": {"language_bias": np.zeros((1, 3))}}, r"has the shape \(1, 3\)"),
        ({"language_mask": True}, {"given": {"language_mask": np.zeros((1, VOCAB), bool)}}, "must allow the end"),
    ],
)
def test_what_is_missing_is_said_before_compiling(tiny, options, given, message):
    generator = Generator(tiny.model, DecodeConfig(max_length=4, **options))
    with pytest.raises(ValueError, match=message):
        generator(tiny.params, [[3]], **given)
    assert generator.compilations == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "amateur"}, "is none of"),
        ({"contrast_beta": 0.7}, "contrast_beta=0.7 means nothing without contrast"),
        ({"contrast_alpha": 0.2}, "means nothing without contrast or dola_layers"),
        ({"dola_layers": (1,), "contrast_beta": 0.7}, "contrast_beta=0.7 means nothing without contrast"),
        ({"contrast": "model", "contrast_alpha": 0.0}, r"in \(0, 1\]"),
        ({"contrast": "model", "contrast_beta": -1.0}, "at least 0"),
        ({"contrast": "model", "dola_layers": (1,)}, "one contrast at a time"),
        ({"contrast": "model", "proposer": "draft_model"}, "nobody to be contrasted with"),
        ({"dola_layers": (1,), "proposer": "draft_model"}, "nobody to be contrasted with"),
        ({"contrast": "model", "method": "beam"}, r"choose one of \['greedy', 'sample'\]"),
        ({"dola_layers": (1, 1)}, "different numbers of decoder layers"),
        ({"language_bias": -1.0}, "at least 0"),
        ({"language_bias": 0.1, "method": "beam"}, "means nothing to method='beam'"),
        ({"ensemble_mean": "probabilites"}, "did you mean 'probabilities'"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        DecodeConfig(**options)
