"""What the decoding loop carries, and what it exchanges with a selector.

A decoding row is one hypothesis in the making; an example owns a group of G adjacent rows (beams, or samples), R = BG.

Pending token: the cache holds keys and values of the first decoder input and of every emitted token except the newest.
The newest one is `pending`; each pass begins by feeding it, so a block of guesses may follow it in the same pass and be
rolled back by not counting it. Where guesses are placeholders (`Proposer.lag`), the cache may lack some tokens before
the newest one too, and a pass begins by feeding those.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlm.models.tree import Tree, chain
from mlm.types import EOS_ID, PyTree

NEG_INF = -1.0e7  # nats; finite, so that sums of forbidden choices never become NaN
DEAD = NEG_INF / 2  # a score below this belongs to a forbidden choice or to an empty place
EOS_ALONE = np.array([[EOS_ID]], np.int32)


class State(NamedTuple):
    """The carry of the loop."""

    tokens: Int[Array, "R T"]  # prompt, then what was emitted; 0 beyond `length`
    length: Int[Array, "R"]  # tokens so far, prompt and EOS included
    pending: Int[Array, "R"]  # the newest token: emitted, not yet in the cache
    log_prob: Float[Array, "R"]  # nats, model's own, emitted tokens only
    start: Int[Array, "R"]  # tokens of the prompt
    limit: Int[Array, "R"]  # the length at which a row stops
    done: Bool[Array, "R"]
    passes: Int[Array, "R"]  # decoder passes that the row took part in, the prompt's not counted
    cache: PyTree
    search: PyTree  # the selector's own
    proposal: PyTree = ()  # the proposer's own
    given: PyTree = ()  # what the caller says of each row, by name
    closing: Int[Array, "R n"] = EOS_ALONE  # tokens that would end the row here; -1: none
    seen: "Seen | tuple[()]" = ()  # while a token is chosen: what the model says beside its logits


class Seen(NamedTuple):
    """What one pass says of a position beside the logits."""

    hidden: Float[Array, "R D"]  # the decoder's state after the newest token
    others: tuple[Float[Array, "R V"], ...] = ()  # logits of what the model is contrasted with
    below: Float[Array, "R C D"] | None = None  # the states after each guess for the next token, in the tree's order
    attention: Float[Array, "R S"] | None = None  # what it looks at in the source, if asked for; 1 at padding


class Choice(NamedTuple):
    """One selector's decision for every row; the loop ignores it where a row is done."""

    token: Int[Array, "R"]
    log_prob: Float[Array, "R"]  # of the row's emitted tokens, this one included
    ended: Bool[Array, "R"]
    search: PyTree
    parent: Int[Array, "B G"] | None = None  # member of the group each row continues; None: itself
    waits: Bool[Array, "R"] | None = None  # rows that take no token yet: the next pass is to tell more; None: no row


class Decoded(NamedTuple):
    """Results per example, best first. A place that no hypothesis filled has length 0 and score NEG_INF."""

    tokens: Int[Array, "B n T"]  # prompt and EOS included; 0 beyond the length
    scores: Float[Array, "B n"]  # nats; for beam search divided by the brevity penalty, coverage added
    lengths: Int[Array, "B n"]  # tokens
    passes: Int[Array, "B"]  # decoder passes made for the example, the prompt's not counted


class Start(NamedTuple):
    """What a selector may know before the first choice."""

    ids: Int[Array, "B"]  # number of each example, the source of its randomness
    max_length: int
    given: Mapping[str, Array]  # what the caller says of each example
    lengths: Int[Array, "R"]  # tokens of the prompts
    seen: Callable[[], Seen]  # what was said of the first input and the prompt but its last token, arrays [R, P, …]


@runtime_checkable
class Selector(Protocol):
    """Chooses the next token of every row from logits. Hashable, so that compiled functions are reused.

    One that is a `Proposer` too has its guesses read in the same pass and chooses among them, by the states behind, or
    says of placeholders how far it trusts what is read behind them.
    """

    @property
    def group(self) -> int:
        """Decoding rows per example."""

    def init(self, start: Start) -> tuple[Float[Array, "R"], PyTree]:
        """Log-probability each row starts from, and the selector's own state."""

    def choose(self, logits: Float[Array, "R V"], processed: Float[Array, "R V"], state: State) -> Choice:
        """`logits` are the model's, for scores; `processed` are what the choice is made from."""

    def finish(self, state: State) -> Decoded: ...


