"""The RAM tier: one block of memory, cut into equal slots, evicted by prefix-aware LRU.

Equal slots because a store of mixed sizes fragments after hours and then refuses records that would
fit; one block because the server can then register it with CUDA once. A slot is in one of three
states: free, linked (found by its key), or unlinked but leased (being written, or deleted and freed at
the last release).
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import mmap
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.tier import Counters, Fill, Lease, TierStats, copy_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

# A slot starts on a multiple of this: wide enough for any vector load of a GPU that reads the
# arena in place, and cheap for small models (a page would waste a fifth of a 20 kB slot).
SLOT_ALIGNMENT = 256


@dataclass(slots=True, eq=False)
class _Entry:
    """One record in a slot.

    rank: (tick, -depth). Eviction takes the smallest: the oldest prefix first, and within one
    prefix the deepest segment, because a prefix without its beginning restores nothing.
    """

    key: SegmentKey
    slot: int
    length: int
    rank: tuple[int, int] = (0, 0)
    leases: int = 0
    linked: bool = False


class _ArenaLease(Lease):
    __slots__ = ("_arena", "_entry", "_open")

    def __init__(self, arena: RamArena, entry: _Entry, data: memoryview, tier: str, address: int) -> None:
        super().__init__(data, tier, address)
        self._arena = arena
        self._entry = entry
        self._open = True

    def again(self) -> Lease:
        return self._arena._lease_again(self)

    def release(self) -> None:
        super().release()
        self._arena._release(self)


class Reservation:
    """A slot being written into in place. End it with `commit` or `abort`, once."""

    __slots__ = ("_arena", "_entry", "buffer")

    def __init__(self, arena: RamArena, entry: _Entry, buffer: memoryview) -> None:
        self.buffer = buffer
        self._arena = arena
        self._entry = entry

    def commit(self, found_in: str) -> tuple[Lease, bool]:
        """Make the record findable and lease it. If the key was put meanwhile, that record is leased.

        Returns the lease and whether it is of this record."""
        return self._arena._commit(self._entry, found_in)

    def abort(self) -> None:
        """Give the slot back."""
        self._arena._abort(self._entry)


class RamArena:
    """Fixed-size slots in one anonymous mapping. Thread-safe.

    slot_bytes:     the largest record, the codec's segment size
    capacity_bytes: memory to hold; rounded down to whole slots
    """

    name = "ram"

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        """Raises ValueError if not even one slot fits."""
        if slot_bytes <= 0:
            raise ValueError(f"slot_bytes must be positive, got {slot_bytes}")
        stride = -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        num_slots = capacity_bytes // stride
        if num_slots < 1:
            raise ValueError(f"an arena of {capacity_bytes} bytes holds no slot of {stride}; enlarge it")
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._stride = stride
        self._map = mmap.mmap(-1, num_slots * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Faster copies and a faster CUDA registration; a kernel built without it says EINVAL.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._map)
        self._readable = self.buffer.toreadonly()
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

        self._lock = threading.Lock()
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[SegmentKey, _Entry] = {}
        # Pins belong to keys, not to entries: pinning and unpinning stay symmetric when a record is
        # deleted, refused or brought back in between.
        self._pins: Counter[SegmentKey] = Counter()
        # Candidates for eviction. An item is stale when its entry has been touched, leased, pinned
        # or unlinked since; stale items are skipped when they surface.
        self._idle: list[tuple[tuple[int, int], int, _Entry]] = []
        self._offers = itertools.count()  # breaks ties of rank, so that entries are never compared
        self._tick = 0
        self._open_leases = 0
        self._counters = Counters()

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        with self._lock:
            return self._get([self._entries.get(key) for key in keys])

    def get_all(self, keys: Sequence[SegmentKey]) -> list[Lease] | None:
        """Lease these records if all of them are here; else none, and nothing is counted."""
        with self._lock:
            entries = [self._entries.get(key) for key in keys]
            return None if None in entries else [lease for lease in self._get(entries) if lease]

    def peek(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        """Lease what is here, as `get` does, without counting as a use."""
        with self._lock:
            entries = [self._entries.get(key) for key in keys]
            return [self._lease(entry, self.name) if entry else None for entry in entries]

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Copy a record into a slot. False when every slot is leased or pinned.

        Raises ValueError if the record is larger than a slot.
        """
        lease, _ = self.insert(key, *copy_of(record))
        if lease is None:
            return False
        lease.release()
        return True

    def reserve(self, key: SegmentKey, num_bytes: int) -> Reservation | None:
        """Take a slot to write a record into in place; None when every slot is leased or pinned.

        Raises ValueError if the record is larger than a slot.
        """
        with self._lock:
            entry = self._take_slot(key, num_bytes)
            if entry is None:
                return None
            # Unlinked and leased: nobody finds it, and nobody else gets its slot.
            entry.leases += 1
            self._open_leases += 1
            start = entry.slot * self._stride
            return Reservation(self, entry, self.buffer[start : start + num_bytes])

    def insert(self, key: SegmentKey, num_bytes: int, fill: Fill) -> tuple[Lease | None, bool]:
        """Put a record that `fill` writes where it will lie, unless there is one, and lease it before
        anything can evict it.

        Returns the lease of what is stored now (None: refused) and whether this call stored it.
        Raises ValueError if the record is larger than a slot, and what `fill` raises; then it is not stored.
        """
        with self._lock:
            if (present := self._entries.get(key)) is not None:
                # Many prompts begin alike. Who puts their beginning again uses it, and what it puts behind
                # it is new, not as old as the first of them.
                present.rank = max(present.rank, self._rank_of_new(key))
                return self._lease(present, self.name), False
        started = time.perf_counter()
        reservation = self.reserve(key, num_bytes)
        if reservation is None:
            return None, False
        try:
            fill(reservation.buffer)  # without the lock: others read and write their records meanwhile
        except BaseException:
            reservation.abort()
            raise
        committed = reservation.commit(self.name)
        with self._lock:
            self._counters.write_seconds += time.perf_counter() - started
        return committed

    def contains(self, keys: Sequence[SegmentKey]) -> list[bool]:
        with self._lock:
            return [key in self._entries for key in keys]

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        with self._lock:
            entries = [entry for key in keys if (entry := self._entries.pop(key, None))]
            for entry in entries:
                self._unlink(entry)
            return len(entries)

    def pin(self, keys: Sequence[SegmentKey]) -> None:
        """Keep these records from eviction, now or when they arrive. Pins count; unpin undoes one."""
        with self._lock:
            self._pins.update(keys)

    def unpin(self, keys: Sequence[SegmentKey]) -> None:
        """Undo one pin of each key; a key without pins is left alone."""
        with self._lock:
            for key in keys:
                if self._pins[key] > 1:
                    self._pins[key] -= 1
                    continue
                del self._pins[key]
                if entry := self._entries.get(key):
                    self._offer(entry)

    def unpinned(self, keys: Sequence[SegmentKey]) -> list[SegmentKey]:
        """Those of these keys that have no pin."""
        with self._lock:
            return [key for key in keys if key not in self._pins]

    def stats(self) -> TierStats:
        with self._lock:
            return self._counters.as_stats(
                name=self.name,
                up=True,
                used_bytes=(self.num_slots - len(self._free)) * self._stride,
                capacity_bytes=self.num_slots * self._stride,
                entries=len(self._entries),
                pinned=sum(key in self._entries for key in self._pins),
            )

    @property
    def open_leases(self) -> int:
        """Leases handed out and not yet released; zero when nobody works."""
        with self._lock:
            return self._open_leases

    def close(self) -> None:
        """Forget every record. The memory goes back when the last view of it is gone."""
        with self._lock:
            for entry in self._entries.values():
                self._unlink(entry)
            self._entries.clear()

    # Below here the lock is held; `_commit`, `_lease_again`, `_release` and `_abort` take it.

    def _get(self, entries: Sequence[_Entry | None]) -> list[Lease | None]:
        """entries: of a prompt's records, in order; None is a miss."""
        started = time.perf_counter()
        leases: list[Lease | None] = []
        self._tick += 1
        for depth, entry in enumerate(entries):
            if entry is None:
                self._counters.misses += 1
                leases.append(None)
                continue
            entry.rank = (self._tick, -depth)
            self._counters.hits += 1
            self._counters.read_bytes += entry.length
            leases.append(self._lease(entry, self.name))
        self._counters.read_seconds += time.perf_counter() - started
        return leases

    def _take_slot(self, key: SegmentKey, num_bytes: int) -> _Entry | None:
        """Find a slot, evicting if need be, for a record that nobody can find yet."""
        if num_bytes > self.slot_bytes:
            raise ValueError(f"a record of {num_bytes} bytes does not fit a slot of {self.slot_bytes}")
        if not self._free and not self._evict_one():
            self._counters.dropped_writes += 1
            return None
        return _Entry(key, self._free.pop(), num_bytes)

    def _link(self, entry: _Entry) -> None:
        """Let an entry be found by its key, which must be free."""
        entry.linked = True
        entry.rank = self._rank_of_new(entry.key)
        self._entries[entry.key] = entry
        self._counters.write_bytes += entry.length

    def _commit(self, entry: _Entry, found_in: str) -> tuple[Lease, bool]:
        """Link a reserved entry, unless another one was first, and lease what is there."""
        with self._lock:
            present = self._entries.get(entry.key)
            if present is None:
                self._link(entry)
            lease = self._lease(present or entry, found_in)
            self._give_back(entry)
            return lease, present is None

    def _rank_of_new(self, key: SegmentKey) -> tuple[int, int]:
        """Join the parent's prefix, one deeper; without a parent here, begin a new prefix."""
        if key.parent is not None and (parent := self._entries.get(SegmentKey(key.namespace, key.parent))):
            tick, negative_depth = parent.rank
            return tick, negative_depth - 1
        self._tick += 1
        return self._tick, 0

    def _lease(self, entry: _Entry, found_in: str) -> Lease:
        entry.leases += 1
        self._open_leases += 1
        start = entry.slot * self._stride
        data = self._readable[start : start + entry.length]
        return _ArenaLease(self, entry, data, found_in, self._address + start)

    def _lease_again(self, lease: _ArenaLease) -> Lease:
        with self._lock:
            assert lease._open
            return self._lease(lease._entry, lease.tier)

    def _release(self, lease: _ArenaLease) -> None:
        with self._lock:
            if lease._open:
                lease._open = False
                self._give_back(lease._entry)

    def _abort(self, entry: _Entry) -> None:
        with self._lock:
            self._give_back(entry)

    def _give_back(self, entry: _Entry) -> None:
        """End one lease."""
        entry.leases -= 1
        self._open_leases -= 1
        if entry.linked:
            self._offer(entry)
        elif entry.leases == 0:
            self._free.append(entry.slot)

    def _unlink(self, entry: _Entry) -> None:
        """Make an entry unreachable; its slot is free now, or at the last release."""
        entry.linked = False
        if entry.leases == 0:
            self._free.append(entry.slot)

    def _is_idle(self, entry: _Entry) -> bool:
        return entry.linked and entry.leases == 0 and entry.key not in self._pins

    def _offer(self, entry: _Entry) -> None:
        """Make an entry a candidate for eviction, if it is idle."""
        if not self._is_idle(entry):
            return
        if len(self._idle) > 2 * self.num_slots + 16:
            # More stale items than live ones: keep the live ones only, this entry among them.
            self._idle = [(e.rank, next(self._offers), e) for e in self._entries.values() if self._is_idle(e)]
            heapq.heapify(self._idle)
        else:
            heapq.heappush(self._idle, (entry.rank, next(self._offers), entry))

    def _evict_one(self) -> bool:
        while self._idle:
            rank, _, entry = heapq.heappop(self._idle)
            if rank == entry.rank and self._is_idle(entry):
                del self._entries[entry.key]
                self._unlink(entry)
                self._counters.evictions += 1
                return True
        return False
