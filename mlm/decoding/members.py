"""Several models, or one that reads in two ways, as one step over one cache: ensembles, and whom a model is contrasted
with.

The loop reads the `length` of a cache and moves rows and slots of its `self`; the joint cache has the members' own side
by side there, and what is left of each behind it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlm.decoding.state import Read, Seen, Step
from mlm.models.tree import Tree
from mlm.registry import Registry
from mlm.types import PyTree

Opened = tuple[Step, PyTree]  # a model's step over the sources it has read, and its cache


def _of_probabilities(log_probs: Float[Array, "m ..."]) -> Float[Array, "..."]:
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(log_probs.shape[0])


def _of_log_probabilities(log_probs: Float[Array, "m ..."]) -> Float[Array, "..."]:
    return jnp.mean(log_probs, axis=0)


# How the members' log-probabilities become the logits of all.
MEANS: Registry[Callable[[Array], Array]] = Registry(
    "mean of an ensemble", probabilities=_of_probabilities, log_probabilities=_of_log_probabilities
)


def averaged(members: Sequence[Opened], mean: str) -> Opened:
    """log mean_m softmax(logits_m), or mean_m log softmax(logits_m): a name out of `MEANS`. Its states are the first
    member's, its attention the mean of theirs. One member is itself.
    """
    if len(members) == 1:
        return members[0]

    def join(*said: Read) -> Read:
        log_probs = jnp.stack([jax.nn.log_softmax(read.logits, axis=-1) for read in said])
        attention = None
        if said[0].seen.attention is not None:
            attention = jnp.mean(jnp.stack([read.seen.attention for read in said]), axis=0)
        return Read(MEANS[mean](log_probs), Seen(said[0].seen.hidden, attention=attention))

    return _joined(members, join)


def contrasted(model: Opened, other: Opened) -> Opened:
    """The model, whose `Seen.others` are the other one's logits."""
    return _joined((model, other), lambda own, said: Read(own.logits, own.seen._replace(others=(said.logits,))))


def told(opened: Opened, beginning: Int[Array, "R P"], lengths: Int[Array, "R"]) -> Opened:
    """The model, which reads another beginning than what it is fed: its first `lengths` + 1 tokens, start token
    included (padding: the model's own).
    """
    step, cache = opened

    def read(
        tokens: Int[Array, "R Q"], cache: PyTree, *, tree: Tree | None = None, prefix: Array | None = None
    ) -> tuple[Read, PyTree]:
        at = cache["length"][:, None] + jnp.arange(tokens.shape[1])  # guesses stand behind the beginning, also in trees
        instead = jnp.take_along_axis(beginning, jnp.minimum(at, beginning.shape[1] - 1), axis=1)
        return step(jnp.where(at <= lengths[:, None], instead, tokens), cache, tree=tree, prefix=prefix)

    return read, cache


def _joined(members: Sequence[Opened], join: Callable[..., Read]) -> Opened:
    steps, caches = zip(*members, strict=True)
    rest = tuple({name: x for name, x in cache.items() if name not in ("length", "self")} for cache in caches)
    joint = {"length": caches[0]["length"], "self": tuple(cache["self"] for cache in caches), "rest": rest}

    def step(
        tokens: Int[Array, "R Q"], cache: PyTree, *, tree: Tree | None = None, prefix: Array | None = None
    ) -> tuple[Read, PyTree]:
        said, written = [], []
        for one, own, others in zip(steps, cache["self"], cache["rest"], strict=True):
            read, after = one(tokens, {**others, "length": cache["length"], "self": own}, tree=tree, prefix=prefix)
            said.append(read)
            written.append(after["self"])
        return join(*said), {**cache, "self": tuple(written)}

    return step, joint
