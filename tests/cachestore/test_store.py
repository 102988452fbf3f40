"""What RAM and Redis do together, beyond what every tier does (test_tiers.py)."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from xxhash import xxh3_128_digest

from aquifer.cachestore import RamArena, RedisTier, SegmentKey, TieredStore, chain_keys, make_namespace

SLOT_BYTES = 64 << 10
KEYS = chain_keys(make_namespace("model", "codec", ""), range(128), segment_tokens=8).segments


class CountingVerifier:
    """Checks a digest at the record's end, as the wire format does, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, record: memoryview, digest: bytes) -> None:
        self.calls += 1
        if xxh3_128_digest(record[:-16]) != bytes(record[-16:]):
            raise ValueError("checksum")


def sealed(body: bytes) -> bytes:
    return body + xxh3_128_digest(body)


@pytest.fixture
def verify() -> CountingVerifier:
    return CountingVerifier()


@pytest.fixture
def make_store(make_tier: Any, verify: CountingVerifier) -> Iterator[Callable[..., TieredStore]]:
    """Make stores over one Redis, as several servers would, or the same server after a restart."""
    stores: list[TieredStore] = []

    def make(url: str | None, *, slots: int = 16, **options: Any) -> TieredStore:
        redis: RedisTier | None = make_tier(url) if url else None
        stores.append(TieredStore(RamArena(slots * SLOT_BYTES, SLOT_BYTES), redis, verify, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def read(store: TieredStore, keys: Any = KEYS[:1]) -> list[tuple[str, bytes] | None]:
    found: list[tuple[str, bytes] | None] = []
    for lease in store.get(keys):
        if lease is None:
            found.append(None)
            continue
        with lease:
            found.append((lease.tier, bytes(lease.data)))
    return found


def test_without_redis_the_store_is_its_ram(make_store: Any) -> None:
    store = make_store(None)
    assert store.put(KEYS[0], b"record")
    assert read(store, KEYS[:2]) == [("ram", b"record"), None]
    assert store.contains(KEYS[:2]) == ["ram", None]
    assert store.flush(0)
    assert [stats.name for stats in store.stats()] == ["ram"]


def test_a_restarted_server_finds_its_records_in_redis_once_and_then_in_ram(
    redis_server: Any, make_store: Any, verify: CountingVerifier
) -> None:
    before = make_store(redis_server.url)
    records = [sealed(os.urandom(1000)) for _ in KEYS]
    for key, record in zip(KEYS, records, strict=True):
        assert before.put(key, record)
    assert before.flush(10)
    assert verify.calls == 0, "what this process made needs no check"

    after = make_store(redis_server.url)
    assert after.contains(KEYS) == ["redis"] * len(KEYS)
    assert read(after, KEYS) == [("redis", record) for record in records]
    assert after.contains(KEYS) == ["ram"] * len(KEYS)
    assert read(after, KEYS) == [("ram", record) for record in records]
    assert verify.calls == len(KEYS), "each record is checked once, on entry"
    ram, redis = after.stats()
    assert (ram.name, ram.hits, ram.misses) == ("ram", len(KEYS), len(KEYS))
    assert (redis.name, redis.hits, redis.misses) == ("redis", len(KEYS), 0)


def test_holes_in_both_tiers_do_not_stop_a_read(redis_server: Any, make_store: Any) -> None:
    writer, store = make_store(redis_server.url), make_store(redis_server.url)
    for index in (1, 3):
        writer.put(KEYS[index], sealed(b"redis"))
    assert writer.flush(10)
    store.put(KEYS[2], sealed(b"ram"))
    assert read(store, KEYS[:5]) == [
        None,
        ("redis", sealed(b"redis")),
        ("ram", sealed(b"ram")),
        ("redis", sealed(b"redis")),
        None,
    ]


def test_a_damaged_record_is_a_miss_deleted_and_can_be_written_again(
    redis_server: Any, make_store: Any
) -> None:
    damaging = make_store(redis_server.url)
    damaging.put(KEYS[0], b"x" + sealed(b"record"))
    assert damaging.flush(10)
    store = make_store(redis_server.url)
    assert read(store) == [None]
    assert store.contains(KEYS[:1]) == [None]
    assert store.stats()[1].corrupt == 1
    store.put(KEYS[0], sealed(b"record"))
    assert store.flush(10)
    assert read(make_store(redis_server.url)) == [("redis", sealed(b"record"))]


def test_what_the_full_arena_cannot_take_is_still_served(redis_server: Any, make_store: Any) -> None:
    writer = make_store(redis_server.url)
    for key in KEYS[:4]:
        writer.put(key, sealed(key.digest))
    assert writer.flush(10)
    store = make_store(redis_server.url, slots=2)
    leases = store.get(KEYS[:4])
    assert [bytes(lease.data) for lease in leases] == [sealed(key.digest) for key in KEYS[:4]]
    assert [lease.tier for lease in leases] == ["redis"] * 4
    for lease in leases:
        lease.release()
    assert store.ram.open_leases == 0


def test_what_ram_refuses_goes_to_redis(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url, slots=1)
    store.pin(KEYS[:1])
    assert store.put(KEYS[0], sealed(b"pinned"))
    assert store.flush(10)
    assert store.put(KEYS[1], sealed(b"next"))
    assert store.flush(10)
    assert store.contains(KEYS[:2]) == ["ram", "redis"]
    assert store.stats()[0].dropped_writes == 1


def test_pinned_records_stay_and_unpinned_ones_go(make_store: Any) -> None:
    store = make_store(None, slots=2)
    store.put(KEYS[0], b"pinned")
    store.pin(KEYS[:1])
    for key in KEYS[8:12]:
        assert store.put(key, b"passing by")
    assert store.contains(KEYS[:1]) == ["ram"]
    assert store.stats()[0].pinned == 1
    store.unpin(KEYS[:1])
    for key in KEYS[12:14]:
        assert store.put(key, b"passing by")
    assert store.contains(KEYS[:1]) == [None]


def test_delete_forgets_in_every_tier_and_cancels_the_write(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url)
    redis_server.pause()
    try:
        for key in KEYS[:4]:
            store.put(key, sealed(b"record"))
    finally:
        redis_server.resume()
    assert store.delete(KEYS[:4]) == 4
    assert store.flush(10)
    assert store.contains(KEYS[:4]) == [None] * 4
    assert make_store(redis_server.url).contains(KEYS[:4]) == [None] * 4


def test_a_read_that_began_before_a_delete_brings_nothing_back(redis_server: Any, make_store: Any) -> None:
    writer, store = make_store(redis_server.url), make_store(redis_server.url)
    for key in KEYS[:3]:
        writer.put(key, sealed(b"record"))
    assert writer.flush(10)

    def delete_meanwhile(record: memoryview, digest: bytes) -> None:
        if digest == KEYS[1].digest:
            store.delete(KEYS[:2])

    store._verify = delete_meanwhile
    assert read(store, KEYS[:3]) == [("redis", sealed(b"record"))] * 3
    assert store.contains(KEYS[:3]) == [None, None, "ram"]
    assert store.ram.open_leases == 0
    assert store.put(KEYS[1], sealed(b"new")) and store.flush(10)
    assert read(make_store(redis_server.url), KEYS[:2]) == [None, ("redis", sealed(b"new"))]


def test_a_write_that_fails_unexpectedly_is_dropped_and_the_next_one_is_written(
    redis_server: Any, make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(redis_server.url)
    put = RedisTier.put

    def fail_once(tier: RedisTier, key: SegmentKey, record: memoryview) -> bool:
        if key == KEYS[0]:
            raise MemoryError
        return put(tier, key, record)

    monkeypatch.setattr(RedisTier, "put", fail_once)
    for key in KEYS[:2]:
        assert store.put(key, sealed(b"record"))
    assert store.flush(10) and store.ram.open_leases == 0
    assert store.stats()[1].dropped_writes == 1
    assert make_store(redis_server.url).contains(KEYS[:2]) == [None, "redis"]


def lifetimes(redis_server: Any) -> list[int]:
    """Of all keys in Redis, in milliseconds."""
    with Redis.from_url(redis_server.url) as client:
        return [client.pttl(name) for name in client.scan_iter()]


def leave_a_minute(redis_server: Any) -> None:
    """To all keys in Redis."""
    with Redis.from_url(redis_server.url) as client:
        for name in client.scan_iter():
            client.pexpire(name, 60_000)


def test_what_is_used_in_ram_lives_on_in_redis(redis_server: Any, make_store: Any, wait_until: Any) -> None:
    store = make_store(redis_server.url)
    for key in KEYS[:4]:
        store.put(key, sealed(os.urandom(10_000)))
    assert store.flush(10)
    leave_a_minute(redis_server)
    store.used(KEYS[:3])
    wait_until(lambda: sum(left > 60_000 for left in lifetimes(redis_server)) == 3)
    leave_a_minute(redis_server)
    store.used(KEYS[:3])  # lately
    store.used(KEYS[3:4])
    wait_until(lambda: sum(left > 60_000 for left in lifetimes(redis_server)) == 1)
    store.used(KEYS[:3], again=True)
    wait_until(lambda: sum(left > 60_000 for left in lifetimes(redis_server)) == 4)
    assert store.stats()[0].hits == 0 and store.ram.open_leases == 0


def test_what_is_used_again_and_again_is_renewed_once(
    redis_server: Any, make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(redis_server.url)
    renewed: list[Any] = []
    monkeypatch.setattr(store.redis, "renew", renewed.append)
    for _ in range(5):
        store.used(KEYS[:3], again=True)
        store.used(KEYS[:1], again=True)
    store._renewing.submit(lambda: None).result()
    assert renewed == [list(KEYS[:3]), list(KEYS[:1])]


def test_what_redis_lost_is_written_again_when_it_is_used(
    redis_server: Any, make_store: Any, wait_until: Any
) -> None:
    store = make_store(redis_server.url)
    for key in KEYS[:4]:
        store.put(key, sealed(b"record"))
    assert store.flush(10)
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    store.ram.delete(KEYS[3:4])
    store.used(KEYS[:4])
    wait_until(lambda: store.redis.contains(KEYS[:4]) == [True, True, True, False])
    assert store.flush(10) and store.ram.open_leases == 0


def test_what_is_used_while_redis_is_down_is_renewed_the_next_time(
    redis_server: Any, make_store: Any, wait_until: Any
) -> None:
    store = make_store(redis_server.url)
    redis_server.stop()
    store.put(KEYS[0], sealed(b"record"))
    assert store.flush(10)
    store.used(KEYS[:1])
    wait_until(lambda: not store._renewed)
    redis_server.start()
    wait_until(lambda: store.stats()[1].up)
    store.used(KEYS[:1])
    wait_until(lambda: store.redis.contains(KEYS[:1]) == [True])


def use_and_wait(store: TieredStore, keys: Any) -> None:
    """Until what was asked of Redis by that is done."""
    store.used(keys)
    store._renewing.submit(lambda: None).result()


def test_what_is_deleted_while_it_is_written_again_stays_deleted(
    redis_server: Any, make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(redis_server.url)
    store.put(KEYS[0], sealed(b"record"))
    assert store.flush(10)
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    peek = store.ram.peek

    def delete_meanwhile(keys: Any) -> Any:
        leases = peek(keys)
        store.delete(keys)
        return leases

    monkeypatch.setattr(store.ram, "peek", delete_meanwhile)
    use_and_wait(store, KEYS[:1])
    assert store.flush(10) and store.contains(KEYS[:1]) == [None]


def test_what_is_written_again_while_it_is_deleted_stays_deleted(
    redis_server: Any, make_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(redis_server.url)
    store.put(KEYS[0], sealed(b"record"))
    assert store.flush(10)
    delete, renewed = store.redis.delete, threading.Event()

    def renew_meanwhile(keys: Any) -> int:
        deleted: int = delete(keys)
        if not renewed.is_set():
            renewed.set()
            use_and_wait(store, keys)
        return deleted

    monkeypatch.setattr(store.redis, "delete", renew_meanwhile)
    store.delete(KEYS[:1])
    assert renewed.is_set() and store.flush(10) and store.contains(KEYS[:1]) == [None]


def test_an_outage_drops_writes_and_serves_from_ram(
    redis_server: Any, make_store: Any, wait_until: Any
) -> None:
    store = make_store(redis_server.url)
    redis_server.stop()
    for key in KEYS:
        assert store.put(key, sealed(b"record"))
    assert store.flush(10)
    assert read(store, KEYS) == [("ram", sealed(b"record"))] * len(KEYS)
    assert store.stats()[1].dropped_writes == len(KEYS)
    assert not store.stats()[1].up

    redis_server.start()
    wait_until(lambda: store.stats()[1].up)
    store.delete(KEYS)
    store.put(KEYS[0], sealed(b"record"))
    assert store.flush(10)
    assert read(make_store(redis_server.url)) == [("redis", sealed(b"record"))]


def test_a_full_write_queue_drops_and_counts(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url, write_behind_bytes=3 * 10_000)
    redis_server.pause()
    try:
        for key in KEYS[:10]:
            assert store.put(key, bytes(10_000))
        assert not store.flush(0.05)
        assert store.ram.open_leases == 3
    finally:
        redis_server.resume()
    assert store.flush(10)
    assert store.stats()[1].dropped_writes == 7
    assert make_store(redis_server.url).contains(KEYS[:10]).count("redis") == 3
    assert store.ram.open_leases == 0


def test_close_writes_what_is_queued(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url, slots=64)
    for key in KEYS:
        store.put(key, sealed(os.urandom(50_000)))
    store.close()
    assert make_store(redis_server.url).contains(KEYS) == ["redis"] * len(KEYS)


def test_close_gives_up_on_a_redis_that_does_not_answer(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url, close_seconds=0.1)
    redis_server.pause()
    try:
        for key in KEYS[:3]:
            store.put(key, sealed(b"record"))
        store.close()
        assert store.ram.stats().entries == 0
    finally:
        redis_server.resume()


def test_an_error_of_the_verifier_itself_leaks_no_lease(
    redis_server: Any, make_store: Any, verify: CountingVerifier
) -> None:
    writer, store = make_store(redis_server.url), make_store(redis_server.url)
    for key in KEYS[:4]:
        writer.put(key, sealed(b"record"))
    assert writer.flush(10)
    store.put(KEYS[4], b"here")

    def fail_early_or_late(record: memoryview, digest: bytes) -> None:
        if digest != KEYS[0].digest:
            time.sleep(0.1)  # the other connection is still reading when the first one has failed
        raise ZeroDivisionError

    store._verify = fail_early_or_late
    with pytest.raises(ZeroDivisionError):
        store.get(KEYS[:5])
    assert store.flush(10)
    assert store.ram.open_leases == 0


def test_many_rounds_leave_nothing_behind(redis_server: Any, make_store: Any) -> None:
    """Readers and writers through an arena too small for them: right bytes, no lease or slot lost."""
    keys = chain_keys(make_namespace("model", "codec", "soak"), range(48 * 8), segment_tokens=8).segments
    store = make_store(redis_server.url, slots=12)
    failures: list[object] = []

    def work(seed: int) -> None:
        for step in range(60):
            start = (seed * 11 + step * 7) % (len(keys) - 3)
            for key, found in zip(keys[start : start + 3], read(store, keys[start : start + 3]), strict=True):
                body = sealed(key.digest * (300 + key.digest[0]))
                if found is None:
                    store.put(key, body)
                elif found[1] != body:
                    failures.append((seed, step, found[0]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.flush(10)
    assert failures == []
    assert store.ram.open_leases == 0
    assert store.ram.stats().entries <= 12
    store.delete(keys)
    ram = store.ram.stats()
    assert (ram.entries, ram.used_bytes) == (0, 0)
    with Redis(port=redis_server.port) as raw:
        assert raw.dbsize() == 0


def test_memory_stays_flat_over_many_rounds(redis_server: Any, make_store: Any) -> None:
    store = make_store(redis_server.url, slots=16)

    def resident_bytes_after(rounds: int) -> int:
        for number in range(rounds):
            key = SegmentKey(KEYS[0].namespace, number.to_bytes(32, "big"))
            store.put(key, sealed(bytes(60_000)))
            read(store, [key])
            store.delete([key])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    warm = resident_bytes_after(200)
    assert resident_bytes_after(1000) - warm < 16 << 20, "1000 records of 60 kB are 60 MB"