# (state, logits [R, V] of the next position, rows that take part [R]) -> state with one token more in those rows
Extend = Callable[[State, Float[Array, "R V"], Bool[Array, "R"]], State]


@runtime_checkable
class Proposer(Protocol):
    """Guesses the tokens that follow the pending one, so that one pass of the model may confirm several of them.

    What is guessed decides how fast a row grows, never what it holds: a guess is kept only where the selector, having
    read all before it, chooses the same token. Unless the guesses are placeholders (`lag`), which say nothing of their
    tokens: behind them whatever the selector takes is kept, and what it takes is its own affair.
    """

    @property
    def tree(self) -> Tree:
        """How the guesses of a pass follow each other: node 0 is the pending token, node w the w-th of W guesses."""

    @property
    def lag(self) -> int:
        """Tokens before the pending one that a pass may have to read too. 0: none. W, of a chain of W placeholders:
        those that were taken behind them.
        """

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        """Its own state after the prompts. read: what the decoder was given, shifted right; `length` of it count. seen:
        what the model said of it, arrays [R, P, …].
        """

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        """(guesses, its own state); -1: none. extend: how the search grows a row from given logits."""

    def observe(self, own: PyTree, grown: Int[Array, "R"], path: Int[Array, "R N"], seen: Seen) -> PyTree:
        """Its own state after the pass, by which every row grew by so many tokens, read at these nodes of the tree.
        seen: what the pass said of every node, arrays [R, W + 1, …].
        """


class NoGuesses:
    """One token a pass."""

    @property
    def lag(self) -> int:
        return 0

    @property
    def tree(self) -> Tree:
        return chain(0)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        return ()

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R 0"], PyTree]:
        return jnp.zeros((state.length.size, 0), jnp.int32), ()

    def observe(self, own: PyTree, grown: Int[Array, "R"], path: Int[Array, "R N"], seen: Seen) -> PyTree:
        return own


NO_GUESSES = NoGuesses()


Processor = Callable[[Float[Array, "R V"], State], Float[Array, "R V"]]


class Read(NamedTuple):
    """What one pass says of every position of a block."""

    logits: Float[Array, "R Q V"]
    seen: Seen  # its arrays with the axis Q of the block's positions behind R


@runtime_checkable
class Step(Protocol):
    """One pass of the model: Q more slots of the cache written, its `length` as it was. tree: None, a chain. prefix:
    tokens of the block that see each other both ways; a model that is decoded with is never asked for it, a drafter is.
    """

    def __call__(
        self,
        tokens: Int[Array, "R Q"],
        cache: PyTree,
        *,
        tree: Tree | None = None,
        prefix: Bool[Array, "R Q"] | None = None,
    ) -> tuple[Read, PyTree]: ...


def ends(state: State, token: Int[Array, "R *n"]) -> Bool[Array, "R *n"]:
    """Whether the row would end with this token: EOS, or the last one of a stop sequence."""
    closing = state.closing.reshape(state.closing.shape[0], *(1,) * (token.ndim - 1), -1)
    return jnp.any(token[..., None] == closing, axis=-1)


def by_example(passes: Int[Array, "R"], group: int) -> Int[Array, "B"]:
    """Passes of the row of each example that took most."""
    return jnp.max(passes.reshape(-1, group), axis=1)


def newest(state: State, back: int) -> Int[Array, "R"]:
    """The token `back` places before the one to come; -2: the row is shorter."""
    index = (state.length - back)[:, None]
    token = jnp.take_along_axis(state.tokens, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, token, -2)[:, 0]


def recurrences(state: State, most: int) -> list[Bool[Array, "R T"]]:
    """For n = 0, ..., `most`: the written positions that stand behind an occurrence of the row's newest n tokens."""
    behind = [written(state)]
    for back in range(1, most + 1):
        behind.append(behind[-1] & (shifted(state.tokens, back) == newest(state, back)[:, None]))
    return behind


def written(state: State) -> Bool[Array, "R T"]:
    """Positions of the row's prefix: its prompt and what it has written."""
    return jnp.arange(state.tokens.shape[1])[None] < state.length[:, None]


def shifted(tokens: Int[Array, "R N"], places: int) -> Int[Array, "R N"]:
    """Each token so many places later, -1 in front."""
    return jnp.pad(tokens, ((0, 0), (places, 0)), constant_values=-1)[:, : tokens.shape[1]]


def token_log_prob(logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Float[Array, "R"]:
    """log softmax(logits)[token], in nats, without the [R, V] table of the others."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
