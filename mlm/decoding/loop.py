"""The decoding loop: one `lax.while_loop` over ragged rows, for every method.

    propose   the block to feed: the pending token, and guesses of those that follow, a chain or a tree
    step      one cached decoder pass -> logits of every position of the block
    process   pure functions reshape or forbid
    select    one token per row (and, for beams, the row it continues), from node to node, as long as one guessed it
    commit    write what was chosen, advance the rows that are not done

Rows have their own lengths, prompts and limits; the loop ends when all are done. Nothing in it depends on how many rows
there are or who the neighbours are. Guesses change the number of passes alone: at every position the selector reads the
same logits, the same past and the same noise as without them, so also a drawn text is the same, token by token (shared
noise in place of rejection sampling: Daliri et al. 2025, arXiv:2408.07978).
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.config import DecodeConfig
from mlm.decoding.proposers import NO_GUESSES
from mlm.decoding.state import (
    EOS_ALONE,
    Choice,
    Decoded,
    Extend,
    Processor,
    Proposer,
    Read,
    Selector,
    Start,
    State,
    Step,
    newest,
)
from mlm.models.tree import Tree
from mlm.types import EOS_ID, PAD_ID, PyTree

NOTHING: Mapping[str, Array] = MappingProxyType({})


def decode(
    step: Step,
    cache: PyTree,
    config: DecodeConfig,
    *,
    ids: Int[Array, "B"],
    limits: Int[Array, "B"],
    prompts: Int[Array, "B P"] | None = None,
    prompt_lengths: Int[Array, "B"] | None = None,
    given: Mapping[str, Array] = NOTHING,
    proposer: Proposer = NO_GUESSES,
) -> Decoded:
    """Decodes B examples; traceable, to be called under `jax.jit`.

    cache: empty, B·G rows (G = `config.selector().group`) of at least `config.slots` slots.
    ids: number of each example, the source of its randomness.
    limits: tokens at most, prompt and EOS included; 0 for a row that only fills up the batch.
    prompts: tokens every result begins with (a language token, a given beginning), read in one pass and never scored;
    a prompt must be shorter than its limit. Only a generated EOS or stop sequence ends a row.
    proposer: who guesses ahead; a selector that chooses among guesses of its own makes them itself.
    given: what a method or processor is to know of each example, by name (phrases that it must hold, allowed tokens).
    """
    selector, processors = config.selector(), config.processors()
    proposer = selector if isinstance(selector, Proposer) else proposer
    state = _start(step, cache, selector, proposer, config, ids, limits, prompts, prompt_lengths, given)
    extend = partial(_extend, selector=selector, processors=processors, stop=config.stop)
    body = partial(_advance, step=step, extend=extend, proposer=proposer)
    return selector.finish(jax.lax.while_loop(lambda state: ~jnp.all(state.done), body, state))


def _start(
    step: Step,
    cache: PyTree,
    selector: Selector,
    proposer: Proposer,
    config: DecodeConfig,
    ids: Int[Array, "B"],
    limits: Int[Array, "B"],
    prompts: Int[Array, "B P"] | None,
    prompt_lengths: Int[Array, "B"] | None,
    given: Mapping[str, Array],
) -> State:
    """The state after the prompts: their tokens in place, all but the last one in the cache."""
    rows = ids.size * selector.group
    limit = jnp.repeat(jnp.minimum(limits, config.max_length), selector.group)
    tokens = jnp.zeros((rows, config.max_length), jnp.int32)
    length = jnp.zeros(rows, jnp.int32)
    pending, read, said = jnp.full(rows, PAD_ID, jnp.int32), None, None
    if prompts is not None:
        length = jnp.repeat(prompt_lengths, selector.group)
        in_prompt = jnp.arange(prompts.shape[1])[None] < length[:, None]
        prompt = jnp.where(in_prompt, jnp.repeat(prompts, selector.group, axis=0), 0)
        fed = jnp.concatenate([pending[:, None], prompt], axis=1)  # what the decoder reads, shifted right
        # Shorter prompts feed slots beyond their length too; not counted, those are overwritten later.
        read = fed[:, :-1]
        said, cache = step(read, cache)
        cache = {**cache, "length": cache["length"] + length}
        tokens = tokens.at[:, : prompt.shape[1]].set(prompt)
        pending = jnp.take_along_axis(fed, length[:, None], axis=1)[:, 0]

    def hidden() -> Float[Array, "R P D"]:
        if said is not None:
            return said.seen.hidden
        traced, _ = jax.eval_shape(step, pending[:, None], cache)  # nothing is read yet, yet a state has a width
        return jnp.zeros((rows, 0, traced.seen.hidden.shape[-1]))

    log_prob, search = selector.init(Start(ids, config.max_length, given, hidden))
    return State(
        tokens=tokens,
        length=length,
        pending=pending,
        log_prob=log_prob,
        start=length,
        limit=limit,
        done=length >= limit,
        passes=jnp.zeros(rows, jnp.int32),
        cache=cache,
        search=search,
        proposal=proposer.begin(read, length),
        given={name: jnp.repeat(x, selector.group, axis=0) for name, x in given.items()},
    )


def _advance(state: State, *, step: Step, extend: Extend, proposer: Proposer) -> State:
    """One pass: every row that is not done grows by one token, and by one more for each guess that is right."""
    tree, active, before = proposer.tree, ~state.done, state.length
    guesses, own = proposer.propose(state, extend)
    block = jnp.concatenate([state.pending[:, None], jnp.maximum(guesses, 0)], axis=1)
    read, cache = step(block, state.cache, None if tree.is_chain else tree)
    state = state._replace(cache=cache, passes=state.passes + active)
    if tree.size == 1:
        state = _chosen(state, read, tree, jnp.zeros_like(before), active, extend)
    else:
        state = _walk(state, read, guesses, tree, active, extend)
    grown = state.length - before
    cache = {**state.cache, "length": state.cache["length"] + grown}
    return state._replace(cache=cache, proposal=proposer.observe(own, grown))


def _walk(
    state: State, read: Read, guesses: Int[Array, "R W"], tree: Tree, active: Bool[Array, "R"], extend: Extend
) -> State:
    """Rows grow from the root on, each until none of the guesses that follow is what it chooses."""
    cache = state.cache
    children = jnp.asarray(tree.children)
    guessed = jnp.concatenate([state.pending[:, None], guesses], axis=1)

    def visit(carry: tuple[State, Array, Array], _: None) -> tuple[tuple[State, Array, Array], Array]:
        state, node, active = carry
        state = _chosen(state, read, tree, node, active, extend)
        below = children[node]
        right = (jnp.take_along_axis(guessed, below, axis=1) == state.pending[:, None]) & (below > 0)
        follows = jnp.max(jnp.where(right, below, 0), axis=1)
        return (state, follows, active & ~state.done & (follows > 0)), node

    # Chains are read where they stand; in a tree the cache is put in the order of the path afterwards.
    first = (state._replace(cache=None), jnp.zeros_like(state.length), active)
    (state, _, _), path = jax.lax.scan(visit, first, None, length=int(tree.depth.max()) + 1)
    return state._replace(cache=cache if tree.is_chain else _along(cache, path.T))


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


def _along(cache: PyTree, path: Int[Array, "R N"]) -> PyTree:
    """The cache with the slots of a path, by their places in the block just written, in the order of the path."""

    def move(slots: Array, start: Array, path: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, slots[:, start + path], start, axis=1)

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
