"""Exact log-probabilities of given targets: one teacher-forced pass, the vocabulary in chunks of positions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from mlm.decoding.buckets import Ints, TokenLists, bucket, check_tokens, shards, target_languages
from mlm.decoding.state import token_log_prob
from mlm.models.transformer import Transformer
from mlm.types import PAD_ID, Hidden, Params, Tokens


class Scores(NamedTuple):
    """Model log-probabilities in nats, host arrays."""

    tokens: Float[Array, "N T"]  # log P(y_t | y_<t, x); 0 beyond the target's length
    totals: Float[Array, "N"]  # log P(y | x), summed over the target's tokens
    lengths: Int[Array, "N"]


class Piece(NamedTuple):
    """An example in a row: its number, and where its source and what the decoder reads begin."""

    example: int
    source: int
    target: int


class Scorer:
    """log P(target | source) for token sequences; keep it, so that what it compiled is reused.

    Several examples share a row, which changes no score; a decoder alone reads each source before its target.

    rows: sharding of an array's first axis over the mesh. chunk: tokens whose logits exist at a time, so that memory is
    chunk · V and not B · T · V. temperature: of the distribution softmax(logits / temperature) that is asked.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: NamedSharding | None = None,
        batch_size: int = 64,
        chunk: int = 512,
        temperature: float = 1.0,
    ):
        if not temperature > 0 or chunk < 1:
            raise ValueError(f"temperature={temperature} must be above 0, and chunk={chunk} tokens at least 1")
        self.model = model
        self._temperature = temperature
        self.compilations = 0  # shapes seen so far; each costs seconds once
        self._rows = rows
        self._shards = shards(rows)
        self._batch_size = -(-batch_size // self._shards) * self._shards
        self._chunk = chunk
        self._run = jax.jit(self._score)

    def __call__(
        self, params: Params, sources: TokenLists, targets: TokenLists, languages: Ints | None = None
    ) -> Scores:
        """Scores in the order given. A target is scored as it stands: append EOS for the probability of ending there.
        languages: target language id of each source, which a language-aware model asks for.

        Raises ValueError for unequal counts, an empty sequence or a token outside the vocabulary.
        """
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources but {len(targets)} targets: give one target per source")
        alone = self.model.config.encoder is None  # where an empty source asks for the target itself
        check_tokens("source", [s for s in sources if len(s) or not alone], self.model.config.vocab_size)
        check_tokens("target", targets, self.model.config.vocab_size)
        to = target_languages(languages, len(sources), self.model.config.languages)
        read = [[]] * len(sources) if alone else sources
        told = [[*s, *t] for s, t in zip(sources, targets, strict=True)] if alone else targets
        lengths = np.array([len(t) for t in targets], np.int32)
        scores = np.zeros((len(targets), int(lengths.max(initial=0))), np.float32)
        width, length = (bucket(max(map(len, sequences), default=1)) for sequences in (read, told))
        if self._packs:
            rows = packed(read, told, (width, length))
        else:
            sizes = [len(s) + len(t) for s, t in zip(read, told, strict=True)]
            rows = [[Piece(int(i), 0, 0)] for i in np.argsort(-np.array(sizes), kind="stable")]
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            count = min(bucket(-(-len(batch) // self._shards), 1) * self._shards, self._batch_size)
            inputs = _batch(batch, read, told, to, (count, width, length))
            if alone:
                inputs = {name: x for name, x in inputs.items() if not name.startswith("encoder")}
            found = jax.device_get(self._run(params, jax.device_put(inputs, self._rows)))
            for row, pieces in zip(found, batch, strict=False):
                for index, _, first in pieces:
                    end = first + len(told[index])
                    scores[index, : lengths[index]] = row[end - lengths[index] : end]
        return _scores(scores, lengths)

    @property
    def _packs(self) -> bool:
        """Not where experts have a capacity: what a row holds decides what they drop."""
        routers = [router for stack in self.model.config.stacks().values() for router in stack.routers()]
        return all(router.capacity is None and router.eval_capacity is None for router in routers)

    def _score(self, params: Params, batch: dict[str, Array]) -> Float[Array, "B T"]:
        self.compilations += 1  # runs while tracing only
        hidden = self.model(params, batch).hidden
        target = batch["decoder_target_tokens"]
        return jnp.where(batch["decoder_segment_ids"] > 0, self._log_probs(params, hidden, target), 0.0)

    def _log_probs(self, params: Params, hidden: Hidden, target: Tokens) -> Float[Array, "B T"]:
        """log softmax(logits)[target], a few positions of every row at a time."""
        batch, length, width = hidden.shape
        step = min(length, max(1, self._chunk * self._shards // batch))
        parts = -(-length // step)
        spare = ((0, 0), (0, parts * step - length))
        hidden = jnp.pad(hidden, (*spare, (0, 0))).reshape(batch, parts, step, width).swapaxes(0, 1)
        target = jnp.pad(target, spare).reshape(batch, parts, step).swapaxes(0, 1)

        def part(states_and_tokens: tuple[Array, Array]) -> Float[Array, "B C"]:
            states, tokens = states_and_tokens
            return jax.vmap(token_log_prob)(self.model.logits(params, states) / self._temperature, tokens)

        return jax.lax.map(part, (hidden, target)).swapaxes(0, 1).reshape(batch, -1)[:, :length]


def together(scores: Sequence[Scores]) -> Scores:
    """Of an ensemble: the mean of the probabilities that its models give to a token."""
    return scores[0] if len(scores) == 1 else _scores(mean_probability([s.tokens for s in scores]), scores[0].lengths)


def mean_probability(log_probs: Sequence[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
    """log mean_m exp(log_probs_m); 0 where all are."""
    return np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs)) if len(log_probs) > 1 else log_probs[0]


def _scores(tokens: Float[np.ndarray, "N T"], lengths: Int[np.ndarray, "N"]) -> Scores:
    return Scores(tokens, tokens.astype(np.float64).sum(1).astype(np.float32), lengths)


def packed(sources: TokenLists, targets: TokenLists, widths: tuple[int, int]) -> list[list[Piece]]:
    """Rows of the widths, filled longest example first, each into the first row that has room for it."""
    sizes = np.array([(len(s), len(t)) for s, t in zip(sources, targets, strict=True)], np.int32).reshape(-1, 2)
    rows: list[list[Piece]] = []
    used = np.zeros_like(sizes)  # of as many rows as there may be
    for index in np.argsort(-sizes.sum(1), kind="stable"):
        fits = np.flatnonzero((used[: len(rows)] + sizes[index] <= widths).all(1))
        place = int(fits[0]) if fits.size else len(rows)
        if place == len(rows):
            rows.append([])
        rows[place].append(Piece(int(index), *map(int, used[place])))
        used[place] += sizes[index]
    return rows


def _batch(
    rows: Sequence[Sequence[Piece]],
    sources: TokenLists,
    targets: TokenLists,
    languages: np.ndarray | None,
    shape: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    """What the model reads: `ROW_FEATURES`, as far as it asks for them."""
    count, source_width, target_width = shape
    names = {"encoder_input_tokens": source_width, "encoder_segment_ids": source_width}
    names |= {f"decoder_{name}": target_width for name in ("input_tokens", "target_tokens", "segment_ids")}
    batch = {name: np.zeros((count, width), np.int32) for name, width in names.items()}
    if languages is not None:
        batch["decoder_language_ids"] = np.zeros((count, target_width), np.int32)
    for row, pieces in enumerate(rows):
        for number, (index, at, to) in enumerate(pieces, 1):
            source, target = sources[index], targets[index]
            read, told = slice(at, at + len(source)), slice(to, to + len(target))
            batch["encoder_input_tokens"][row, read] = source
            batch["encoder_segment_ids"][row, read] = number
            batch["decoder_input_tokens"][row, told] = [PAD_ID, *target[:-1]]
            batch["decoder_target_tokens"][row, told] = target
            batch["decoder_segment_ids"][row, told] = number
            if languages is not None:
                batch["decoder_language_ids"][row, told] = languages[index]
    return batch
