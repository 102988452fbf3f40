from __future__ import annotations

import ctypes

import pytest

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import SegmentKey, chain_keys, make_namespace
from aquifer.cachestore.tier import copy_of, lease_of_own

NAMESPACE = make_namespace("model", "codec", "")


def chain(length: int, first_token: int = 0) -> tuple[SegmentKey, ...]:
    return chain_keys(NAMESPACE, range(first_token, first_token + 8 * length), segment_tokens=8).segments


def held(arena: RamArena, keys: tuple[SegmentKey, ...]) -> list[int]:
    return [index for index, found in enumerate(arena.contains(keys)) if found]


def touch(arena: RamArena, keys: tuple[SegmentKey, ...]) -> None:
    for lease in arena.get(keys):
        assert lease is not None
        lease.release()


def test_a_prefix_put_in_order_loses_its_end_first() -> None:
    arena = RamArena(4 * 256, 256)
    old, new = chain(4), chain(3, first_token=1000)
    for key in old:
        assert arena.put(key, b"old")
    for evicted, key in enumerate(new, start=1):
        assert arena.put(key, b"new")
        assert held(arena, old) == list(range(4 - evicted))


def test_a_prefix_got_again_outlives_a_newer_one_and_loses_its_end_first() -> None:
    arena = RamArena(6 * 256, 256)
    used, unused, new = chain(3), chain(3, 1000), chain(5, 2000)
    for key in used + unused:
        arena.put(key, b"x")
    touch(arena, used)
    for key in new[:3]:
        arena.put(key, b"x")
    assert (held(arena, used), held(arena, unused)) == ([0, 1, 2], [])
    for key in new[3:]:
        arena.put(key, b"x")
    assert held(arena, used) == [0]


def test_what_is_put_behind_an_old_beginning_is_new() -> None:
    arena = RamArena(8 * 256, 256)
    documents = [
        chain_keys(NAMESPACE, [1, 2, 3, 4, *range(1000 * number, 1000 * number + 44)], segment_tokens=8)
        for number in (1, 2, 3)
    ]
    for document in documents:
        assert document.sinks is not None
        for key in (document.sinks, *document.segments):
            assert arena.put(key, b"x")
    old, middle, new = (held(arena, document.segments) for document in documents)
    assert (old, middle, new) == ([], [0], [0, 1, 2, 3, 4, 5])
    assert arena.contains([key for document in documents if (key := document.sinks)]) == [True] * 3


def test_release_order_does_not_decide_what_is_evicted() -> None:
    arena = RamArena(3 * 256, 256)
    keys, new = chain(3), chain(1, 1000)
    for key in keys:
        arena.put(key, b"x")
    for lease in arena.get(keys):
        assert lease is not None
        lease.release()
    assert arena.put(new[0], b"x")
    assert held(arena, keys) == [0, 1]


def test_a_leased_slot_is_neither_evicted_nor_overwritten() -> None:
    arena = RamArena(2 * 256, 256)
    first, second, third = chain(1)[0], chain(1, 1000)[0], chain(1, 2000)[0]
    arena.put(first, b"first")
    arena.put(second, b"second")
    (lease,) = arena.get([first])
    assert lease is not None
    assert arena.put(third, b"third")
    assert arena.contains([first, second, third]) == [True, False, True]
    assert bytes(lease.data) == b"first"
    lease.release()


def test_deleting_a_leased_record_unlinks_it_now_and_frees_its_slot_later() -> None:
    arena = RamArena(256, 256)
    old, new = chain(1)[0], chain(1, 1000)[0]
    arena.put(old, b"old")
    (lease,) = arena.get([old])
    assert lease is not None
    assert arena.delete([old]) == 1
    assert arena.get([old]) == [None]
    assert not arena.put(new, b"new")
    assert bytes(lease.data) == b"old"
    lease.release()
    assert arena.put(new, b"new")


def test_a_deleted_record_keeps_its_slot_until_the_last_of_its_leases() -> None:
    arena = RamArena(256, 256)
    old, new = chain(1)[0], chain(1, 1000)[0]
    arena.put(old, b"old")
    first, second = arena.get([old, old])
    assert first is not None
    assert second is not None
    arena.delete([old])
    first.release()
    assert not arena.put(new, b"new")
    assert bytes(second.data) == b"old"
    second.release()
    assert arena.put(new, b"new")
    assert arena.stats().used_bytes == 256


def test_when_everything_is_leased_or_pinned_a_put_is_refused_and_counted() -> None:
    arena = RamArena(2 * 256, 256)
    pinned, leased, new = chain(1)[0], chain(1, 1000)[0], chain(1, 2000)[0]
    arena.put(pinned, b"x")
    arena.put(leased, b"x")
    arena.pin([pinned])
    (lease,) = arena.get([leased])
    assert lease is not None
    assert not arena.put(new, b"x")
    assert (arena.stats().dropped_writes, arena.stats().pinned) == (1, 1)
    lease.release()
    assert arena.put(new, b"x")
    assert arena.contains([pinned, leased]) == [True, False]


