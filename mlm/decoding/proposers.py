"""Proposers: what is guessed ahead, so that one pass of the model confirms several tokens. Lossless, all of them.

`PROPOSERS` maps a name (`DecodeConfig.proposer`) to what makes one from the inputs of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlm.decoding.chimera import ChimeraHeads
from mlm.decoding.growth import advance, along
from mlm.decoding.ngrams import Trigrams, successors
from mlm.decoding.state import (
    NEG_INF,
    NO_GUESSES,
    Extend,
    NoGuesses,
    Proposer,
    Seen,
    State,
    Step,
    newest,
    shifted,
    written,
)
from mlm.models.transformer import Transformer
from mlm.models.tree import Tree, best_first, chain
from mlm.registry import Registry
from mlm.types import PAD_ID, Params, PyTree

MATCHED = 3  # tokens at most by which a row finds its place in the source


class Inputs(NamedTuple):
    """What a proposer may read, a row for each decoding row. draft: a smaller model's step and its empty cache. table:
    trigrams of text like that to be written. mask_token: what a drafter of blocks was trained to fill. heads: the
    model, its parameters and the empty cache of its Chimera heads.
    """

    sources: Int[Array, "R S"]
    lengths: Int[Array, "R"]
    draft: tuple[Step, PyTree] | None = None
    table: Trigrams | None = None
    mask_token: int | None = None
    heads: tuple[Transformer, Params, PyTree] | None = None


@dataclass(frozen=True)
class InputCopy(NoGuesses):
    """The source from where the row stands in it, for tasks that change little of their input.

    Before anything is written that is its beginning. Later it is behind the last n tokens written, n = 1, 2, 3, with
    the first n for which they occur just once in the source; where they do not occur, or three still occur more than
    once, nothing is guessed. Source: Sun et al. 2021 (arXiv:2106.04970), input-guided aggressive decoding.
    """

    sources: Int[Array, "R S"]
    lengths: Int[Array, "R"]
    width: int = 8

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        place = jnp.where(state.length == state.start, 0, self._place(state))
        at = place[:, None] + jnp.arange(self.width)
        known = (place >= 0)[:, None] & (at < self.lengths[:, None])
        tokens = jnp.take_along_axis(self.sources, jnp.clip(at, 0, self.sources.shape[1] - 1), axis=1)
        return jnp.where(known, tokens, -1), ()

    def _place(self, state: State) -> Int[Array, "R"]:
        """Index behind the tokens written last; -1: not known."""
        place = jnp.full(state.length.shape, -1)
        open_ = jnp.ones(state.length.shape, bool)
        positions = jnp.arange(self.sources.shape[1])[None]
        ends = positions < self.lengths[:, None]  # where the written tokens may end in the source
        for n in range(1, MATCHED + 1):
            ends = ends & (shifted(self.sources, n - 1) == newest(state, n)[:, None])
            count = jnp.sum(ends, axis=1)
            found = jnp.max(jnp.where(ends, positions + 1, -1), axis=1)
            place = jnp.where(open_ & (count == 1), found, place)
            open_ = open_ & (count > 1)
        return place


@dataclass(frozen=True)
class NGramTable(NoGuesses):
    """What followed the last two tokens: in a table of text, in the source, and in what the row holds so far.

    Of each node of the tree the children are its best successors by `ngrams.successors`. No second model, no training.
    Source: Liu et al. 2024 (arXiv:2407.12021), ADED, expanded by rank instead of by a tree search on the host.
    """

    sources: Int[Array, "R S"]
    lengths: Int[Array, "R"]
    table: Trigrams | None
    shape: Tree

    @property
    def tree(self) -> Tree:
        return self.shape

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        known = jnp.arange(self.sources.shape[1])[None] < self.lengths[:, None]
        # A gap of one place, so that nothing follows the source's end.
        gap = jnp.full((state.length.size, 1), -1)
        text = jnp.concatenate(
            [jnp.where(known, self.sources, -1), gap, jnp.where(written(state), state.tokens, -1)], axis=1
        )
        nodes = [state.pending]
        before = [jnp.where(state.length > 1, newest(state, 2), PAD_ID)]
        for node, children in enumerate(self.tree.children):
            below = children[children >= 0]
            if not below.size:
                continue
            found = successors(self.table, text, before[node], nodes[node], below.size)
            # Children of the earlier nodes have the smaller numbers, so they are appended in order.
            nodes += [found[:, rank] for rank in range(below.size)]
            before += [nodes[node]] * below.size
        return jnp.stack(nodes[1:], axis=1), ()


@dataclass(frozen=True)
class DraftModel(NoGuesses):
    """What a smaller model of the same vocabulary would write, by the same search and with the same noise.

    Of its `width` guesses the expected number of tokens a pass is (1 - a^(W+1)) / (1 - a), a the share of positions
    where both choose the same. inner: who guesses for the draft model itself (staged speculation). Sources: Leviathan
    et al. 2023 (arXiv:2211.17192); shared noise: Daliri et al. 2025; stages: Spector & Ré 2023 (arXiv:2308.04623).
    """

    step: Step
    cache: PyTree  # empty; slots for the guesses of both beyond the longest row
    width: int = 4
    inner: Proposer = NO_GUESSES

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        return _begun(self.step, self.cache, read, length), self.inner.begin(read, length, None)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        # One token more than guesses: the last guess, too, must be in the draft's cache should it be right.
        cache, inner = state.proposal
        alone = state._replace(cache=cache, proposal=inner, limit=state.length + self.width + 1)
        alone = jax.lax.while_loop(
            lambda alone: ~jnp.all(alone.done),
            lambda alone: advance(alone, step=self.step, extend=extend, proposer=self.inner),
            alone,
        )
        at = state.length[:, None] + jnp.arange(self.width)
        guesses = jnp.take_along_axis(alone.tokens, jnp.minimum(at, state.tokens.shape[1] - 1), axis=1)
        there = at < jnp.minimum(alone.length, state.tokens.shape[1])[:, None]
        own = {**alone.cache, "length": cache["length"]}, alone.proposal
        return jnp.where(there, guesses, -1), own

    def observe(self, own: PyTree, grown: Int[Array, "R"], path: Int[Array, "R N"], seen: Seen) -> PyTree:
        cache, inner = own
        return {**cache, "length": cache["length"] + grown}, inner


@dataclass(frozen=True)
class DraftTree(NoGuesses):
    """Shaped as `shape`, what a smaller model would write: at every node its best tokens by the same search and noise.

    The draft reads the tree level by level, each time from its root, so its passes are as many as the tree is deep,
    and one. Source: Spector & Ré 2023 (arXiv:2308.04623).
    """

    step: Step
    cache: PyTree
    shape: Tree

    @property
    def tree(self) -> Tree:
        return self.shape

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        return _begun(self.step, self.cache, read, length)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        tree, cache, rows = self.tree, state.proposal, jnp.arange(state.length.size)
        states: list[State] = [state._replace(cache=None, proposal=())]
        for level in range(int(tree.depth.max()) + 1):
            known = int((tree.depth <= level).sum())
            block = jnp.stack([node.pending for node in states], axis=1)
            read, cache = self.step(block, cache, tree=Tree(tree.parents[:known]))
            for node in range(known):
                if tree.depth[node] < level:
                    continue
                logits = read.logits[:, node]
                for _ in range(int((tree.children[node] >= 0).sum())):
                    states.append(extend(states[node], logits, ~states[node].done))
                    logits = logits.at[rows, states[-1].pending].set(NEG_INF)
        guesses = [jnp.where(states[tree.parents[n]].done, -1, states[n].pending) for n in range(1, tree.size)]
        return jnp.stack(guesses, axis=1), cache

    def observe(self, own: PyTree, grown: Int[Array, "R"], path: Int[Array, "R N"], seen: Seen) -> PyTree:
        own = along(own, self.tree, path)
        return {**own, "length": own["length"] + grown}


@dataclass(frozen=True)
class MaskBlock(NoGuesses):
    """What a drafter fills in for mask tokens behind the newest one, all in one pass.

    It reads the tokens confirmed since its last pass, each of which sees those before it, then W - 1 masks, which see
    all of them and each other; the first guess is what it says behind the newest token, the others what it says of the
    masks. That is how `objectives.mask_block` trains it, and why its cache may keep the tokens: no mask has touched
    them, so each is read once, in the pass that guesses behind it. Source: Xia et al. 2022 (arXiv:2203.16487),
    generalized aggressive decoding, its beta = 1.
    """

    step: Step
    cache: PyTree  # empty; slots for two blocks beyond the longest row
    mask_token: int
    width: int = 8

    @property
    def tree(self) -> Tree:
        return chain(self.width)

    def begin(self, read: Int[Array, "R P"] | None, length: Int[Array, "R"], seen: Seen | None) -> PyTree:
        return _begun(self.step, self.cache, read, length)

    def propose(self, state: State, extend: Extend) -> tuple[Int[Array, "R W"], PyTree]:
        cache, newest_at = state.proposal, state.length[:, None]  # what the decoder reads is shifted right by one
        # At most W + 1 tokens are new; a row with fewer has places left behind its masks, which nothing sees.
        at = cache["length"][:, None] + jnp.arange(2 * self.width)
        read = jnp.pad(state.tokens, ((0, 0), (1, 0)), constant_values=PAD_ID)
        told = jnp.take_along_axis(read, jnp.minimum(at, read.shape[1] - 1), axis=1)
        masks = (at > newest_at) & (at < newest_at + self.width)
        said, cache = self.step(jnp.where(at <= newest_at, told, self.mask_token), cache, prefix=masks)
        first = newest_at - at[:, :1]
        where = jnp.maximum(first, 0) + jnp.arange(self.width)
        guesses = jnp.take_along_axis(jnp.argmax(said.logits, axis=-1), where, axis=1)
        return guesses, {**cache, "length": state.length + 1}


def _begun(step: Step, cache: PyTree, read: Int[Array, "R P"] | None, length: Int[Array, "R"]) -> PyTree:
    """The draft's cache after the prompts."""
    cache = cache if read is None else step(read, cache)[1]
    return {**cache, "length": cache["length"] + length}


