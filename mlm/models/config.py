"""What a model is, as frozen data that refuses nonsense when built. Published members are values in `presets.py`."""

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlm.models.specs import (
    AttentionSpec,
    ChimeraSpec,
    EmbeddingSpec,
    FFNSpec,
    LayerSpec,
    NormSpec,
    PositionSpec,
    RecurrentSpec,
    ResidualSpec,
    RouterSpec,
    SublayerSpec,
    check_above_zero,
    check_choice,
    check_positive,
)
from mlm.registry import nearest

REMAT_POLICIES = ("none", "minimal", "dots", "full")
ATTENTION_PATHS = ("plain", "blockwise", "cudnn", "splash")
HEADS = ("linear", "tied", "codes", "two_level")
OFFSETS = ("language", "script")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of `repeats` equal groups of layers, then `rest` layers of one more group. A group is the smallest
    repeating pattern.

    Parameters of the groups are stacked on a leading axis. scan: run the groups by one `lax.scan` (compile time does
    not grow with depth) or unrolled; the numbers are the same. remat: what the backward pass keeps (none: everything;
    minimal: outputs of weight matmuls; dots: outputs of all matmuls; full: layer inputs only). attention: how it is
    computed on whole sequences, never what (plain: all logits at once; blockwise: in memory that grows with the length;
    cudnn, splash: the kernels of NVIDIA GPUs and of TPUs, which refuse what they cannot do). final_norm: a norm after
    the last layer (post-norm stacks have none).
    """

    group: tuple[LayerSpec, ...]
    repeats: int
    causal: bool
    rest: int = 0
    norm: NormSpec = NormSpec()
    residual: ResidualSpec = ResidualSpec()
    embedding: EmbeddingSpec = EmbeddingSpec()
    final_norm: bool = True
    dropout: float = 0.0
    remat: str = "none"
    attention: str = "plain"
    scan: bool = True

    def __post_init__(self):
        check_positive(self, "repeats")
        check_choice("StackConfig", "remat", self.remat, REMAT_POLICIES)
        check_choice("StackConfig", "attention", self.attention, ATTENTION_PATHS)
        if not self.group or not all(layer.sublayers for layer in self.group):
            raise ValueError("StackConfig.group needs at least one layer, and every layer at least one sublayer")
        if not 0 <= self.rest < len(self.group):
            raise ValueError(
                f"StackConfig.rest={self.rest} must be less than the group's {len(self.group)} layers: "
                "more of them are another repeat"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"StackConfig.dropout={self.dropout} must be in [0, 1)")
        shared = {(s.heads, s.position) for s in self.attentions() if s.position.table() == "stack"}
        if len(shared) > 1:
            raise ValueError(
                f"StackConfig: one relative-position table serves all layers that share it, so their heads and buckets "
                f"must agree; found {sorted((heads, p.buckets, p.max_distance) for heads, p in shared)}"
            )
        read = {(s.heads, s.head_dim, s.position) for s in self.attentions() if s.position.kind == "seqpe"}
        if len(read) > 1:
            raise ValueError(
                f"StackConfig: one reader of positions serves all layers, so their heads, their size and its spec must "
                f"agree; found heads of {sorted(f'{heads}x{size}' for heads, size, _ in read)}"
            )
        if not any(spec.reads_itself for spec in self.sublayers()):
            raise ValueError(
                "StackConfig: no layer of the group holds self-attention or recurrence, so tokens never meet"
            )
        self._check_routers()

    def _check_routers(self) -> None:
        routers = self.routers()
        if len({router.experts for router in routers}) > 1:
            raise ValueError(
                f"StackConfig: the mixtures of one stack share the table of experts that is reported, so their numbers "
                f"of experts must agree; found {sorted({router.experts for router in routers})}"
            )
        if not self.causal:
            return
        for router in routers:
            drops = router.capacity is not None or router.eval_capacity is not None
            if router.kind == "expert_choice" or (drops and router.priority == "score"):
                how = "kind='expert_choice'" if router.kind == "expert_choice" else "priority='score'"
                raise ValueError(
                    f"StackConfig: {how} decides by later tokens of the row who is served, so a decoder would see the "
                    "future; use kind='top_k' with priority='token'"
                )
            if drops and router.priority == "choice" and router.k > 1:
                raise ValueError(
                    f"StackConfig: priority='choice' with k={router.k} lets first choices of later tokens displace "
                    "second choices of earlier ones, so a decoder would see the future; use priority='token'"
                )

    def mapped(self, sublayer: Callable[[SublayerSpec], SublayerSpec]) -> "StackConfig":
        """The stack with what the function makes of every sublayer."""
        group = tuple(LayerSpec(sublayers=tuple(map(sublayer, layer.sublayers))) for layer in self.group)
        return dataclasses.replace(self, group=group)

    @property
    def layers(self) -> int:
        return self.repeats * len(self.group) + self.rest

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Every layer, first to last."""
        return self.group * self.repeats + self.group[: self.rest]

    def sublayers(self) -> list[SublayerSpec]:
        """Those of one group, whatever the kind."""
        return [spec for layer in self.group for spec in layer.sublayers]

    def attentions(self) -> list[AttentionSpec]:
        """The attention sublayers of one group."""
        return [spec for spec in self.sublayers() if isinstance(spec, AttentionSpec)]

    def routers(self) -> list[RouterSpec]:
        """Those of the mixtures of experts of one group."""
        return [spec.router for spec in self.sublayers() if isinstance(spec, FFNSpec) and spec.router]

    def reads_memory(self) -> bool:
        return any(spec.reads_memory for spec in self.sublayers())

    def last_reader(self) -> tuple[int, str]:
        """(number of the last layer that reads the encoder's states, name of the tap of how it sees them)."""
        readers = [
            (number, f"{name}/probabilities")
            for number, layer in enumerate(self.layer_specs())
            for name, spec in zip(layer.names(), layer.sublayers, strict=True)
            if spec.reads_memory
        ]
        return readers[-1]

    def seqpe(self) -> AttentionSpec | None:
        """The attention whose positions a reader spells, if there is one."""
        return next((s for s in self.attentions() if s.position.kind == "seqpe"), None)

    def branches(self) -> bool:
        """Whether a block may be a tree: no unit carries a state from slot to slot, no reader numbers the slots."""
        return self.seqpe() is None and not any(isinstance(spec, RecurrentSpec) for spec in self.sublayers())

    def shared_table(self) -> AttentionSpec | None:
        """The attention whose relative-position table the whole stack shares, if there is one."""
        return next((s for s in self.attentions() if s.position.table() == "stack"), None)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What leaves. linear: a matrix of its own, or with a `rank` a product of [D, rank] and [rank, V]; tied: the
    (decoder's) input table; codes: each token's column is the sum of one out of `codes` shared columns in each of
    `groups` groups. In one group tokens share a column, by number in `clusters` (or else neighbouring ids do), and only
    a bias tells them apart: without it a token of a cluster of n cannot cost less than ln n nats (`codes.floor`). Codes
    save parameters, and time in decoding; the loss spreads the columns and costs what a linear head's does. two_level:
    a softmax over `codes` clusters, then one within the target's, of `rank`. Products are multiplied by `multiply`, and
    logits bounded by softcap * tanh(logits / softcap).

    mlm_transform: the states first pass LayerNorm(gelu(x W + b)), as in BERT and XLM-R. bias: a number per token is
    added to the products. offsets: vectors of the "language", or of its "script", that are added to the last states
    (LangSAMP).
    """

    kind: str = "linear"
    multiply: float = 1.0
    softcap: float | None = None
    mlm_transform: bool = False
    bias: bool = False
    rank: int | None = None
    codes: int = 0
    groups: int = 1
    clusters: tuple[int, ...] = ()
    offsets: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("HeadSpec", "kind", self.kind, HEADS)
        check_positive(self, "rank")
        if self.rank and self.kind not in ("linear", "two_level"):
            raise ValueError(
                f"HeadSpec: rank={self.rank} belongs to kind='linear' or 'two_level', not {self.kind!r}; a tied head "
                "has its input table's, EmbeddingSpec.rank"
            )
        check_positive(self, "groups")
        if (self.kind in ("codes", "two_level")) != (self.codes > 0) or (self.kind != "codes" and self.groups > 1):
            raise ValueError(
                f"HeadSpec: codes={self.codes} and groups={self.groups} belong to kind='codes', which needs codes of "
                f"at least 1; kind={self.kind!r} ('two_level' too needs codes, in one group)"
            )
        if self.kind == "two_level" and (self.rank is None or (self.multiply, self.softcap) != (1.0, None)):
            raise ValueError(
                f"HeadSpec: kind='two_level' needs the rank of its softmax within clusters, found {self.rank}, and has "
                f"no logits to scale: multiply={self.multiply} and softcap={self.softcap} must be 1.0 and None"
            )
        if self.clusters and (self.groups > 1 or not 0 <= min(self.clusters) <= max(self.clusters) < self.codes):
            raise ValueError(
                f"HeadSpec.clusters must number one of codes={self.codes} columns for every token, from 0, in one "
                f"group; found numbers from {min(self.clusters)} to {max(self.clusters)} and groups={self.groups}"
            )
        for offset in self.offsets:
            check_choice("HeadSpec", "offsets", offset, OFFSETS)
        check_above_zero(self, "multiply", "softcap")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An encoder-decoder, a decoder alone (encoder None) or an encoder alone (decoder None).

    encoder_width: the encoder's width where it is not d_model. share_embedding: one input table for both stacks.
    start_token: whose row the decoder reads for id 0, its first input (fairseq begins with the end of sequence).
    languages: number of language ids, 0 for none included, where something is kept for every target language: norms
    (`NormSpec.languages`), the head's offsets, or the bridge, a matrix between encoder and decoder (LALT). scripts: the
    number of each language's script. `families.language_aware` sets them together.
    chimera: heads that guess ahead from the decoder's states, of which nothing else of the model knows.
    dtype: the type of activations and matrix products ("bfloat16" on accelerators); parameters are float32 masters,
    and norms, softmax and loss are computed in float32 in any case.
    """

    vocab_size: int
    d_model: int
    encoder: StackConfig | None
    decoder: StackConfig | None
    encoder_width: int | None = None
    share_embedding: bool = True
    head: HeadSpec = HeadSpec()
    start_token: int = 0
    languages: int | None = None
    scripts: tuple[int, ...] = ()
    bridge: bool = False
    chimera: ChimeraSpec | None = None
    dtype: str = "float32"

    def __post_init__(self):
        check_positive(self, "vocab_size", "d_model", "encoder_width", "languages")
        check_choice("ModelConfig", "dtype", self.dtype, DTYPES)
        if not 0 <= self.start_token < self.vocab_size:
            raise ValueError(f"ModelConfig.start_token={self.start_token} is no id of the {self.vocab_size}")
        encoder, decoder = self.encoder, self.decoder
        if encoder is None and decoder is None:
            raise ValueError("a model needs an encoder, a decoder, or both; found neither")
        if (encoder and encoder.causal) or (decoder and not decoder.causal):
            raise ValueError(
                f"encoder.causal={encoder and encoder.causal}, decoder.causal={decoder and decoder.causal}: an encoder "
                "reads in both directions and a decoder writes left to right; set False and True"
            )
        if encoder and encoder.reads_memory():
            raise ValueError(
                "encoder layers cannot hold cross-attention, or recurrence with attends=True: there is no other stack "
                "for them to read"
            )
        if decoder and encoder and not decoder.reads_memory():
            raise ValueError(
                "no decoder layer holds cross-attention or recurrence with attends=True, so the decoder would never "
                "see the source"
            )
        if decoder and not encoder and decoder.reads_memory():
            raise ValueError(
                "a decoder layer holds cross-attention or recurrence with attends=True, but there is no encoder to read"
            )
        if self.encoder_width not in (None, self.d_model):
            if self.share_embedding or not encoder or not decoder:
                raise ValueError(
                    f"encoder_width={self.encoder_width} is not d_model={self.d_model}: one input table cannot serve "
                    "both stacks; set share_embedding=False"
                )
            if any(spec.source == "joint" for spec in decoder.attentions()):
                raise ValueError(
                    f"joint attention reads encoder and decoder with the same matrices: encoder_width="
                    f"{self.encoder_width} must be d_model={self.d_model}"
                )
        if self.share_embedding and len({stack.embedding.rank for stack in self.stacks().values()}) > 1:
            raise ValueError(
                f"one table serves both stacks, so their ranks must agree: encoder.embedding.rank="
                f"{encoder and encoder.embedding.rank}, decoder.embedding.rank={decoder and decoder.embedding.rank}"
            )
        if self.chimera and not decoder:
            raise ValueError(f"{self.chimera}: these heads read a decoder's states, and this model has no decoder")
        self._check_tied()
        self._check_codes()
        self._check_languages()

    def _check_tied(self) -> None:
        own = list(self.stacks().values())[-1].embedding
        if self.head.kind == "tied" and not own.fix_norm and 1.0 not in (self.head.multiply, own.multiply):
            raise ValueError(
                f"a tied table is scaled where it is read or where it is written, not twice: embedding.multiply="
                f"{own.multiply:g} (D^1/2 in Gemma and fairseq) and head.multiply={self.head.multiply:g} (D^-1/2 in "
                "T5); leave one of them at 1"
            )

    def _check_codes(self) -> None:
        head = self.head
        if head.clusters and len(head.clusters) != self.vocab_size:
            raise ValueError(f"HeadSpec.clusters has {len(head.clusters)} numbers for vocab_size={self.vocab_size}")
        if head.groups > 1 and head.codes**head.groups < self.vocab_size:
            raise ValueError(
                f"HeadSpec: codes={head.codes} in groups={head.groups} tell {head.codes**head.groups} tokens apart, "
                f"and vocab_size={self.vocab_size}: raise one of them"
            )

    def _check_languages(self) -> None:
        norms = {stack.norm.languages for stack in self.stacks().values()}
        aware = [f"norm.languages={n}" for n in norms if n is not None]
        aware += [f"head.offsets={self.head.offsets}"] * bool(self.head.offsets) + ["bridge=True"] * self.bridge
        if (self.languages is not None) != bool(aware) or not norms <= {None, self.languages}:
            raise ValueError(
                f"languages={self.languages} is the number of language ids of all that is kept by target language; "
                f"found {', '.join(aware) or 'nothing that is'}: set both, to the same number"
            )
        if self.bridge and not (self.encoder and self.decoder):
            raise ValueError("bridge=True stands between an encoder and a decoder, and this model is one of them alone")
        if len(self.scripts) != (self.languages if "script" in self.head.offsets else 0) or min((0, *self.scripts)) < 0:
            raise ValueError(
                f"scripts={self.scripts} must number the script of every language, from 0, for an offset by 'script', "
                f"and be () without one; there are languages={self.languages} and head.offsets={self.head.offsets}"
            )

    @property
    def memory_width(self) -> int:
        return self.encoder_width or self.d_model

    def stacks(self) -> dict[str, StackConfig]:
        """The stacks that there are, "encoder" before "decoder"."""
        return {name: stack for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)) if stack}


