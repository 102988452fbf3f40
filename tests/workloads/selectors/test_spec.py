import pytest

from aquifer.workloads.selectors.landmarks import TokenLandmarks
from aquifer.workloads.selectors.shadowkv import ShadowKV
from aquifer.workloads.selectors.spec import METHODS, canonical, parse_method


def test_a_method_is_its_name_its_budget_and_its_knobs() -> None:
    assert parse_method("landmarks") == TokenLandmarks()
    assert parse_method("landmarks:0.1") == TokenLandmarks(budget=0.1)
    assert parse_method(" landmarks:0.1:heads=shared:mean=off ") == TokenLandmarks(0.1, "shared", mean=False)
    assert parse_method("shadowkv:rank=80:budget=0.15") == ShadowKV(budget=0.15, rank=80)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_written_in_one_way(name: str) -> None:
    assert parse_method(canonical(name)) == parse_method(name)
    assert canonical(canonical(name)) == canonical(name)


def test_a_budget_given_by_name_and_a_default_given_explicitly_are_the_same_method() -> None:
    assert canonical("landmarks:budget=0.05:mean=on") == canonical("landmarks") == "landmarks:0.05"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chess", "there are full, window, oracle, landmarks, chunks, shadowkv, quest"),
        ("full:0.5", "full takes nothing"),
        ("landmarks:0.05:rank=3", "landmarks takes budget=0.05, heads=own"),
        ("landmarks:heads=shared:0.05", "landmarks takes budget"),
        ("landmarks:0.05:budget=0.1", "landmarks takes budget"),
        ("landmarks:heads=both", "heads is one of own, shared, not 'both'"),
        ("landmarks:mean=true", "mean is one of on, off"),
        ("landmarks:much", "budget is a number, not 'much'"),
        ("shadowkv:rank=4.5", "rank is a whole number"),
        ("shadowkv:rank=0", "rank and chunk are at least 1"),
        ("chunks:chunk=0", "chunk is 0"),
        ("quest:page=0", "at least 1"),
        ("landmarks:0", "budget is 0;"),
        ("oracle:1.5", "budget is 1.5"),
        ("window:nan", "budget is nan"),
    ],
)
def test_a_bad_method_is_answered_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)
