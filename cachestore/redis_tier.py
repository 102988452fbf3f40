"""The Redis tier: records that survive a restart and are shared between servers.

How a record lies in Redis (N is SegmentKey.redis_name):

    N      magic, total length, nonce, then the first part of the record
    N:1    the same nonce, then the second part
    N:2    ...

Values are split because Redis and its clients slow down on very large ones. The nonce, drawn anew for
each write, keeps two writers' parts from being taken for one record. A reader knows the
largest record, so it asks for all possible parts at once and needs no second round trip.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.redis_link import Command, RedisLink
from aquifer.cachestore.tier import Counters, Lease, TierStats

if TYPE_CHECKING:
    from typing_extensions import Buffer

WEEK_SECONDS = 7 * 24 * 3600.0
# A little less than 2 MiB, so that a value with its header fits the allocator's 2 MiB class.
PART_BYTES = (2 << 20) - 64
# Asked for and not yet read, per connection: enough to keep a 10 Gbit/s line busy. More is slower:
# with 16 MiB waiting in Redis's output buffer, reads on the loopback interface lose a third.
WINDOW_BYTES = 4 << 20

_HEAD = struct.Struct("<4sQ8s")  # magic, total length in bytes, nonce
_MAGIC = b"AQS1"
_NONCE_BYTES = 8


class RedisTier:
    """Records in Redis. Thread-safe; whatever Redis does, a record is there or it is a miss.

    max_record_bytes: the largest record that will be put or asked for
    ttl_seconds:      lifetime of a record, begun anew by every hit; None: until Redis evicts it
    connections:      sockets that share one large read
    """

    name = "redis"

    def __init__(
        self,
        link: RedisLink,
        *,
        max_record_bytes: int,
        ttl_seconds: float | None = WEEK_SECONDS,
        connections: int = 2,
    ) -> None:
        self.link = link
        self.max_record_bytes = max_record_bytes
        self._num_parts = max(1, -(-max_record_bytes // PART_BYTES))
        self._expiry: tuple[str | int, ...] = ("PX", int(ttl_seconds * 1000)) if ttl_seconds else ()
        self._connections = connections
        self._readers = ThreadPoolExecutor(connections, thread_name_prefix="redis-read")
        self._lock = threading.Lock()
        self._counters = Counters()

    @property
    def up(self) -> bool:
        return self.link.up

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        leases: list[Lease | None] = [None] * len(keys)

        def keep(index: int, record: memoryview) -> None:
            leases[index] = Lease(record, self.name)

        self.read(keys, keep)
        return leases

    def read(self, keys: Sequence[SegmentKey], accept: Callable[[int, memoryview], None]) -> None:
        """Fetch records and hand each over as it arrives: accept(index in keys, record).

        `accept` runs on several threads. It raises a ValueError for a record that it finds damaged;
        that one is deleted and counted as corrupt.
        """
        if not keys:
            return
        if not self.up:
            with self._lock:
                self._counters.misses += len(keys)
            return
        started = time.perf_counter()
        count = min(self._connections, len(keys))
        shares = [range(first, len(keys), count) for first in range(count)]
        try:
            if count == 1:
                self._read_share(keys, shares[0], accept)
            else:
                list(self._readers.map(lambda share: self._read_share(keys, share, accept), shares))
        finally:
            with self._lock:
                self._counters.read_seconds += time.perf_counter() - started

    def put(self, key: SegmentKey, record: Buffer) -> bool:
        """Store a record with its TTL unless the key is taken. False: down, refused or memory full.

        Raises ValueError if the record is larger than `max_record_bytes`.
        """
        view = memoryview(record).cast("B")
        if view.nbytes > self.max_record_bytes:
            raise ValueError(f"a record of {view.nbytes} bytes is above the limit of {self.max_record_bytes}")
        started = time.perf_counter()
        stored = self._write(key.redis_name, view)
        with self._lock:
            if stored is None:
                self._counters.dropped_writes += 1
            elif stored:
                self._counters.write_bytes += view.nbytes
                self._counters.write_seconds += time.perf_counter() - started
        return stored is not None

    def contains(self, keys: Sequence[SegmentKey]) -> list[bool]:
        replies = self.link.execute([("EXISTS", key.redis_name) for key in keys]) if keys else []
        return [False] * len(keys) if replies is None else [reply == 1 for reply in replies]

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        names = [name for key in keys for name in self._part_names(key.redis_name)]
        replies = self.link.execute([("UNLINK", name) for name in names]) if names else []
        return sum(reply == 1 for reply in (replies or [])[:: self._num_parts])

    def stats(self) -> TierStats:
        """Asks the server for its memory; what it holds counts as 0 while it is down."""
        info = self.link.server_info()
        with self._lock:
            self._counters.errors = self.link.errors
            self._counters.evictions = info.evictions if info else self._counters.evictions
            return self._counters.as_stats(
                name=self.name,
                up=self.up,
                used_bytes=info.used_bytes if info else 0,
                capacity_bytes=info.capacity_bytes if info else None,
                entries=info.entries if info else 0,
            )

    def close(self) -> None:
        self._readers.shutdown()
        self.link.close()

    def _part_names(self, name: bytes) -> list[bytes]:
        return [name, *(b"%s:%d" % (name, part) for part in range(1, self._num_parts))]

    def _read_share(
        self, keys: Sequence[SegmentKey], share: Sequence[int], accept: Callable[[int, memoryview], None]
    ) -> None:
        """Read the records keys[i] for i in share over one connection."""
        damaged: list[SegmentKey] = []
        parts: list[Any] = []
        hits = read_bytes = 0

        def take(position: int, reply: Any) -> None:
            nonlocal hits, read_bytes
            parts.append(reply)
            if len(parts) < self._num_parts:
                return
            index = share[position // self._num_parts]
            try:
                record = _join(parts)
                if record is not None:
                    accept(index, record)
                    hits += 1
                    read_bytes += record.nbytes
            except ValueError:
                damaged.append(keys[index])
            finally:
                parts.clear()

        # GETEX reads and begins the lifetime anew in one command.
        verb = "GETEX" if self._expiry else "GET"
        names = [name for index in share for name in self._part_names(keys[index].redis_name)]
        window = max(2, WINDOW_BYTES // min(self.max_record_bytes, PART_BYTES))
        try:
            self.link.stream([(verb, name, *self._expiry) for name in names], take, window=window)
        finally:
            with self._lock:
                self._counters.hits += hits
                self._counters.misses += len(share) - hits
                self._counters.corrupt += len(damaged)
                self._counters.read_bytes += read_bytes
        self.delete(damaged)

    def _write(self, name: bytes, record: memoryview) -> bool | None:
        """True: stored. False: the key was taken. None: it could not be stored."""
        nonce = os.urandom(_NONCE_BYTES)
        head = b"".join((_HEAD.pack(_MAGIC, record.nbytes, nonce), record[:PART_BYTES]))
        # The head first: it decides which of two writers wins. Until the rest is there a reader
        # sees a truncated record, which is a miss.
        replies = self.link.execute([("SET", name, head, *self._expiry, "NX")])
        if _any_failed(replies):
            return None
        if replies == [None]:
            return False
        tails: list[Command] = [
            (
                "SET",
                b"%s:%d" % (name, part),
                b"".join((nonce, record[start : start + PART_BYTES])),
                *self._expiry,
            )
            for part, start in enumerate(range(PART_BYTES, record.nbytes, PART_BYTES), start=1)
        ]
        if tails and _any_failed(self.link.execute(tails)):
            self.link.execute([("UNLINK", part_name) for part_name in self._part_names(name)])
            return None
        return True


def _any_failed(replies: list[Any] | None) -> bool:
    return replies is None or any(isinstance(reply, ResponseError) for reply in replies)


def _join(parts: Sequence[Any]) -> memoryview | None:
    """Put a record together; None if there is none.

    Raises ValueError if it is not ours, cut short, or of two writers.
    """
    head = parts[0]
    if head is None:
        return None
    if not isinstance(head, bytes) or len(head) < _HEAD.size:
        raise ValueError("not a record")
    magic, length, nonce = _HEAD.unpack_from(head)
    if magic != _MAGIC:
        raise ValueError("not a record of this version")
    pieces = [memoryview(head)[_HEAD.size :]]
    for tail in parts[1 : -(-length // PART_BYTES)]:
        if not isinstance(tail, bytes) or tail[:_NONCE_BYTES] != nonce:
            raise ValueError("a part is missing or from another write")
        pieces.append(memoryview(tail)[_NONCE_BYTES:])
    if sum(piece.nbytes for piece in pieces) != length:
        raise ValueError("cut short, or longer than it says")
    # One part is the common case and needs no copy.
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
