"""The decoding loop: one `lax.while_loop` over ragged rows, for every method.

    propose   the block to feed: the pending token, and guesses of those that follow
    step      one cached decoder pass -> logits of every position of the block
    process   pure functions reshape or forbid
    select    one token per row (and, for beams, the row it continues), position by position, as long as it is the guess
    commit    write what was chosen, advance the rows that are not done

Rows have their own lengths, prompts and limits; the loop ends when all are done. Nothing in it depends on how many rows
there are or who the neighbours are. Guesses change the number of passes alone: at every position the selector reads the
same logits, the same past and the same noise as without them, so also a drawn text is the same, token by token (shared
noise in place of rejection sampling: Daliri et al. 2025, arXiv:2408.07978).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm.decoding.config import DecodeConfig
from mlm.decoding.proposers import NO_GUESSES
from mlm.decoding.state import Choice, Decoded, Extend, Processor, Proposer, Selector, State, Step
from mlm.types import PAD_ID, PyTree


def decode(
    step: Step,
    cache: PyTree,
    config: DecodeConfig,
    *,
    ids: Int[Array, "B"],
    limits: Int[Array, "B"],
    prompts: Int[Array, "B P"] | None = None,
    prompt_lengths: Int[Array, "B"] | None = None,
    proposer: Proposer = NO_GUESSES,
) -> Decoded:
    """Decodes B examples; traceable, to be called under `jax.jit`.

    cache: empty, B·G rows (G = `config.selector().group`) of at least `config.slots` slots.
    ids: number of each example, the source of its randomness.
    limits: tokens at most, prompt and EOS included; 0 for a row that only fills up the batch.
    prompts: tokens every result begins with (a language token, a given beginning), read in one pass and never scored;
    a prompt must be shorter than its limit. Only a generated EOS ends a row.
    """
    selector, processors = config.selector(), config.processors()
    state = _start(step, cache, selector, proposer, config.max_length, ids, limits, prompts, prompt_lengths)
    extend = partial(_extend, selector=selector, processors=processors)
    body = partial(_advance, step=step, extend=extend, proposer=proposer)
    return selector.finish(jax.lax.while_loop(lambda state: ~jnp.all(state.done), body, state))


def _start(
    step: Step,
    cache: PyTree,
    selector: Selector,
    proposer: Proposer,
    max_length: int,
    ids: Int[Array, "B"],
    limits: Int[Array, "B"],
    prompts: Int[Array, "B P"] | None,
    prompt_lengths: Int[Array, "B"] | None,
) -> State:
    """The state after the prompts: their tokens in place, all but the last one in the cache."""
    rows = ids.size * selector.group
    log_prob, search = selector.init(ids, max_length)
    limit = jnp.repeat(jnp.minimum(limits, max_length), selector.group)
    tokens = jnp.zeros((rows, max_length), jnp.int32)
    length = jnp.zeros(rows, jnp.int32)
    pending, read = jnp.full(rows, PAD_ID, jnp.int32), None
    if prompts is not None:
        length = jnp.repeat(prompt_lengths, selector.group)
        given = jnp.arange(prompts.shape[1])[None] < length[:, None]
        prompt = jnp.where(given, jnp.repeat(prompts, selector.group, axis=0), 0)
        fed = jnp.concatenate([pending[:, None], prompt], axis=1)  # what the decoder reads, shifted right
        # Shorter prompts feed slots beyond their length too; not counted, those are overwritten later.
        read = fed[:, :-1]
        _, _, cache = step(read, cache)
        cache = {**cache, "length": cache["length"] + length}
        tokens = tokens.at[:, : prompt.shape[1]].set(prompt)
        pending = jnp.take_along_axis(fed, length[:, None], axis=1)[:, 0]
    zero, own = jnp.zeros((), jnp.int32), proposer.begin(read, length)
    return State(tokens, length, pending, log_prob, length, limit, length >= limit, zero, cache, search, own)


def _advance(state: State, *, step: Step, extend: Extend, proposer: Proposer) -> State:
    """One pass: every row that is not done grows by one token, and by one more for each guess that is right."""
    guesses, own = proposer.propose(state, extend)
    block = jnp.concatenate([state.pending[:, None], jnp.maximum(guesses, 0)], axis=1)
    logits, _, cache = step(block, state.cache)
    before, active = state.length, ~state.done
    state = state._replace(cache=cache)
    if proposer.width == 0:
        state = extend(state, logits[:, 0], active)
    else:
        state = _confirm(state, logits, guesses, active, extend)
    grown = state.length - before
    cache = {**state.cache, "length": state.cache["length"] + grown}
    return state._replace(passes=state.passes + 1, cache=cache, proposal=proposer.observe(own, grown))


def _confirm(
    state: State, logits: Float[Array, "R Q V"], guesses: Int[Array, "R W"], active: Bool[Array, "R"], extend: Extend
) -> State:
    """Rows grow along the block, each until its guess is not what it chooses."""
    cache = state.cache

    def position(carry: tuple[State, Array], its: tuple[Array, Array]) -> tuple[tuple[State, Array], None]:
        (state, active), (logits, guess) = carry, its
        state = extend(state, logits, active)
        return (state, active & ~state.done & (state.pending == guess)), None

    none = jnp.full_like(guesses[:, :1], -1)
    positions = jnp.swapaxes(logits, 0, 1), jnp.concatenate([guesses, none], axis=1).T
    (state, _), _ = jax.lax.scan(position, (state._replace(cache=None), active), positions)
    return state._replace(cache=cache)


def _extend(
    state: State,
    logits: Float[Array, "R V"],
    active: Bool[Array, "R"],
    *,
    selector: Selector,
    processors: tuple[Processor, ...],
) -> State:
    """One token more in the rows that are active."""
    processed = logits
    for process in processors:
        processed = process(processed, state)
    return _commit(state, selector.choose(logits, processed, state), active)


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