def test_pins_are_counted_and_wait_for_records_to_come() -> None:
    arena = RamArena(256, 256)
    pinned, new = chain(1)[0], chain(1, 1000)[0]
    arena.pin([pinned])
    arena.pin([pinned])
    arena.put(pinned, b"x")
    arena.unpin([pinned])
    assert not arena.put(new, b"x")
    arena.unpin([pinned])
    arena.unpin([pinned])
    assert arena.put(new, b"x")


def test_releasing_twice_counts_once() -> None:
    arena = RamArena(256, 256)
    (key,) = chain(1)
    arena.put(key, b"x")
    (first,) = arena.get([key])
    (second,) = arena.get([key])
    assert first is not None
    assert second is not None
    first.release()
    first.release()
    assert arena.open_leases == 1
    assert not arena.put(chain(1, 1000)[0], b"y")
    second.release()
    assert arena.open_leases == 0


def test_a_released_lease_hides_its_bytes() -> None:
    arena = RamArena(256, 256)
    (key,) = chain(1)
    arena.put(key, b"x")
    (lease,) = arena.get([key])
    assert lease is not None
    with lease:
        assert lease.data.readonly
    with pytest.raises(ValueError, match="released"):
        _ = lease.data


def test_a_lease_says_where_its_bytes_lie() -> None:
    arena = RamArena(4 * 256, 256)
    keys = chain(3)
    arena.put(keys[0], b"first")
    reservation = arena.reserve(keys[1], 6)
    assert reservation is not None
    reservation.buffer[:] = b"second"
    second, _ = reservation.commit("redis")
    third, _ = arena.insert(keys[2], *copy_of(b"third"))
    (first,) = arena.get(keys[:1])
    for lease, body in ((first, b"first"), (second, b"second"), (third, b"third")):
        assert lease is not None and lease.address is not None and lease.data == body
        assert ctypes.string_at(lease.address, len(body)) == body
    assert lease_of_own(*copy_of(b"elsewhere"), "own").address is None


def test_all_of_some_records_are_leased_or_none() -> None:
    arena = RamArena(4 * 256, 256)
    keys = chain(4)
    for key in keys[:3]:
        arena.put(key, b"x")
    before = arena.stats()
    assert arena.get_all(keys) is None
    assert arena.stats() == before and arena.open_leases == 0
    leases = arena.get_all(keys[:3])
    assert leases is not None and [bytes(lease.data) for lease in leases] == [b"x"] * 3
    assert arena.open_leases == 3 and arena.stats().hits == before.hits + 3
    for lease in leases:
        lease.release()
    for key in chain(2, 1000):  # the prefix that was leased is the newest, and loses its end first
        arena.put(key, b"y")
    assert held(arena, keys) == [0, 1]
    assert arena.get_all([]) == []


def test_a_record_larger_than_a_slot_is_refused() -> None:
    arena = RamArena(1024, 300)
    with pytest.raises(ValueError, match="301 bytes does not fit a slot of 300"):
        arena.put(chain(1)[0], bytes(301))


def test_an_arena_without_room_for_one_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no slot"):
        RamArena(1000, 2000)


def test_capacity_is_whole_aligned_slots() -> None:
    arena = RamArena(10_000, 300)
    stats = arena.stats()
    assert arena.num_slots == 10_000 // 512
    assert stats.capacity_bytes == arena.num_slots * 512 == arena.buffer.nbytes


def test_bookkeeping_stays_bounded_when_records_are_only_read() -> None:
    arena = RamArena(4 * 256, 256)
    keys = chain(4)
    for key in keys:
        arena.put(key, b"x")
    for _ in range(1000):
        touch(arena, keys)
    assert len(arena._idle) <= 2 * arena.num_slots + 17


def test_a_record_is_written_in_place_while_others_use_the_arena() -> None:
    arena = RamArena(4 * 256, 256)
    there, new = chain(2)
    arena.put(there, b"there")

    def fill(target: memoryview) -> None:
        target[:] = b"new"
        assert held(arena, (there, new)) == [0]  # a lock held meanwhile would stop this for ever
        touch(arena, (there,))

    lease, is_new = arena.insert(new, 3, fill)
    assert lease is not None and is_new and bytes(lease.data) == b"new"
    lease.release()
    assert arena.open_leases == 0


def test_who_stores_a_record_while_another_one_writes_it_wins() -> None:
    arena = RamArena(2 * 256, 256)
    (key,) = chain(1)

    def fill(target: memoryview) -> None:
        target[:] = b"second"
        assert arena.put(key, b"first")

    lease, is_new = arena.insert(key, 6, fill)
    assert lease is not None and not is_new and bytes(lease.data) == b"first"
    lease.release()
    assert arena.stats().used_bytes == 256 and arena.open_leases == 0


def test_a_record_that_cannot_be_written_leaves_nothing_behind() -> None:
    arena = RamArena(256, 256)
    (key,) = chain(1)

    def fill(target: memoryview) -> None:
        raise OSError("no body")

    with pytest.raises(OSError, match="no body"):
        arena.insert(key, 6, fill)
    assert arena.stats().used_bytes == 0 and arena.open_leases == 0
    assert arena.put(key, b"later")
