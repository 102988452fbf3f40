"""Reading a prompt on a device that does its work in its own time."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from asking import answer, ask, prompt, submit
from tiny_models import greedy_reference, tiny_model

from aquifer.server.engine import reading, restore
from aquifer.server.engine.clock import Clock
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.fetch import Fetched, Fetcher
from aquifer.server.engine.pages import BlockTable
from aquifer.server.engine.restore import Restorer
from aquifer.server.engine.state import RequestState
from aquifer.server.engine.streams import SegmentReader
from aquifer.server.engine.types import FailedEvent, FinishedEvent, TokenEvent

MakeEngine = Callable[..., Engine]
WaitUntil = Callable[[Callable[[], bool]], None]

IDS = prompt(1, 1300)


class LateClock(Clock):
    """Of a device that is done when somebody waits for it, or when a test says so."""

    waits = 0
    done = False
    """Of all clocks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._waited_for = False

    @property
    def over(self) -> bool:
        return self._waited_for or LateClock.done

    def seconds(self) -> float:
        self._waited_for = True
        LateClock.waits += 1
        return 0.5


@pytest.fixture
def engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Five segments of a prompt are in RAM, to be restored two at a time by a device that is always late."""
    engine = make_engine(tiny_model("llama"), keep=False)
    answer(engine, ask(IDS))
    assert engine.flush(30)
    for module in (reading, restore):
        monkeypatch.setattr(module, "Clock", LateClock)
    monkeypatch.setattr(LateClock, "waits", 0)
    monkeypatch.setattr(Restorer, "group_segments", 2)
    return engine


def test_the_question_is_prepared_while_a_device_restores(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may be reading stays until it is done, and one group at most is ahead of the one it is at."""
    restore, prefill = Restorer.restore, engine._loop._runner.prefill
    sources, alive, leases = list[weakref.ref[Any]](), list[list[bool]](), list[int]()

    def restored(*args: Any) -> Any:
        clock, source = restore(*args)
        sources.append(weakref.ref(source))
        return clock, source

    def computed(*args: Any) -> Any:
        gc.collect()
        alive.append([source() is not None for source in sources])
        leases.append(engine.store.ram.open_leases)
        return prefill(*args)

    monkeypatch.setattr(Restorer, "restore", restored)
    monkeypatch.setattr(engine._loop._runner, "prefill", computed)
    tokens, last = answer(engine, ask(IDS))
    assert tokens == greedy_reference(tiny_model("llama"), IDS, 8)
    # Of groups of 2, 2 and 1 the last one was on its way.
    assert alive == [[False, False, True]] and leases == [1]
    assert engine.store.ram.open_leases == 0
    assert last.timings.restore_seconds > 1.5 and last.timings.prefill_seconds == 0.5


def test_what_is_recorded_once_is_not_timed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a first restore would look slower than computing, and the load gate close on it."""
    log: list[str] = []
    recording = SimpleNamespace(replay=lambda *_: log.append("replayed"))
    clock = SimpleNamespace(stop=lambda: log.append("stopped"))
    monkeypatch.setattr(restore, "Clock", lambda _: log.append("started") or clock)
    chained = SimpleNamespace(chained="a chain")
    reader = SimpleNamespace(source=lambda _: chained, codec=SimpleNamespace(chain=None))
    restorer = Restorer(cast(SegmentReader, reader), engine._parts.pool)
    restorer._recorded = cast(Any, SimpleNamespace(of=lambda _: log.append("recorded") or recording))
    restorer.restore([], BlockTable([]))
    assert log == ["recorded", "started", "replayed", "stopped"]


def test_the_time_of_a_fetch_is_shared_by_what_was_fetched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by what was asked for: or a tier that is asked for little would look fast."""
    fetch, loaded = Fetcher.fetch, list[float]()

    def fetch_slowly(*args: Any) -> Fetched:
        return replace(fetch(*args), seconds=60.0)

    def measured(source: str, tokens: int, seconds: float) -> None:
        if source == "ram":
            loaded.append(seconds)

    engine.store.ram.delete(engine._keys(IDS, "").segments[1:3])
    monkeypatch.setattr(Fetcher, "fetch", fetch_slowly)
    monkeypatch.setattr(engine._parts.gate, "measured", measured)
    assert submit(engine, ask(IDS)).finished.cached.ram == 3 * 256
    assert sum(loaded) == 60.0 + 2 * 0.5  # two groups


