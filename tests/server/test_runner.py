"""One step of many sequences: what computes beside what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from tiny_models import DEVICE, tiny_model

from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.engine.sampling import Choice, StepResult
from aquifer.server.models.adapter import DecoderAdapter


class LoggedStep:
    """A fast step of rows that begin at `start`; it says what happens when."""

    device_bytes = 0

    def __init__(self, name: str, start: int, log: list[str]) -> None:
        self._name, self._start, self._log = name, start, log

    def accepts(self, row: Rows) -> bool:
        return row.start == self._start

    def start(self, rows: Sequence[Rows]) -> Callable[[], list[StepResult]]:
        self._log.append(f"{self._name} started")

        def finish() -> list[StepResult]:
            self._log.append(f"{self._name} finished")
            return [Choice(self._start, 0.0) for _ in rows]

        return finish


def test_a_device_computes_all_fast_steps_while_the_caller_does_something_else() -> None:
    adapter = DecoderAdapter(tiny_model("llama"), max_tokens=4096)
    pool = PagePool(adapter.spec, 4 * 256 * adapter.spec.bytes_per_token, DEVICE, keep=False)
    log: list[str] = []
    runner = ModelRunner(adapter, pool, [LoggedStep("one", 1, log), LoggedStep("two", 2, log)])
    caches = [PagedCache(pool, BlockTable([page])) for page in range(4)]
    rows = [Rows([7], start, cache) for start, cache in zip((2, 0, 1, 2), caches, strict=True)]
    results = runner.step(rows, lambda: log.append("meanwhile"))
    assert log == ["one started", "two started", "meanwhile", "one finished", "two finished"]
    assert [cast(Choice, results[number]).token_id for number in (0, 2, 3)] == [2, 1, 2]
    plain = results[1]  # was not accepted by any
    assert isinstance(plain, torch.Tensor) and plain.shape == (1, adapter.vocab_size)
