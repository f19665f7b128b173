"""The device mesh: which axes exist, how large they are, which devices they hold.

    replica   copies of the model in different slices (multi-slice pods only; slow network between them)
    data      copies of the model that see different rows
    fsdp      as data, and parameters and optimizer state are split as well (gathered layer by layer)
    expert    as data for everything dense; experts of a mixture-of-experts layer are split
    tensor    heads, feed-forward and vocabulary of one layer are split (fast network wanted)

Rows of a batch are split over replica × data × fsdp × expert.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "expert", "tensor")
ROW_AXES = ("replica", "data", "fsdp", "expert")  # a batch's rows are split over these


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices. -1, at most once: whatever the other axes leave.

    Raises ValueError for sizes that are neither positive nor -1, and for more than one -1.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    replica: int = 1

    def __post_init__(self):
        for name, size in self.asked().items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise ValueError(f"mesh axis {name}={size!r}: sizes are positive integers, or -1 for the rest")
        rest = [name for name, size in self.asked().items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh axes {' and '.join(rest)} are all -1; only one axis can take the rest")

    def asked(self) -> dict[str, int]:
        """The sizes as configured, outermost axis first."""
        return {"replica": self.replica, **{name: getattr(self, name) for name in AXES}}

    def sizes(self, devices: int, slices: int = 1) -> dict[str, int]:
        """Axis sizes for that many devices, with -1 filled in. slices: parts of a pod joined by a slow network.

        Raises ValueError with the nearest sizes that fit when their product is not the number of devices, or when
        replica is no multiple of the slices.
        """
        sizes = self._filled(devices)
        if sizes["replica"] % slices:
            raise ValueError(f"the devices span {slices} slices, but replica={sizes['replica']}: use replica={slices}")
        return sizes

    def _filled(self, devices: int) -> dict[str, int]:
        asked = self.asked()
        rest = [name for name, size in asked.items() if size == -1]
        fixed = math.prod(size for size in asked.values() if size != -1)
        shown = " × ".join(f"{name}={size}" for name, size in asked.items() if size > 1) or "every axis 1"
        if rest and devices % fixed == 0:
            return {**asked, rest[0]: devices // fixed}
        if not rest and fixed == devices:
            return asked
        if rest:
            rule = f"their product {fixed} must divide the number of devices"
        else:
            rule = f"their product {fixed} must be the number of devices"
        raise ValueError(f"mesh {shown} does not fit {devices} devices: {rule}; {_nearest_fit(asked, devices)}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices of all processes (or the given ones).

    Axes are data, fsdp, expert, tensor, with a leading replica axis when replica > 1; axis types are Auto.
    The devices of one process stay neighbours, so that each process feeds one block of rows.
    Raises ValueError when the sizes do not fit the devices, or when several slices meet replica=1.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = config.sizes(len(devices), slices)
    inner = tuple(sizes[name] for name in AXES)
    if slices > 1:
        per_slice = (sizes["replica"] // slices, *inner)
        array = mesh_utils.create_hybrid_device_mesh(per_slice, (slices, 1, 1, 1, 1), devices)
    else:
        array = _arrange((sizes["replica"], *inner), devices)
    if sizes["replica"] == 1:
        return Mesh(array.reshape(inner), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(array, ("replica", *AXES), axis_types=(AxisType.Auto,) * (len(AXES) + 1))


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of `config` over that many devices, none of which is there. Raises ValueError as `make_mesh` does."""
    sizes = {name: size for name, size in config.sizes(devices).items() if name in AXES or size > 1}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def stand_ins(count: int) -> list[jax.Device]:
    """Devices to compile for: this machine's where it has `count` of them, else that many parts of its CPU.

    Raises ValueError when jax has started before with fewer.
    """
    with contextlib.suppress(RuntimeError):  # it has started: what it has must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    devices = jax.devices("cpu") if len(devices) < count else devices
    if len(devices) < count:
        raise ValueError(f"jax has started with {len(devices)} devices, and {count} are asked for: use a new process")
    return devices[:count]


def describe(mesh: Mesh) -> dict:
    """What the mesh is, as JSON values; `summary` says it in one line for a screen."""
    first = mesh.devices.flat[0]
    processes = sorted({device.process_index for device in mesh.devices.flat})
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    axes = " ".join(f"{name}={size}" for name, size in sizes.items())
    kind = first.device_kind if first.platform != "cpu" else "cpu"
    count, hosts = mesh.devices.size, len(processes)
    return {
        "summary": f"{count} {kind} device{'s' * (count > 1)} in {hosts} process{'es' * (hosts > 1)}: {axes}",
        "axes": sizes,
        "platform": first.platform,
        "device_kind": first.device_kind,
        "devices": count,
        "processes": hosts,
        "device_ids": np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices).tolist(),
    }


def divisors(number: int) -> list[int]:
    """All divisors in rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def closest(value: int, candidates: Sequence[int], count: int = 3) -> list[int]:
    """The candidates nearest to a value, in rising order."""
    return sorted(sorted(candidates, key=lambda n: (abs(n - value), n))[:count])


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices in mesh shape, along the network's topology and with each process's devices adjacent if possible."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, contiguous_submeshes=True)
    except (ValueError, NotImplementedError, AssertionError):  # this topology has no such arrangement
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _nearest_fit(asked: dict[str, int], devices: int) -> str:
    """What to change: for each axis that is set, the sizes that fit with the others as they are."""
    if -1 not in asked.values():
        others = math.prod(size for name, size in asked.items() if name != "data")
        if devices % others == 0:
            return f"use data={devices // others}, or data=-1 for the rest"
    fixes = []
    for name, size in asked.items():
        others = math.prod(s for n, s in asked.items() if n != name and s != -1)
        if size > 1 and devices % others == 0:
            fixes.append(f"{name}=" + " or ".join(map(str, closest(size, divisors(devices // others)))))
    return "nearest that do: " + ("; ".join(fixes) if fixes else f"products among {divisors(devices)}")