def test_the_first_token_goes_out_before_leases_are_given_back(engine: Engine) -> None:
    leases = list[int]()
    events = submit(engine, ask(IDS), lambda event: leases.append(engine.store.ram.open_leases))
    last = events.finished
    assert last.timings.restore_seconds > 1.5 and last.timings.prefill_seconds == 0.5
    first = next(at for at, event in enumerate(events.all) if isinstance(event, TokenEvent))
    assert leases[first] == 1 and set(leases[first + 1 :]) == {0}  # of the last group


def test_an_answer_of_one_token_leaves_no_lease(engine: Engine) -> None:
    assert submit(engine, ask(IDS, 1)).finished.timings.restore_seconds > 1.5
    assert engine.store.ram.open_leases == 0


def test_leases_that_wait_for_the_first_token_end_where_it_does_not_come(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = RequestState.report_progress

    def fails(state: RequestState) -> None:
        if state.first_choice is not None:
            assert engine.store.ram.open_leases == 1
            raise RuntimeError("no more")
        report(state)

    monkeypatch.setattr(RequestState, "report_progress", fails)
    assert isinstance(submit(engine, ask(IDS)).wait(), FailedEvent)
    assert engine.store.ram.open_leases == 0


def test_leases_of_a_group_that_stands_after_its_request_failed_end_then(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    stops = itertools.count(1)

    def fails(clock: Clock) -> None:
        if next(stops) == 4:  # of three groups, then of the question, whose first token is known
            raise RuntimeError("no more")

    monkeypatch.setattr(LateClock, "stop", fails)
    assert isinstance(submit(engine, ask(IDS)).wait(), FailedEvent)
    wait_until(lambda: engine.store.ram.open_leases == 0)


def test_a_device_goes_straight_on_to_the_next_chunk_but_no_further_ahead(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, waited = engine._loop._runner.prefill, list[int]()

    def computed(*args: Any) -> Any:
        waited.append(LateClock.waits)
        return prefill(*args)

    monkeypatch.setattr(engine._loop._runner, "prefill", computed)
    answer(engine, ask(prompt(2, 2000)))  # in chunks of 512
    assert waited == [0, 0, 1, 2] and LateClock.waits == 4


def test_a_prompt_that_is_only_read_stands_when_that_is_said(engine: Engine) -> None:
    event = submit(engine, ask(IDS[:1280], 0)).finished
    assert LateClock.waits == 3
    assert event.cached.ram == 1280 and event.timings.restore_seconds > 1.5


def end_in_second_group(engine: Engine, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    """Have something happen when a second group begins to be restored; the first one is under way."""
    restore, begun = Restorer.restore, list[int]()

    def ends(*args: Any) -> Any:
        begun.append(engine.store.ram.open_leases)
        if len(begun) == 2:
            assert begun == [6, 6]  # five segments and the sinks
            end()
        return restore(*args)

    monkeypatch.setattr(Restorer, "restore", ends)


def test_leases_end_with_a_request_that_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    def fail() -> None:
        raise RuntimeError("no more")

    end_in_second_group(engine, monkeypatch, fail)
    assert isinstance(submit(engine, ask(IDS)).wait(), FailedEvent)
    wait_until(lambda: engine.store.ram.open_leases == 0)
    assert engine._parts.pool.available_pages == engine._parts.pool.num_pages


def test_leases_of_a_cancelled_request_end_when_the_device_is_done_while_others_are_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    request, other = ask(IDS), ask(prompt(2, 20), 4000)
    answered = submit(engine, other)
    wait_until(lambda: len(answered.tokens) > 0)
    end_in_second_group(engine, monkeypatch, lambda: engine.cancel(request.request_id))
    assert isinstance(submit(engine, request).wait(), FinishedEvent)
    assert engine.store.ram.open_leases == 2  # of the group that was under way
    monkeypatch.setattr(LateClock, "done", True)
    wait_until(lambda: engine.store.ram.open_leases == 0)
    assert not any(isinstance(event, FinishedEvent) for event in answered.all)
    engine.cancel(other.request_id)
    answered.wait()


def test_leases_end_with_a_turn_that_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    def fail() -> None:
        raise RuntimeError("no more turns")

    # The group that begins now is under way when the turn fails.
    end_in_second_group(
        engine, monkeypatch, lambda: monkeypatch.setattr(engine._loop._writer, "pump", lambda limit: fail())
    )
    assert isinstance(submit(engine, ask(IDS)).wait(), FailedEvent)
    wait_until(lambda: engine.store.ram.open_leases == 0)
    monkeypatch.undo()


def test_leases_end_with_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shut_down = engine._shut_down
    end_in_second_group(engine, monkeypatch, lambda: engine._inbox.put(shut_down))
    assert isinstance(submit(engine, ask(IDS)).wait(), FailedEvent)
    engine._thread.join()
    assert engine.store.ram.open_leases == 0
    engine._on_close()
    engine.store.close()
