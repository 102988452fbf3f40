import json

import pytest

from aquifer.workloads.scoring import is_scoreable, score_needles, score_table, score_text2json

GOLD = json.dumps([{"name": "A B", "city": "X", "badge": "1"}, {"name": "C D", "city": "Y", "badge": "2"}])


def prediction(*items: object) -> str:
    return json.dumps(list(items))


A = {"name": "A B", "city": "X", "badge": "1"}
C = {"name": "C D", "city": "Y", "badge": "2"}


def test_the_expected_answer_scores_one_also_with_text_around_it() -> None:
    assert score_text2json(GOLD, GOLD) == 1.0
    assert score_text2json("Here you are: " + GOLD + " Done.", GOLD) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "none", "[", "]", GOLD + "[]", '[{"name": }]', '{"name": "A B"}', "][", "[" * 5000],
)
def test_anything_but_exactly_one_json_list_scores_zero(text: str) -> None:
    assert score_text2json(text, GOLD) == 0.0


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([A], 1 / 2),  # one record missing
        ([A, {**C, "city": "Z"}], 1.75 / 2),  # one wrong value
        ([A, {"name": "C D", "city": "Y"}], 1.5 / 2),  # one missing field
        ([A, {**C, "city": None}], 1.5 / 2),  # null counts as missing
        ([A, {"name": "C D"}], 1 / 2),  # nothing left of an item
        ([A, C, {"name": "E F", "city": "X", "badge": "1"}], 2 / 3),  # unknown name
        ([A, C, {"city": "X"}], 2 / 3),  # no name
        ([A, C, A], 2 / 3),  # repeated
        ([A, C, "noise", 3, None], 2 / 5),  # not even objects
        ([A, {**C, "badge": 2}], 1.0),  # a number counts as its digits
        ([A, {**C, "badge": 2.5}], 1.75 / 2),
        ([A, {**C, "badge": {"x": 1}}], 1.75 / 2),  # a nested object is a wrong value
        ([{**A, "name": 7.5}, C], 1 / 3),  # a name that is no string is an unknown one
    ],
)
def test_partial_credit(items: list[object], expected: float) -> None:
    assert score_text2json(prediction(*items), GOLD) == pytest.approx(expected)


def test_typographic_apostrophe_equals_the_plain_one() -> None:
    gold = json.dumps([{"name": "O'Neil", "city": "X", "badge": "1"}])
    assert score_text2json('[{"name": "O’Neil", "city": "X", "badge": "1"}]', gold) == 1.0


def test_gold_with_repeated_names_is_not_scoreable() -> None:
    repeated = prediction(A, A)
    assert not is_scoreable(repeated)
    assert is_scoreable(GOLD)
    with pytest.raises(ValueError, match="distinct names"):
        score_text2json(GOLD, repeated)


def test_empty_gold_wants_an_empty_list() -> None:
    assert score_text2json("[]", "[]") == 1.0
    assert score_text2json(prediction(A), "[]") == 0.0


def test_needles_score_the_share_of_values_present() -> None:
    gold = json.dumps({"Ada": "111", "Bel": "222", "Cor": "333", "Dun": "444"})
    assert score_needles("Ada 111, Bel 222, Cor 334", gold) == 0.5
    assert score_needles("", gold) == 0.0
    assert score_needles("x9", json.dumps(["x9", 7])) == 0.5


def test_table_score_is_f1_over_normalized_rows() -> None:
    gold = "Town\tCode\nThe Hague\tAB-1\nOslo\tCD-2"
    assert score_table("town\tcode\nhague\tab1\nOSLO \tCD 2", gold) == 1.0
    assert score_table("Town\tCode\nOslo\tCD-2", gold) == pytest.approx(2 / 3)
    assert score_table("Oslo\tCD-2\nOslo\tCD-2\nThe Hague\tAB-1", gold) == pytest.approx(4 / 5)
    assert score_table("", gold) == 0.0
    assert score_table("Town\tCode", "Town\tCode") == 1.0
