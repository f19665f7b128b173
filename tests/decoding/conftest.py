"""One tiny random model, and what it says about any prefix when nothing is cached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.generate import Generator
from mlm.decoding.state import Decoded
from mlm.models.families import t5_style
from mlm.models.transformer import Transformer

VOCAB, LENGTH = 12, 10
SOURCES = [[5, 6, 7, 1], [9, 1], [3, 3, 8, 2, 4, 1], [11, 10, 1], [4, 1], [7, 8, 9, 10, 11, 5, 3, 1], [2, 1], [6, 1]]


class Tiny:
    """A model with its parameters, and a slow reference that reads every prefix anew."""

    def __init__(self, vocab: int, length: int, seed: int):
        self.vocab, self.length = vocab, length
        config = t5_style(vocab_size=vocab, d_model=16, d_ff=32, heads=2, head_dim=8, layers=(2, 2))
        self.model = Transformer(config)
        self.params = self.model.init(jax.random.key(seed))
        self._whole = jax.jit(self._forward)
        self._generators: dict[DecodeConfig, Generator] = {}

    def decode(self, config: DecodeConfig, sources, **options) -> Decoded:
        """The generator's results; tests share what it compiled."""
        generator = self._generators.setdefault(config, Generator(self.model, config))
        return generator(self.params, sources, **options)

    def _forward(self, params, source, prefix):
        told = jnp.ones_like(prefix)  # causal: what stands after the prefix cannot matter
        batch = {
            "encoder_input_tokens": source,
            "encoder_segment_ids": (source != 0).astype(jnp.int32),
            "decoder_input_tokens": jnp.pad(prefix, ((0, 0), (1, 0)))[:, :-1],
            "decoder_segment_ids": told,
        }
        hidden = self.model(params, batch).hidden
        return self.model.logits(params, hidden), hidden

    def _read(self, source, prefix) -> list[np.ndarray]:
        """Logits [V] and states [D] after the first input and every token of the prefix, from a whole forward pass."""
        sources, prefixes = np.zeros((1, 8), np.int32), np.zeros((1, self.length), np.int32)
        sources[0, : len(source)] = source
        prefixes[0, : len(prefix)] = prefix
        assert len(prefix) < self.length
        read = self._whole(self.params, sources, prefixes)
        return [np.asarray(x, np.float64)[0, : len(prefix) + 1] for x in read]

    def states(self, source, prefix) -> np.ndarray:
        """The decoder's states after the first input and every token of the prefix, float64 [1 + n, D]."""
        return self._read(source, prefix)[1]

    def log_probs(self, source, prefix) -> np.ndarray:
        """log P(next token | source, prefix), float64 [V]."""
        logits = self._read(source, prefix)[0][-1]
        return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()

    def total(self, source, target) -> float:
        """log P(target | source), token by token."""
        return sum(self.log_probs(source, target[:i])[token] for i, token in enumerate(target))


@pytest.fixture(scope="session")
def make_tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny(VOCAB, LENGTH, seed=1)


@pytest.fixture(scope="session")
def sources() -> list[list[int]]:
    return SOURCES


METHODS = {
    "greedy": {},
    "sample": {"n_best": 2, "top_p": 0.95, "seed": 5},
    "beam": {"beams": 3, "n_best": 2},
    "contrastive_search": {"candidates": 3},
    "lexical_units": {"mask_token": 2, "guesses": 3, "threshold": 0.15},
}
_SLOW = ("contrastive_search", "lexical_units")


@pytest.fixture(params=[pytest.param(m, marks=pytest.mark.slow) if m in _SLOW else m for m in METHODS])
def config(request) -> DecodeConfig:
    """One config per method."""
    return DecodeConfig(method=request.param, max_length=LENGTH, **METHODS[request.param])
