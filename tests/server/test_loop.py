"""How answers leave the loop, and how requests do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from asking import Events, ask, busy, prompt, submit
from tiny_models import DEVICE, greedy_reference, tiny_model

from aquifer.server.engine import reading, runner
from aquifer.server.engine.admission import Admission, Room
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.runner import Rows
from aquifer.server.engine.sampling import StepResult
from aquifer.server.engine.selective import SelectiveCache
from aquifer.server.engine.state import RequestState
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    KVMode,
    TokenEvent,
)

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("beside", [True, False])
def test_tokens_are_sent_beside_the_next_step_or_at_once(
    beside: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"))
    assert engine._loop._sends_beside_steps == (DEVICE.type == "cuda")
    engine._loop._sends_beside_steps = beside
    step, sent = engine._loop._runner.step, []

    def watched(rows: Sequence[Rows], meanwhile: Callable[[], None]) -> list[StepResult]:
        before = len(events.tokens)
        results = step(rows, meanwhile)
        sent.append((before, len(events.tokens)))
        return results

    monkeypatch.setattr(engine._loop._runner, "step", watched)
    with busy(engine):
        events = submit(engine, ask(prompt(1, 20), 5))
    events.wait()
    # Neither the first token waits, nor the last.
    assert sent == ([(1, 1), (1, 2), (2, 3), (3, 4)] if beside else [(1, 1), (2, 2), (3, 3), (4, 4)])
    assert len(events.tokens) == 5


def test_tokens_do_not_wait_for_another_prompt(make_engine: MakeEngine) -> None:
    """What one step gave is sent before the next piece of a prompt is read."""
    engine = make_engine(tiny_model("llama"), chunk_tokens=256)
    engine._loop._sends_beside_steps = True
    advance, waiting = engine._loop._prompts.advance, []

    def watched(state: RequestState) -> None:
        waiting.append(len(engine._loop._unsent))
        advance(state)

    engine._loop._prompts.advance = watched  # type: ignore[method-assign]
    events = [submit(engine, ask(prompt(seed, length), 30)) for seed, length in ((1, 20), (2, 1500))]
    for one in events:
        one.wait()
    assert len(waiting) > 6 and not any(waiting)


@pytest.mark.parametrize("mode", ["resident", "streamed", "verified"])
def test_an_answer_that_cannot_be_spelled_fails_alone_and_once(mode: KVMode, make_engine: MakeEngine) -> None:
    """Also where it fails while a step is running that reads its cache."""
    model, ids = tiny_model("llama"), prompt(2, 40)
    engine = make_engine(model)
    spell, times = engine._decode_text, itertools.count()

    def fail_late(tokens: Sequence[int]) -> str:
        if next(times) > 6:
            raise ValueError("no such letter")
        return spell(tokens)

    fine = submit(engine, ask(ids, 40))
    engine._decode_text = fail_late
    engine._loop._sends_beside_steps = True
    broken = submit(engine, ask(prompt(3, 600), 40, mode=mode, budget=1.0))
    last = broken.wait()
    assert isinstance(last, FailedEvent) and "no such letter" in last.message
    fine.wait()
    assert fine.tokens == greedy_reference(model, ids, 40)
    assert [type(event) for event in broken.all].count(FailedEvent) == 1
    assert broken.all[-1] is last
    assert engine._parts.pool.available_pages == engine._parts.pool.num_pages
    assert engine.store.ram.open_leases == 0


@pytest.mark.parametrize("failures", [1, 1000])
def test_an_answer_that_is_cancelled_and_cannot_be_spelled_ends_once_and_alone(
    failures: int, make_engine: MakeEngine
) -> None:
    model, ids = tiny_model("llama"), prompt(2, 40)
    engine = make_engine(model)
    spell, left = engine._decode_text, [0]

    def fail(tokens: Sequence[int]) -> str:
        if left[0]:
            left[0] -= 1
            raise ValueError("no such letter")
        return spell(tokens)

    def cancel(event: Event) -> None:
        if len(broken.tokens) == 5:
            left[0] = failures
            engine.cancel(request.request_id)

    fine = submit(engine, ask(ids, 60))
    engine._decode_text = fail
    engine._loop._sends_beside_steps = True
    request, broken = ask(prompt(3, 40), 60), Events(cancel)
    engine.submit(request, broken)
    broken.wait()
    fine.wait()
    assert fine.tokens == greedy_reference(model, ids, 60)
    ends = [event for event in broken.all if isinstance(event, FinishedEvent | FailedEvent)]
    assert ends == broken.all[-1:]


@pytest.mark.parametrize("end", ["finished", "cancelled", "failed"])
def test_caches_are_let_go_before_their_pages(
    end: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, order = make_engine(tiny_model("llama")), list[str]()
    release, step = Admission.release, engine._loop._runner.step

    def give_back(admission: Admission, room: Room) -> None:
        order.append("pages")
        release(admission, room)

    def fails(*args: Any) -> list[StepResult]:
        raise RuntimeError("no more steps")

    monkeypatch.setattr(SelectiveCache, "release", lambda cache: order.append("cache"))
    monkeypatch.setattr(Admission, "release", give_back)
    monkeypatch.setattr(engine._loop._runner, "step", fails if end == "failed" else step)

    def cancel(event: Event) -> None:
        if len(events.tokens) == 3 and end == "cancelled":
            engine.cancel(request.request_id)

    request, events = ask(prompt(1, 600), 20, mode="selective"), Events(cancel)
    engine.submit(request, events)
    events.wait()
    assert engine.flush(10)
    assert order == ["cache", "pages"]


@pytest.mark.parametrize("mode", ["streamed", "selective", "verified"])
def test_a_device_that_fails_ends_every_request_and_no_thread(
    mode: KVMode, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked of it raises then, letting caches go as well."""
    engine = make_engine(tiny_model("llama"), keep=False)

    def fails(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def first_token(event: Event) -> None:
        if isinstance(event, TokenEvent) and len(engine._loop._decoding) == 1:
            monkeypatch.setattr(engine._loop._runner, "step", fails)
            monkeypatch.setattr(runner, "until_read", fails)
            monkeypatch.setattr(SelectiveCache, "release", fails)

    requests = [ask(prompt(seed, 600), 200, mode=mode) for seed in (1, 2)]
    asked = [submit(engine, request, first_token) for request in requests]
    for events in asked:
        assert isinstance(events.wait(), FailedEvent)
    later = submit(engine, ask(prompt(3, 20), 4)).wait()
    assert isinstance(later, FailedEvent)
    assert engine._parts.pool.available_pages == engine._parts.pool.num_pages
    assert engine.store.ram.open_leases == 0


def test_room_comes_back_where_no_cells_can_be_made(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"))

    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(reading, "cells_to_fill", no_memory)
    fine = submit(engine, ask(prompt(1, 20), 60))
    assert isinstance(submit(engine, ask(prompt(2, 600), 6, mode="selective")).wait(), FailedEvent)
    assert isinstance(fine.wait(), FinishedEvent)
    for pool in (engine._parts.pool, engine._parts.index):
        assert pool.available_pages == pool.num_pages