class Kind(NamedTuple):
    """How a proposer is made of a batch's inputs, of guesses and branches, and what it does, in a line."""

    make: Callable[[Inputs, int, int], Proposer]
    summary: str
    blocks: int = 1  # blocks of guesses that may stand in the cache behind the longest row
    options: tuple[str, ...] = ("guesses",)  # of `DecodeConfig`, that it reads
    drafts: bool = False  # whether it asks a smaller model
    counts: bool = False  # whether it looks up the trigrams of a text
    heads: bool = False  # whether it asks heads of the model's own


def _ngram_table(inputs: Inputs, guesses: int, branches: int) -> NGramTable:
    return NGramTable(inputs.sources, inputs.lengths, inputs.table, best_first(guesses, branches))


def _draft_model(inputs: Inputs, guesses: int, branches: int) -> Proposer:
    assert inputs.draft is not None
    step, cache = inputs.draft
    return DraftModel(step, cache, guesses) if branches == 1 else DraftTree(step, cache, best_first(guesses, branches))


def _mask_block(inputs: Inputs, guesses: int, branches: int) -> MaskBlock:
    assert inputs.draft is not None
    assert inputs.mask_token is not None
    return MaskBlock(*inputs.draft, inputs.mask_token, guesses)


def _chimera(inputs: Inputs, guesses: int, branches: int) -> ChimeraHeads:
    assert inputs.heads is not None
    return ChimeraHeads(*inputs.heads, guesses)


