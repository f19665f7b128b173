"""The transformer: pure functions of a nested dict of arrays, built from a `ModelConfig`."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mlm.models.chimera import Chimera
from mlm.models.codes import Codebook, TwoLevel, Within, floor
from mlm.models.config import ModelConfig
from mlm.models.functional import Template
from mlm.models.language import Bridge, Offsets, languages_of_sources
from mlm.models.layers import Norm, Pass, cap, parameter, product, unit_rows, zeros
from mlm.models.order import doubled
from mlm.models.paths import path_of
from mlm.models.routing import Routed
from mlm.models.specs import EmbeddingSpec, NormSpec
from mlm.models.stack import Stack
from mlm.models.tree import Tree
from mlm.registry import nearest
from mlm.types import (
    ONE_DEVICE,
    PAD_ID,
    Batch,
    Hidden,
    Logits,
    Params,
    Placement,
    PyTree,
    SourceHidden,
    SourceSegments,
    SourceTokens,
)

_PREFIX = "decoder_causal_attention"


class Output(NamedTuple):
    """hidden: the last stack's states after its final norm, offsets by language added: what the head reads. encoded:
    the encoder's, if any, before the bridge.

    routed: of each stack with mixtures of experts, their records [n, …] by depth. taps: what was asked for, by name.
    positions: in training, the losses of the readers of positions of each stack that has one, in nats.
    """

    hidden: Hidden
    encoded: SourceHidden | None
    routed: dict[str, Routed]
    taps: dict[str, Array]
    positions: dict[str, Float[Array, ""]]


class Block(NamedTuple):
    """What a pass over a block of cached rows says. logits: of the final states, then of those after each number of
    layers that was asked for. attention: in the last layer that reads the encoder's states, mean of its heads.
    """

    logits: tuple[Float[Array, "R Q V"], ...]
    hidden: Float[Array, "R Q D"]
    attention: Float[Array, "R Q S"] | None
    cache: PyTree


class Prediction(NamedTuple):
    """What a loss reads: -log p(target) = -log softmax(cap(states @ matrix + bias))[target] + within.nll.

    within: None but for a head of two levels, whose targets and columns are those of clusters.
    """

    states: Float[Array, "B T K"]
    matrix: Float[Array, "K V"]
    bias: Float[Array, "V"] | None
    targets: Int[Array, "B T"]
    within: Within | None


class Ends(nnx.Module):
    """Input tables, what the head owns, the bridge between the stacks. Initial std: the tables' as their stack says,
    D^-1/2 of the head.

    One table serves both stacks, or "encoder_embedding" the encoder and "embedding" the decoder and a tied head. A
    table of some rank has its second factor in "…_up", of std rank^-1/2; a head's first is "head_down".
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, width = config.vocab_size, config.d_model
        stacks = config.stacks()
        last = stacks[next(reversed(stacks))]
        self._add_table("embedding", size, width, last.embedding, rngs)
        if not config.share_embedding and len(stacks) == 2:
            self._add_table("encoder_embedding", size, config.memory_width, stacks["encoder"].embedding, rngs)
        if config.head.kind == "two_level":
            self.two_level = TwoLevel(width, config.head, size, rngs)
        elif rank := config.head.rank:
            self.head_down = parameter(rngs, (width, rank), width**-0.5, ("embed", "rank"))
            self.head = parameter(rngs, (rank, size), rank**-0.5, ("rank", "vocab"))
        elif config.head.kind == "codes":
            self.codebook = Codebook(width, config.head, size, rngs)
        elif config.head.kind == "linear":
            self.head = parameter(rngs, (width, size), width**-0.5, ("embed", "vocab"))
        if config.head.bias:
            self.head_bias = zeros((size,), ("vocab",))
        if config.head.mlm_transform:
            self.transform = MLMTransform(width, last.norm.eps, rngs)
        if config.languages and config.bridge:
            self.bridge = Bridge(config.memory_width, config.languages)
        if config.languages and config.head.offsets:
            self.offsets = Offsets(width, config.head.offsets, config.languages, config.scripts)

    def _add_table(self, name: str, size: int, width: int, spec: EmbeddingSpec, rngs: nnx.Rngs) -> None:
        columns, axis = (width, "embed") if spec.rank is None else (spec.rank, "rank")
        setattr(self, name, parameter(rngs, (size, columns), spec.initial_std, ("vocab", axis)))
        if spec.rank:
            setattr(self, f"{name}_up", parameter(rngs, (columns, width), columns**-0.5, ("rank", "embed")))


