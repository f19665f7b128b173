"""The paths that attention can take, by name: the same numbers with other memory and on other hardware."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlm.models.attention import attend
from mlm.models.blockwise import attend_blockwise
from mlm.models.config import StackConfig
from mlm.models.kernels import (
    attend_cudnn,
    attend_splash,
    cudnn_misfits,
    cudnn_misfits_here,
    splash_misfits,
    splash_misfits_here,
)
from mlm.models.view import Attend


@dataclass(frozen=True)
class Path:
    """draws: whether it reads masks and biases as arrays, or the sights that they are drawn from.

    misfits(stack, dtype): what of a model it cannot do. misfits_here(lengths, prefix): what of a pass or of the
    devices. Both as phrases, none where it fits.
    """

    attend: Attend
    draws: bool
    misfits: Callable[[StackConfig, str], list[str]] = lambda stack, dtype: []
    misfits_here: Callable[[Sequence[int], bool], list[str]] = lambda lengths, prefix: []


PATHS: dict[str, Path] = {
    "plain": Path(attend, draws=True),
    "blockwise": Path(attend_blockwise, draws=False),
    "cudnn": Path(attend_cudnn, True, cudnn_misfits, cudnn_misfits_here),
    "splash": Path(attend_splash, False, splash_misfits, splash_misfits_here),
}


def path_of(stack: StackConfig, dtype: str, lengths: Sequence[int] = (), prefix: bool | None = None) -> Path:
    """The path that the stack names. prefix None: before any pass, when only the model can be judged.

    Raises ValueError with all that does not fit, and the paths that would.
    """
    if found := _misfits(stack.attention, stack, dtype, lengths, prefix):
        fitting = ", ".join(map(repr, fitting_paths(stack, dtype, lengths, prefix)))
        raise ValueError(f"attention={stack.attention!r} does not fit: {'; '.join(found)}. What fits: {fitting}")
    return PATHS[stack.attention]


def fitting_paths(stack: StackConfig, dtype: str, lengths: Sequence[int] = (), prefix: bool | None = None) -> list[str]:
    """Names of the paths that can do all that the stack asks for; see `path_of`."""
    return [name for name in PATHS if not _misfits(name, stack, dtype, lengths, prefix)]


def _misfits(name: str, stack: StackConfig, dtype: str, lengths: Sequence[int], prefix: bool | None) -> list[str]:
    here = [] if prefix is None else PATHS[name].misfits_here(lengths, prefix)
    if name != "plain" and stack.seqpe():
        here = ["position='seqpe': its biases differ from pair to pair, and only plain attention holds them", *here]
    return PATHS[name].misfits(stack, dtype) + here
