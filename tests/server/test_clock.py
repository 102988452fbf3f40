"""Seconds of a device's own work."""

from __future__ import annotations

import torch
from tiny_models import DEVICE

from aquifer.server.engine.clock import Clock


def test_a_clock_is_over_when_the_work_is() -> None:
    numbers = torch.ones(2048, 2048, device=DEVICE)
    first, second = Clock(DEVICE), Clock(DEVICE)
    numbers @ numbers
    first.stop()
    for _ in range(50):
        numbers @ numbers
    second.stop()
    assert 0 < first.seconds() < second.seconds()
    assert first.over and second.over


def test_a_device_that_failed_does_nothing_any_more() -> None:
    class Failed:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: unspecified launch failure")

        synchronize = query

    clock = Clock(torch.device("cpu"))
    clock._events = Failed(), Failed()  # type: ignore[assignment]
    assert clock.over and clock.seconds() == 0.0
