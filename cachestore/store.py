"""The store that the engine uses: a RAM arena above Redis.

    put:  RAM at once, Redis in the background
    get:  RAM, then Redis in one batch; what Redis had is verified and moves up into RAM

Bytes are only ever copied between tiers, and the first writer wins, so two answers made from the
same key are made from the same bytes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aquifer.cachestore.arena import RamArena, Reservation
from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.cachestore.tier import Fill, Lease, TierStats, copy_of, lease_of_own, released_if_it_fails
from aquifer.cachestore.write_behind import WriteBehind

if TYPE_CHECKING:
    from typing_extensions import Buffer

_RENEW_SECONDS = 600.0
"""How often, at most, Redis hears that a prompt's records are in use; seldom beside their lifetime."""

_RENEW_AFTER_SECONDS = 1.0
"""At most. Hundreds of commands take the interpreter from whatever follows a prompt's use, such as the next
restore; and a prompt that is used again in that time is renewed once."""

_RENEWED_PROMPTS = 10_000
"""Of which it is known when their records in Redis were renewed."""


class TieredStore:
    """Records by key, in the fastest tier that has them. Thread-safe.

    verify:             verify(record, digest of its key) raises a ValueError for a record that is
                        damaged or another key's; called once for each record that enters RAM from
                        Redis, maybe on several threads at a time
    write_behind_bytes: records on their way to Redis; more are not written there, and counted.
                        Never more than half the arena, because queued records hold their slots
    close_seconds:      how long `close` may wait for them
    """

    def __init__(
        self,
        ram: RamArena,
        redis: RedisTier | None,
        verify: Callable[[memoryview, bytes], None],
        *,
        write_behind_bytes: int = 256 << 20,
        close_seconds: float = 10.0,
    ) -> None:
        self.ram = ram
        self.redis = redis
        self._verify = verify
        self._close_seconds = close_seconds
        self._lock = threading.Lock()
        self._promotions: set[_Promotion] = set()
        """Under way."""
        lifetime = redis.ttl_seconds if redis is not None else None
        self._renew_seconds = min(_RENEW_SECONDS, lifetime / 8) if lifetime else _RENEW_SECONDS
        self._renewed: OrderedDict[SegmentKey, float] = OrderedDict()
        """When, by a prompt's last record."""
        self._to_renew: set[SegmentKey] = set()
        """Those that are about to be."""
        self._closing = threading.Event()
        self._renewing = ThreadPoolExecutor(1, thread_name_prefix="redis-renew")
        self._write_behind: WriteBehind | None = None
        if redis is not None:
            self._write_behind = WriteBehind(
                redis,
                capacity_bytes=min(write_behind_bytes, max(ram.slot_bytes, ram.buffer.nbytes // 2)),
            )

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        """Lease records in the order of `keys`; None is a miss. `lease.tier` says where it was found."""
        leases = self.ram.get(keys)
        missing = [index for index, lease in enumerate(leases) if lease is None]
        if self.redis is None or not missing:
            return leases

        landing = _Promotion(self.ram, [keys[index] for index in missing], self._verify)
        with released_if_it_fails(leases), released_if_it_fails(landing.leases), self._under_way(landing):
            self.redis.read(landing.keys, landing)
        for index, lease in zip(missing, landing.leases, strict=True):
            leases[index] = lease
        return leases

    def contains(self, keys: Sequence[SegmentKey]) -> list[str | None]:
        """Name the tier that has each record now. A hint for planning: `get` does not rely on it."""
        found: list[str | None] = ["ram" if here else None for here in self.ram.contains(keys)]
        if self.redis is not None:
            missing = [index for index, tier in enumerate(found) if tier is None]
            in_redis = self.redis.contains([keys[index] for index in missing])
            for index, here in zip(missing, in_redis, strict=True):
                found[index] = "redis" if here else None
        return found

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Keep a record unless one is there already. False when no tier took it.

        Raises ValueError if the record is larger than the arena's slot.
        """
        lease, is_new = self.insert(key, *copy_of(record))
        if lease is not None:
            lease.release()
        return is_new or lease is not None

    def insert(self, key: SegmentKey, num_bytes: int, fill: Fill) -> tuple[Lease | None, bool]:
        """Put a record that `fill` writes, and lease what RAM holds of this key then, so that nothing can
        evict it in between.

        Returns the lease (None: RAM has no room) and whether a tier took the record by this call.
        Raises ValueError if the record is larger than the arena's slot, and what `fill` raises.
        """
        lease, is_new = self.ram.insert(key, num_bytes, fill)
        if self._write_behind is not None and (is_new or lease is None):
            second = lease.again() if lease else lease_of_own(num_bytes, fill, self.ram.name)
            queued = self._write_behind.offer(key, second)
            return lease, is_new or queued
        return lease, is_new

    def used(self, keys: Sequence[SegmentKey], *, again: bool = False) -> None:
        """Say that a prompt's records were used, wherever they were: in Redis their lifetime begins anew, and
        what it lost is written again, if RAM has it. Returns at once; that is done a second later.

        again: even if that was done lately; but once for what is asked within a second.
        """
        if self.redis is None or self._write_behind is None or not keys:
            return
        now = time.monotonic()
        with self._lock:
            lately = now - self._renewed.get(keys[-1], -self._renew_seconds) < self._renew_seconds
            if keys[-1] in self._to_renew or (lately and not again):
                return
            self._to_renew.add(keys[-1])
            self._renewed[keys[-1]] = now
            self._renewed.move_to_end(keys[-1])
            if len(self._renewed) > _RENEWED_PROMPTS:
                self._renewed.popitem(last=False)
        due = now + min(_RENEW_AFTER_SECONDS, self._renew_seconds / 2)
        self._renewing.submit(self._renew, self.redis, self._write_behind, list(keys), due)

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        """Forget records in every tier; return how many there were."""
        known = sum(tier is not None for tier in self.contains(keys))
        # RAM first: what Redis lost is written again from there.
        self.ram.delete(keys)
        if self._write_behind is not None:
            self._write_behind.cancel(keys)
        if self.redis is not None:
            self.redis.delete(keys)
        # Once more, when reads that have begun before are told: promoting a record they would bring it back.
        with self._lock:
            for promotion in self._promotions:
                promotion.deleted.update(keys)
        self.ram.delete(keys)
        return known

    def pin(self, keys: Sequence[SegmentKey]) -> None:
        """Keep these records in RAM, now or when they arrive. Pins count; unpin undoes one."""
        self.ram.pin(keys)

    def unpin(self, keys: Sequence[SegmentKey]) -> None:
        """Undo one pin of each key; a key without pins is left alone."""
        self.ram.unpin(keys)

    def unpinned(self, keys: Sequence[SegmentKey]) -> list[SegmentKey]:
        """Those of these keys that nobody has pinned."""
        return self.ram.unpinned(keys)

    def flush(self, timeout: float) -> bool:
        """Wait until what was put has reached Redis or was dropped; False after `timeout` seconds."""
        return self._write_behind is None or self._write_behind.flush(timeout)

    def stats(self) -> list[TierStats]:
        """One entry for each tier, fastest first."""
        if self.redis is None or self._write_behind is None:
            return [self.ram.stats()]
        redis = self.redis.stats()
        dropped = redis.dropped_writes + self._write_behind.dropped
        return [self.ram.stats(), dataclasses.replace(redis, dropped_writes=dropped)]

    def close(self) -> None:
        """Drain the writes for a bounded time, then close every tier."""
        self._closing.set()
        self._renewing.shutdown(cancel_futures=True)
        if self._write_behind is not None:
            self._write_behind.close(self._close_seconds)
        if self.redis is not None:
            self.redis.close()
        self.ram.close()

    def _renew(
        self, redis: RedisTier, write_behind: WriteBehind, keys: Sequence[SegmentKey], due: float
    ) -> None:
        self._closing.wait(max(0.0, due - time.monotonic()))
        with self._lock:
            self._to_renew.discard(keys[-1])
        here = redis.renew(keys)
        if here is None:  # down: next time
            with self._lock:
                self._renewed.pop(keys[-1], None)
            return
        lost = [key for key, found in zip(keys, here, strict=True) if not found]
        offered = []
        for key, lease in zip(lost, self.ram.peek(lost), strict=True):
            if lease is not None:
                write_behind.offer(key, lease)
                offered.append(key)
        # What was deleted meanwhile must not come back by this.
        gone = [key for key, found in zip(offered, self.ram.contains(offered), strict=True) if not found]
        if gone:
            write_behind.cancel(gone)
            redis.delete(gone)

    @contextmanager
    def _under_way(self, promotion: _Promotion) -> Iterator[None]:
        with self._lock:
            self._promotions.add(promotion)
        try:
            yield
        finally:
            with self._lock:
                self._promotions.discard(promotion)


class _Promotion:
    """Lands what Redis has in the arena, checked."""

    def __init__(
        self, ram: RamArena, keys: Sequence[SegmentKey], verify: Callable[[memoryview, bytes], None]
    ) -> None:
        self.keys = keys
        self.leases: list[Lease | None] = [None] * len(keys)
        self.deleted: set[SegmentKey] = set()
        """Since this read began."""
        self._ram = ram
        self._verify = verify
        self._arriving: dict[int, Reservation | memoryview] = {}

    def allocate(self, index: int, num_bytes: int) -> memoryview:
        reservation = self._ram.reserve(self.keys[index], num_bytes)
        if reservation is not None:
            self._arriving[index] = reservation
            return reservation.buffer
        # Every slot leased or pinned: the record still serves this caller, from memory of its own.
        own = memoryview(bytearray(num_bytes))
        self._arriving[index] = own
        return own

    def complete(self, index: int) -> None:
        place = self._arriving[index]
        try:
            record = place if isinstance(place, memoryview) else place.buffer
            self._verify(record.toreadonly(), self.keys[index].digest)
        except BaseException:
            self.abandon(index)
            raise
        del self._arriving[index]
        if isinstance(place, memoryview):
            self.leases[index] = Lease(place.toreadonly(), RedisTier.name)
        else:
            self.leases[index], _ = place.commit(RedisTier.name)
            if self.keys[index] in self.deleted:  # serves this caller, and nobody else
                self._ram.delete([self.keys[index]])

    def abandon(self, index: int) -> None:
        place = self._arriving.pop(index)
        if isinstance(place, Reservation):
            place.abort()
