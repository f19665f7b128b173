"""The clock of a sweep: tokens that were written, seconds without compilation."""

import time

import numpy as np

from mlm.decoding.generate import Generator
from mlm.decoding.state import Decoded
from mlm.session.trials import _Clock


class Slow(Generator):
    """A generator that compiles, slowly, when it first meets a length; two results for each source."""

    def __init__(self):
        self.compilations = self.calls = 0
        self.lengths = set()

    def __call__(self, params, sources, *, prompts):
        self.calls += 1
        if len(sources[0]) not in self.lengths:
            self.lengths.add(len(sources[0]))
            self.compilations += 1
            time.sleep(0.3)
        count = len(sources)
        tokens = np.zeros((count, 2, 9), np.int32)
        lengths = np.array([[7, 9]] * count, np.int32)
        return Decoded(tokens, np.zeros((count, 2), np.float32), lengths, np.asarray(8))


def test_what_compiles_is_timed_again_and_only_new_tokens_count():
    """Best results of 7 tokens, one forced first."""
    slow = Slow()
    clock = _Clock(slow)
    for _ in range(2):
        clock({}, [[5, 6, 1]] * 4, prompts=[[3]] * 4)
    assert slow.calls == 3  # twice at first, once when nothing was left to compile
    assert clock.tokens == 2 * 4 * (7 - 1)
    assert clock.passes == 16
    assert 0 < clock.seconds < 0.3
