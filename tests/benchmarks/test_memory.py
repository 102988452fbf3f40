"""Device memory while answers are decoded, where CUDA's count is made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aquifer.benchmarks.memory import DecodingMemory


@dataclass
class Device:
    """Stands for an engine on a device. books: staging by the engine; one page is always in use."""

    allocated: int = 100
    peak: int = 100
    recorded: int = 0
    books: int = 7
    let_go: list[int] = field(default_factory=list)
    """Bytes that the engine gives back once the turn that sent the last event is over."""

    def load(self) -> Any:
        return SimpleNamespace(device_bytes={"resident": 50, "landmarks": 0, "staging": self.books})

    def flush(self, timeout: float) -> bool:
        while self.let_go:
            self.allocated -= self.let_go.pop()
        return True

    def take(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def segments(self) -> list[dict[str, Any]]:
        recorded = {"segment_pool_id": (0, 1), "total_size": 10 + self.recorded, "allocated_size": 10}
        return [{"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 1}, recorded]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: device.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", device.reset_peak)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", device.segments)
    return device


def memory_of(engine: Any) -> DecodingMemory:
    return DecodingMemory(engine)


def one_run(memory: DecodingMemory, device: Device, lane: int, step: int) -> None:
    """A request that holds `lane` bytes until the end, and `step` bytes while a step is computed."""
    with memory.watched():
        device.take(lane + 900)  # reading takes more than decoding
        device.allocated -= 900
        for _ in range(3):
            device.take(step)
            device.allocated -= step
            device.books = 7 + lane + step
            memory.step_taken()
        device.let_go.append(lane)
    device.books = 7


def test_books_and_device_agree_run_after_run(device: Device) -> None:
    memory = memory_of(device)
    for lane, step in ((20, 30), (20, 30), (5, 40), (20, 30)):
        one_run(memory, device, lane, step)
        assert memory.books_bytes == memory.measured_bytes == 50 + 7 + lane + step


def test_what_a_run_leaves_on_the_device_is_measured_from_then_on(device: Device) -> None:
    memory = memory_of(device)
    with memory.watched():
        device.take(8)
        device.recorded = 200
        memory.step_taken()
    assert memory.measured_bytes == 7 + 8 + 200
    one_run(memory, device, 20, 30)
    assert memory.measured_bytes == 50 + 7 + 8 + 200 + 20 + 30


def test_the_pass_before_the_first_step_is_in_neither_figure(device: Device) -> None:
    memory = memory_of(device)
    with memory.watched():
        device.take(500)
        device.allocated -= 500
        device.books = 507
        memory.step_taken()
        device.books = 7
        memory.step_taken()
    assert memory.books_bytes == memory.measured_bytes == 57
