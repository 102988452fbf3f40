"""Whatever happens to Redis, a record is right or it is a miss, and service goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from structlog.testing import capture_logs

from aquifer.cachestore import RedisTier, chain_keys, make_namespace, redis_tier

RECORD_BYTES = 5 << 20  # three parts
KEYS = chain_keys(make_namespace("model", "codec", ""), range(64), segment_tokens=8).segments


@pytest.fixture
def server(redis_server: Any) -> Any:
    return redis_server


@pytest.fixture
def raw(server: Any) -> Iterator[Redis]:
    """A plain client, to do to the server what others might."""
    with Redis(port=server.port) as client:
        yield client


class Landing:
    """Lands records in its own memory, and lets a test step in when one is complete."""

    def __init__(self) -> None:
        self.arriving: dict[int, memoryview] = {}
        self.completed: dict[int, bytes] = {}
        self.on_complete: Callable[[int], object] = lambda index: None

    def allocate(self, index: int, num_bytes: int) -> memoryview:
        self.arriving[index] = memoryview(bytearray(num_bytes))
        return self.arriving[index]

    def complete(self, index: int) -> None:
        record = bytes(self.arriving.pop(index))
        self.on_complete(index)
        self.completed[index] = record

    def abandon(self, index: int) -> None:
        del self.arriving[index]


def read(tier: RedisTier, index: int = 0) -> bytes | None:
    (lease,) = tier.get(KEYS[index : index + 1])
    return None if lease is None else bytes(lease.data)


# Outages


def test_a_killed_server_is_a_miss_and_recovery_is_automatic(
    server: Any, make_tier: Any, wait_until: Any
) -> None:
    tier = make_tier(server.url)
    assert tier.put(KEYS[0], b"record")
    with capture_logs() as logs:
        server.stop()
        assert [read(tier) for _ in range(5)] == [None] * 5
        assert not tier.up
        assert not tier.put(KEYS[0], b"record")
        assert (tier.contains(KEYS[:1]), tier.delete(KEYS[:1])) == ([False], 0)
        stats = tier.stats()
        server.start()
        wait_until(lambda: tier.up)
        wait_until(lambda: len(logs) == 2)
    assert (stats.up, stats.errors, stats.misses, stats.dropped_writes) == (False, 1, 5, 1)
    assert [entry["log_level"] for entry in logs] == ["warning", "info"]
    assert tier.put(KEYS[0], b"record")
    assert read(tier) == b"record"


def test_a_restart_that_nobody_noticed_costs_no_error(server: Any, make_tier: Any) -> None:
    tier = make_tier(server.url)
    tier.put(KEYS[0], b"record")
    server.stop()
    server.start()
    assert tier.put(KEYS[1], b"another")
    assert tier.stats().errors == 0


def test_a_paused_server_times_out_into_a_miss_and_comes_back(
    server: Any, make_tier: Any, wait_until: Any
) -> None:
    tier = make_tier(server.url, timeout_seconds=0.2)
    tier.put(KEYS[0], b"record")
    server.pause()
    try:
        assert read(tier) is None
        assert not tier.up
    finally:
        server.resume()
    wait_until(lambda: tier.up)
    assert read(tier) == b"record"


def test_a_server_that_is_not_there_at_the_start_may_come_later(
    server: Any, make_tier: Any, wait_until: Any
) -> None:
    server.stop()
    tier = make_tier(server.url)
    assert not tier.up
    server.start()
    wait_until(lambda: tier.up)
    assert tier.put(KEYS[0], b"record")


def test_a_failure_in_the_middle_of_a_large_read_is_a_miss(
    server: Any, make_tier: Any, raw: Redis, wait_until: Any
) -> None:
    tier = make_tier(server.url)
    record = os.urandom(RECORD_BYTES)
    for key in KEYS:
        assert tier.put(key, record)

    landing = Landing()
    landing.on_complete = lambda index: raw.client_kill_filter(_type="normal", skipme=True)
    tier.read(KEYS, landing)
    stats = tier.stats()
    assert set(landing.completed.values()) == {record}
    assert stats.hits == len(landing.completed)
    assert stats.hits + stats.misses == len(KEYS)
    assert stats.misses > 0
    assert landing.arriving == {}, "memory of the record that was cut off is given back"
    wait_until(lambda: tier.up)
    assert all(tier.get(KEYS))


def test_memory_full_is_counted_and_not_an_outage(start_redis: Any, make_tier: Any) -> None:
    server = start_redis("--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    tier = make_tier(server.url)
    assert tier.put(KEYS[0], b"small")
    results = [tier.put(key, os.urandom(RECORD_BYTES)) for key in KEYS[1:4]]
    assert False in results
    stats = tier.stats()
    assert stats.dropped_writes == results.count(False)
    assert stats.errors >= stats.dropped_writes
    assert stats.capacity_bytes == 6 << 20
    assert tier.up
    assert read(tier) == b"small"
    assert [read(tier, index) is not None for index in (1, 2, 3)] == results


# Records that are not what they should be


def test_a_record_evicted_between_contains_and_get_is_a_miss(server: Any, make_tier: Any, raw: Redis) -> None:
    tier = make_tier(server.url)
    tier.put(KEYS[0], b"record")
    assert tier.contains(KEYS[:1]) == [True]
    raw.delete(KEYS[0].redis_name)
    assert read(tier) is None
    assert tier.stats().corrupt == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw, name: raw.set(name, b""),
        lambda raw, name: raw.set(name, b"from somebody else, and long enough for a header"),
        lambda raw, name: raw.set(name, raw.get(name)[:-1]),
        lambda raw, name: raw.append(name, b"x"),
        lambda raw, name: raw.set(name, raw.get(name)[:10]),
        lambda raw, name: (raw.delete(name), raw.rpush(name, b"a list")),
        lambda raw, name: raw.delete(name + b":1"),
        lambda raw, name: raw.delete(name + b":2"),
        lambda raw, name: raw.set(name + b":2", raw.get(name + b":2")[:-1]),
        lambda raw, name: raw.set(name + b":1", b"tiny"),
        lambda raw, name: raw.set(name + b":1", raw.get(KEYS[1].redis_name + b":1")),
    ],
    ids=[
        "empty", "foreign", "truncated", "longer", "cut header", "list", "no part 1", "no part 2",
        "part 2 truncated", "part 1 foreign", "part 1 of another write",
    ],
)  # fmt: skip
def test_spoiled_data_is_a_miss_counted_and_deleted(
    server: Any,
    make_tier: Any,
    raw: Redis,
    spoil: Callable[[Redis, bytes], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_tier, "WRITING_SECONDS", 0.0)  # it was written long ago
    tier = make_tier(server.url)
    record = os.urandom(RECORD_BYTES)
    for key in KEYS[:2]:
        tier.put(key, record)
    spoil(raw, KEYS[0].redis_name)
    assert read(tier) is None
    assert raw.exists(*(KEYS[0].redis_name + suffix for suffix in (b"", b":1", b":2"))) == 0
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.corrupt) == (0, 1, 1)
    assert read(tier, 1) == record
    assert tier.put(KEYS[0], record)
    assert read(tier) == record


def test_what_another_server_is_writing_is_a_miss_and_left_alone(
    server: Any, make_tier: Any, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its last parts are missing, and where they are those of an earlier write."""
    writer, reader = make_tier(server.url), make_tier(server.url)
    record, execute, seen = os.urandom(RECORD_BYTES), writer.link.execute, list[bytes | None]()

    def read_meanwhile(commands: list[tuple[Any, ...]]) -> Any:
        replies = execute(commands)
        seen.append(read(reader))
        return replies

    monkeypatch.setattr(writer.link, "execute", read_meanwhile)
    for _ in range(2):
        assert writer.put(KEYS[0], record)
        raw.delete(KEYS[0].redis_name)
    assert seen == [None, record] * 2 and reader.stats().corrupt == 0


