"""The loop against slow references, and a row's independence of everything that is not its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.phrases import constraints
from mlm.decoding.state import Proposer
from tests.decoding.conftest import METHODS

EOS = 1


def rows(decoded, i):
    """Every result of example i as a list of tokens."""
    return [list(t[:n]) for t, n in zip(decoded.tokens[i], decoded.lengths[i], strict=True)]


def greedy_reference(tiny, source, prompt=(), limit=10):
    tokens, score = list(prompt), 0.0
    while len(tokens) < limit and tokens[len(prompt) :][-1:] != [EOS]:
        log_probs = tiny.log_probs(source, tokens)
        tokens.append(int(log_probs.argmax()))
        score += log_probs[tokens[-1]]
    return tokens, score


def test_the_cached_loop_is_greedy_search_without_a_cache(tiny, sources):
    out = tiny.decode(DecodeConfig(max_length=10), sources)
    ended = 0
    for i, source in enumerate(sources):
        tokens, score = greedy_reference(tiny, source)
        assert rows(out, i) == [tokens]
        assert not out.tokens[i, 0, len(tokens) :].any()
        np.testing.assert_allclose(out.scores[i, 0], score, atol=1e-4)
        ended += tokens[-1] == EOS
    assert 0 < ended < len(sources)  # both ways of stopping are covered


def test_ragged_prompts_are_kept_and_continued_as_without_a_cache(tiny, sources):
    prompts = [
        [7],
        [],
        [2, 1, 9, 4],
        [3, 3],
        [8, 1],
        [5],
        [6, 7, 8, 9, 10],
        [11],
    ]  # an EOS inside a prompt ends nothing
    limits = [10, 4, 10, 3, 7, 2, 6, 10]
    out = tiny.decode(DecodeConfig(max_length=10), sources, prompts=prompts, limits=limits)
    for i, (source, prompt, limit) in enumerate(zip(sources, prompts, limits, strict=True)):
        tokens, score = greedy_reference(tiny, source, prompt, limit)
        assert rows(out, i) == [tokens]
        np.testing.assert_allclose(out.scores[i, 0], score, atol=1e-4)  # the prompt is not scored


def test_prompts_and_limits_hold_for_every_method(tiny, sources, config):
    prompts, limits = [[4, 1, 9]] * 8, [4, 5, 6, 7, 8, 9, 10, 10]
    out = tiny.decode(config, sources, prompts=prompts, limits=limits)
    found = out.lengths > 0  # a single free token leaves beams without a result
    assert (out.tokens[:, :, :3] == [4, 1, 9])[found].all()
    assert (out.lengths <= np.array(limits)[:, None]).all()
    assert (out.lengths[:, 0] > 3).all()
    assert (np.diff(out.scores, axis=1) <= 0).all()  # best first


def test_a_row_knows_nothing_of_its_neighbours(tiny, sources, config):
    prompts = [[7], [], [2, 1, 9, 4], [3, 3], [8, 1], [5], [6, 7, 8, 9, 10], [11]]
    together = tiny.decode(config, sources, prompts=prompts)
    for i in (0, 2, 5, 6):
        alone = tiny.decode(config, [sources[i]], prompts=[prompts[i]], ids=[i])
        assert rows(alone, 0) == rows(together, i)
        np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-5)


def tensor_sharding(model, mesh):
    """Heads, feed-forward and vocabulary over `tensor`, the rest on every device."""
    names = {"heads", "mlp", "vocab"}
    place = lambda axes: NamedSharding(mesh, P(*("tensor" if a in names else None for a in axes)))  # noqa: E731
    return jax.tree.map(place, model.axes(), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
def test_eight_devices_give_the_tokens_of_one(tiny, sources, config, data, tensor):
    mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    one = tiny.decode(config, sources, prompts=[[7]] * 8)
    params = jax.device_put(tiny.params, tensor_sharding(tiny.model, mesh))
    rows_over_data = NamedSharding(mesh, P("data"))
    eight = Generator(tiny.model, config, rows=rows_over_data)(params, sources, prompts=[[7]] * 8)
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_allclose(one.scores, eight.scores, rtol=1e-5)


SEARCHES = {
    "beam": {"beams": 4, "n_best": 3},
    "diverse_beam": {"beams": 4, "n_best": 3},
    "constrained_beam": {"beams": 4, "n_best": 3},
    "value_guided_beam": {"beams": 4, "n_best": 3, "value": lambda tokens, length, hidden: hidden[:, 0]},
    "contrastive_search": {},
    "fsd": {"ngram": 3},
    "fsd_d": {},
    "lexical_units": {"mask_token": 2},
}


@pytest.mark.parametrize("method", SEARCHES)
def test_searches_stay_inside_their_shard(tiny, method):
    """Rows over eight devices: all that devices tell each other is whether all rows are done, and, where guesses are
    walked over, whether any goes on.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config = DecodeConfig(method=method, max_length=10, **SEARCHES[method])
    generator = Generator(tiny.model, config, rows=NamedSharding(mesh, P("data")))
    sources = np.random.default_rng(0).integers(2, 12, (8, 8), dtype=np.int32)
    inputs = {
        "sources": sources,
        "source_lengths": np.full(8, 8, np.int32),
        "limits": np.full(8, 10, np.int32),
        "ids": np.arange(8, dtype=np.int32),
        "given": constraints([[[7, 8], [9]]] * 8) if method == "constrained_beam" else {},
    }
    inputs = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    params = jax.device_put(tiny.params, NamedSharding(mesh, P()))
    compiled = generator._run.lower((params,), inputs, None, None, None).compile()
    moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce)\(", compiled.as_text())
    assert set(moved) == {("pred[]", "all-reduce")}
    assert len(moved) == 1 + isinstance(config.selector(), Proposer)
    if method not in METHODS and method != "constrained_beam":  # these have tests of their own for this
        eight, one = compiled((params,), inputs, None, None, None), tiny.decode(config, sources)
        np.testing.assert_array_equal(eight.tokens, one.tokens)
        np.testing.assert_allclose(eight.scores, one.scores, rtol=1e-5)


def test_the_loop_ends_with_its_last_row(tiny, sources):
    config = DecodeConfig(max_length=10)
    full = tiny.decode(config, sources)
    assert (full.passes == full.lengths[:, 0]).all()
    short = [i for i in range(8) if full.lengths[i, 0] < 10]
    out = tiny.decode(config, [sources[i] for i in short])
    assert out.passes.max() == full.lengths[short].max() < 10


def prefilled(tiny, source, width):
    source = jnp.array([source])
    encoded = tiny.model.encode(tiny.params, source)
    return tiny.model.init_cache(tiny.params, encoded, source != 0, 1, width)


def advance(cache, n):
    return {**cache, "length": cache["length"] + n}


def test_a_block_is_its_single_steps_and_rolls_back(tiny, sources):
    """What the loop builds on: a block may be fed at once, and any number of its tokens counted."""
    tokens = jnp.array([[0, 7, 3, 9, 5]])
    step = jax.jit(tiny.model.step)
    single, seen = prefilled(tiny, sources[0], 8), []
    for i in range(5):
        logits, _, single = step(tiny.params, tokens[:, i : i + 1], single)
        single = advance(single, 1)
        seen.append(logits[:, 0])
    block, _, cache = step(tiny.params, tokens, prefilled(tiny, sources[0], 8))
    np.testing.assert_allclose(block, jnp.stack(seen, 1), atol=1e-5)
    for a, b in zip(jax.tree.leaves(single["self"]), jax.tree.leaves(cache["self"]), strict=True):
        np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-5)
    _, _, wrong = step(tiny.params, tokens.at[:, 2:].set(8), prefilled(tiny, sources[0], 8))
    again, _, _ = step(tiny.params, tokens[:, 2:], advance(wrong, 2))
    np.testing.assert_allclose(again, block[:, 2:], atol=1e-5)
