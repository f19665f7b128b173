"""Loss of every language on given rows: nats per token, and bits per byte, which compare languages and vocabularies.

    losses = TokenLosses(model)
    trained = language_losses(partial(losses, params), batches, spelling, languages=len(LANGUAGES))
    unigram = language_losses(unigram(log_probs), batches, spelling, languages=len(LANGUAGES))
    trained.bits_per_byte[language_id("fr")]

    bits per byte = Σ −log P(token) / ln 2 / Σ UTF-8 bytes that the token spells

Both sums run over the target tokens that spell text. Sentinels, language tokens and the end of sequence spell none:
they count in the loss per token, and stand in neither sum here. (<unk> spells text of unknown length: its bytes count
as 0, so it can only make a model look worse.) Everything is a sum until the last moment, so batches, packing and
devices do not matter.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mlm.models.transformer import Transformer
from mlm.objectives import head_cross_entropy
from mlm.types import Params

Rows = Mapping[str, np.ndarray]  # mlm.types.ROW_FEATURES on the host


class Spelling(NamedTuple):
    """What each id of a vocabulary writes."""

    text: Bool[np.ndarray, "V"]  # spells text; the others are special tokens
    size: Int[np.ndarray, "V"]  # UTF-8 bytes of it
    space: Bool[np.ndarray, "V"]  # begins with a space that vanishes at the start of a text (SentencePiece's ▁)
    opens: Bool[np.ndarray, "V"]  # language tokens: a text starts after them


@dataclass(frozen=True)
class LanguageLosses:
    """Sums per language id, float64. Add two of them for the sums over both sets of rows."""

    nll: Float[np.ndarray, "L"]  # nats over all target tokens
    tokens: Float[np.ndarray, "L"]
    text_nll: Float[np.ndarray, "L"]  # nats over the tokens that spell text
    text_tokens: Float[np.ndarray, "L"]
    bytes: Float[np.ndarray, "L"]  # UTF-8 bytes that these spell

    def __add__(self, other: "LanguageLosses") -> "LanguageLosses":
        return LanguageLosses(*(a + b for a, b in zip(self._fields(), other._fields(), strict=True)))

    @property
    def loss(self) -> Float[np.ndarray, "L"]:
        """Nats per target token; NaN for a language without tokens."""
        return _ratio(self.nll, self.tokens)

    @property
    def bits_per_byte(self) -> Float[np.ndarray, "L"]:
        """NaN for a language without text."""
        return _ratio(self.text_nll, self.bytes) / np.log(2)

    def total(self) -> "LanguageLosses":
        """All languages together, as one entry."""
        return LanguageLosses(*(x.sum(keepdims=True) for x in self._fields()))

    def seen(self) -> list[int]:
        """Ids of the languages with tokens."""
        return np.flatnonzero(self.tokens).tolist()

    def _fields(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def language_losses(
    token_nll: Callable[[Rows], np.ndarray | Array],
    batches: Iterable[Rows],
    spelling: Spelling,
    *,
    languages: int,
    by: str = "decoder_language_ids",
) -> LanguageLosses:
    """Sums over the rows. token_nll: −log P of every target token, [B, T] nats; what it says of padding is ignored.

    by: the feature whose ids are told apart. languages: number of these ids, padding's 0 included.
    """
    sums = LanguageLosses(*np.zeros((5, languages)))
    for batch in batches:
        sums += _sums(np.asarray(token_nll(batch), np.float64), batch, spelling, languages, by)
    return sums


class TokenLosses:
    """(params, rows) -> −log P of every target token; keep it, so that what it compiled is reused.

    rows: sharding of an array's first axis over the mesh; it must divide the rows of a batch. chunk: target positions
    whose logits exist at a time (None: chosen from the sizes).
    """

    def __init__(self, model: Transformer, *, rows: NamedSharding | None = None, chunk: int | None = None):
        self.model, self._rows, self._chunk = model, rows, chunk
        self._run = jax.jit(self._nll)

    def __call__(self, params: Params, batch: Rows) -> Float[np.ndarray, "B T"]:
        read = _READ if self.model.config.languages is None else (*_READ, "decoder_language_ids")
        used = {name: batch[name] for name in read}
        return jax.device_get(self._run(params, jax.device_put(used, self._rows)))

    def _nll(self, params: Params, batch: dict[str, Array]) -> Float[Array, "B T"]:
        states = self.model(params, batch).hidden
        hidden, kernel, bias, target, within = self.model.prediction(params, states, batch["decoder_target_tokens"])
        mesh = None if self._rows is None else self._rows.mesh
        weights = jnp.ones(target.shape, jnp.float32)
        softcap = self.model.config.head.softcap
        nll = head_cross_entropy(
            hidden, kernel, target, weights, bias=bias, softcap=softcap, chunk=self._chunk, mesh=mesh
        )[1].nll
        return nll if within is None else nll + within.nll


_READ = (
    "encoder_input_tokens",
    "encoder_segment_ids",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_segment_ids",
)


# The unigram baseline: what token frequencies alone are worth.


def token_counts(batches: Iterable[Rows], vocab_size: int) -> dict[int, Int[np.ndarray, "V"]]:
    """Language id -> how often each token is a target in the rows; their sum is the count of the whole mixture."""
    counts: dict[int, np.ndarray] = {}
    for batch in batches:
        target, language = batch["decoder_target_tokens"], batch["decoder_language_ids"]
        told = batch["decoder_loss_weights"] > 0
        for index in np.unique(language[told]).tolist():
            found = np.bincount(target[told & (language == index)], minlength=vocab_size)
            counts[index] = counts.get(index, 0) + found
    return counts


def unigram_log_probs(counts: Int[np.ndarray, "V"], spelling: Spelling) -> Float[np.ndarray, "V"]:
    """log((count + 1) / (total + tokens)) over the tokens that spell text (add-one smoothing); NaN for the others.

    The baseline is told where text stands, which only makes it harder to beat.
    """
    known = np.where(spelling.text, counts + 1.0, np.nan)
    return np.log(known / np.nansum(known))


def unigram(
    log_probs: Float[np.ndarray, "V"] | Mapping[int, Float[np.ndarray, "V"]],
) -> Callable[[Rows], Float[np.ndarray, "B T"]]:
    """A `token_nll` from `unigram_log_probs`: one table for all languages, or language id -> its own.

    Its loss per token is NaN (special tokens have no probability here); its bits per byte are what it is for.
    """
    if isinstance(log_probs, np.ndarray):
        return lambda batch: -log_probs[batch["decoder_target_tokens"]]
    ids = np.array(sorted(log_probs))
    table = np.stack([log_probs[i] for i in ids])

    def own(batch: Rows) -> np.ndarray:
        language = batch["decoder_language_ids"]
        place = np.minimum(np.searchsorted(ids, language), len(ids) - 1)
        missing = np.setdiff1d(language[batch["decoder_loss_weights"] > 0], ids)
        if missing.size:
            raise ValueError(f"no unigram counts for the languages with ids {missing.tolist()}")
        return -table[place, batch["decoder_target_tokens"]]

    return own


def _sums(nll: np.ndarray, batch: Rows, spelling: Spelling, languages: int, by: str) -> LanguageLosses:
    target, told = batch["decoder_target_tokens"], batch["decoder_loss_weights"] > 0
    text = told & spelling.text[target]
    before = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    first = (batch["decoder_positions"] == 0) | ((batch["decoder_positions"] == 1) & spelling.opens[before])
    size = spelling.size[target] - (first & spelling.space[target])

    def add(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        found = np.bincount(batch[by][where], values[where], minlength=languages)
        return found.astype(np.float64)  # of no token at all it would be an array of integers

    one = np.ones(target.shape)
    return LanguageLosses(add(nll, told), add(one, told), add(nll, text), add(one, text), add(size, text))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
