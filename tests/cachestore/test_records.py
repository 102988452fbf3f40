from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from redis import Redis

from aquifer.cachestore import RecordStore
from aquifer.cachestore import records as records_module


@pytest.fixture(params=["ram", "redis"])
def records(request: pytest.FixtureRequest) -> RecordStore:
    if request.param == "ram":
        return RecordStore(None)
    server = request.getfixturevalue("redis_server")
    return RecordStore(request.getfixturevalue("make_link")(server.url))


# Alike with and without Redis


def test_a_record_comes_back_until_it_is_deleted(records: RecordStore) -> None:
    assert records.get("contract-17") is None
    records.put("contract-17", b"\x00blob\xff", None)
    assert records.get("contract-17") == b"\x00blob\xff"
    assert records.delete("contract-17")
    assert records.get("contract-17") is None
    assert not records.delete("contract-17")


def test_the_latest_put_counts(records: RecordStore) -> None:
    records.put("name", b"old", 60)
    records.put("name", b"new", None)
    assert records.get("name") == b"new"
    assert records.list("") == ["name"]


def test_a_deleted_name_can_be_used_again(records: RecordStore) -> None:
    records.put("name", b"old", None)
    records.delete("name")
    records.put("name", b"new", None)
    assert records.get("name") == b"new"
    assert records.list("na") == ["name"]


def test_list_returns_the_names_with_the_prefix_sorted(records: RecordStore) -> None:
    for name in ("b/2", "a/2", "a/1", "a*", "ä/ü", "gone"):
        records.put(name, b"x", 60)
    records.delete("gone")
    assert records.list("a/") == ["a/1", "a/2"]
    assert records.list("") == ["a*", "a/1", "a/2", "b/2", "ä/ü"]
    assert records.list("c") == []


def test_an_expired_record_is_gone_and_not_listed(records: RecordStore, wait_until: Any) -> None:
    records.put("short", b"x", 0.05)
    records.put("long", b"x", 60)
    wait_until(lambda: records.get("short") is None)
    assert records.list("") == ["long"]


@pytest.mark.parametrize(("blob", "ttl"), [(b"", None), (b"x", 0), (b"x", -1)])
def test_an_empty_blob_or_lifetime_is_refused(records: RecordStore, blob: bytes, ttl: float | None) -> None:
    with pytest.raises(ValueError, match="name"):
        records.put("name", blob, ttl)


# RAM alone


def test_ram_is_bounded_and_the_least_recently_used_goes_first() -> None:
    records = RecordStore(None, ram_bytes=100)
    records.put("a", bytes(40), None)
    records.put("b", bytes(40), None)
    records.get("a")
    records.put("c", bytes(40), None)
    assert records.list("") == ["a", "c"]
    with pytest.raises(ValueError, match="101 bytes"):
        records.put("d", bytes(101), None)


# Redis and several servers


def test_records_are_shared_between_servers(redis_server: Any, make_link: Any) -> None:
    here, there = (RecordStore(make_link(redis_server.url)) for _ in range(2))
    here.put("name", b"blob", 60)
    assert there.get("name") == b"blob"
    assert there.list("") == ["name"]
    here.put("name", b"newer", 60)
    assert there.get("name") == b"newer"
    assert here.delete("name")
    assert there.get("name") is None
    assert there.list("") == []


def test_the_index_is_used_now_and_then(redis_server: Any, make_link: Any, wait_until: Any) -> None:
    records = RecordStore(make_link(redis_server.url))
    records.put("name", b"blob", None)
    with Redis(port=redis_server.port) as raw:
        wait_until(lambda: raw.object("idletime", "aquifer:record-names") >= 1)
        records.touch()
        assert raw.object("idletime", "aquifer:record-names") == 0


def test_records_expire_in_redis_too(redis_server: Any, make_link: Any) -> None:
    records = RecordStore(make_link(redis_server.url))
    records.put("name", b"blob", 60)
    records.put("for ever", b"blob", None)
    with Redis(port=redis_server.port) as raw:
        assert (
            0 < raw.ttl("aquifer:r:name") <= 60 and raw.zscore("aquifer:record-names", "name") > time.time()
        )
        assert raw.ttl("aquifer:r:for ever") == -1


def test_an_outage_is_served_from_ram_and_made_up_for(
    redis_server: Any, make_link: Any, wait_until: Any
) -> None:
    link = make_link(redis_server.url)
    here, there = RecordStore(link), RecordStore(make_link(redis_server.url))
    here.put("kept", b"old", None)
    redis_server.stop()
    assert here.get("kept") == b"old"
    here.put("kept", b"new", None)
    here.put("made", b"in the dark", 60)
    assert here.list("") == ["kept", "made"]
    assert here.get("made") == b"in the dark"
    redis_server.start()
    wait_until(lambda: link.up)
    assert here.list("") == ["kept", "made"]
    wait_until(lambda: there.get("made") == b"in the dark")
    assert there.get("kept") == b"new"


