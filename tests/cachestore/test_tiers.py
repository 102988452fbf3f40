"""What every tier promises, checked on each of them with the same tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aquifer.cachestore import (
    RamArena,
    RedisLink,
    RedisTier,
    SegmentKey,
    TieredStore,
    chain_keys,
    make_namespace,
)

SLOT_BYTES = 5 << 20
NAMESPACE = make_namespace("model", "codec", "")
KEYS = chain_keys(NAMESPACE, range(64), segment_tokens=8).segments


def accept_all(record: memoryview, digest: bytes) -> None:
    pass


@pytest.fixture(params=["ram", "redis", "tiered"])
def tier(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "ram":
        tier: Any = RamArena(8 * SLOT_BYTES, SLOT_BYTES)
    else:
        link = RedisLink(request.getfixturevalue("redis_server").url)
        tier = RedisTier(link, max_record_bytes=SLOT_BYTES)
    if request.param == "tiered":
        tier = TieredStore(RamArena(8 * SLOT_BYTES, SLOT_BYTES), tier, accept_all)
    yield tier
    tier.close()


def read(tier: Any, keys: tuple[SegmentKey, ...] | list[SegmentKey]) -> list[bytes | None]:
    records = []
    for lease in tier.get(keys):
        if lease is None:
            records.append(None)
            continue
        with lease:
            records.append(bytes(lease.data))
    return records


def holds(tier: Any, keys: tuple[SegmentKey, ...]) -> list[bool]:
    return [bool(found) for found in tier.contains(keys)]


def test_what_was_never_put_is_a_miss(tier: Any) -> None:
    assert read(tier, KEYS) == [None] * len(KEYS)
    assert holds(tier, KEYS) == [False] * len(KEYS)


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 64, (2 << 20) - 63, (2 << 20) + 1, SLOT_BYTES])
def test_a_record_comes_back_whole_whatever_its_size(tier: Any, size: int) -> None:
    record = os.urandom(size)
    assert tier.put(KEYS[0], record)
    assert read(tier, KEYS[:1]) == [record]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_put(tier: Any, kind: type) -> None:
    assert tier.put(KEYS[0], kind(b"record"))
    assert read(tier, KEYS[:1]) == [b"record"]


def test_records_come_back_in_the_order_asked_for_with_holes_as_misses(tier: Any) -> None:
    for index in (0, 2, 3, 6):
        assert tier.put(KEYS[index], b"%d" % index)
    assert read(tier, KEYS[::-1]) == [None, b"6", None, None, b"3", b"2", None, b"0"]
    assert holds(tier, KEYS) == [True, False, True, True, False, False, True, False]


def test_the_same_key_asked_for_twice_comes_back_twice(tier: Any) -> None:
    tier.put(KEYS[0], b"record")
    assert read(tier, [KEYS[0], KEYS[1], KEYS[0]]) == [b"record", None, b"record"]


def test_asking_for_nothing_is_fine(tier: Any) -> None:
    assert (tier.get([]), list(tier.contains([])), tier.delete([])) == ([], [], 0)


def test_the_first_writer_wins(tier: Any) -> None:
    assert tier.put(KEYS[0], b"first")
    assert tier.put(KEYS[0], b"second")
    assert read(tier, KEYS[:1]) == [b"first"]


def test_get_after_delete_is_a_miss_and_the_key_can_be_put_again(tier: Any) -> None:
    tier.put(KEYS[0], b"first")
    tier.put(KEYS[1], b"other")
    assert tier.delete([KEYS[0], KEYS[7]]) == 1
    assert read(tier, KEYS[:2]) == [None, b"other"]
    assert tier.put(KEYS[0], b"second")
    assert read(tier, KEYS[:1]) == [b"second"]


def test_a_lease_outlives_the_deletion_of_its_record(tier: Any) -> None:
    tier.put(KEYS[0], b"record")
    (lease,) = tier.get(KEYS[:1])
    tier.delete(KEYS[:1])
    tier.put(KEYS[1], b"another")
    assert bytes(lease.data) == b"record"
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="released"):
        _ = lease.data


def test_a_record_above_the_limit_is_refused_with_both_numbers(tier: Any) -> None:
    with pytest.raises(ValueError, match=rf"{SLOT_BYTES + 1} bytes .* {SLOT_BYTES}"):
        tier.put(KEYS[0], bytes(SLOT_BYTES + 1))


def test_two_salts_do_not_see_each_other(tier: Any) -> None:
    ids = range(8)
    (mine,) = chain_keys(make_namespace("model", "codec", "mine"), ids, segment_tokens=8).segments
    (yours,) = chain_keys(make_namespace("model", "codec", "yours"), ids, segment_tokens=8).segments
    tier.put(mine, b"secret")
    assert read(tier, [yours, mine]) == [None, b"secret"]


def test_hits_misses_and_bytes_are_counted(tier: Any) -> None:
    tier.put(KEYS[0], bytes(1000))
    read(tier, KEYS[:3])
    stats = tier.stats()[0] if isinstance(tier, TieredStore) else tier.stats()
    assert (stats.hits, stats.misses) == (1, 2)
    assert (stats.read_bytes, stats.write_bytes) == (1000, 1000)
    assert stats.read_seconds > 0
    assert stats.write_seconds > 0
    assert stats.entries == 1
    assert stats.used_bytes > 0
    assert (stats.up, stats.errors, stats.corrupt, stats.dropped_writes) == (True, 0, 0, 0)


def test_readers_writers_and_deleters_never_see_wrong_bytes(tier: Any) -> None:
    """Every record is made from its key alone, so any mix-up shows."""
    keys = chain_keys(NAMESPACE, range(24 * 8), segment_tokens=8).segments
    failures: list[str] = []

    def record_of(key: SegmentKey) -> bytes:
        return key.digest * (8192 + key.digest[0] * 64)

    def work(seed: int) -> None:
        for step in range(30):
            start = (seed * 7 + step * 5) % len(keys)
            chosen = keys[start : start + 4]
            for key, lease in zip(chosen, tier.get(chosen), strict=True):
                if lease is None:
                    tier.put(key, record_of(key))
                    continue
                with lease:
                    if bytes(lease.data) != record_of(key):
                        failures.append(f"worker {seed}, step {step}: wrong bytes")
            if step % 7 == seed:
                tier.delete(chosen[:1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert failures == []
