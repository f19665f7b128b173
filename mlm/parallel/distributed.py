"""Starting a run of several processes: nothing to configure where the environment already says it.

| environment | recognised by |
|---|---|
| explicit | MLM_COORDINATOR=host:port, MLM_PROCESS_COUNT, MLM_PROCESS_ID (all three) |
| SLURM step (`srun`) | SLURM_JOB_ID and SLURM_NTASKS > 1; one task per node sees all GPUs of its node |
| TPU VM, GKE TPU pod | a TPU device in /dev and libtpu installed |

Everything else is one process. All processes must see the same file system under the run directory.
"""

import glob
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils

EXPLICIT = ("MLM_COORDINATOR", "MLM_PROCESS_COUNT", "MLM_PROCESS_ID")


@dataclass(frozen=True)
class Start:
    """How to start: `how` names the environment, `arguments` go to jax.distributed.initialize (None: one process)."""

    how: str
    arguments: dict | None


def initialize_distributed(timeout: int = 300) -> Start:
    """Connects this process to the others, if there are others. Call it before the first JAX computation; a second
    call does nothing. `timeout`: seconds to wait for the other processes.

    Raises ValueError when the environment contradicts itself.
    """
    start = detect(os.environ, tpu=_has_tpu())
    if start.arguments is None or jax.distributed.is_initialized():
        return start
    if jax.config.jax_cpu_collectives_implementation is None:  # CPU processes could not talk to each other
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**start.arguments, initialization_timeout=timeout)
    return start


def preempted(step: int) -> bool:
    """True, in every process at the same step, after any process received SIGTERM. `step`: the step just done.

    The processes agree through the coordinator, without touching the devices. Always False in a single process,
    which can look at its own signal handler.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


def detect(environment: Mapping[str, str], tpu: bool = False) -> Start:
    """What the environment asks for. Pure, so that it can be tested.

    Raises ValueError when only some of the explicit variables are set or they are no numbers in range.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        if missing:
            raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three, or none")
        return _explicit(*(environment[name] for name in EXPLICIT))
    # SLURM_STEP_NODELIST exists only inside srun: a plain python in a batch script is one process
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_NODELIST" in environment:
        if int(environment.get("SLURM_NTASKS", "1")) == 1:
            return Start("one SLURM task", None)
        arguments: dict[str, Any] = {"cluster_detection_method": "slurm"}
        gpus, nodes = environment.get("SLURM_GPUS_ON_NODE", ""), environment.get("SLURM_STEP_NUM_NODES")
        if gpus.isdigit() and nodes == environment["SLURM_NTASKS"]:  # JAX alone would take one GPU per task
            arguments["local_device_ids"] = list(range(int(gpus)))
        return Start("SLURM", arguments)
    if tpu:
        return Start("TPU", {})
    return Start("one process", None)


def _explicit(coordinator: str, count: str, index: str) -> Start:
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise ValueError(f"MLM_PROCESS_COUNT={count}, MLM_PROCESS_ID={index}: need 0 <= id < count")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"MLM_COORDINATOR={coordinator!r}: need host:port of process 0, e.g. node001:8476")
    if int(count) == 1:
        return Start("one process", None)
    arguments = {"coordinator_address": coordinator, "num_processes": int(count), "process_id": int(index)}
    return Start("MLM_COORDINATOR", {**arguments, "cluster_detection_method": "deactivate"})


def _has_tpu() -> bool:
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None
