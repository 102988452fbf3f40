"""How runs become figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aquifer.benchmarks.harness import Contestant, LeftOutError, Report, Role, clocked_fresh, show, spread


def _contestant(name: str, role: Role, seconds: list[float], order: list[str]) -> Contestant:
    left = iter(seconds)

    def run() -> float:
        order.append(name)
        return next(left)

    return Contestant(name, role, run)


def test_contestants_take_turns_and_the_first_run_warms_up() -> None:
    order: list[str] = []
    report = Report("test", {})
    report.measure(
        [
            _contestant("a", "ours", [99.0, 1.0, 3.0, 2.0], order),
            _contestant("b", "peer", [99.0, 8.0, 8.0, 5.0], order),
        ],
        repeat=3,
    )
    report.compare()
    assert order == ["a", "b"] * 4
    a, b = report.rows
    assert (a.figures["seconds"], b.figures["seconds"]) == (2.0, 8.0)
    assert (a.figures["times"], b.figures["times"]) == (1.0, 4.0)


def test_a_contestant_that_cannot_run_is_named_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse() -> float:
        raise LeftOutError("needs what is not here")

    report = Report("test", {"tokens": 7})
    report.measure(
        [Contestant("it", "ours", lambda: 1.0), Contestant("other", "peer", refuse)],
        repeat=1,
    )
    show(report, tmp_path / "lines.jsonl")
    output = capsys.readouterr().out
    assert "left out: other: needs what is not here" in output
    line = json.loads(output.splitlines()[-1])
    assert [row["name"] for row in line["rows"]] == ["it"]
    assert line["left_out"] == {"other": "needs what is not here"}
    assert {"benchmark", "setup", "date", "command", "hardware", "threads", "torch", "load_average"} <= set(
        line
    )
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == line


def test_spread_is_relative_to_the_median() -> None:
    assert spread([2.0]) == 0.0
    assert spread([2.0, 2.0, 2.0]) == 0.0
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(80.0)


def test_making_fresh_data_is_not_timed() -> None:
    made: list[int] = []

    def prepare() -> Callable[[], None]:
        made.append(sum(range(3_000_000)))
        return lambda: None

    seconds = clocked_fresh(torch.device("cpu"), prepare)()
    assert made and seconds < 0.01


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (1000.0, True)])
def test_a_busy_machine_is_pointed_out(load: float, busy: bool) -> None:
    assert bool(Report("test", {}, load_average=load).notes) is busy
