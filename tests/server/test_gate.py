"""Loading is refused only where it was measured to be slower than computing."""

from aquifer.server.engine.gate import LoadGate


def test_nothing_is_refused_before_both_sides_were_measured() -> None:
    gate = LoadGate(always=False)
    gate.measured("redis", 100, 10.0)
    assert gate.worth_loading("redis")


def test_slow_tier_is_refused_and_a_fast_one_is_not() -> None:
    gate = LoadGate(always=False)
    gate.measured("computed", 1000, 1.0)
    gate.measured("redis", 100, 1.0)
    gate.measured("ram", 10_000, 1.0)
    assert not gate.worth_loading("redis")
    assert gate.worth_loading("ram")


def test_refused_tier_is_tried_again_now_and_then_and_recovers() -> None:
    gate = LoadGate(always=False)
    gate.measured("computed", 1000, 1.0)
    gate.measured("redis", 100, 1.0)
    tried = [gate.worth_loading("redis") for _ in range(800)]
    assert tried == [*[False] * 392, *[True] * 8] * 2
    for _ in range(20):
        gate.measured("redis", 100_000, 1.0)
    assert gate.worth_loading("redis")


def test_always_loads_whatever_was_measured() -> None:
    gate = LoadGate(always=True)
    gate.measured("computed", 1000, 1.0)
    gate.measured("redis", 1, 1.0)
    assert gate.worth_loading("redis")
