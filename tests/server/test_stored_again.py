"""What a tier lost of a document is stored again, from wherever it can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asking import Events, answer, ask, prompt, submit
from tiny_models import tiny_model

from aquifer.cachestore import RedisLink, RedisTier
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import Event, FailedEvent, ProgressEvent, TokenEvent

MakeEngine = Callable[..., Engine]

IDS = prompt(12, 1000)


@pytest.fixture
def stored(make_engine: MakeEngine, redis_server: Any) -> tuple[Engine, RedisTier]:
    """A document is on the device, in RAM and in Redis."""
    redis = RedisTier(RedisLink(redis_server.url), max_record_bytes=1 << 20)
    engine = make_engine(tiny_model("llama"), redis=redis)
    engine.generate([ask(IDS, 0)])
    assert engine.flush(30)
    return engine, redis


def test_what_ram_lost_is_stored_though_the_device_has_it(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.generate([ask(IDS, 0)])
    sinks, *segments = engine._keys(IDS, "").records
    for lost, recomputed in ([sinks], 1), (segments[1:2], 1), ([sinks, *segments], 3), ([], 0):
        engine.store.ram.delete(lost)
        assert answer(engine, ask(IDS))[1].cached.gpu == 768
        assert engine.generate([ask(IDS, 0)])[0].computed_tokens == 256 * recomputed
        assert engine.store.ram.contains([sinks, *segments]) == [True] * 4


def test_what_redis_lost_is_there_again_when_it_was_asked_about(
    stored: tuple[Engine, RedisTier], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    engine, redis = stored
    keys = engine._keys(IDS, "").records
    for request in (ask(IDS), ask(IDS, 0)):
        engine.store._renewed.clear()
        assert redis.delete(keys) == 4
        engine.generate([request])
        wait_until(lambda: redis.contains(keys) == [True] * 4)


def test_what_redis_has_comes_from_there_or_is_computed_where_that_is_faster(
    stored: tuple[Engine, RedisTier],
) -> None:
    engine, _ = stored
    keys, gate = engine._keys(IDS, "").records, engine._parts.gate
    for redis_pays in (True, False):
        gate._always = redis_pays
        gate.measured("computed", 10**9, 1.0)
        gate.measured("redis", 1, 1.0)
        engine.store.ram.delete(keys)
        last = engine.generate([ask(IDS, 0)])[0]
        assert (last.cached.redis, last.computed_tokens) == ((768, 0) if redis_pays else (0, 768))
        assert engine.store.ram.contains(keys) == [True] * 4


def test_a_question_waits_for_the_document_that_is_being_read_and_shares_it(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), chunk_tokens=256)
    ids, answered = prompt(12, 7 * 256), Events()
    questions = [ask(ids + prompt(13, 10))]

    def ask_meanwhile(event: Event) -> None:
        if isinstance(event, ProgressEvent) and questions:
            engine.submit(questions.pop(), answered)

    assert submit(engine, ask(ids, 0), ask_meanwhile).finished.computed_tokens == 7 * 256
    assert answered.finished.computed_tokens == 10


def test_what_ram_has_no_room_for_is_not_read_again_in_vain(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), slots=5)
    ids = prompt(12, 7 * 256)
    assert [engine.generate([ask(ids, 0)])[0].computed_tokens for _ in range(2)] == [7 * 256, 0]


def test_what_an_answer_reads_stays_where_there_is_no_room_for_it_twice(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=14, refuse_when_full=True)
    ids = prompt(12, 7 * 256)
    engine.generate([ask(ids, 0)])
    engine.store.ram.delete(engine._keys(ids, "").records)
    refused, posts = Events(), [ask(ids, 0)]

    def post_again(event: Event) -> None:
        if isinstance(event, TokenEvent) and posts:
            engine.submit(posts.pop(), refused)

    assert submit(engine, ask(ids + prompt(13, 10), 100), post_again).finished.cached.gpu == 7 * 256
    last = refused.wait()
    assert isinstance(last, FailedEvent) and last.kind == "overloaded"
    assert answer(engine, ask(ids + prompt(14, 10)))[1].cached.gpu == 7 * 256
