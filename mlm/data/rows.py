"""Arithmetic on ragged rows laid end to end, without loops: what noise and framing need for many pieces of text at
once.
"""

from collections.abc import Sequence

from mlm.data.tensorflow import tf
from mlm.types import EOS_ID


class Rows:
    """Where the items of a flat tensor lie: `row` and `place` in it per item, `lengths` and `starts` per row. All
    int32.
    """

    def __init__(self, ragged: tf.RaggedTensor):
        splits = tf.cast(ragged.row_splits, tf.int32)
        self.starts = splits[:-1]
        self.lengths = splits[1:] - self.starts
        self.count = tf.size(self.lengths)
        self.size = splits[-1]
        self.row = tf.repeat(tf.range(self.count), self.lengths)
        self.place = tf.range(self.size) - tf.gather(self.starts, self.row)

    def spread(self, per_row: tf.Tensor) -> tf.Tensor:
        """A value per row -> the same per item."""
        return tf.gather(per_row, self.row)

    def sum(self, per_item: tf.Tensor) -> tf.Tensor:
        """Sums of each row, int32; True counts 1."""
        return tf.math.unsorted_segment_sum(tf.cast(per_item, tf.int32), self.row, self.count)

    def cumsum(self, per_item: tf.Tensor) -> tf.Tensor:
        """Running sums inside each row, int32; True counts 1."""
        total = tf.cumsum(tf.cast(per_item, tf.int32))
        before = tf.gather(tf.concat([[0], total], 0), self.starts)
        return total - self.spread(before)

    def random_ranks(self, seed: tf.Tensor, first: tf.Tensor | None = None, last: tf.Tensor | None = None) -> tf.Tensor:
        """A random order 0, 1, … of each row's items; items in `first` come before the others, items in `last` after
        them.
        """
        keys = tf.random.stateless_uniform([self.size], seed, dtype=tf.float64)  # float32 would have ties
        if first is not None:
            keys = tf.where(first, keys - 1, keys)
        if last is not None:
            keys = tf.where(last, keys + 1, keys)
        order = tf.argsort(keys + 4 * tf.cast(self.row, tf.float64))
        return tf.math.invert_permutation(order) - self.spread(self.starts)


def from_lengths(lengths: tf.Tensor) -> Rows:
    """Rows of the given lengths, one after the other."""
    splits = tf.concat([[0], tf.cumsum(lengths)], 0)
    return Rows(tf.RaggedTensor.from_row_splits(tf.zeros([splits[-1]], tf.int32), splits, validate=False))


def select(pieces: tf.RaggedTensor, values: tf.Tensor, keep: tf.Tensor) -> tf.RaggedTensor:
    """The rows of `pieces` with other `values` (flat), of which only those in `keep` (flat, bool) stay."""
    return in_rows(tf.boolean_mask(values, keep), Rows(pieces).sum(keep))


def in_rows(values: tf.Tensor, lengths: tf.Tensor) -> tf.RaggedTensor:
    """A flat tensor in rows of the given lengths (with int64 splits, as TensorFlow makes them elsewhere)."""
    return tf.RaggedTensor.from_row_lengths(values, tf.cast(lengths, tf.int64), validate=False)


def cut(values: tf.Tensor, length: int) -> tf.RaggedTensor:
    """A flat tensor in rows of `length` items, the last one shorter; no row for no item."""
    size = tf.size(values, tf.int64)
    splits = tf.concat([tf.range(0, size, length), [size]], 0)
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


def frame(
    pieces: tf.RaggedTensor, length: int | None, first: Sequence = (), last: Sequence = (EOS_ID,)
) -> tf.RaggedTensor:
    """Each row between `first` and `last` (ids, or scalars), itself cut so that all fits in `length` items.

    length None: no cut. Raises ValueError when `length` has no room for one item of the row.
    """
    extra = len(first) + len(last)
    if length is not None and length <= extra:
        raise ValueError(f"a length of {length} tokens has no room for text beside {extra} special tokens")
    rows = Rows(pieces)
    kept = rows.lengths if length is None else tf.minimum(rows.lengths, length - extra)
    framed = from_lengths(kept + extra)
    around = [tf.convert_to_tensor(ids, tf.int32) for ids in (first, last) if ids]
    pool = tf.concat([pieces.values, *around], 0)
    inner = framed.spread(rows.starts) + framed.place - len(first)
    index = tf.where(framed.place < len(first), rows.size + framed.place, inner)
    behind = framed.place - framed.spread(framed.lengths) + len(last)  # place in `last`, below 0 before it
    index = tf.where(behind >= 0, rows.size + len(first) + behind, index)
    return in_rows(tf.gather(pool, index), framed.lengths)
