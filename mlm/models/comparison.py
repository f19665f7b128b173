"""Whether two configs compute the same, and where not."""

import dataclasses
from typing import Any

from mlm.models.config import ModelConfig
from mlm.models.specs import FFNSpec, RouterSpec, SublayerSpec


def mathematics(config: ModelConfig) -> ModelConfig:
    """The config without what changes only how it runs: types, dropout, remat, scan, attention path, gradient scale."""

    def plain(stack):
        embedding = dataclasses.replace(stack.embedding, gradient=1.0)
        residual = dataclasses.replace(stack.residual, gain=1.0, depth_exponent=0.0)
        return dataclasses.replace(
            stack.mapped(_plain_routes),
            dropout=0.0,
            remat="none",
            scan=True,
            attention="plain",
            embedding=embedding,
            residual=residual,
        )

    stacks = {name: plain(stack) for name, stack in config.stacks().items()}
    width = None if config.encoder_width == config.d_model else config.encoder_width
    return dataclasses.replace(config, dtype="float32", encoder_width=width, **stacks)


def _plain_routes(spec: SublayerSpec) -> SublayerSpec:
    """A mixture without what is done to train it, and as if every token found room: gates are then of the chosen."""
    if not isinstance(spec, FFNSpec) or spec.router is None or spec.router.kind != "top_k":
        return spec
    kept = ("experts", "k", "bias_rate", "shared", "budget", "output_masking")
    gates = "raw" if spec.router.gates == "raw" else "chosen"
    return dataclasses.replace(spec, router=RouterSpec(gates=gates, **{n: getattr(spec.router, n) for n in kept}))


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Fields in which two plain trees (`to_json` of configs) differ, as "decoder.norm.eps: 1e-06, not 1e-05"."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in differences(a.get(key), b.get(key), f"{path}.{key}".strip("."))]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a!r}, not {b!r}"]