def test_a_change_during_an_outage_beats_what_redis_still_holds(
    redis_server: Any, make_link: Any, wait_until: Any
) -> None:
    link = make_link(redis_server.url, timeout_seconds=0.2)
    here, there = RecordStore(link), RecordStore(make_link(redis_server.url))
    here.put("deleted", b"old", None)
    here.put("changed", b"old", None)
    redis_server.pause()
    try:
        assert here.delete("deleted")
        here.put("changed", b"new", None)
        assert here.get("deleted") is None
    finally:
        redis_server.resume()
    wait_until(lambda: link.up)
    assert here.list("") == ["changed"]
    assert there.get("deleted") is None
    assert there.get("changed") == b"new"


def test_a_redis_that_came_up_empty_gets_the_records_back(
    redis_server: Any, make_link: Any, wait_until: Any
) -> None:
    link = make_link(redis_server.url)
    records = RecordStore(link)
    records.put("name", b"blob", None)
    redis_server.stop()
    redis_server.start()
    assert records.get("name") == b"blob"
    wait_until(lambda: link.up)
    assert records.get("name") == b"blob"
    assert RecordStore(make_link(redis_server.url)).get("name") == b"blob"


def test_a_copy_that_was_not_confirmed_for_long_is_not_believed(
    redis_server: Any, make_link: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordStore(make_link(redis_server.url))
    records.put("name", b"blob", None)
    with Redis(port=redis_server.port) as raw:
        raw.flushall()
    monkeypatch.setattr(records_module, "BELIEVED_SECONDS", -1)
    assert records.get("name") is None


@pytest.mark.parametrize("lifetime", [None, 60])
def test_an_evicted_record_comes_back(lifetime: float | None, redis_server: Any, make_link: Any) -> None:
    here, there = (RecordStore(make_link(redis_server.url)) for _ in range(2))
    there.put("name", b"older", None)
    here.put("name", b"blob", lifetime)
    with Redis(port=redis_server.port) as raw:
        raw.delete("aquifer:r:name")
    assert there.get("name") is None, "its copy is of the put before"
    assert here.get("name") == there.get("name") == b"blob"
    assert there.list("") == ["name"]


def test_two_puts_right_after_each_other_are_told_apart(
    redis_server: Any, make_link: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (RecordStore(make_link(redis_server.url)) for _ in range(2))
    clock = itertools.count(time.time(), 10e-6)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    there.put("name", b"older", None)
    here.put("name", b"newer", None)
    with Redis(port=redis_server.port) as raw:
        raw.delete("aquifer:r:name")
    assert there.get("name") is None


@pytest.mark.parametrize("reborn", [False, True])
@pytest.mark.parametrize("change", ["deletes", "deletes, puts and lets expire", "lets expire", "evicts"])
def test_a_copy_of_what_another_server_ended_does_not_come_back(
    change: str, reborn: bool, redis_server: Any, make_link: Any, wait_until: Any
) -> None:
    here, there = (RecordStore(make_link(redis_server.url)) for _ in range(2))
    with Redis(port=redis_server.port) as raw:
        if reborn:  # into an index that was lost
            there.put("another", b"blob", None)
            raw.flushall()
            here.put("name", b"old", None)
        else:
            here.put("name", b"old", None)
        if "deletes" in change:
            assert there.delete("name")
        if "expire" in change:
            there.put("name", b"newer", 0.05)
            wait_until(lambda: not raw.exists("aquifer:r:name"))
        if change == "evicts":
            there.put("name", b"newer", None)
            raw.delete("aquifer:r:name")
        assert here.get("name") is None
        assert not raw.exists("aquifer:r:name")


def test_a_redis_that_lost_its_index_keeps_its_records(redis_server: Any, make_link: Any) -> None:
    here, there = (RecordStore(make_link(redis_server.url)) for _ in range(2))
    here.put("name", b"blob", None)
    with Redis(port=redis_server.port) as raw:
        raw.delete("aquifer:record-names")
        assert there.get("name") == here.get("name") == b"blob"
        there.put("another", b"blob", None)  # which draws an epoch
        assert there.delete("name")
        assert here.get("name") is None


def test_a_value_that_is_no_record_reads_as_none(redis_server: Any, make_link: Any) -> None:
    records = RecordStore(make_link(redis_server.url))
    with Redis(port=redis_server.port) as raw:
        raw.rpush("aquifer:r:name", b"a list")
    assert records.get("name") is None


def test_a_put_that_redis_has_no_memory_for_beats_what_it_still_holds(
    redis_server: Any, make_link: Any
) -> None:
    records = RecordStore(make_link(redis_server.url))
    records.put("name", b"old", None)
    with Redis(port=redis_server.port) as raw:
        raw.config_set("maxmemory", 1)
        records.put("name", b"new", None)
        assert records.get("name") == b"new"
        raw.config_set("maxmemory", 0)
    assert records.get("name") == b"new"
    assert RecordStore(make_link(redis_server.url)).get("name") == b"new"


def test_a_put_forgotten_during_an_outage_is_not_taken_for_a_delete(
    redis_server: Any, make_link: Any, wait_until: Any
) -> None:
    link = make_link(redis_server.url, timeout_seconds=0.2)
    records = RecordStore(link, ram_bytes=100)
    records.put("a", b"old", None)
    redis_server.pause()
    try:
        records.put("a", b"n" * 60, None)
        records.put("b", b"n" * 60, None)
    finally:
        redis_server.resume()
    wait_until(lambda: link.up)
    assert records.get("b") == b"n" * 60
    assert records.get("a") in {b"old", b"n" * 60}, "Redis may have taken the put it did not confirm"
