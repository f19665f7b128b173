"""From the rows of each process to one global batch on the mesh."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlm.parallel.mesh import ROW_AXES
from mlm.types import Batch


@dataclass(frozen=True)
class DataLayout:
    """Which block of the global batch this process feeds: block `index` of `count` equal ones, in row order."""

    index: int
    count: int


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over replica × data × fsdp × expert; everything else whole."""
    axes = tuple(name for name in ROW_AXES if mesh.shape.get(name, 1) > 1)
    return NamedSharding(mesh, P(axes) if axes else P())


def data_layout(mesh: Mesh, process: int | None = None) -> DataLayout:
    """The block of rows of a process (default: this one). Processes that only split tensors share a block, and then
    have to feed the same rows.
    """
    process = jax.process_index() if process is None else process
    row_parts = int(np.prod([mesh.shape.get(name, 1) for name in ROW_AXES]))
    rows: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((row_parts,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(row_parts)))
    return layout_of(rows, process)


def layout_of(rows: Mapping[int, set[int]], process: int) -> DataLayout:
    """The block of a process, from the rows that the devices of each process hold. Blocks are in row order."""
    blocks = sorted({tuple(sorted(owned)) for owned in rows.values()})
    held = [row for block in blocks for row in block]
    if len(held) != len(set(held)):
        raise ValueError(
            f"processes hold overlapping row blocks {blocks}: make the tensor axis a divisor or a multiple of the "
            f"devices of one process"
        )
    return DataLayout(blocks.index(tuple(sorted(rows[process]))), len(blocks))


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Global arrays, rows split over the mesh, from the rows of this process (features may have any rank >= 1).

    Raises ValueError when the rows do not divide over this process's devices.
    """
    sharding = batch_sharding(mesh)
    layout = data_layout(mesh)
    parts = int(np.prod([mesh.shape.get(name, 1) for name in ROW_AXES])) // layout.count
    batch = {}
    for name, local in rows.items():
        if len(local) % parts:
            near = max(parts, round(len(local) / parts) * parts)
            raise ValueError(
                f"{name} has {len(local)} rows in this process, which do not divide over its {parts} row blocks; "
                f"use a multiple of {parts} (nearest: {near}), that is batch_size={near * layout.count} in all, "
                f"or make data × fsdp × expert smaller"
            )
        shape = (len(local) * layout.count, *local.shape[1:])
        batch[name] = jax.make_array_from_process_local_data(sharding, np.asarray(local), shape)
    return batch


def prefetch(
    rows: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    position: Callable[[], Any] = lambda: None,
    size: int = 2,
) -> Iterator[tuple[Batch, Any]]:
    """Global batches, `size` of them on their way to the devices before they are asked for.

    Yields (batch, position after it): `position` is called right after each draw, so that a checkpoint taken while
    later batches are already queued still holds the place that belongs to the batch just trained on.
    """
    queue: collections.deque[tuple[Batch, Any]] = collections.deque()
    for local in rows:
        queue.append((global_batch(local, mesh), position()))
        if len(queue) > size:
            yield queue.popleft()
    yield from queue
