"""Two ways to the same tokens, for every registered method and proposer, in a mixture of experts whose layers differ.

Elsewhere are compared: the cached loop, blocks and rollback with whole passes (`loop_test`), trees with their chains
(`tests/models/tree_test.py`), beams with a reference in Python (`beam_test`), draws with the exact distribution
(`selectors_test`), guesses with none in a dense model (`proposers_test`).
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.decoding.config import METHODS, DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.phrases import constraints
from mlm.decoding.proposers import PROPOSERS
from mlm.models.families import sparse, t5_style
from mlm.models.specs import ChimeraSpec, RouterSpec
from mlm.models.transformer import Transformer

LENGTH = 8
OPTIONS = {
    "sample": {"n_best": 2, "top_p": 0.95, "seed": 5},
    "beam": {"n_best": 2},
    "diverse_beam": {"n_best": 3},
    "lexical_units": {"mask_token": 2, "threshold": 0.15},
    "value_guided_beam": {"value": lambda tokens, length, hidden: hidden[:, 0]},
}
GIVEN = {"constrained_beam": constraints([[[4]], [], [[5, 6]], [[9], [3]], [], [[7]], [[2]], []])}
PROMPTS = [[7], [], [2, 9, 4], [3, 3], [8, 2], [5], [6, 7, 8, 9, 10], [11]]
FAST = {"sample", "beam"}  # others that `loop_test` does not run; the rest are slow tests


@pytest.fixture(scope="module")
def experts():
    """(model, parameters): every second layer sparse, two of four experts a token, which decoding never drops."""
    dense = t5_style(vocab_size=12, d_model=16, d_ff=16, heads=2, head_dim=8, layers=(2, 2))
    dense = dataclasses.replace(dense, chimera=ChimeraSpec(heads=4, attention_heads=2, head_dim=8, d_ff=16))
    model = Transformer(sparse(dense, RouterSpec(experts=4, k=2, gates="chosen", capacity=1.0), every=2))
    return model, model.init(jax.random.key(0))


def same(got, want, rows=slice(None)):
    np.testing.assert_array_equal(got.tokens, want.tokens[rows])
    np.testing.assert_array_equal(got.lengths, want.lengths[rows])
    np.testing.assert_allclose(got.scores, want.scores[rows], atol=1e-4)


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_one_row_is_itself_among_eight_and_on_eight_devices(experts, sources, method):
    model, params = experts
    config = DecodeConfig(method=method, max_length=LENGTH, **OPTIONS.get(method, {}))
    generator = Generator(model, config)
    given = GIVEN.get(method, {})
    together = generator(params, sources, prompts=PROMPTS, given=given)
    for i in (1, 6):
        own = {name: x[i : i + 1] for name, x in given.items()}
        same(generator(params, [sources[i]], prompts=[PROMPTS[i]], ids=[i], given=own), together, slice(i, i + 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = Generator(model, config, rows=NamedSharding(mesh, P("data")))
    same(spread(jax.device_put(params, NamedSharding(mesh, P())), sources, prompts=PROMPTS, given=given), together)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "sample"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_guesses_in_experts_change_nothing(experts, sources, proposer, method):
    model, params = experts
    plain = Generator(model, DecodeConfig(method=method, max_length=LENGTH))(params, sources, prompts=PROMPTS)
    kind = PROPOSERS[proposer]
    options = {"guesses": 4} if "guesses" in kind.options else {}
    options |= {"branches": 2} if "branches" in kind.options else {}
    options |= {"mask_token": 2} if "mask_token" in kind.options else {}
    config = DecodeConfig(method=method, max_length=LENGTH, proposer=proposer, **options)
    other = model.init(jax.random.key(1)) if kind.drafts else None
    found = Generator(model, config, draft=model if kind.drafts else None)(
        params, sources, prompts=PROMPTS, draft=other
    )
    same(found, plain)
    assert (found.passes <= plain.passes).all()