def positioned(config: ModelConfig, position: PositionSpec) -> ModelConfig:
    """The model with this in place of what its self-attention knows of distances; what is added to tokens stays."""

    def sublayer(spec: SublayerSpec) -> SublayerSpec:
        if isinstance(spec, AttentionSpec) and spec.reads_itself:
            return dataclasses.replace(spec, position=position)
        return spec

    stacks: dict[str, Any] = {name: own.mapped(sublayer) for name, own in config.stacks().items()}
    return dataclasses.replace(config, **stacks)


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain data; `from_json` is its inverse."""
    return dataclasses.asdict(config)


def from_json(data: dict[str, Any]) -> ModelConfig:
    """Rebuild a ModelConfig from `to_json` data. Raises ValueError for unknown or missing keys."""
    return _build(ModelConfig, data)


def _build(kind: Any, data: Any) -> Any:
    """`data` as the type that an annotation names: dataclasses from dicts, tuples from lists."""
    if isinstance(kind, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if data is None or not isinstance(data, dict):
            return data
        # Of two kinds of sublayer, the one that has all the fields.
        kind = next((k for k in kinds if dataclasses.is_dataclass(k) and data.keys() <= _fields(k)), kinds[0])
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in data)
    if not dataclasses.is_dataclass(kind):
        return data
    hints, name = typing.get_type_hints(kind), typing.cast(type, kind).__name__
    for key in data:
        if key not in hints:
            raise ValueError(f"{name} has no field {key!r}; {nearest(key, hints)}")
    make: Any = kind
    try:
        return make(**{key: _build(hints[key], value) for key, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
