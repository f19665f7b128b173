"""TensorFlow and SeqIO, imported once and without their start-up notes, which no environment variable silences.

Modules of this room write `from mlm.data.tensorflow import seqio, tf`.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_native_notes() -> Iterator[None]:
    """Holds back what native code writes to file descriptor 2; shows it after all when the block fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            notes.seek(0)
            sys.stderr.write(notes.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


with _without_native_notes():
    import seqio
    import tensorflow as tf
    import tensorflow_text  # registers the tokenizer ops

__all__ = ["seqio", "tensorflow_text", "tf"]
