"""The decoding loop: one `lax.while_loop` over ragged rows, for every method.

    propose   the block to feed: the pending token
    step      one cached decoder pass -> logits
    process   pure functions reshape or forbid
    select    one token per row (and, for beams, the row it continues)
    commit    write what was chosen, advance the rows that are not done

Rows have their own lengths, prompts and limits; the loop ends when all are done. Nothing in it depends on how many rows
there are or who the neighbours are.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlm.decoding.config import DecodeConfig
from mlm.decoding.state import Choice, Decoded, Processor, Selector, State, Step
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
) -> Decoded:
    """Decodes B examples; traceable, to be called under `jax.jit`.

    cache: empty, B·G rows (G = `config.selector().group`) of at least `config.max_length` slots.
    ids: number of each example, the source of its randomness.
    limits: tokens at most, prompt and EOS included; 0 for a row that only fills up the batch.
    prompts: tokens every result begins with (a language token, a given beginning), read in one pass and never scored;
    a prompt must be shorter than its limit. Only a generated EOS ends a row.
    """
    selector, processors = config.selector(), config.processors()
    state = _start(step, cache, selector, config.max_length, ids, limits, prompts, prompt_lengths)
    body = partial(_advance, step=step, selector=selector, processors=processors)
    return selector.finish(jax.lax.while_loop(lambda state: ~jnp.all(state.done), body, state))


def _start(
    step: Step,
    cache: PyTree,
    selector: Selector,
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
    pending = jnp.full(rows, PAD_ID, jnp.int32)
    if prompts is not None:
        length = jnp.repeat(prompt_lengths, selector.group)
        given = jnp.arange(prompts.shape[1])[None] < length[:, None]
        prompt = jnp.where(given, jnp.repeat(prompts, selector.group, axis=0), 0)
        fed = jnp.concatenate([pending[:, None], prompt], axis=1)  # what the decoder reads, shifted right
        # Shorter prompts feed slots beyond their length too; not counted, those are overwritten later.
        _, _, cache = step(fed[:, :-1], cache)
        cache = {**cache, "length": cache["length"] + length}
        tokens = tokens.at[:, : prompt.shape[1]].set(prompt)
        pending = jnp.take_along_axis(fed, length[:, None], axis=1)[:, 0]
    zero = jnp.zeros((), jnp.int32)
    return State(tokens, length, pending, log_prob, limit, length >= limit, zero, cache, search)


def _advance(state: State, *, step: Step, selector: Selector, processors: tuple[Processor, ...]) -> State:
    """One pass: every row that is not done grows by one token."""
    block = state.pending[:, None]
    logits, _, cache = step(block, state.cache)
    logits = processed = logits[:, -1]
    for process in processors:
        processed = process(processed, state)
    choice = selector.choose(logits, processed, state)
    return _commit(state, cache, choice)


def _commit(state: State, cache: PyTree, choice: Choice) -> State:
    active = ~state.done
    tokens = state.tokens
    if choice.parent is not None:
        tokens = _continue(tokens, choice.parent)
        cache = {**cache, "self": jax.tree.map(lambda x: _continue(x, choice.parent), cache["self"])}
    here = jnp.arange(tokens.shape[1])[None] == state.length[:, None]
    grown = state.length + active
    return State(
        tokens=jnp.where(here & active[:, None], choice.token[:, None], tokens),
        length=grown,
        pending=jnp.where(active, choice.token, state.pending),
        log_prob=jnp.where(active, choice.log_prob, state.log_prob),
        limit=state.limit,
        done=state.done | choice.ended | (grown >= state.limit),
        passes=state.passes + 1,
        cache={**cache, "length": cache["length"] + active},
        search=choice.search,
    )


def _continue(x: Array, parent: Int[Array, "B G"]) -> Array:
    """Rows permuted inside their group: out[b·G + g] = x[b·G + parent[b, g]]; local to the shard of example b."""
    grouped = x.reshape(*parent.shape, *x.shape[1:])
    return jax.vmap(lambda rows, index: rows[index])(grouped, parent).reshape(x.shape)
