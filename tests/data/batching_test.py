"""Packed rows hold exactly the examples that went in, and a restored packer goes on as if it had never stopped."""

import numpy as np
import pytest

from mlm.data.batching import Example, Packer, Rows, arrays_to_rows, fill_rate, rows_to_arrays
from mlm.types import ROW_FEATURES


def random_examples(count, seed=0, longest=(24, 12)):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(3, 1000, rng.integers(1, longest[0] + 1)).astype(np.int32),
            rng.integers(3, 1000, rng.integers(1, longest[1] + 1)).astype(np.int32),
            int(rng.integers(1, 9)),
            int(rng.integers(1, 5)),
            int(rng.integers(1, 9)),
        )
        for _ in range(count)
    ]


def unpack(batch):
    """Reference: reads the examples back out of a batch, token by token."""
    found = []
    for row in range(len(batch["encoder_segment_ids"])):
        for segment in range(1, batch["encoder_segment_ids"][row].max(initial=0) + 1):
            source = batch["encoder_segment_ids"][row] == segment
            target = batch["decoder_segment_ids"][row] == segment
            (language,) = set(batch["decoder_language_ids"][row, target])
            (inputs_language,) = set(batch["encoder_language_ids"][row, source])
            (task,) = set(batch["decoder_task_ids"][row, target])
            np.testing.assert_array_equal(batch["encoder_positions"][row, source], np.arange(source.sum()))
            np.testing.assert_array_equal(batch["decoder_positions"][row, target], np.arange(target.sum()))
            inputs, targets = batch["encoder_input_tokens"][row, source], batch["decoder_target_tokens"][row, target]
            np.testing.assert_array_equal(batch["decoder_input_tokens"][row, target], [0, *targets[:-1]])
            found.append((tuple(inputs), tuple(targets), language, task, inputs_language))
    return found


def as_tuples(examples):
    return [(tuple(e.inputs), tuple(e.targets), e.language, e.task, e.inputs_language) for e in examples]


@pytest.mark.parametrize("pack", [True, False])
def test_no_example_is_lost_repeated_or_changed(pack):
    examples = random_examples(300)
    packer = Packer(32, 16, pack=pack)
    for example in examples:
        packer.add(example)
    packer.flush()
    batch = packer.take(10_000)
    assert sorted(unpack(batch)) == sorted(as_tuples(examples))
    if not pack:
        assert unpack(batch) == as_tuples(examples)  # and in order
        assert len(batch["decoder_target_tokens"]) == len(examples)


def test_padding_is_zero_everywhere():
    packer = Packer(32, 16)
    for example in random_examples(50):
        packer.add(example)
    packer.flush()
    batch = packer.take(10_000)
    assert set(batch) == set(ROW_FEATURES)
    for name, array in batch.items():
        side = "encoder" if name.startswith("encoder") else "decoder"
        assert (array[batch[f"{side}_segment_ids"] == 0] == 0).all(), name
        assert array.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32), name
    assert (batch["decoder_loss_weights"] == (batch["decoder_segment_ids"] > 0)).all()


def test_a_row_by_hand():
    packer = Packer(6, 5, open_rows=2)
    packer.add(Example(np.array([7, 8, 1], np.int32), np.array([9, 1], np.int32), 4, 2, 3, start=11))
    packer.add(Example(np.array([5, 1], np.int32), np.array([6, 3, 1], np.int32), 5, 1, 5))
    batch = packer.take(1)  # the target side is full, so the row is complete
    expected = {
        "encoder_input_tokens": [7, 8, 1, 5, 1, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 0],
        "encoder_language_ids": [3, 3, 3, 5, 5, 0],
        "decoder_input_tokens": [11, 9, 0, 6, 3],
        "decoder_target_tokens": [9, 1, 6, 3, 1],
        "decoder_loss_weights": [1, 1, 1, 1, 1],
        "decoder_segment_ids": [1, 1, 2, 2, 2],
        "decoder_positions": [0, 1, 0, 1, 2],
        "decoder_language_ids": [4, 4, 5, 5, 5],
        "decoder_task_ids": [2, 2, 1, 1, 1],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)


def test_packing_fills_rows():
    packer = Packer(128, 64)
    for example in random_examples(2000, longest=(40, 20)):
        packer.add(example)
    source, target = fill_rate(packer.take(1000))
    assert max(source, target) > 0.9
    assert min(source, target) > 0.8


@pytest.mark.parametrize("pack", [True, False])
def test_a_restored_packer_continues_exactly(pack):
    examples = random_examples(200)
    whole, before, after = Packer(32, 16, pack), Packer(32, 16, pack), Packer(32, 16, pack)
    for example in examples:
        whole.add(example)
    for example in examples[:90]:
        before.add(example)
    head = before.take(5)
    after.restore(arrays_to_rows(rows_to_arrays(before.snapshot())))
    for example in examples[90:]:
        after.add(example)
    for packer in (whole, after):
        packer.flush()
    expected, tail = whole.take(10_000), after.take(10_000)
    for name, array in expected.items():
        np.testing.assert_array_equal(array, np.concatenate([head[name], tail[name]]), err_msg=name)


def test_a_snapshot_does_not_change_with_its_packer():
    packer = Packer(32, 16)
    examples = random_examples(40)
    for example in examples[:20]:
        packer.add(example)
    snapshot = packer.snapshot()
    before = as_tuples([e for row in snapshot.ready + snapshot.open for e in row])
    for example in examples[20:]:
        packer.add(example)
    packer.take(100)
    assert as_tuples([e for row in snapshot.ready + snapshot.open for e in row]) == before


def test_rows_of_nothing():
    assert arrays_to_rows(rows_to_arrays(Packer(8, 8).snapshot())) == Rows([], [])


def test_an_example_longer_than_a_row_is_refused():
    example = Example(np.ones(9, np.int32), np.ones(3, np.int32), 1, 1, 1)
    with pytest.raises(ValueError, match="9 source and 3 target tokens does not fit rows of 8 and 8"):
        Packer(8, 8).add(example)
