"""Mesh, partition rules, multi-process start-up: the only room that knows devices."""

from mlm.parallel.batches import DataLayout, batch_sharding, data_layout, global_batch, prefetch
from mlm.parallel.distributed import initialize_distributed, preempted
from mlm.parallel.mesh import MeshConfig, abstract_mesh, describe, make_mesh, stand_ins
from mlm.parallel.placement import MeshPlacement
from mlm.parallel.rules import RULES, check_sizes, constrain, parameter_table, shardings, spec

__all__ = [
    "RULES",
    "DataLayout",
    "MeshConfig",
    "MeshPlacement",
    "abstract_mesh",
    "batch_sharding",
    "check_sizes",
    "constrain",
    "data_layout",
    "describe",
    "global_batch",
    "initialize_distributed",
    "make_mesh",
    "parameter_table",
    "preempted",
    "prefetch",
    "shardings",
    "spec",
    "stand_ins",
]
