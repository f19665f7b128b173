"""The one place that knows both the step and the mesh: shardings, donation and `jax.jit` are applied here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from mlm.models.config import ModelConfig
from mlm.models.order import check_any_order
from mlm.models.specs import RecurrentSpec
from mlm.models.transformer import Transformer
from mlm.objectives import OBJECTIVES, Loss
from mlm.objectives.any_order import AnyOrder
from mlm.objectives.candidates import narrowed
from mlm.objectives.chimera import chimera
from mlm.objectives.mask_block import masked
from mlm.parallel import MeshPlacement, check_sizes, shardings
from mlm.registry import nearest
from mlm.training.optimizers import freezing, state_axes
from mlm.training.routing import rebalanced, with_positions, with_routing
from mlm.training.state import TrainState, init_state
from mlm.training.step import Prepare, evaluation_step, train_step
from mlm.training.units import unit_masking
from mlm.types import Batch, Hidden, Params, PyTree

NONFINITE = ("stop", "skip")
MASKING = ("mask_block", "lexical_units")  # objectives that hide a block of targets


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the parameters move.

    steps: updates in the whole run. z_loss: weight of (log Z)^2 in nats. loss_chunk: target positions per piece of the
    head (None: chosen from the sizes). candidates: tokens that a training step normalises over, the targets of the
    microbatch and the `neighbours` nearest to each (None: all; `objectives.candidates`), so that its loss is a lower
    bound of that of an evaluation, which takes all. block, mask_token: of objectives "mask_block" and "lexical_units",
    how many targets are predicted at once, and the token that stands for them. unit_threshold: of "lexical_units", the
    least probability of each target of a unit. Objective "chimera" trains the heads of that name, and all other
    parameters stay bit for bit what they are. any_order: the decoder learns to write in any order, of targets that are
    masked anew in every step; an evaluation masks as the last steps do, the same every time.
    ema_decay: 0 keeps no mean. on_nonfinite: "stop" the run, or "skip" the update and count it. precision of
    activations is the model's `dtype`.
    """

    steps: int
    objective: str = "text_to_text"
    microbatches: int = 1
    seed: int = 0
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    loss_chunk: int | None = None
    candidates: int | None = None
    neighbours: int = 50
    block: int | None = None
    mask_token: int | None = None
    unit_threshold: float = 0.9
    any_order: AnyOrder | None = None
    ema_decay: float = 0.0
    on_nonfinite: str = "stop"

    def __post_init__(self):
        for name in ("steps", "microbatches", "candidates", "neighbours", "block", "mask_token"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name}={getattr(self, name)} must be at least 1")
        masking = self.objective in MASKING
        if masking and self.any_order is not None:
            raise ValueError(
                f"objective={self.objective!r} and any_order both say which targets are masked: keep one of them"
            )
        if self.trains_heads and self.any_order is not None:
            raise ValueError("objective='chimera' trains heads that guess from left to right: leave any_order out")
        if (self.block is not None, self.mask_token is not None) != (masking, masking):
            raise ValueError(
                f"TrainConfig.block={self.block}, mask_token={self.mask_token}: each of the objectives {MASKING} needs "
                f"both, and any other, as objective={self.objective!r}, must leave both out"
            )
        units = self.objective == "lexical_units"
        if units and self.block == 1:
            raise ValueError("TrainConfig.block=1 hides no target; objective='lexical_units' needs 2 or more")
        if not 0.0 < self.unit_threshold < 1.0:
            raise ValueError(f"TrainConfig.unit_threshold={self.unit_threshold} must be in (0, 1), as 0.9")
        if self.unit_threshold != TrainConfig.unit_threshold and not units:
            raise ValueError(
                f"TrainConfig.unit_threshold={self.unit_threshold} means nothing to objective={self.objective!r}; only "
                "'lexical_units' reads it"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"TrainConfig.ema_decay={self.ema_decay} must be in [0, 1); T5 runs use 0, EMA runs 0.999")
        if self.on_nonfinite not in NONFINITE:
            raise ValueError(f"TrainConfig.on_nonfinite={self.on_nonfinite!r}: {nearest(self.on_nonfinite, NONFINITE)}")

    @property
    def trains_heads(self) -> bool:
        """Whether the Chimera heads alone learn."""
        return self.objective == "chimera"

    @property
    def masks(self) -> dict[str, Any] | None:
        """What must be known to decode with a run that learned to fill masks, for its `data.json`; None: it did not."""
        if self.any_order is not None:
            return {"objective": "any_order", "mask_token": self.any_order.mask_token}
        if self.mask_token is None:
            return None
        return {"objective": self.objective, "mask_token": self.mask_token, "block": self.block}


