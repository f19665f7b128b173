"""Save, restore, retention: a run can be killed at any moment and goes on, on any mesh."""

from mlm.checkpoints.checkpointer import CheckpointConfig, Checkpointer, Restored
from mlm.checkpoints.errors import CheckpointError, CorruptCheckpoint
from mlm.checkpoints.versions import versions

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "CorruptCheckpoint", "Restored", "versions"]
