"""Self-consistency: the answer of most, ties to the best."""

import numpy as np
import pytest

from mlm.evaluation.choosing.agreement import last_match, votes


def test_votes_are_shares_of_all():
    np.testing.assert_allclose(votes(["7", "8", None, "8"]), [0.25, 0.5, 0.0, 0.5])
    np.testing.assert_allclose(votes([None, None]), 0.0)


def test_of_tied_answers_the_first_is_the_best():
    assert int(np.argmax(votes(["5", "6", "6", "5", None]))) == 0


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"answer is (\d+)", "First the answer is 3. No: the answer is 12!", "12"),
        (r"\d+", "3 and 4 make 7", "7"),
        (r"\d+", "none", None),
    ],
)
def test_an_answer_is_the_last_match(pattern, text, answer):
    assert last_match(pattern)(text) == answer