OptimizerFactory = Callable[[PyTree, PyTree], optax.GradientTransformation]  # (parameter axes, shapes) -> optimizer


class Trainer:
    """Compiled steps of one model on one mesh. languages: size of the per-language metrics.

    Raises ValueError, before anything is compiled, when heads, widths, vocabulary or batch do not divide the mesh, or
    when the data has languages that a language-aware model does not.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig, optimizer: OptimizerFactory, mesh: Mesh, languages: int):
        if model.languages is not None and model.languages < languages:
            raise ValueError(
                f"the model keeps parts for languages={model.languages} language ids, but the data has {languages}: "
                f"set languages={languages}"
            )
        self.config, self.mesh = train, mesh
        self.model = Transformer(model, MeshPlacement(mesh))
        several = mesh if mesh.size > 1 else None
        loss_fn, prepare = make_loss(self.model, train, languages, several), _masking(self.model, train, several)
        self.optimizer = optimizer(self.model.axes(), self.model.shapes())
        adjust: dict[str, Any] = {"adjust": partial(rebalanced, self.model)}
        if train.trains_heads:
            self.optimizer, adjust = freezing(self.optimizer, self.model.shapes(), [r"(?!chimera/).*"]), {}
        self._key = jax.random.key(train.seed)

        self.abstract = abstract_state(self.model, self.optimizer, mesh, ema=train.ema_decay > 0)
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        scalar = NamedSharding(mesh, P())
        step = partial(
            train_step,
            loss_fn=loss_fn,
            optimizer=self.optimizer,
            key=self._key,
            microbatches=train.microbatches,
            ema_decay=train.ema_decay,
            **adjust,
            prepare=prepare,
        )
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, scalar))
        evaluate = partial(evaluation_step, loss_fn=loss_fn, prepare=prepare)
        self.evaluate_batch = jax.jit(evaluate, out_shardings=scalar)

    def init(self, params: Params | None = None) -> TrainState:
        """The state before the first step, each device holding only its part. params: in place of fresh ones, all of
        them or all but the Chimera heads'; the state takes their memory over.
        """
        begin = partial(init_state, optimizer=self.optimizer, ema=self.config.ema_decay > 0)
        if params is None:
            return jax.jit(lambda key: begin(self.model.init(key)), out_shardings=self.shardings)(self._key)

        def take(params: Params, key: Key[Array, ""]) -> TrainState:
            fresh = {name: part for name, part in self.model.init(key).items() if name == "chimera"}
            return begin({**fresh, **params})

        return jax.jit(take, out_shardings=self.shardings, donate_argnums=0)(params, self._key)

    def check_batch(self, rows: int) -> None:
        """Raises ValueError when a global batch of `rows` rows does not divide over devices and microbatches."""
        parts = self.config.microbatches
        if rows % parts:
            raise ValueError(f"batch_size={rows} does not divide into microbatches={parts}; use a multiple of {parts}")
        check_sizes(self.mesh, batch=rows // parts)


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh, ema: bool
) -> TrainState:
    """Shape, type and place of every array of the state, before any of them exists."""
    shapes, axes = model.shapes(), model.axes()
    state = jax.eval_shape(lambda params: init_state(params, optimizer, ema=ema), shapes)
    scalar = NamedSharding(mesh, P())
    parameters = shardings(shapes, axes, mesh)
    moments = shardings(state.optimizer, state_axes(optimizer, shapes, axes), mesh)
    places = TrainState(scalar, scalar, parameters, moments, parameters if ema else None)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, places)


def _masking(model: Transformer, train: TrainConfig, mesh: Mesh | None = None) -> Prepare | None:
    """What makes the batch of a step that learns to fill masks; others read their batches as they are.

    Raises ValueError for a mask token that the model has no row for, and for a model that cannot fill such masks.
    """
    any_order, decoder = train.any_order, model.config.decoder
    token = train.mask_token if any_order is None else any_order.mask_token
    if token is None or decoder is None:
        return None
    if token >= model.config.vocab_size:
        raise ValueError(
            f"mask_token={token} is outside the model's vocabulary of {model.config.vocab_size} ids; name one that no "
            "target holds, such as a sentinel"
        )
    if any_order is not None:
        check_any_order(decoder)
        return lambda params, batch, key, step: any_order.masked(batch, key, step)
    block = train.block
    assert block is not None
    if train.objective == "lexical_units":
        return unit_masking(
            model,
            threshold=train.unit_threshold,
            block=block,
            mask_token=token,
            chunk=train.loss_chunk,
            mesh=mesh,
        )
    if any(isinstance(spec, RecurrentSpec) for spec in decoder.sublayers()):
        raise ValueError("objective='mask_block': a recurrent decoder cannot see its masks both ways; use attention")
    return lambda params, batch, key, step: masked(batch, key, block, token)


def make_loss(model: Transformer, config: TrainConfig, languages: int, mesh: Mesh | None = None) -> Callable[..., Loss]:
    """loss(params, batch, dropout key or None): the model's decoder states through head and objective.

    mesh: lets the head work on each device's part of the vocabulary; None on one device. Raises ValueError for a model
    without a decoder, and where heads are trained that are not there, or are there and another objective moves what
    they read.
    """
    objective = OBJECTIVES[config.objective]
    if model.config.decoder is None:
        raise ValueError(f"objective {config.objective!r} predicts decoder targets, and this model has no decoder")
    if config.trains_heads and model.config.chimera is None:
        raise ValueError(
            "objective='chimera' trains heads that this model has not: set preset.chimera=@chimera(), as "
            "gin/objectives/chimera.gin does"
        )
    if not config.trains_heads and model.config.chimera is not None:
        raise ValueError(
            f"objective={config.objective!r} moves the states that the model's chimera heads read, and does not train "
            "them: leave preset.chimera out, and train heads on the run when it is complete (objective='chimera')"
        )
    if config.candidates is not None and model.config.head.kind == "two_level":
        raise ValueError(f"candidates={config.candidates}: a head of two levels normalises over few tokens by itself")

    def said(params: Params, hidden: Hidden, batch: Batch, key: jax.Array | None) -> Loss:
        """What the objective makes of such states."""
        hidden, kernel, bias, targets, within = model.prediction(params, hidden, batch["decoder_target_tokens"])
        if config.candidates is not None and key is not None:
            kernel, bias, targets = narrowed(kernel, bias, targets, config.candidates, config.neighbours)
        return objective(
            hidden,
            kernel,
            {**batch, "decoder_target_tokens": targets},
            bias=bias,
            within=within,
            num_languages=languages,
            z_loss=config.z_loss,
            label_smoothing=config.label_smoothing,
            softcap=model.config.head.softcap,
            chunk=config.loss_chunk,
            mesh=mesh,
        )

    def loss_of(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        output = model(params, batch, key, languages=languages)
        loss = said(params, output.hidden, batch, key)
        loss = with_routing(loss, output.routed, batch) if output.routed else loss
        return with_positions(loss, output.positions, batch) if output.positions else loss

    def loss_of_heads(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        """The rest of the model is what it is when it decodes: without dropout, and no gradient reaches it."""
        params = {**jax.lax.stop_gradient(params), "chimera": params["chimera"]}
        hidden = model(params, batch).hidden
        rows = model.decoder_rows(params, batch["decoder_input_tokens"])
        drafted = model.chimera(params).whole(rows, hidden, batch["decoder_segment_ids"])
        weights = jnp.where(drafted.known, batch["decoder_loss_weights"], 0.0)
        heads = [
            said(params, mixed, {**batch, "decoder_loss_weights": own}, key)
            for mixed, own in zip(drafted.mixed, weights, strict=True)
        ]
        error = jnp.mean(jnp.square(drafted.states.astype(jnp.float32) - hidden.astype(jnp.float32)), axis=-1)
        return chimera(heads, error, weights)

    return loss_of_heads if config.trains_heads else loss_of
