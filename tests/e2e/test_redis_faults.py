"""Redis lost, stalled, full or lying: a question costs time then, never its answer."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis_server import RedisServer
from service_process import ServiceProcess, document, plain_answer
from transformers import PreTrainedModel
from waiting import wait_until

from aquifer.clients import Answer, Sampling

QUESTION = "What is the heaviest crate?"
NEW_TOKENS = 16
SLOTS = 20
"""Records in the RAM arena: two long documents push everything else out of it."""
SLOT_BYTES = 256 + 3 * 2 * 256 * 32 * 4 + 16 + 240
"""Header, KV of a segment in float32, checksum; rounded up to a multiple of 256."""

_fillers = itertools.count()


@pytest.fixture(scope="module")
def running(start_service: Callable[..., ServiceProcess], module_redis: RedisServer) -> ServiceProcess:
    return start_service(redis_url=module_redis.url, ram_bytes=SLOTS * SLOT_BYTES)


@pytest.fixture
def service(running: ServiceProcess, module_redis: RedisServer) -> ServiceProcess:
    """The service with an empty Redis that it knows to be there."""
    with redis.Redis.from_url(module_redis.url) as stored:
        stored.flushall()
        stored.config_set("maxmemory", 0)
    wait_until(lambda: redis_is(running, "up"), poll_seconds=0.05)
    return running


def redis_is(service: ServiceProcess, state: str) -> bool:
    """Whether readiness and metrics agree that Redis is in this state."""
    says = service.client.ready()
    is_up = service.metric("tier_up", tier="redis") == 1
    return says.ready and says.tiers["redis"] == state and says.degraded != is_up and is_up == (state == "up")


def ask(service: ServiceProcess, text: str) -> Answer:
    return service.client.generate(QUESTION, document=text, sampling=Sampling(max_new_tokens=NEW_TOKENS))


def tokens(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def segments_in(server: RedisServer) -> set[bytes]:
    with redis.Redis.from_url(server.url) as stored:
        return set(stored.scan_iter("aquifer:s:*", count=1000))


def settled(server: RedisServer) -> set[bytes]:
    """What stands in Redis once no more arrives: documents that were read before are written there behind
    their answers, and a queue that they fill drops what comes next."""
    before, found = None, segments_in(server)
    while found != before:
        time.sleep(0.2)
        before, found = found, segments_in(server)
    return found


def ask_and_store(service: ServiceProcess, server: RedisServer, text: str) -> tuple[Answer, list[bytes]]:
    """The cold answer, and the names under which the document's records stand in Redis."""
    before = settled(server)
    answer = ask(service, text)
    records = answer.prompt_tokens // 256 + 1  # the first tokens have a record of their own
    wait_until(lambda: len(segments_in(server) - before) == records, poll_seconds=0.02)
    return answer, sorted(segments_in(server) - before)


def evict_from_ram(service: ServiceProcess) -> None:
    """Have other documents read until nothing that was in RAM before is still there."""
    for _ in range(2):
        filler = document(f"{next(_fillers)} fills the arena", num_tokens=3300)

        def is_in_ram(filler: str = filler) -> bool:
            answer = service.client.generate("?", document=filler, sampling=Sampling(max_new_tokens=1))
            segments = answer.prompt_tokens // 256
            assert segments > SLOTS // 2
            return answer.cached_tokens.ram == 256 * segments

        wait_until(is_in_ram)  # records go there behind the answer


def test_serves_without_redis_and_fills_it_once_it_appears(
    start_service: Callable[..., ServiceProcess],
    start_redis: Callable[[], RedisServer],
    model: PreTrainedModel,
) -> None:
    server = start_redis()
    server.stop()
    service = start_service(redis_url=server.url)
    text = document("Before")
    assert tokens(ask(service, text)) == plain_answer(model, text, QUESTION, NEW_TOKENS)
    assert redis_is(service, "down")
    server.start()
    wait_until(lambda: redis_is(service, "up"), poll_seconds=0.05)
    _, names = ask_and_store(service, server, document("After"))
    assert names


def test_answers_equal_plain_generation_from_every_tier(
    service: ServiceProcess, module_redis: RedisServer, model: PreTrainedModel
) -> None:
    text = document("Every tier")
    cold, _ = ask_and_store(service, module_redis, text)
    from_ram = ask(service, text)
    evict_from_ram(service)
    from_redis = ask(service, text)
    assert cold.cached_tokens.total == 0
    assert from_ram.cached_tokens.ram == from_redis.cached_tokens.redis == cold.prompt_tokens // 256 * 256
    expected = plain_answer(model, text, QUESTION, NEW_TOKENS)
    assert tokens(cold) == tokens(from_ram) == tokens(from_redis) == expected


def test_a_killed_redis_is_done_without_and_used_again_when_it_is_back(
    service: ServiceProcess, module_redis: RedisServer
) -> None:
    text = document("Killed")
    cold, _ = ask_and_store(service, module_redis, text)
    evict_from_ram(service)
    module_redis.stop()
    try:
        alone = ask(service, text)
        assert redis_is(service, "down")
    finally:
        module_redis.start()
    assert (tokens(alone), alone.cached_tokens.total) == (tokens(cold), 0)
    wait_until(lambda: redis_is(service, "up"), poll_seconds=0.05)
    again, _ = ask_and_store(service, module_redis, document("After the kill"))
    evict_from_ram(service)
    restored = ask(service, document("After the kill"))
    assert restored.cached_tokens.redis > 0
    assert tokens(restored) == tokens(again)