def test_a_record_that_the_reader_rejects_is_deleted(server: Any, make_tier: Any) -> None:
    tier = make_tier(server.url)
    tier.put(KEYS[0], b"damaged")

    def reject(index: int) -> None:
        raise ValueError("checksum")

    landing = Landing()
    landing.on_complete = reject
    tier.read(KEYS[:1], landing)
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.corrupt) == (0, 1, 1)
    assert tier.contains(KEYS[:1]) == [False]


# Lifetime


def test_every_part_expires_and_a_hit_begins_the_lifetime_anew(
    server: Any, make_tier: Any, raw: Redis
) -> None:
    tier = make_tier(server.url, ttl_seconds=60.0)
    tier.put(KEYS[0], os.urandom(RECORD_BYTES))
    names = [KEYS[0].redis_name + suffix for suffix in (b"", b":1", b":2")]
    assert all(0 < raw.ttl(name) <= 60 for name in names)
    for name in names:
        raw.expire(name, 10)
    assert read(tier) is not None
    assert all(raw.ttl(name) > 10 for name in names)


def test_an_expired_record_is_a_miss(server: Any, make_tier: Any, wait_until: Any) -> None:
    tier = make_tier(server.url, ttl_seconds=0.05)
    tier.put(KEYS[0], b"record")
    wait_until(lambda: tier.contains(KEYS[:1]) == [False])
    assert read(tier) is None
    assert tier.stats().corrupt == 0


def test_without_a_lifetime_records_stay(server: Any, make_tier: Any, raw: Redis) -> None:
    tier = make_tier(server.url, ttl_seconds=None)
    tier.put(KEYS[0], b"record")
    assert read(tier) == b"record"
    assert raw.ttl(KEYS[0].redis_name) == -1
