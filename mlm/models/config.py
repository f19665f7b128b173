"""What a model is, as frozen data that refuses nonsense when built. Published members are values in `presets.py`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mlm.registry import nearest

ACTIVATIONS = ("geglu", "swiglu", "relu", "gelu")  # the first two are gated: two input matrices
REMAT_POLICIES = ("none", "minimal", "dots", "full")
HEADS = ("linear", "tied")
DTYPES = ("float32", "bfloat16")


def _choice(owner: str, field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}.{field}={value!r} is not one of {known}; {nearest(value, known)}")


def _positive(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(owner).__name__}.{field}={value!r} must be an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class PositionSpec:
    """T5 relative positions: a learned bias per head and distance bucket, one table shared by the stack's layers.

    Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance` tokens.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        _positive(self, "buckets", "max_distance")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"PositionSpec: buckets={self.buckets} must be a multiple of 4 and max_distance={self.max_distance} "
                f"must exceed buckets/2={self.buckets // 2} (T5 uses 32 and 128)"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention sublayer. source: "self" (its own stack's states) or "cross" (the encoder's output)."""

    source: str
    heads: int
    head_dim: int

    def __post_init__(self):
        _choice("AttentionSpec", "source", self.source, ("self", "cross"))
        _positive(self, "heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class FFNSpec:
    """One position-wise feed-forward sublayer of width `d_ff`."""

    d_ff: int
    activation: str = "geglu"

    def __post_init__(self):
        _choice("FFNSpec", "activation", self.activation, ACTIVATIONS)
        _positive(self, "d_ff")

    @property
    def gated(self) -> bool:
        return self.activation in ("geglu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Sublayers in order, each pre-normalised with its own residual, e.g. (self, cross, ffn)."""

    sublayers: tuple[AttentionSpec | FFNSpec, ...]

    def names(self) -> tuple[str, ...]:
        """Parameter names of the sublayers: "self_attention", "cross_attention", "ffn"; a repeat gets "_2", "_3"."""
        names: list[str] = []
        for spec in self.sublayers:
            base = "ffn" if isinstance(spec, FFNSpec) else f"{spec.source}_attention"
            seen = sum(n == base or n.startswith(f"{base}_") for n in names)
            names.append(base if not seen else f"{base}_{seen + 1}")
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of `repeats` equal groups of layers. A group is the smallest repeating pattern.

    Parameters of the groups are stacked on a leading axis. scan: run the groups by one `lax.scan` (compile time does
    not grow with depth) or unrolled; the numbers are the same. remat: what the backward pass keeps (none: everything;
    minimal: outputs of weight matmuls; dots: outputs of all matmuls; full: layer inputs only).
    """

    group: tuple[LayerSpec, ...]
    repeats: int
    causal: bool
    position: PositionSpec = PositionSpec()
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        _positive(self, "repeats")
        _choice("StackConfig", "remat", self.remat, REMAT_POLICIES)
        if not self.group or not all(layer.sublayers for layer in self.group):
            raise ValueError("StackConfig.group needs at least one layer, and every layer at least one sublayer")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"StackConfig.dropout={self.dropout} must be in [0, 1)")
        heads = {s.heads for s in self._attentions("self")}
        if len(heads) != 1:
            raise ValueError(
                f"StackConfig: one relative-position table serves all self-attention of a stack, so their head counts "
                f"must agree and exist; found {sorted(heads) or 'no self-attention'}"
            )

    @property
    def layers(self) -> int:
        return self.repeats * len(self.group)

    @property
    def heads(self) -> int:
        return self._attentions("self")[0].heads

    def attends(self, source: str) -> bool:
        return bool(self._attentions(source))

    def _attentions(self, source: str) -> list[AttentionSpec]:
        specs = [spec for layer in self.group for spec in layer.sublayers]
        return [spec for spec in specs if isinstance(spec, AttentionSpec) and spec.source == source]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An encoder-decoder transformer: one input table for both stacks, a linear or tied output head.

    dtype: the type of activations and matrix products ("bfloat16" on accelerators); parameters are float32 masters,
    and norms, softmax and loss are computed in float32 in any case.
    """

    vocab_size: int
    d_model: int
    encoder: StackConfig
    decoder: StackConfig
    head: str = "linear"
    dtype: str = "float32"

    def __post_init__(self):
        _positive(self, "vocab_size", "d_model")
        _choice("ModelConfig", "head", self.head, HEADS)
        _choice("ModelConfig", "dtype", self.dtype, DTYPES)
        if self.encoder.causal or not self.decoder.causal:
            raise ValueError(
                f"encoder.causal={self.encoder.causal}, decoder.causal={self.decoder.causal}: an encoder-decoder reads "
                "the source in both directions and writes the target left to right; set False and True"
            )
        if self.encoder.attends("cross"):
            raise ValueError("encoder layers cannot hold cross-attention: there is no other stack for them to read")
        if not self.decoder.attends("cross"):
            raise ValueError("no decoder layer holds cross-attention, so the decoder would never see the source")


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain data; `from_json` is its inverse."""
    return dataclasses.asdict(config)


def from_json(data: dict[str, Any]) -> ModelConfig:
    """Rebuild a ModelConfig from `to_json` data. Raises ValueError for unknown or missing keys."""

    def sublayer(d: dict) -> AttentionSpec | FFNSpec:
        return _build(AttentionSpec if "source" in d else FFNSpec, d)

    def stack(d: dict) -> StackConfig:
        group = tuple(LayerSpec(sublayers=tuple(sublayer(s) for s in layer["sublayers"])) for layer in d["group"])
        return _build(StackConfig, {**d, "group": group, "position": _build(PositionSpec, d["position"])})

    return _build(ModelConfig, {**data, "encoder": stack(data["encoder"]), "decoder": stack(data["decoder"])})


def _build(cls: type, data: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no field {key!r}; {nearest(key, known)}")
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None