def test_a_stalled_redis_is_given_up_on_and_used_again_when_it_answers(
    service: ServiceProcess, module_redis: RedisServer
) -> None:
    text = document("Stalled")
    cold, _ = ask_and_store(service, module_redis, text)
    evict_from_ram(service)
    module_redis.pause()
    try:
        alone = ask(service, text)
        assert redis_is(service, "down")
    finally:
        module_redis.resume()
    assert (tokens(alone), alone.cached_tokens.total) == (tokens(cold), 0)
    wait_until(lambda: redis_is(service, "up"), poll_seconds=0.05)
    evict_from_ram(service)
    restored = ask(service, text)
    assert restored.cached_tokens.redis > 0
    assert tokens(restored) == tokens(cold)


def test_a_full_redis_is_counted_and_does_not_matter(
    service: ServiceProcess, module_redis: RedisServer, model: PreTrainedModel
) -> None:
    errors = service.metric("tier_lookups_total", tier="redis", result="error")
    dropped = service.metric("tier_dropped_writes_total", tier="redis")
    with redis.Redis.from_url(module_redis.url) as stored:
        stored.config_set("maxmemory", 1)
    text = document("Full")
    answer = ask(service, text)
    assert tokens(answer) == plain_answer(model, text, QUESTION, NEW_TOKENS)
    records = answer.prompt_tokens // 256 + 1
    wait_until(
        lambda: service.metric("tier_dropped_writes_total", tier="redis") == dropped + records,
        poll_seconds=0.05,
    )
    assert service.metric("tier_lookups_total", tier="redis", result="error") >= errors + records
    assert redis_is(service, "up"), "a full Redis still answers"
    assert segments_in(module_redis) == set()


def test_answers_stay_right_while_redis_comes_and_goes(
    service: ServiceProcess, module_redis: RedisServer, model: PreTrainedModel
) -> None:
    # More than RAM holds, so that Redis is asked all the time.
    texts = [document(f"{number} in rough weather", num_tokens=1500) for number in range(6)]
    expected = {text: plain_answer(model, text, QUESTION, NEW_TOKENS) for text in texts}

    def requests(seed: int) -> list[tuple[str, list[int]]]:
        asked = random.Random(seed).choices(texts, k=8)
        return [(text, tokens(ask(service, text))) for text in asked]

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(requests, seed) for seed in range(4)]
        while not all(answer.done() for answer in answers):
            module_redis.stop()
            time.sleep(0.3)
            module_redis.start()
            wait_until(lambda: redis_is(service, "up"), poll_seconds=0.02)
            module_redis.pause()
            time.sleep(1.3)
            module_redis.resume()
            wait_until(lambda: redis_is(service, "up"), poll_seconds=0.02)
    for answer in answers:
        for text, answered in answer.result():
            assert answered == expected[text]


def flip_a_byte(stored: redis.Redis, names: list[bytes]) -> None:
    for name in names:
        middle = stored.strlen(name) // 2
        byte = stored.getrange(name, middle, middle)
        stored.setrange(name, middle, bytes([byte[0] ^ 0x10]))


def cut_short(stored: redis.Redis, names: list[bytes]) -> None:
    for name in names:
        stored.set(name, stored.get(name)[:-100])


def swap_two(stored: redis.Redis, names: list[bytes]) -> None:
    by_length = sorted(names, key=stored.strlen)
    one, other = by_length[-2:]  # both whole segments: lengths tell nothing
    values = stored.mget(one, other)
    assert len(values[0]) == len(values[1]) and values[0] != values[1]
    stored.mset({one: values[1], other: values[0]})


def fill_with_garbage(stored: redis.Redis, names: list[bytes]) -> None:
    for name in names:
        stored.set(name, b"\xa5" * stored.strlen(name))


def keep_the_head_only(stored: redis.Redis, names: list[bytes]) -> None:
    """What says how long a record is stays true; everything behind it is another's."""
    for name in names:
        stored.setrange(name, 64, b"\x5a" * (stored.strlen(name) - 64))


def put_a_list(stored: redis.Redis, names: list[bytes]) -> None:
    for name in names:
        stored.delete(name)
        stored.rpush(name, "not", "a", "record")


@pytest.mark.parametrize(
    "spoil", [flip_a_byte, cut_short, swap_two, fill_with_garbage, keep_the_head_only, put_a_list]
)
def test_spoiled_records_are_counted_replaced_and_never_believed(
    service: ServiceProcess,
    module_redis: RedisServer,
    model: PreTrainedModel,
    spoil: Callable[[redis.Redis, list[bytes]], None],
) -> None:
    text = document(f"{spoil.__name__} spoiled this")
    cold, names = ask_and_store(service, module_redis, text)
    evict_from_ram(service)
    with redis.Redis.from_url(module_redis.url) as stored:
        before = {name: stored.dump(name) for name in names}
        spoil(stored, names)
        spoiled = {name: dump for name in names if (dump := stored.dump(name)) != before[name]}
    corrupt = service.metric("tier_lookups_total", tier="redis", result="corrupt")

    answer = ask(service, text)
    assert tokens(answer) == tokens(cold) == plain_answer(model, text, QUESTION, NEW_TOKENS)
    assert answer.cached_tokens.redis <= 256 * (len(names) - len(spoiled))
    assert service.metric("tier_lookups_total", tier="redis", result="corrupt") == corrupt + len(spoiled)

    with redis.Redis.from_url(module_redis.url) as stored:
        wait_until(lambda: all(stored.dump(name) not in (None, dump) for name, dump in spoiled.items()))
    evict_from_ram(service)
    restored = ask(service, text)
    assert restored.cached_tokens.redis == cold.prompt_tokens // 256 * 256, "what was spoiled stands again"
    assert tokens(restored) == tokens(cold)
