"""The parts of a layer as frozen data that refuses nonsense when built; `config.py` puts them together."""

from dataclasses import dataclass
from typing import ClassVar

from mlm.registry import nearest

ACTIVATIONS = ("geglu", "geglu_erf", "swiglu", "relu", "gelu", "gelu_tanh")  # the first three are gated
POSITIONS = ("none", "t5_bucket", "alibi", "rope", "seqpe")
ABSOLUTE_POSITIONS = ("none", "learned", "sinusoidal")
SOURCES = ("self", "cross", "joint")
QK_NORMS = ("none", "rms", "l2_scalar")
NORMS = ("rms", "layer")
ORDERS = ("pre", "post", "sandwich")
ROUTERS = ("top_k", "expert_choice")
GATES = ("raw", "chosen", "kept")
PRIORITIES = ("token", "choice", "score")


def check_choice(owner: str, field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}.{field}={value!r} is not one of {known}; {nearest(value, known)}")


def check_positive(owner: object, *fields: str) -> None:
    """None is let through: a field that may be None says so by its type."""
    for field in fields:
        value = getattr(owner, field)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{type(owner).__name__}.{field}={value!r} must be an integer of at least 1")


def check_above_zero(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if value is not None and not value > 0:
            raise ValueError(f"{type(owner).__name__}.{field}={value!r} must be above 0")


@dataclass(frozen=True, kw_only=True)
class SeqPESpec:
    """A small transformer that reads positions as `digits` decimal digits (Li et al. 2025), one for a stack.

    width, heads, layers: its own. contrast weighs the loss by which, of `candidates`, the one nearest to each of
    `pivots` positions has the most similar vector; transfer weighs the loss by which `window` positions anywhere are as
    similar to each other as so many of the first `trained`, the length trained on in tokens. shift: with that
    probability the positions of a training step begin somewhere else than at 0. Losses are drawn anew in every step;
    weights are constant, where the paper warms them up.
    """

    digits: int = 5
    width: int = 768
    heads: int = 12
    layers: int = 2
    contrast: float = 0.1
    transfer: float = 0.1
    trained: int = 512
    pivots: int = 32
    candidates: int = 32
    window: int = 32
    shift: float = 0.1

    def __post_init__(self):
        check_positive(self, "digits", "width", "heads", "layers", "trained", "pivots", "candidates", "window")
        if self.width % self.heads:
            raise ValueError(f"SeqPESpec: heads={self.heads} must divide width={self.width}")
        for field in ("contrast", "transfer"):
            if getattr(self, field) < 0.0:
                raise ValueError(f"SeqPESpec.{field}={getattr(self, field)} must not be negative")
        if not 0.0 <= self.shift < 1.0:
            raise ValueError(f"SeqPESpec.shift={self.shift} must be in [0, 1)")
        if self.digits > 9 or max(self.trained, self.window) > self.limit:
            raise ValueError(
                f"SeqPESpec: digits={self.digits} (at most 9) spell {10**self.digits} positions, which must hold "
                f"trained={self.trained} and window={self.window}"
            )

    @property
    def limit(self) -> int:
        """Positions that can be spelled."""
        return 10**self.digits


@dataclass(frozen=True, kw_only=True)
class PositionSpec:
    """How self-attention knows distances.

    t5_bucket: a learned bias per head and distance bucket; half of the buckets are exact distances, the rest grow
    logarithmically up to `max_distance` tokens; share: one table for the "stack" (T5) or for each "layer" (umT5).
    alibi: -slope x distance, slopes fixed per head. rope: queries and keys turn with their position, slowest turn
    `base`; positions are divided by `factor`, which stretches a trained context. context: the length trained on, in
    tokens; then only pairs that turn less than once in it are stretched by `factor`, those that turn 4 times or more
    are not at all, and those between in proportion (Llama 3.1). seqpe: pairs of vectors that a small transformer, the
    field `seqpe`, reads out of the digits of both positions; its losses go with the training loss.
    """

    kind: str = "t5_bucket"
    share: str = "stack"
    buckets: int = 32
    max_distance: int = 128
    base: float = 10_000.0
    factor: float = 1.0
    context: int | None = None
    seqpe: SeqPESpec | None = None

    def __post_init__(self):
        check_choice("PositionSpec", "kind", self.kind, POSITIONS)
        check_choice("PositionSpec", "share", self.share, ("stack", "layer"))
        check_positive(self, "buckets", "max_distance", "context")
        check_above_zero(self, "base", "factor")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"PositionSpec: buckets={self.buckets} must be a multiple of 4 and max_distance={self.max_distance} "
                f"must exceed buckets/2={self.buckets // 2} (T5 uses 32 and 128)"
            )
        if self.context is not None and self.kind != "rope":
            raise ValueError(f"PositionSpec: context={self.context} belongs to kind='rope', not {self.kind!r}")

        if (self.kind == "seqpe") != (self.seqpe is not None):
            raise ValueError(
                f"PositionSpec: kind={self.kind!r} with seqpe={self.seqpe}: kind='seqpe', and no other, needs the "
                "SeqPESpec of its reader"
            )

    def table(self) -> str:
        """Who owns the table of biases: "stack", "layer" or "nobody"."""
        return self.share if self.kind == "t5_bucket" else "nobody"


