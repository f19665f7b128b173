"""Selectors that look at one row at a time: greedy and sampling. Beam search has a file of its own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.ranking import first_max, top_k
from mlm.decoding.state import Choice, Decoded, Start, State, by_example, ends, token_log_prob


@dataclass(frozen=True)
class Greedy:
    """The most probable token; the lowest id when several tie."""

    group: int = 1

    def init(self, start: Start):
        return jnp.zeros(start.ids.shape, jnp.float32), ()

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        return emitted(state, logits, first_max(processed))

    def finish(self, state: State) -> Decoded:
        return by_score(state, self.group)


@dataclass(frozen=True)
class Sample:
    """Draws from softmax(processed logits), `group` times per example, independently.

    The noise of sample g of example i at position t comes from fold_in(fold_in(fold_in(seed, i), g), t) alone: neither
    the neighbours in the batch nor the number of devices nor `group` can change a draw. Gumbel-max, so no sum over the
    vocabulary is needed.
    """

    group: int = 1
    seed: int = 0

    def init(self, start: Start):
        examples = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), start.ids)
        rows = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(examples, jnp.arange(self.group))
        return jnp.zeros(start.ids.size * self.group, jnp.float32), rows.reshape(-1)

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        keys = jax.vmap(jax.random.fold_in)(state.search, state.length)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, processed.shape[1:]))(keys)
        return emitted(state, logits, first_max(processed + noise))

    def finish(self, state: State) -> Decoded:
        return by_score(state, self.group)


def emitted(state: State, logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Choice:
    """That token in every row, scored by the model."""
    return Choice(token, state.log_prob + token_log_prob(logits, token), ends(state, token), state.search)


def by_score(state: State, group: int) -> Decoded:
    """Groups the rows by example, best total log-probability first."""
    scores, order = top_k(state.log_prob.reshape(-1, group), group)
    of_rows = jax.vmap(lambda rows, index: rows[index])  # inside each example, local to its shard
    tokens, length = (of_rows(x.reshape(-1, group, *x.shape[1:]), order) for x in (state.tokens, state.length))
    return Decoded(tokens, scores, length, by_example(state.passes, group))
