"""The arena against a model of it: random operations, checked after each one."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from aquifer.cachestore import Lease, RamArena, SegmentKey, chain_keys, make_namespace
from aquifer.cachestore.arena import Reservation

SLOTS = 5
SLOT_BYTES = 256
NAMESPACE = make_namespace("model", "codec", "")
# Two prefixes that share their beginning, and an unrelated one.
TOKENS = [list(range(48)), [*range(24), *range(1000, 1024)], list(range(2000, 2048))]
KEYS = sorted(
    {key for tokens in TOKENS for key in chain_keys(NAMESPACE, tokens, segment_tokens=8).segments},
    key=lambda key: key.digest,
)
some_keys = st.lists(st.sampled_from(KEYS), max_size=4)


class ArenaModel(RuleBasedStateMachine):
    leases: Bundle[tuple[Lease, bytes]] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.arena = RamArena(SLOTS * SLOT_BYTES, SLOT_BYTES)
        self.last_put: dict[SegmentKey, bytes] = {}
        self.pins: dict[SegmentKey, int] = {}
        self.open: list[tuple[Lease, SegmentKey, bytes]] = []
        self.reserved: list[tuple[Reservation, SegmentKey, bytes]] = []
        self.number = 0

    def resident(self) -> set[SegmentKey]:
        return {key for key, here in zip(KEYS, self.arena.contains(KEYS), strict=True) if here}

    def leased_now(self) -> set[SegmentKey]:
        """Keys whose present record is leased, not only one that was deleted under its lease."""
        return {key for _, key, record in self.open if self.last_put[key] == record} & self.resident()

    def unlinked_slots(self) -> int:
        """Slots of deleted records that are still leased, and of records being written."""
        linked = {self.last_put[key] for key in self.resident()}
        return len({record for _, _, record in self.open} - linked) + len(self.reserved)

    def evictable(self) -> set[SegmentKey]:
        leased = self.leased_now()
        return {key for key in self.resident() if key not in leased and not self.pins.get(key)}

    def free_slots(self) -> int:
        return SLOTS - len(self.resident()) - self.unlinked_slots()

    def new_record(self, size: int) -> bytes:
        self.number += 1
        return (b"%06d " % self.number * SLOT_BYTES)[:size]  # at least the number: never twice the same

    @rule(key=st.sampled_from(KEYS), size=st.integers(6, SLOT_BYTES))
    def put(self, key: SegmentKey, size: int) -> None:
        before, evictable, free_slots = self.resident(), self.evictable(), self.free_slots()
        record = self.new_record(size)
        stored = self.arena.put(key, record)
        after = self.resident()
        if key in before:
            assert stored
            assert after == before
            return
        assert stored == bool(free_slots or evictable)
        evicted = before - after
        assert len(evicted) == (stored and not free_slots)
        assert evicted <= evictable
        if stored:
            self.last_put[key] = record
        assert after == (before - evicted) | ({key} if stored else set())

    @rule(key=st.sampled_from(KEYS), size=st.integers(6, SLOT_BYTES))
    def reserve(self, key: SegmentKey, size: int) -> None:
        before, evictable, free_slots = self.resident(), self.evictable(), self.free_slots()
        reservation = self.arena.reserve(key, size)
        assert (reservation is not None) == bool(free_slots or evictable)
        evicted = before - self.resident()
        assert len(evicted) == (reservation is not None and not free_slots)
        assert evicted <= evictable
        if reservation is not None:
            record = self.new_record(size)
            reservation.buffer[:] = record
            self.reserved.append((reservation, key, record))

    @precondition(lambda self: self.reserved)
    @rule(target=leases, data=st.data())
    def commit(self, data: st.DataObject) -> tuple[Lease, bytes]:
        place = data.draw(st.integers(0, len(self.reserved) - 1))
        before = self.resident()
        reservation, key, record = self.reserved.pop(place)
        lease, is_new = reservation.commit("redis")
        assert is_new == (key not in before)
        if key not in before:
            self.last_put[key] = record
        assert self.resident() == before | {key}
        self.open.append((lease, key, self.last_put[key]))
        return lease, self.last_put[key]

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        before = self.resident()
        self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))[0].abort()
        assert self.resident() == before

    @rule(target=leases, keys=some_keys)
    def get(self, keys: list[SegmentKey]) -> object:
        resident = self.resident()
        found = self.arena.get(keys)
        taken = []
        for key, lease in zip(keys, found, strict=True):
            assert (lease is not None) == (key in resident)
            if lease is not None:
                self.open.append((lease, key, self.last_put[key]))
                taken.append((lease, self.last_put[key]))
        return multiple(*taken)

    @rule(taken=consumes(leases))
    def release(self, taken: tuple[Lease, bytes]) -> None:
        lease, record = taken
        assert bytes(lease.data) == record
        lease.release()
        self.open = [item for item in self.open if item[0] is not lease]

    @rule(keys=some_keys)
    def delete(self, keys: list[SegmentKey]) -> None:
        expected = len(self.resident() & set(keys))
        assert self.arena.delete(keys) == expected
        assert not self.resident() & set(keys)

    @rule(keys=some_keys)
    def pin(self, keys: list[SegmentKey]) -> None:
        self.arena.pin(keys)
        for key in keys:
            self.pins[key] = self.pins.get(key, 0) + 1

    @rule(keys=some_keys)
    def unpin(self, keys: list[SegmentKey]) -> None:
        self.arena.unpin(keys)
        for key in keys:
            self.pins[key] = max(0, self.pins.get(key, 0) - 1)

    @invariant()
    def no_leased_byte_has_changed(self) -> None:
        for lease, _, record in self.open:
            assert bytes(lease.data) == record

    @invariant()
    def accounts_balance(self) -> None:
        stats = self.arena.stats()
        assert self.arena.open_leases == len(self.open) + len(self.reserved)
        assert stats.entries == len(self.resident()) <= SLOTS
        assert stats.used_bytes == (stats.entries + self.unlinked_slots()) * SLOT_BYTES
        assert stats.pinned == sum(1 for key in self.resident() if self.pins.get(key))

    def teardown(self) -> None:
        for lease, _, _ in self.open:
            lease.release()
        for reservation, _, _ in self.reserved:
            reservation.abort()
        self.arena.delete(KEYS)
        stats = self.arena.stats()
        assert (self.arena.open_leases, stats.entries, stats.used_bytes) == (0, 0, 0)
        # Every slot is free and is handed out once.
        self.arena.unpin([key for key, count in self.pins.items() for _ in range(count)])
        for number, key in enumerate(KEYS[:SLOTS]):
            assert self.arena.put(key, b"%d" % number * 100)
        for number, lease in enumerate(self.arena.get(KEYS[:SLOTS])):
            assert lease is not None
            assert bytes(lease.data) == b"%d" % number * 100


ArenaModel.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestArenaModel = ArenaModel.TestCase