def _staged(inputs: Inputs, guesses: int, branches: int) -> DraftModel:
    drafting = _draft_model(inputs, guesses, 1)
    assert isinstance(drafting, DraftModel)
    return replace(drafting, inner=_ngram_table(inputs, guesses, branches))


_TREE = ("guesses", "branches")
PROPOSERS: Registry[Kind] = Registry(
    "proposer",
    none=Kind(lambda inputs, guesses, branches: NO_GUESSES, "one token a pass", blocks=0, options=()),
    input_copy=Kind(
        lambda inputs, guesses, branches: InputCopy(inputs.sources, inputs.lengths, guesses),
        "the source from where the row stands in it (Sun et al. 2021)",
    ),
    ngram_table=Kind(
        _ngram_table,
        "what followed the last two tokens before: in a text, the source, the row itself (Liu et al. 2024)",
        options=_TREE,
        counts=True,
    ),
    draft_model=Kind(
        _draft_model, "what a smaller model would write (Leviathan et al. 2023)", options=_TREE, drafts=True
    ),
    mask_block=Kind(
        _mask_block,
        "a drafter trained by objective mask_block, all guesses in one pass (Xia et al. 2022)",
        blocks=2,
        options=("guesses", "mask_token"),
        drafts=True,
    ),
    staged=Kind(
        _staged,
        "a smaller model, for which the n-gram table guesses in turn (Spector & Ré 2023)",
        blocks=2,
        options=_TREE,
        drafts=True,
        counts=True,
    ),
    chimera=Kind(
        _chimera,
        "the model's own heads, trained by objective chimera; guesses: at most as many as heads (Zeng et al. 2024)",
        heads=True,
    ),
)