class MLMTransform(nnx.Module):
    """LayerNorm(gelu(x W + b)), before the output matrix of a masked language model (Devlin et al. 2019)."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs):
        self.dense = parameter(rngs, (width, width), width**-0.5, ("embed", "mlp"))
        self.bias = zeros((width,), ("mlp",))
        self.norm = Norm(width, NormSpec(kind="layer", eps=eps))

    def __call__(self, x: Hidden) -> Hidden:
        y = product(x, self.dense[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)
        return self.norm(jax.nn.gelu(y, approximate=False))


class Transformer:
    """Encoder-decoder, decoder or encoder, as the config says. Holds no arrays: `init` makes them, every other method
    takes them. placement: how activations and experts lie on devices.
    """

    def __init__(self, config: ModelConfig, placement: Placement = ONE_DEVICE):
        self.config = config
        self.placement = placement
        self._dtype = jnp.dtype(config.dtype)
        for stack in config.stacks().values():
            path_of(stack, config.dtype)  # refuses what does not fit before anything is traced
        if config.head.kind == "codes" and not config.head.bias and (least := floor(config.head, config.vocab_size)):
            warnings.warn(
                f"tokens that share a column of the head (codes={config.head.codes}, groups={config.head.groups}) "
                f"cannot be told apart: on average a token costs at least {least:.2f} nats; use more groups, or "
                "bias=True",
                stacklevel=2,
            )
        self._ends = Template(partial(Ends, config))
        width = {"encoder": config.memory_width, "decoder": config.d_model}
        self._stacks = {name: Stack(width[name], config.memory_width, stack) for name, stack in config.stacks().items()}
        self._parts: dict[str, Any] = dict(self._stacks)  # those that have a name in the parameters
        if config.chimera:
            self._parts["chimera"] = Template(partial(Chimera, config.d_model, config.chimera))

    def starting_with(self, token: int) -> "Transformer":
        """The same, but that its decoder reads this token first."""
        return Transformer(replace(self.config, start_token=token), self.placement)

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters: {"embedding", "head", "encoder": {...}, "decoder": {...}, "chimera": {...}}, those
        that there are. What others are does not depend on the last.
        """
        ends, encoder, decoder = jax.random.split(key, 3)
        keys = {"encoder": encoder, "decoder": decoder, "chimera": jax.random.fold_in(key, 3)}
        return {**self._ends.init(ends), **{name: part.init(keys[name]) for name, part in self._parts.items()}}

    def axes(self) -> PyTree:
        """Logical axis names of every parameter, a tuple per leaf."""
        return {**self._ends.axes(), **{name: part.axes() for name, part in self._parts.items()}}

    def shapes(self) -> PyTree:
        """Shape and dtype of every parameter; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def __call__(
        self,
        params: Params,
        batch: Batch,
        key: Key[Array, ""] | None = None,
        *,
        languages: int = 0,
        taps: Collection[str] = (),
        steering: Mapping[str, Array] | None = None,
        encoded: SourceHidden | None = None,
    ) -> Output:
        """Final states of a text-to-text batch (`mlm.types.ROW_FEATURES`), packed or not; teacher-forced in a decoder.

        A model of one stack reads only that stack's features. Where a batch has "decoder_causal_attention" [B, T], the
        decoder's tokens with a 1, the prefix of an example, see each other both ways (prefix LM; T5X's name). Where it
        has "decoder_ranks", "decoder_reads" and "decoder_query_tokens" [B, T], the decoder writes in order of rank: its
        input tokens are the targets themselves, and the states those of the queries (`models.order`).
        key: dropout key, or None for evaluation. languages: number of language ids, to count each one's use of experts
        (0: not counted). taps: names out of `tap_names`; each comes back as [layers that have it, …]. steering: stack
        -> what is added to its router logits, [n, B or 1, T or 1, E] for its n mixtures by depth (-1e10 forbids an
        expert). encoded: the encoder's states, where they are already there.
        A language-aware model (`ModelConfig.languages`) reads the target language off the ids of the decoder's tokens,
        or of the encoder's where it is alone. Raises KeyError, with the nearest name, for a tap that the model does not
        have, ValueError for a missing language.
        """
        self._check_taps(taps)
        order = None
        if "decoder_ranks" in batch:
            batch, order = doubled(batch)
        to = self._target_languages(batch)
        source, target = (None, None) if key is None else jax.random.split(key)
        segments = None
        routed: dict[str, Routed] = {}
        taken: dict[str, Array] = {}

        def run(stack: str, memory: Float[Array, "B S _"] | None, own_key: Key[Array, ""] | None) -> Hidden:
            tokens, own = batch[f"{stack}_input_tokens"], batch[f"{stack}_segment_ids"]
            prefix = f"{stack}/"
            its = Pass(
                real=own > 0,
                rate=self.config.stacks()[stack].dropout,
                placement=self.placement,
                languages=batch[f"{stack}_language_ids"] if languages else None,
                language_count=languages,
                target_languages=to.get(stack),
                taps=frozenset(name.removeprefix(prefix) for name in taps if name.startswith(prefix)),
            )
            hidden, notes = self._stacks[stack].forward(
                params[stack],
                self._rows(params, stack, tokens),
                own,
                memory,
                segments,
                own_key,
                its,
                (steering or {}).get(stack),
                batch[_PREFIX] > 0 if stack == "decoder" and _PREFIX in batch else None,
                order if stack == "decoder" else None,
            )
            if notes.routed:
                routed[stack] = notes.routed[0]
            taken.update({prefix + name: value for name, value in notes.taps.items()})
            return hidden

        if "encoder" in self._stacks:
            encoded = run("encoder", None, source) if encoded is None else encoded
            segments = batch["encoder_segment_ids"]
        hidden = encoded
        if "decoder" in self._stacks:
            hidden = run("decoder", self._bridged(params, encoded, to.get("encoder")), target)
        hidden = self._offset(params, hidden, next(reversed(to.values()), None))
        if order is not None:
            hidden = hidden[:, hidden.shape[1] // 2 :]
        return Output(hidden, encoded, routed, taken, self._position_losses(params, key))

    def _position_losses(self, params: Params, key: Key[Array, ""] | None) -> dict[str, Float[Array, ""]]:
        losses = {}
        for number, (name, config) in enumerate(self.config.stacks().items()):
            if config.seqpe() and key is not None:
                own = jax.random.fold_in(jax.random.fold_in(key, 2), number)
                losses[name] = self._stacks[name].position_loss(params[name], own)
        return losses

    def encode(
        self,
        params: Params,
        tokens: SourceTokens,
        segments: SourceSegments | None = None,
        key: Key[Array, ""] | None = None,
        languages: Int[Array, "B"] | None = None,
    ) -> SourceHidden:
        """Encoder states after the final norm. Without segments every token but padding (id 0) is one example.

        languages: target language of each row; only a language-aware model asks for them, with a ValueError.
        """
        segments = (tokens != 0).astype(jnp.int32) if segments is None else segments
        its = Pass(
            real=segments > 0,
            rate=self.config.stacks()["encoder"].dropout,
            placement=self.placement,
            target_languages=self._checked(languages),
        )
        rows = self._rows(params, "encoder", tokens)
        return self._stacks["encoder"].forward(params["encoder"], rows, segments, None, None, key, its)[0]

    def tap_names(self) -> tuple[str, ...]:
        """What `taps` can ask for: "encoder/hidden" (states after every layer), "decoder/ffn/activations",
        "encoder/moe/probabilities", and the weights of attention, "decoder/cross_attention/probabilities" and the like:
        [layers, B, H, T, M] in float32, keys of joint attention the stack's own first. Attention that is asked for them
        takes the plain path, whatever the stack's.
        """
        names = []
        for stack, config in self.config.stacks().items():
            names.append(f"{stack}/hidden")
            for layer in config.group:
                for name, spec in zip(layer.names(), layer.sublayers, strict=True):
                    names.extend(f"{stack}/{name}/{tap}" for tap in spec.taps)
        return tuple(dict.fromkeys(names))

    def _check_taps(self, taps: Collection[str]) -> None:
        for name in taps:
            if name not in self.tap_names():
                raise KeyError(f"no tap {name!r} in this model; {nearest(name, self.tap_names())}")

    def rebalanced(self, params: Params, load: Mapping[str, Float[Array, "n E"]]) -> Params:
        """The parameters after loss-free balancing, by the load that each stack's mixtures reported in `Output`."""
        return params | {name: self._stacks[name].rebalanced(params[name], own) for name, own in load.items()}

    def head(
        self, params: Params, hidden: Hidden
    ) -> tuple[Float[Array, "B T K"], Float[Array, "K V"], Float[Array, "V"] | None]:
        """(states, matrix, bias) of the logits cap(states @ matrix + bias): for a loss that never holds them all.

        The matrix holds the head's multiplier (D^-1/2 for T5 with a tied head). K is D, or the rank of a factorised
        head, whose first factor the states have passed.
        """
        head = self.config.head
        if head.kind == "two_level":
            raise ValueError("a head of two levels has no one matrix for all tokens; ask for `prediction` or `logits`")
        hidden = self._transformed(params, hidden)
        down = params["head_down"] if head.rank else None
        if head.kind == "tied" and "embedding_up" in params:
            down = params["embedding_up"].T
        if down is not None:
            hidden = product(hidden, down.astype(hidden.dtype))
        if head.kind == "codes":
            matrix = self._bind_ends(params).codebook.matrix()
        else:
            matrix = params["head"] if head.kind == "linear" else self._table(params).T
        return hidden, matrix if head.multiply == 1.0 else matrix * head.multiply, params.get("head_bias")

    def prediction(self, params: Params, hidden: Hidden, targets: Int[Array, "B T"]) -> Prediction:
        """What the loss of these targets is made of, whatever the head."""
        if self.config.head.kind != "two_level":
            return Prediction(*self.head(params, hidden), targets, None)
        hidden, parts = self._transformed(params, hidden), self._bind_ends(params).two_level
        within = parts.within(hidden, targets, params.get("head_bias"))
        return Prediction(hidden, parts.columns[...], None, jnp.asarray(parts.clusters())[targets], within)

    def logits(self, params: Params, hidden: Hidden) -> Logits:
        """Float32 logits over the vocabulary, in nats; of a head of two levels, log-probabilities."""
        if self.config.head.kind == "two_level":
            parts = self._bind_ends(params).two_level
            return parts.log_probs(self._transformed(params, hidden), params.get("head_bias"))
        hidden, kernel, bias = self.head(params, hidden)
        if self.config.head.kind == "codes":
            logits = self.config.head.multiply * self._bind_ends(params).codebook.products(hidden)
        else:
            logits = jnp.einsum("BTD,DV->BTV", hidden, kernel.astype(self._dtype), preferred_element_type=jnp.float32)
        return cap(logits if bias is None else logits + bias, self.config.head.softcap)

    def chimera(self, params: Params) -> Any:
        """The model's Chimera heads (`models.chimera`). Raises ValueError for a model without them."""
        if "chimera" not in self._parts:
            raise ValueError("this model has no chimera heads: ModelConfig.chimera is None")
        return self._parts["chimera"].bind(params["chimera"])

    def decoder_rows(self, params: Params, tokens: Int[Array, "B T"]) -> Hidden:
        """Embeddings of what the decoder reads, in their size, before positions and a norm."""
        return self._stacks["decoder"].scaled(self._rows(params, "decoder", tokens))

    def unrolled(self, params: Params) -> Params:
        """Parameters for `step` in a loop: without the stacking, whose slices would be copied at every pass."""
        return {**params, "decoder": self._stacks["decoder"].unrolled(params["decoder"])}

    def init_cache(
        self,
        params: Params,
        encoded: SourceHidden | None,
        source_mask: Bool[Array, "B S"] | None,
        rows: int,
        length: int,
        languages: Int[Array, "B"] | None = None,
        block: int | None = None,
    ) -> PyTree:
        """The decoding state of `rows` rows (batch x beams) of `length` positions each. block: how many are read at
        once at most (None: maybe all), which tells how long the ring of a windowed layer must be.

        {"length": [R] positions in use, "self": per layer, name, key|value [R, H, M, K], M = `length` slots, or the
         fewer min(length, window + block - 1) of a ring,
         "cross": per layer the source's keys and values, computed once and kept at B rows, "source_mask": [B, S]};
        in a language-aware model also "languages" [R], the target languages; where positions are read as digits,
        "positions", what all slots' are to queries and keys.
        encoded and source_mask are None for a decoder alone, and languages has then one for each of the rows.
        A permutation of beams gathers axis 0 of "length" and of every leaf of "self"; the rest is shared.
        """
        if encoded is not None and rows % encoded.shape[0]:
            raise ValueError(f"rows={rows} must be a multiple of the {encoded.shape[0]} sources: rows = batch x beams")
        to = self._checked(languages)
        memory = encoded if encoded is None else self._bridged(params, encoded, to)
        cross, own = self._stacks["decoder"].init_cache(
            params["decoder"], memory, source_mask, rows, length, block or length, self._dtype
        )
        cache = {"length": jnp.zeros(rows, jnp.int32), "self": own, "cross": cross, "source_mask": source_mask}
        if (reading := self._stacks["decoder"].read_positions(params["decoder"], length)) is not None:
            cache["positions"] = reading
        return cache if to is None else {**cache, "languages": jnp.repeat(to[:, 0], rows // to.shape[0])}

    def step(
        self,
        params: Params,
        tokens: Int[Array, "R Q"],
        cache: PyTree,
        prefix: Bool[Array, "R Q"] | None = None,
        tree: Tree | None = None,
    ) -> tuple[Float[Array, "R Q V"], Float[Array, "R Q D"], PyTree]:
        """(logits, states, cache) of the next Q tokens of every row, causal inside the block, but for the tokens of a
        prefix, which see each other and so must come in one block. tree: of Q nodes, each of which sees what is in the
        cache and its own ancestors; a chain where there is none.

        Their keys stand in slots length, length + 1, … (of a ring, modulo its size); "length" itself is not advanced,
        so a caller commits n of the Q tokens by adding n to it, and rolls back by not adding. length + Q must not
        exceed the positions that the cache was made for.
        """
        said = self.block(params, tokens, cache, prefix, tree)
        return said.logits[0], said.hidden, said.cache

    def block(
        self,
        params: Params,
        tokens: Int[Array, "R Q"],
        cache: PyTree,
        prefix: Bool[Array, "R Q"] | None = None,
        tree: Tree | None = None,
        early: tuple[int, ...] = (),
        attention: bool = False,
    ) -> Block:
        """As `step`, with more of what the pass says. early: for each of these counts of decoder layers (0: none) the
        logits that the head makes of the states after so many. attention: whether that over the source is to be shown.
        """
        rows = self._rows(params, "decoder", tokens)
        stack = self._stacks["decoder"]
        states, shown, own = stack.step(params["decoder"], rows, cache, self.placement, prefix, tree, early, attention)
        to = cache["languages"][:, None] if "languages" in cache else None
        states = tuple(self._offset(params, x, to) for x in states)
        return Block(tuple(self.logits(params, x) for x in states), states[0], shown, {**cache, "self": own})

    def _transformed(self, params: Params, hidden: Hidden) -> Hidden:
        return self._bind_ends(params).transform(hidden) if self.config.head.mlm_transform else hidden

    def _table(self, params: Params) -> Float[Array, "V K"]:
        """The input table that a tied head reads, the first factor of one with a rank."""
        last = next(reversed(self.config.stacks().values()))
        return unit_rows(params["embedding"]) if last.embedding.fix_norm else params["embedding"]

    def _target_languages(self, batch: Batch) -> dict[str, Int[Array, "B _"]]:
        """Target language of every token of each stack; nothing for a model that does not ask."""
        if self.config.languages is None:
            return {}
        stack = next(reversed(self._stacks))
        if f"{stack}_language_ids" not in batch:
            raise ValueError(f"a language-aware model needs {stack}_language_ids; the batch has {sorted(batch)}")
        to = {stack: batch[f"{stack}_language_ids"]}
        if len(self._stacks) == 2:
            segments = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
            to = {"encoder": languages_of_sources(*segments, to["decoder"]), **to}
        return to

    def _checked(self, languages: Int[Array, "B"] | None) -> Int[Array, "B 1"] | None:
        if self.config.languages is None:
            return None
        if languages is None:
            raise ValueError(
                "this model is language-aware (ModelConfig.languages): say which language each row is to write, by "
                "languages=[ids], or by to=… in a session"
            )
        return languages[:, None]

    def _bridged(self, params: Params, memory: SourceHidden | None, to: Int[Array, "B #S"] | None) -> Any:
        """The encoder's states as the decoder reads them."""
        return self._bind_ends(params).bridge(memory, to, self.placement) if self.config.bridge else memory

    def _offset(self, params: Params, hidden: Hidden, to: Int[Array, "B #T"] | None) -> Hidden:
        return self._bind_ends(params).offsets(hidden, to) if self.config.head.offsets else hidden

    def _bind_ends(self, params: Params) -> Any:
        return self._ends.bind({name: value for name, value in params.items() if name not in self._parts})

    def _rows(self, params: Params, stack: str, tokens: Int[Array, "B T"]) -> Hidden:
        """Rows of the stack's input table, F[tokens] P where it has a rank."""
        if stack == "decoder" and self.config.start_token:
            tokens = jnp.where(tokens == PAD_ID, self.config.start_token, tokens)
        name = f"{stack}_embedding" if f"{stack}_embedding" in params else "embedding"
        rows = params[name].astype(self._dtype)[tokens]
        return product(rows, params[f"{name}_up"].astype(self._dtype)) if f"{name}_up" in params else rows
