"""Stop sequences: a text ends behind one as behind EOS, whatever the method; only what was written counts."""

import numpy as np
import pytest

from mlm.decoding.config import DecodeConfig
from mlm.decoding.phrases import stop_size

EOS, T = 1, 10
OPTIONS = {
    "greedy": {},
    "input_copy": {"proposer": "input_copy", "guesses": 3},
    "sample": {"method": "sample", "seed": 5, "n_best": 2},
}


def texts(out, i):
    return [t[:n].tolist() for t, n in zip(out.tokens[i], out.lengths[i], strict=True) if n]


def cut(text, stop, start=0):
    """The text up to the first stop sequence among what stands behind `start`."""
    for end in range(start + 1, len(text) + 1):
        if any(text[start:end][-len(phrase) :] == list(phrase) for phrase in stop):
            return text[:end]
    return text


def common(out, start=0):
    """Two sequences that many texts hold: a token of some place, and two tokens that stand together."""
    rows = [text[start:] for i in range(len(out.tokens)) for text in texts(out, i)]
    pairs = [tuple(row[j : j + 2]) for row in rows for j in range(1, len(row) - 1) if EOS not in row[j : j + 2]]
    most = max(set(pairs), key=pairs.count)
    singles = [row[3] for row in rows if len(row) > 3 and row[3] not in (EOS, *most)]
    return (most, (max(set(singles), key=singles.count),))


@pytest.mark.parametrize("method", OPTIONS)
def test_the_text_is_that_of_a_longer_decode_cut_by_hand(tiny, sources, method):
    plain = tiny.decode(DecodeConfig(max_length=T, **OPTIONS[method]), sources)
    stop = common(plain)
    out = tiny.decode(DecodeConfig(max_length=T, stop=stop, **OPTIONS[method]), sources)
    shorter = []
    for i in range(8):
        want = [cut(text, stop) for text in texts(plain, i)]
        assert sorted(texts(out, i)) == sorted(want)
        shorter += [cut(text, stop) != text for text in texts(plain, i)]
        for text, score in zip(texts(out, i), out.scores[i], strict=True):
            np.testing.assert_allclose(score, tiny.total(sources[i], text), atol=1e-4)
    assert any(shorter)
    assert not all(shorter)
    assert out.passes.sum() < plain.passes.sum()


@pytest.mark.parametrize("method", OPTIONS)
def test_a_sequence_that_begins_in_the_prompt_ends_nothing(tiny, sources, method):
    """The prompt ends with the first token of the sequence, and greedy search goes on with the second."""
    own = OPTIONS[method]
    plain = tiny.decode(DecodeConfig(max_length=T, **own), sources)
    prompts = [t[0, :3].tolist() for t in plain.tokens]
    free = tiny.decode(DecodeConfig(max_length=T, **own), sources, prompts=prompts)
    stop = tuple({(prompts[i][-1], text[3]) for i in range(8) for text in texts(free, i) if text[3] != EOS})
    out = tiny.decode(DecodeConfig(max_length=T, stop=stop, **own), sources, prompts=prompts)
    spanning = 0
    for i in range(8):
        assert sorted(texts(out, i)) == sorted(cut(text, stop, 3) for text in texts(free, i))
        spanning += any(tuple(text[2:4]) in stop and len(text) > 4 for text in texts(out, i))
    assert spanning


@pytest.mark.parametrize("method", ["beam", "diverse_beam"])
def test_beams_end_behind_a_sequence_with_the_score_of_a_whole_text(tiny, sources, method):
    own = {"method": method, "beams": 4, "n_best": 4, "max_length": T}
    plain = tiny.decode(DecodeConfig(min_length=5, **own), sources)
    stop = common(plain)
    out = tiny.decode(DecodeConfig(min_length=5, stop=stop, **own), sources)
    stopped = 0
    for i in range(8):
        for text, score in zip(texts(out, i), out.scores[i], strict=False):
            assert cut(text, stop) == text
            ended = text[-1] == EOS or stop_size(text, stop) > 0
            want = tiny.total(sources[i], text) / (((5 + len(text)) / 6) ** 0.6 if ended else 1.0)
            np.testing.assert_allclose(score, want, atol=1e-4)
            stopped += stop_size(text, stop) > 0
    assert stopped


def test_the_longest_sequence_counts():
    assert stop_size([4, 5, 6], ((6,), (5, 6), (4, 6))) == 2
    assert stop_size([4, 5], ((6,), (3, 4, 5))) == 0
    assert stop_size(np.array([], np.int32), ((6,),)) == 0
    assert stop_size([4, 5], ()) == 0
