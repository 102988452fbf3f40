"""Where a guess is taken from."""

from __future__ import annotations

import pytest

from aquifer.workloads.guesses import Guesser

PROMPT = [90, 1, 2, 3, 91, 4, 5, 6, 92]
EXPECTED = [50, 10, 11, 51, 20, 21, 51, 30, 31, 52]


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([50], [10, 11, 51]),
        ([50, 10, 11, 51], [20, 21, 51]),
        ([50, 10, 11, 51, 20, 21, 51], [30, 31, 52]),
        ([50, 77, 78, 51], [20, 21, 51]),  # a wrong value: on with the next
        ([50, 77, 78, 79, 79, 51, 30], [31, 52]),  # one left out
        ([50, 10, 11, 51, 4, 5], [6, 92, 50]),  # a value of the prompt
        ([50, 80, 81, 82, 80, 81], [82, 80, 50]),  # a repetition of its own
        ([50, 10, 11, 51, 99], []),  # never seen
    ],
)
def test_an_answer_goes_on_as_where_it_reads_the_same(tokens: list[int], guess: list[int]) -> None:
    assert Guesser(PROMPT, EXPECTED).after(tokens, 3) == guess


def test_a_guess_is_no_longer_than_asked_for() -> None:
    assert Guesser(PROMPT, EXPECTED).after([50], 1) == [10]
    assert Guesser(PROMPT, EXPECTED, longest=2).after([50], 9) == [10, 11]
    assert Guesser(PROMPT, EXPECTED, longest=0).after([50], 9) == []
    assert Guesser(PROMPT, EXPECTED).after([50], 0) == []
    assert Guesser([], []).after([50], 9) == []
