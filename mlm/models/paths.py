"""The paths that attention can take, by name: the same numbers with other memory and on other hardware."""

from dataclasses import dataclass

from mlm.models.attention import Attend, attend
from mlm.models.blockwise import attend_blockwise


@dataclass(frozen=True)
class Path:
    """draws: whether it reads masks and biases as arrays, or the sights that they are drawn from."""

    attend: Attend
    draws: bool


PATHS: dict[str, Path] = {
    "plain": Path(attend, draws=True),
    "blockwise": Path(attend_blockwise, draws=False),
}
