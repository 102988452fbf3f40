"""The RAM tier: one block of memory, cut into equal slots, evicted by prefix-aware LRU.

Equal slots because a store of mixed sizes fragments after hours and then refuses records that would
fit; one block because the server can then register it with CUDA once. A slot is in one of three
states: free, linked (found by its key), or unlinked but still leased (deleted, freed at the last
release).
"""

from __future__ import annotations

import contextlib
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
from aquifer.cachestore.tier import Counters, Lease, TierStats

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
    rank: tuple[int, int]
    leases: int = 0
    linked: bool = True


class _ArenaLease(Lease):
    __slots__ = ("_arena", "_entry", "_open")

    def __init__(self, arena: RamArena, entry: _Entry, data: memoryview, tier: str) -> None:
        super().__init__(data, tier)
        self._arena = arena
        self._entry = entry
        self._open = True

    def release(self) -> None:
        super().release()
        self._arena._release(self)


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
        started = time.perf_counter()
        leases: list[Lease | None] = []
        with self._lock:
            self._tick += 1
            for depth, key in enumerate(keys):
                entry = self._entries.get(key)
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

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Copy a record into a slot. False when every slot is leased or pinned.

        Raises ValueError if the record is larger than a slot.
        """
        with self._lock:
            return self._place(key, record)[0] is not None

    def insert(self, key: SegmentKey, record: Buffer, found_in: str) -> tuple[Lease | None, bool]:
        """Put a record and lease it in one step, so that nothing can evict it in between.

        found_in: the tier name that the lease carries.
        Returns the lease of what is stored now (None: refused) and whether this call stored it.
        Raises ValueError if the record is larger than a slot.
        """
        with self._lock:
            entry, is_new = self._place(key, record)
            return (self._lease(entry, found_in) if entry else None), is_new

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

    # Below here the lock is held, except in `_release`.

    def _place(self, key: SegmentKey, record: Buffer) -> tuple[_Entry | None, bool]:
        started = time.perf_counter()
        source = memoryview(record).cast("B")
        if source.nbytes > self.slot_bytes:
            raise ValueError(f"a record of {source.nbytes} bytes does not fit a slot of {self.slot_bytes}")
        if (present := self._entries.get(key)) is not None:
            return present, False
        if not self._free and not self._evict_one():
            self._counters.dropped_writes += 1
            return None, False
        slot = self._free.pop()
        start = slot * self._stride
        # Under the lock on purpose: the copy holds the GIL anyway, so nothing else could run.
        self.buffer[start : start + source.nbytes] = source
        entry = _Entry(key, slot, source.nbytes, self._rank_of_new(key))
        self._entries[key] = entry
        self._offer(entry)
        self._counters.write_bytes += entry.length
        self._counters.write_seconds += time.perf_counter() - started
        return entry, True

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
        return _ArenaLease(self, entry, self._readable[start : start + entry.length], found_in)

    def _release(self, lease: _ArenaLease) -> None:
        with self._lock:
            if not lease._open:
                return
            lease._open = False
            entry = lease._entry
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
