"""Seconds of a device's own work."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tiny_models import DEVICE

from aquifer.server.engine.clock import Clock


def test_a_clock_runs_from_its_start_to_the_end_of_the_work() -> None:
    numbers = torch.ones(64, 64, device=DEVICE)
    outer = Clock(DEVICE)
    inner = Clock(DEVICE)
    for _ in range(100):
        numbers @ numbers
    inner.stop()
    numbers @ numbers
    outer.stop()
    assert 0 < inner.seconds() <= outer.seconds()
    assert inner.over and outer.over


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU is done when it returns")
def test_a_clock_is_not_over_before_the_work_is() -> None:
    numbers = torch.ones(8192, 8192, device=DEVICE)
    clock = Clock(DEVICE)
    for _ in range(100):
        numbers @ numbers
    clock.stop()
    assert not clock.over
    assert clock.seconds() > 0 and clock.over


def test_a_device_that_failed_does_nothing_any_more() -> None:
    class Failed:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: unspecified launch failure")

        synchronize = query

    clock, failed = Clock(torch.device("cpu")), cast(torch.cuda.Event, Failed())
    clock._events = failed, failed
    assert clock.over and clock.seconds() == 0.0
