"""How rows grow by one pass of the model: guesses confirmed node by node, the cache put in order, tokens committed."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.state import EOS_ALONE, Choice, Extend, Processor, Proposer, Read, Selector, State, Step, newest
from mlm.models.tree import Tree
from mlm.types import EOS_ID, PAD_ID, PyTree


def extension(selector: Selector, processors: tuple[Processor, ...], stop: tuple[tuple[int, ...], ...]) -> Extend:
    """How this search grows rows by one token. stop: phrases that end a text, as EOS does."""
    return partial(_extend, selector=selector, processors=processors, stop=stop)


def advance(state: State, *, step: Step, extend: Extend, proposer: Proposer) -> State:
    """One pass: every row that is not done grows by one token, and by one more for each guess that is right."""
    tree, lag, active, before = proposer.tree, proposer.lag, ~state.done, state.length
    guesses, own = proposer.propose(state, extend)
    if lag:
        read, cache = _catching_up(state, guesses, step)
    else:
        block = jnp.concatenate([state.pending[:, None], jnp.maximum(guesses, 0)], axis=1)
        read, cache = step(block, state.cache, tree=None if tree.is_chain else tree)
    state = state._replace(cache=cache, passes=state.passes + active)
    path = jnp.zeros((before.size, 1), jnp.int32)
    if tree.size == 1:
        state = _chosen(state, read, tree, path[:, 0], active, extend)
    else:
        state, path = _walk(state._replace(cache=None), read, None if lag else guesses, tree, active, extend)
    grown = state.length - before
    if tree.size > 1:
        state = state._replace(cache=along(cache, tree, path))
    # Behind what stood for a token its key is not the token's: what was taken there is read by the next pass.
    kept = jnp.minimum(before + 1, state.length) if lag else state.cache["length"] + grown
    cache = {**state.cache, "length": kept}
    return state._replace(cache=cache, proposal=proposer.observe(own, grown, path, read.seen))


def _catching_up(state: State, guesses: Int[Array, "R W"], step: Step) -> tuple[Read, PyTree]:
    """A pass over what is not read yet, at most W tokens before the pending one, and that one, and W guesses; what it
    says of the last W + 1. A row that has less to read has places left behind its guesses, which nothing counts.
    """
    width, start = guesses.shape[1], state.cache["length"]
    at = start[:, None] + jnp.arange(2 * width + 1)
    read = jnp.pad(state.tokens, ((0, 0), (1, 0)), constant_values=PAD_ID)  # the decoder's input is shifted right
    told = jnp.take_along_axis(read, jnp.minimum(at, read.shape[1] - 1), axis=1)
    ahead = at - state.length[:, None]  # of the pending token
    guess = jnp.take_along_axis(guesses, jnp.clip(ahead - 1, 0, width - 1), axis=1)
    said, cache = step(jnp.where(ahead <= 0, told, guess), state.cache, tree=None)

    def last(x: Float[Array, "R Q *s"]) -> Float[Array, "R _ *s"]:
        return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, width + 1))(x, state.length - start)

    return jax.tree.map(last, said), cache


class _Steps(NamedTuple):
    """Where the rows of a walk stand."""

    state: State
    node: Int[Array, "R"]
    active: Bool[Array, "R"]
    path: Int[Array, "R N"]
    taken: int | Int[Array, ""]


def _walk(
    state: State, read: Read, guesses: Int[Array, "R W"] | None, tree: Tree, active: Bool[Array, "R"], extend: Extend
) -> tuple[State, Int[Array, "R N"]]:
    """Rows grow from the root on, each until none of the guesses that follow is what it chooses, or it waits; nodes on
    the way. guesses None: whatever is chosen follows.
    """
    children = jnp.asarray(tree.children)
    guessed = None if guesses is None else jnp.concatenate([state.pending[:, None], guesses], axis=1)

    def visit(walk: _Steps) -> _Steps:
        state = _chosen(walk.state, read, tree, walk.node, walk.active, extend)
        below = children[walk.node]
        right = below > 0
        if guessed is not None:
            right = (jnp.take_along_axis(guessed, below, axis=1) == state.pending[:, None]) & right
        follows = jnp.max(jnp.where(right, below, 0), axis=1)
        active = walk.active & (state.length > walk.state.length) & ~state.done & (follows > 0)
        return _Steps(state, follows, active, walk.path.at[:, walk.taken].set(walk.node), walk.taken + 1)

    # Few guesses are right as a rule, so the walk ends with the last row that goes on, not with the tree: nobody is
    # active behind a leaf.
    root = jnp.zeros_like(state.length)
    path = jnp.zeros((root.size, int(tree.depth.max()) + 1), jnp.int32)
    walk = jax.lax.while_loop(lambda walk: jnp.any(walk.active), visit, _Steps(state, root, active, path, 0))
    return walk.state, walk.path


def _chosen(
    state: State, read: Read, tree: Tree, node: Int[Array, "R"], active: Bool[Array, "R"], extend: Extend
) -> State:
    """One token more, by what the pass says of a node of each row, and of the nodes below it."""

    def at(node: Array, x: Array) -> Array:
        return x[:, 0] if x.shape[1] == 1 else jax.vmap(lambda row, index: row[index])(x, node)

    seen = jax.tree.map(partial(at, node), read.seen)
    if tree.size > 1:
        seen = seen._replace(below=at(jnp.asarray(tree.children)[node], read.seen.hidden))
    return extend(state._replace(seen=seen), at(node, read.logits), active)._replace(seen=())


def along(cache: PyTree, tree: Tree, path: Int[Array, "R N"]) -> PyTree:
    """The cache with the slots of a path, by their nodes in the block just written, in the order of the path."""
    if tree.is_chain:
        return cache

    def move(slots: Array, start: Array, path: Array) -> Array:  # modulo their number, as in a ring
        to, size = start + jnp.arange(path.size), slots.shape[1]
        return slots.at[:, to % size].set(slots[:, (start + path) % size])

    moved = jax.tree.map(lambda x: jax.vmap(move)(x, cache["length"], path), cache["self"])
    return {**cache, "self": moved}


def _extend(
    state: State,
    logits: Float[Array, "R V"],
    active: Bool[Array, "R"],
    *,
    selector: Selector,
    processors: tuple[Processor, ...],
    stop: tuple[tuple[int, ...], ...],
) -> State:
    """One token more in the rows that are active."""
    if stop:
        state = state._replace(closing=_closing(state, stop))
    processed = logits
    for process in processors:
        processed = process(processed, state)
    choice = selector.choose(logits, processed, state)
    active = active if choice.waits is None else active & ~choice.waits
    return _commit(state, choice, active)._replace(closing=EOS_ALONE)


def _closing(state: State, stop: tuple[tuple[int, ...], ...]) -> Int[Array, "R n"]:
    """EOS, and the last token of each stop sequence whose others the row has just written; -1 where it has not."""
    written = state.length - state.start
    columns = [jnp.full_like(written, EOS_ID)]
    for phrase in stop:
        begun = written >= len(phrase) - 1
        for back, token in enumerate(reversed(phrase[:-1]), 1):
            begun = begun & (newest(state, back) == token)
        columns.append(jnp.where(begun, phrase[-1], -1))
    return jnp.stack(columns, axis=1)


def _commit(state: State, choice: Choice, active: Bool[Array, "R"]) -> State:
    tokens, cache = state.tokens, state.cache
    if choice.parent is not None:
        tokens = _continue(tokens, choice.parent)
        cache = {**cache, "self": jax.tree.map(lambda x: _continue(x, choice.parent), cache["self"])}
    here = jnp.arange(tokens.shape[1])[None] == state.length[:, None]
    grown = state.length + active
    return state._replace(
        tokens=jnp.where(here & active[:, None], choice.token[:, None], tokens),
        length=grown,
        pending=jnp.where(active, choice.token, state.pending),
        log_prob=jnp.where(active, choice.log_prob, state.log_prob),
        done=state.done | (active & choice.ended) | (grown >= state.limit),
        cache=cache,
        search=choice.search,
    )


def _continue(x: Array, parent: Int[Array, "B G"]) -> Array:
    """Rows permuted inside their group: out[b·G + g] = x[b·G + parent[b, g]]; local to the shard of example b."""
    grouped = x.reshape(*parent.shape, *x.shape[1:])
    return jax.vmap(lambda rows, index: rows[index])(grouped, parent).reshape(x.shape)
