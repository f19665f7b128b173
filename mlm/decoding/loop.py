"""The decoding loop: one `lax.while_loop` over ragged rows, for every method.

    propose   the block to feed: the pending token, and guesses of those that follow, a chain or a tree
    step      one cached decoder pass -> logits of every position of the block
    process   pure functions reshape or forbid
    select    one token per row (and, for beams, the row it continues), from node to node, as long as one guessed it
    commit    write what was chosen, advance the rows that are not done

Rows have their own lengths, prompts and limits; the loop ends when all are done. Nothing in it depends on how many rows
there are or who the neighbours are. Guesses change the number of passes alone: at every position the selector reads the
same logits, the same past and the same noise as without them, so also a drawn text is the same, token by token (shared
noise in place of rejection sampling: Daliri et al. 2025, arXiv:2408.07978). The one exception is a method that says so,
`lexical_units`: its selector takes tokens behind placeholders.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mlm.decoding.config import DecodeConfig
from mlm.decoding.growth import advance, extension
from mlm.decoding.state import NO_GUESSES, Decoded, Proposer, Seen, Selector, Start, State, Step
from mlm.types import PAD_ID, PyTree

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
    extend = extension(selector, processors, config.stop)
    body = partial(advance, step=step, extend=extend, proposer=proposer)
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

    def seen() -> Seen:
        if said is not None:
            return said.seen
        traced, _ = jax.eval_shape(step, pending[:, None], cache)  # nothing is read yet, yet a state has a width
        return jax.tree.map(lambda x: jnp.zeros((rows, 0, *x.shape[2:]), x.dtype), traced.seen)

    log_prob, search = selector.init(Start(ids, config.max_length, given, length, seen))
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
        proposal=proposer.begin(read, length, None if said is None else said.seen),
        given={name: jnp.repeat(x, selector.group, axis=0) for name, x in given.items()},
    )
