"""How steps of several answers are timed."""

import pytest

from aquifer.benchmarks.answers import longest_answer, pace
from aquifer.benchmarks.harness import LeftOutError


def tokens_at(begin: float, end: float, *, step: float = 0.03, place: int = 0) -> list[float]:
    """When tokens of an answer come: one that reading gives, and one after each step; place: in the batch."""
    count = round((end - begin) / step)
    return [begin - 0.01, *(begin + step * number + 0.0001 * place for number in range(1, count + 1))]


def test_each_answer_is_timed_by_its_own_tokens() -> None:
    """Few steps are common to all; what the last one gives to others comes after the first answer's end."""
    answers = [tokens_at(0.03 * place, 0.48 + 0.03 * place, place=place) for place in range(12)]
    assert pace(answers) == pytest.approx(0.03)
    assert pace(answers[:1]) == pytest.approx(0.03)


def test_tokens_that_come_together_count_as_often_as_they_are() -> None:
    drafted = [0.0, *(0.1 * check + 0.0001 * place for check in range(1, 6) for place in range(4))]
    assert pace([drafted]) == pytest.approx(0.1 / 4, rel=0.01)
    assert pace([drafted, drafted]) == pytest.approx(0.1 / 4, rel=0.01)


def test_answers_that_never_went_on_at_once_are_left_out() -> None:
    with pytest.raises(LeftOutError, match="2 contexts do not fit"):
        pace([tokens_at(0, 0.3), tokens_at(0.3, 0.6)])


def test_an_answer_goes_on_while_others_are_read() -> None:
    assert longest_answer(131_072, 1, 16) == 18
    assert longest_answer(131_072, 12, 16) == 18 + 12 * (2 * 16 + 3)
