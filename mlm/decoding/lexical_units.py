"""Lexical unit decoding: a model trained by `objectives.lexical_units` writes several tokens a pass where it is sure.

Not lossless: behind the first token of a pass the others are chosen without sight of each other.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.ranking import first_max
from mlm.decoding.selectors import by_score, emitted
from mlm.decoding.state import Choice, Decoded, Extend, NoGuesses, Start, State, recurrences, token_log_prob
from mlm.models.tree import Tree, chain
from mlm.types import PyTree


@dataclass(frozen=True)
class LexicalUnits(NoGuesses):
    """A pass reads the newest token y_{t-1} and W placeholders [M] behind it, all causal, and takes

        y_t      always
        y_{t+j}  where y_t, …, y_{t+j-1} were taken, p(y_{t+j} | y_{<t}, [M] · j) > threshold, and it makes no n-gram
                 of the row come a second time

    each the most probable token that is not forbidden; p is the model's own, of all tokens. A token that is not taken
    waits for the next pass, which reads the tokens in place of their placeholders and is then sure to take one. So
    threshold 1 is greedy search. The score of a text is the sum of log p as the passes said it, no log-probability of
    the text: whatever stood behind a placeholder was not told the tokens before it in its pass.

    Source: Sun et al. 2024 (arXiv:2405.15208). Keys of the tokens taken behind placeholders are computed by the next
    pass, within its block.
    """

    mask_token: int
    width: int = 8
    threshold: float = 0.9
    n: int = 3
    group = 1

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    @property
    def lag(self) -> int:
        return self.width

    def init(self, start: Start) -> tuple[Float[Array, "R"], PyTree]:
        """Its own state: the number of the pass that took the row's newest token; 0 where that is of the prompt."""
        return jnp.zeros(start.ids.shape, jnp.float32), jnp.zeros(start.ids.shape, jnp.int32)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        return jnp.full((state.length.size, self.width), self.mask_token, jnp.int32), ()

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        token = first_max(processed)
        sure = jnp.exp(token_log_prob(logits, token)) > self.threshold
        again = jnp.any(recurrences(state, self.n - 1)[-1] & (state.tokens == token[:, None]), axis=1)
        first = state.search != state.passes
        choice = emitted(state, logits, token)
        return choice._replace(search=state.passes, waits=~first & (again | ~sure))

    def finish(self, state: State) -> Decoded:
        return by_score(state, self.group)
