"""What the tiers have of a prompt is found and used; what is missing, damaged or slow is computed."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence

import pytest
from asking import answer, ask, prompt, submit
from tiny_models import greedy_reference, tiny_model

from aquifer.cachestore.keys import chain_keys, make_namespace
from aquifer.compression.wire import RecordOpener, WireError
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.gate import LoadGate

MakeEngine = Callable[..., Engine]


def test_holes_are_recomputed_and_the_rest_is_used(make_engine: MakeEngine) -> None:
    model = tiny_model("qwen3")
    engine = make_engine(model, keep=False)
    ids = prompt(6, 1500)
    answer(engine, ask(ids))
    assert engine.flush(30)
    namespace = make_namespace(engine.info.model_fingerprint, engine.info.codec_fingerprint, "")
    keys = chain_keys(namespace, ids)
    engine.store.delete([keys.segments[1], keys.segments[3]])
    tokens, last = answer(engine, ask(ids))
    assert tokens == greedy_reference(model, ids, 8)
    assert last.cached.ram == 3 * 256
    assert engine.flush(30)
    assert answer(engine, ask(ids))[1].cached.ram == 5 * 256


def test_segment_zero_without_its_sinks_is_a_miss(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    ids = prompt(7, 600)
    answer(engine, ask(ids))
    assert engine.flush(30)
    sinks = chain_keys(
        make_namespace(engine.info.model_fingerprint, engine.info.codec_fingerprint, ""), ids
    ).sinks
    assert sinks is not None
    engine.store.delete([sinks])
    tokens, last = answer(engine, ask(ids))
    assert tokens == greedy_reference(model, ids, 8)
    assert last.cached.ram == 256


def test_a_failing_fetch_is_a_miss_and_not_an_error(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    ids = prompt(19, 600)
    answer(engine, ask(ids))
    assert engine.flush(30)

    def broken(keys: object) -> None:
        raise OSError("the store is broken")

    monkeypatch.setattr(engine.store, "get", broken)
    monkeypatch.setattr(engine.store.ram, "get_all", broken)
    tokens, last = answer(engine, ask(ids))
    assert tokens == greedy_reference(model, ids, 8)
    assert last.cached.total == 0


def test_what_is_in_ram_is_found_by_the_engines_own_thread(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    ids = prompt(30, 600)
    tokens, _ = answer(engine, ask(ids))
    assert engine.flush(30)
    monkeypatch.setattr(engine.store, "get", lambda keys: [None] * len(keys))
    again, last = answer(engine, ask(ids))
    assert again == tokens and last.cached.ram == 512
    engine.store.ram.delete(engine._keys(ids, "").segments[1:])
    again, last = answer(engine, ask(ids))
    assert again == tokens and last.cached.total == 0  # what is not at hand is asked for as before


def test_ram_that_is_slower_than_computing_is_tried_a_few_segments_at_a_time(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquifer.server.engine.gate._RETRY_EVERY", 50)
    engine = make_engine(tiny_model("llama"), keep=False)
    ids = prompt(32, 1300)
    tokens, _ = answer(engine, ask(ids))
    assert engine.flush(30)
    gate = LoadGate(always=False)
    gate.measured("computed", 10**9, 1.0)
    gate.measured("ram", 1, 1.0)
    engine._loop._fetcher._gate = gate
    # A hundred segments are asked for, five at a time, and of fifty that would be refused eight are tried.
    found = [answer(engine, ask(ids)) for _ in range(20)]
    assert [last.cached.ram // 256 for _, last in found] == [*[0] * 8, 3, 5] * 2
    assert all(again == tokens for again, _ in found)


@pytest.mark.parametrize("ram_is_slow", [False, True])
def test_a_prompt_that_needs_no_tier_waits_for_none(
    ram_is_slow: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    gate, hang = LoadGate(always=False), threading.Event()
    gate.measured("computed", 1000, 1.0)
    gate.measured("ram", 1 if ram_is_slow else 10**9, 1.0)
    engine._loop._fetcher._gate = gate

    def hangs(keys: Sequence[object]) -> list[None]:
        assert hang.wait(60)
        return [None] * len(keys)

    monkeypatch.setattr(engine.store, "contains", hangs)
    stuck = [submit(engine, ask(prompt(40 + number, 600))) for number in range(3)]
    ids = prompt(43, 20)
    assert answer(engine, ask(ids))[0] == greedy_reference(model, ids, 8)
    assert not any(events.all for events in stuck)
    hang.set()
    for events in stuck:
        assert len(events.finished.text) == 8


@pytest.mark.parametrize("kind", ["MemoryError", "WireError"])
def test_leases_end_where_opening_records_fails(
    kind: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At hand and in the thread that fetches; a record that is refused cannot even be deleted."""
    engine = make_engine(tiny_model("llama"), keep=False)
    ids = prompt(44, 1300)
    tokens, _ = answer(engine, ask(ids))
    assert engine.flush(30)
    opened, opens = RecordOpener.open, itertools.count(1)

    def fails(opener: RecordOpener, record: memoryview, chain: bytes) -> memoryview:
        if next(opens) % 3:
            return opened(opener, record, chain)
        raise MemoryError if kind == "MemoryError" else WireError("not the one")

    def broken(keys: object) -> None:
        raise OSError("the store is broken")

    monkeypatch.setattr(RecordOpener, "open", fails)
    monkeypatch.setattr(engine.store, "delete", broken)
    again, last = answer(engine, ask(ids))
    assert again == tokens and last.cached.total == 0
    assert engine.store.ram.open_leases == 0


@pytest.mark.parametrize("which", [0, 1])
def test_a_record_that_changed_in_ram_is_refused_and_computed_again(
    which: int, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    ids = prompt(31, 800)
    tokens, _ = answer(engine, ask(ids))
    assert engine.flush(30)
    (lease,) = engine.store.ram.get(engine._keys(ids, "").segments[which : which + 1])
    assert lease is not None and lease.address is not None
    ctypes.memset(lease.address + 20, 0xFF, 8)  # of its header
    lease.release()
    again, last = answer(engine, ask(ids))
    assert again == tokens and last.cached.ram == 512
    assert engine.flush(30)
    again, last = answer(engine, ask(ids))
    assert again == tokens and last.cached.ram == 768
    assert engine.store.ram.open_leases == 0