NO_POSITION = PositionSpec(kind="none")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """rms: scale * x / sqrt(mean(x^2) + eps); offset_one: (1 + scale) with scale 0 at first (Gemma).

    layer: scale * (x - mean) / sqrt(var + eps) + bias. languages: a scale and a bias for each of that many target
    languages, in encoder and decoder (LALN; Zhang et al. 2020).
    """

    kind: str = "rms"
    offset_one: bool = False
    eps: float = 1e-6
    languages: int | None = None

    def __post_init__(self):
        check_choice("NormSpec", "kind", self.kind, NORMS)
        check_positive(self, "languages")
        check_above_zero(self, "eps")
        if self.offset_one and self.kind != "rms":
            raise ValueError(f"NormSpec: offset_one=True belongs to kind='rms', not {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """Where a sublayer's norms stand. pre: x + f(norm(x)); sandwich: x + norm'(f(norm(x))); post: norm(alpha x + f(x)).

    gain multiplies the initial weights of feed-forward, values and attention output. DeepNorm (Wang et al. 2022) is
    "post" with alpha > 1 and gain < 1: `deep_norm` gives its constants. depth_exponent: initial matrices of the
    l-th layer, from 1, are multiplied by l^-depth_exponent; 1/2 is DS-Init (Zhang et al. 2019), whose released code has
    1/4.
    """

    order: str = "pre"
    alpha: float = 1.0
    gain: float = 1.0
    depth_exponent: float = 0.0

    def __post_init__(self):
        check_choice("ResidualSpec", "order", self.order, ORDERS)
        check_above_zero(self, "alpha", "gain")
        if not 0.0 <= self.depth_exponent <= 1.0:
            raise ValueError(f"ResidualSpec.depth_exponent={self.depth_exponent} must be in [0, 1]; DS-Init has 0.5")
        if self.alpha != 1.0 and self.order != "post":
            raise ValueError(f"ResidualSpec: alpha={self.alpha} belongs to order='post', not {self.order!r}")


def deep_norm(encoder: int | None, decoder: int | None) -> tuple[ResidualSpec | None, ResidualSpec | None]:
    """DeepNorm's residuals for stacks of that many layers; None where there is no stack.

    One stack of N: alpha = (2N)^1/4, gain = (8N)^-1/4. Encoder of N with decoder of M: 0.81 (N^4 M)^1/16 and
    0.87 (N^4 M)^-1/16 for the encoder, (3M)^1/4 and (12M)^-1/4 for the decoder. Source: Wang et al. 2022, table 1.
    """
    if encoder and decoder:
        both = encoder**4 * decoder
        return (
            ResidualSpec(order="post", alpha=0.81 * both ** (1 / 16), gain=0.87 * both ** (-1 / 16)),
            ResidualSpec(order="post", alpha=(3 * decoder) ** 0.25, gain=(12 * decoder) ** -0.25),
        )
    layers = encoder or decoder
    if not layers:
        raise ValueError("deep_norm needs the number of layers of at least one stack")
    one = ResidualSpec(order="post", alpha=(2 * layers) ** 0.25, gain=(8 * layers) ** -0.25)
    return (one, None) if encoder else (None, one)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention sublayer.

    source: "self" (its own stack's states), "cross" (the encoder's output) or "joint" (both under one softmax, with the
    same key and value matrices; encoder keys are neither rotated nor windowed: T5Gemma 2). kv_heads: fewer key heads
    than query heads, each shared by heads / kv_heads of them (None: as many). scale multiplies q k^T (None: 1, folded
    into the initial query weights as in T5). qk_norm: "rms" over each head (Gemma 3), "l2_scalar" unit vectors times a
    learned number that starts at `qk_gain` (Henry et al. 2020). softcap: cap * tanh(logits / cap). window, in tokens:
    a query sees the last `window` positions, itself included; where nothing is causal, (window - 1) // 2 behind it
    and window // 2 ahead.
    """

    source: str
    heads: int
    head_dim: int
    kv_heads: int | None = None
    scale: float | None = None
    qk_norm: str = "none"
    qk_gain: float = 18.0
    softcap: float | None = None
    window: int | None = None
    position: PositionSpec = NO_POSITION
    bias: bool = False
    taps: ClassVar[tuple[str, ...]] = ("probabilities",)

    def __post_init__(self):
        check_choice("AttentionSpec", "source", self.source, SOURCES)
        check_choice("AttentionSpec", "qk_norm", self.qk_norm, QK_NORMS)
        check_positive(self, "heads", "head_dim", "kv_heads", "window")
        check_above_zero(self, "scale", "softcap", "qk_gain")
        if self.heads % self.key_heads:
            raise ValueError(
                f"AttentionSpec: kv_heads={self.kv_heads} must divide heads={self.heads}; "
                f"what does: {[n for n in range(1, self.heads + 1) if self.heads % n == 0]}"
            )
        if self.source == "cross" and (self.window or self.position.kind != "none"):
            raise ValueError(
                f"AttentionSpec: cross-attention has no order to speak of, so window={self.window} and "
                f"position.kind={self.position.kind!r} must be None and 'none'"
            )
        if self.position.kind == "rope" and self.head_dim % 2:
            raise ValueError(f"AttentionSpec: rope turns pairs of numbers, so head_dim={self.head_dim} must be even")
        if self.qk_norm == "l2_scalar" and self.scale is not None:
            raise ValueError(f"AttentionSpec: qk_norm='l2_scalar' learns its scale; scale={self.scale} must be None")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def name(self) -> str:
        return f"{self.source}_attention"

    @property
    def reads_itself(self) -> bool:
        return self.source != "cross"

    @property
    def reads_memory(self) -> bool:
        return self.source != "self"


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Which of `experts` feed-forward networks serve a token, p = softmax(x W) in float32.

    kind: "top_k", a token takes the k experts of largest p; "expert_choice", an expert takes its C tokens of largest p,
    which looks at the whole row and is for encoders. gates, what a chosen expert's output is multiplied by: "raw" p
    (Switch, ST-MoE), p over the sum of the "chosen" ones, or over the sum of those that were "kept" (GShard, NLLB).

    capacity None: nothing is dropped, whatever the skew. Otherwise an expert takes at most C = max(min_capacity,
    round(capacity n / experts)) of the n tokens of a routing group, which is `group_rows` rows; what finds it full is
    dropped and lives on in the residual. eval_capacity is the same for evaluation; decoding drops nothing in any case.
    priority, who comes first: "token", left to right (a decoder sees no future), "choice", all first choices before all
    second ones (GShard), or "score", larger p first (batch-prioritised; Riquelme et al. 2021).

    balance weighs E sum_e f_e P_e (f: share of tokens that chose e, counting `balance_choices` "first" or "any"; P:
    mean p), z weighs mean logsumexp^2; both per layer, in nats. bias_rate: a bias per expert, in the choice only, moves
    by that much a step towards equal load (Wang et al. 2024). jitter: x is multiplied by U(1 - jitter, 1 + jitter).

    shared: width of a feed-forward network that serves every token and is added. budget turns that into conditional
    routing (CMR): (1 - g) shared + g experts, g = sigmoid(x w + b), with budget_weight |mean g - budget| as a loss, and
    g = 0 with probability budget_dropout. output_masking (EOM): an expert's output is zeroed with that probability
    in training, multiplied by its complement otherwise. gating_dropout: with that probability a step routes each row
    inside one random block of `gating_block` experts. dropout: rate inside the experts (None: the stack's). init:
    factor on the experts' initial std (Switch: 0.1^1/2).

    Sources: Shazeer 2017, Fedus 2021 (Switch), Zoph 2022 (ST-MoE), Zhou 2022 (expert choice), NLLB team 2022.
    """

    experts: int
    kind: str = "top_k"
    k: int = 1
    gates: str = "raw"
    capacity: float | None = None
    eval_capacity: float | None = None
    min_capacity: int = 4
    group_rows: int = 1
    priority: str = "token"
    balance: float = 0.01
    balance_choices: str = "first"
    z: float = 0.0
    bias_rate: float = 0.0
    jitter: float = 0.0
    shared: int | None = None
    budget: float | None = None
    budget_weight: float = 0.1
    budget_dropout: float = 0.2
    output_masking: float = 0.0
    gating_dropout: float = 0.0
    gating_block: int | None = None
    dropout: float | None = None
    init: float = 1.0

    def __post_init__(self):
        check_choice("RouterSpec", "kind", self.kind, ROUTERS)
        check_choice("RouterSpec", "gates", self.gates, GATES)
        check_choice("RouterSpec", "priority", self.priority, PRIORITIES)
        check_choice("RouterSpec", "balance_choices", self.balance_choices, ("first", "any"))
        check_positive(self, "experts", "k", "min_capacity", "group_rows", "shared", "gating_block")
        check_above_zero(self, "capacity", "eval_capacity", "init")
        for field in ("budget", "budget_dropout", "output_masking", "gating_dropout", "jitter", "dropout"):
            value = getattr(self, field)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"RouterSpec.{field}={value} must be in [0, 1)")
        for field in ("balance", "z", "bias_rate", "budget_weight"):
            if getattr(self, field) < 0.0:
                raise ValueError(f"RouterSpec.{field}={getattr(self, field)} must not be negative")
        if self.k > self.experts:
            raise ValueError(f"RouterSpec: a token cannot take k={self.k} of experts={self.experts}")
        if self.budget is not None and self.shared is None:
            raise ValueError(f"RouterSpec: budget={self.budget} weighs experts against a shared network; set shared")
        if self.gating_dropout and (self.gating_block is None or self.experts % self.gating_block):
            raise ValueError(
                f"RouterSpec: gating_dropout={self.gating_dropout} routes within blocks of gating_block="
                f"{self.gating_block} experts, which must divide experts={self.experts}"
            )
        if self.kind == "expert_choice":
            self._check_expert_choice()
        elif self.k == 1 and self.gates != "raw":
            raise ValueError(
                f"RouterSpec: k=1 with gates={self.gates!r} multiplies by 1, so the router gets no gradient; "
                "set gates='raw'"
            )
        elif (self.capacity, self.eval_capacity) == (None, None) and (self.group_rows, self.priority) != (1, "token"):
            raise ValueError(
                f"RouterSpec: group_rows={self.group_rows} and priority={self.priority!r} say who is dropped, and "
                "nothing is: set capacity, or leave them at 1 and 'token'"
            )

    def _check_expert_choice(self) -> None:
        if self.capacity is None or (self.k, self.gates, self.bias_rate) != (1, "raw", 0.0):
            raise ValueError(
                f"RouterSpec: kind='expert_choice' takes capacity={self.capacity} (mean experts per token, as 2.0) in "
                f"place of k={self.k}, gates={self.gates!r}, bias_rate={self.bias_rate}; leave those at 1, 'raw', 0"
            )
        if self.balance:
            raise ValueError(f"RouterSpec: kind='expert_choice' is balanced by itself; set balance={self.balance} to 0")

    @property
    def active(self) -> float:
        """Experts that serve a token, on average, where none is dropped."""
        return float(self.k if self.kind == "top_k" else self.capacity or 1.0)

    def slots(self, tokens: int, training: bool) -> int | None:
        """C, the tokens an expert takes of a routing group of that many; None: as many as come."""
        factor = self.capacity if training else self.eval_capacity
        if factor is None and self.kind == "expert_choice":
            factor = self.capacity
        if factor is None:
            return None
        return min(tokens, max(self.min_capacity, round(factor * tokens / self.experts)))


@dataclass(frozen=True, kw_only=True)
class FFNSpec:
    """One position-wise feed-forward sublayer of width `d_ff`, or a mixture of experts of that width each.

    gelu and geglu_erf are exact, geglu and gelu_tanh use tanh for erf.
    """

    d_ff: int
    activation: str = "geglu"
    bias: bool = False
    router: RouterSpec | None = None
    reads_itself: ClassVar[bool] = False
    reads_memory: ClassVar[bool] = False

    def __post_init__(self):
        check_choice("FFNSpec", "activation", self.activation, ACTIVATIONS)
        check_positive(self, "d_ff")

    @property
    def name(self) -> str:
        return "moe" if self.router else "ffn"

    @property
    def taps(self) -> tuple[str, ...]:
        return ("probabilities",) if self.router else ("activations",)

    @property
    def gated(self) -> bool:
        return self.activation in ACTIVATIONS[:3]


@dataclass(frozen=True, kw_only=True)
class RecurrentSpec:
    """One sublayer of gated recurrent units with states of `width`: left to right in a decoder, in an encoder a second
    set of them right to left too.

    attends: each step looks at the encoder's states by additive attention first, with `alignment` hidden units (None:
    `width`). Sources: Cho et al. 2014; Bahdanau et al. 2015.
    """

    width: int
    attends: bool = False
    alignment: int | None = None
    name: ClassVar[str] = "recurrent"
    reads_itself: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(self, "width", "alignment")
        if self.alignment and not self.attends:
            raise ValueError(f"RecurrentSpec: alignment={self.alignment} is the width of attention; set attends=True")

    @property
    def reads_memory(self) -> bool:
        return self.attends

    @property
    def taps(self) -> tuple[str, ...]:
        return ("probabilities",) if self.attends else ()


# Each has a `name` for its parameters, `taps` that it hands out, and says whether it `reads_itself`, its own stack's
# other positions, and whether it `reads_memory`, the encoder's states.
SublayerSpec = AttentionSpec | FFNSpec | RecurrentSpec


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Sublayers in order, each with its own norm and residual, e.g. (self, cross, ffn)."""

    sublayers: tuple[SublayerSpec, ...]

    def __post_init__(self):
        sources = {spec.source for spec in self.sublayers if isinstance(spec, AttentionSpec)}
        if {"joint", "cross"} <= sources:
            raise ValueError(
                "LayerSpec: joint attention reads the encoder under one softmax with the stack's own states, so its "
                "layer holds no cross-attention as well; leave one of them out"
            )

    def names(self) -> tuple[str, ...]:
        """Parameter names of the sublayers: "self_attention", "cross_attention", "ffn", "moe", "recurrent"; a repeat
        gets "_2".
        """
        names: list[str] = []
        for spec in self.sublayers:
            seen = sum(n == spec.name or n.startswith(f"{spec.name}_") for n in names)
            names.append(spec.name if not seen else f"{spec.name}_{seen + 1}")
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """How tokens enter a stack: multiply, plus what stands at their absolute position, normed where `norm` is set.

    std: the table's at first (None: 1 / multiply). learned: a table of `length` positions (the index inside the
    example, plus `offset`). sinusoidal: fairseq's, sines then cosines, first position `offset`. token_type: one learned
    row is added to every token (what is left of BERT's sentence numbers in XLM-R). gradient: share of the gradient that
    reaches the table (GLM-130B uses 0.1). fix_norm: rows are first divided by their lengths, also those of a tied head;
    then `multiply` is the length of all of them (Nguyen & Chiang 2018; QKNorm's recipe has D^1/2). rank: the table is a
    product F P of [V, rank] and [rank, D], also in a tied head (ALBERT, OFA).
    """

    multiply: float = 1.0
    std: float | None = None
    positions: str = "none"
    length: int | None = None
    offset: int = 0
    token_type: bool = False
    norm: bool = False
    gradient: float = 1.0
    fix_norm: bool = False
    rank: int | None = None

    def __post_init__(self):
        check_choice("EmbeddingSpec", "positions", self.positions, ABSOLUTE_POSITIONS)
        check_positive(self, "length", "rank")
        if self.rank and self.fix_norm:
            raise ValueError(
                f"EmbeddingSpec: rank={self.rank} with fix_norm=True would need the whole table F P at every step, to "
                "know its rows' lengths; choose one of them"
            )
        check_above_zero(self, "multiply", "std", "gradient")
        if (self.positions == "learned") != (self.length is not None):
            raise ValueError(
                f"EmbeddingSpec: positions={self.positions!r} with length={self.length}: a learned table, and nothing "
                "else, needs its number of positions"
            )

    @property
    def initial_std(self) -> float:
        return self.std or 1.0 / self.multiply


@dataclass(frozen=True, kw_only=True)
class ChimeraSpec:
    """Heads that guess up to `heads` tokens ahead from the decoder's own states (`models.chimera`).

    The one layer before them has `attention_heads` heads of `head_dim`, which turn with their positions, and a gated
    network of width `d_ff`. Source: Zeng et al. 2024 (arXiv:2402.15758).
    """

    heads: int = 3
    attention_heads: int = 8
    head_dim: int = 64
    d_ff: int = 2048

    def __post_init__(self):
        check_positive(self, "heads", "attention_heads", "head_dim", "d_ff")
        if self.head_dim % 2:
            raise ValueError(f"ChimeraSpec: rope turns pairs of numbers, so head_dim={self.head_dim} must be even")

    @property
    def attention(self) -> AttentionSpec:
        return AttentionSpec(
            source="self",
            heads=self.attention_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            position=PositionSpec(kind="rope"),
        )

    @property
    def network(self) -> FFNSpec:
        return FFNSpec(d_ff=self.d_ff, activation="swiglu")
