"""The Redis tier: records that survive a restart and are shared between servers.

How a record lies in Redis (N is SegmentKey.redis_name):

    N      magic, total length, nonce, then the first part of the record
    N:1    the same nonce, then the second part
    N:2    ...

Values are split because Redis and its clients slow down on very large ones. The nonce, made anew for
each write, keeps two writers' parts from being taken for one record, and tells when the write began: what
lacks parts soon after that is being written. A reader knows the largest record, so it asks for all possible
parts at once and needs no second round trip.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_wire import Bulk, Command, RefusedError, Reply, ReplyReader
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
_NONCE = struct.Struct("<I4s")  # Unix seconds when the write began, random bytes

WRITING_SECONDS = 30.0
"""No write of one record takes as long, and no two servers' clocks differ as much."""


class Landing(Protocol):
    """Where the records of one read go. Called on several threads, on one for each index."""

    def allocate(self, index: int, num_bytes: int) -> memoryview:
        """Provide memory for the record of keys[index], before it is known to be whole."""

    def complete(self, index: int) -> None:
        """Take over what was written there, or give the memory back and raise ValueError: damaged."""

    def abandon(self, index: int) -> None:
        """Give the memory back: the record did not arrive whole."""


class RedisTier:
    """Records in Redis. Thread-safe; whatever Redis does, a record is there or it is a miss.

    max_record_bytes: the largest record that will be put or asked for
    ttl_seconds:      lifetime of a record, begun anew by every hit; None: until Redis evicts it
    connections:      sockets that share one large read; more than one pays where a single stream does not
                      fill the line (TLS, long distances), not on one machine
    """

    name = "redis"

    def __init__(
        self,
        link: RedisLink,
        *,
        max_record_bytes: int,
        ttl_seconds: float | None = WEEK_SECONDS,
        connections: int = 1,
    ) -> None:
        self.link = link
        self.max_record_bytes = max_record_bytes
        self.ttl_seconds = ttl_seconds
        self._num_parts = max(1, -(-max_record_bytes // PART_BYTES))
        self._expiry: tuple[str | int, ...] = ("PX", max(1, int(ttl_seconds * 1000))) if ttl_seconds else ()
        self._connections = connections
        self._readers = ThreadPoolExecutor(connections, thread_name_prefix="redis-read")
        self._lock = threading.Lock()
        self._counters = Counters()

    @property
    def up(self) -> bool:
        return self.link.up

    def get(self, keys: Sequence[SegmentKey]) -> list[Lease | None]:
        landing = _OwnMemory(len(keys))
        self.read(keys, landing)
        return landing.leases

    def read(self, keys: Sequence[SegmentKey], landing: Landing) -> None:
        """Fetch records straight into the memory that `landing` provides.

        What it finds damaged is deleted and counted as corrupt; what is being written is just a miss.
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
                self._read_share(keys, shares[0], landing)
            else:
                # An error of one share is raised when all have ended: none may still land a record then.
                reading = [self._readers.submit(self._read_share, keys, share, landing) for share in shares]
                for share_read in wait(reading).done:
                    share_read.result()
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

    def renew(self, keys: Sequence[SegmentKey]) -> list[bool] | None:
        """Begin the lifetime of records anew, as a hit does. Returns which are here; None: Redis is down."""
        if not self._expiry:
            return self.contains(keys) if self.up else None
        names = self._names(keys)
        replies = self.link.execute([("PEXPIRE", name, self._expiry[1]) for name in names])
        return None if replies is None else [reply == 1 for reply in replies[:: self._num_parts]]

    def delete(self, keys: Sequence[SegmentKey]) -> int:
        names = self._names(keys)
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

    def _names(self, keys: Sequence[SegmentKey]) -> list[bytes]:
        """Of all parts that the records may have."""
        return [name for key in keys for name in self._part_names(key.redis_name)]

    def _part_names(self, name: bytes) -> list[bytes]:
        return [name, *(b"%s:%d" % (name, part) for part in range(1, self._num_parts))]

    def _read_share(self, keys: Sequence[SegmentKey], share: Sequence[int], landing: Landing) -> None:
        """Read the records keys[i] for i in share over one connection."""
        # GETEX reads and begins the lifetime anew in one command.
        verb = "GETEX" if self._expiry else "GET"
        names = self._names([keys[index] for index in share])
        window = max(2, WINDOW_BYTES // min(self.max_record_bytes, PART_BYTES))
        assembly = _Assembly(share, self._num_parts, self.max_record_bytes, landing)
        try:
            self.link.stream([(verb, name, *self._expiry) for name in names], assembly.receive, window=window)
        finally:
            assembly.stop()
            with self._lock:
                self._counters.hits += assembly.hits
                self._counters.misses += len(share) - assembly.hits
                self._counters.corrupt += len(assembly.damaged)
                self._counters.read_bytes += assembly.read_bytes
        self.delete([keys[index] for index in assembly.damaged])

    def _write(self, name: bytes, record: memoryview) -> bool | None:
        """True: stored. False: the key was taken. None: it could not be stored."""
        nonce = _NONCE.pack(int(time.time()), os.urandom(4))
        head = (_HEAD.pack(_MAGIC, record.nbytes, nonce), record[:PART_BYTES])
        # The head first: it decides which of two writers wins.
        replies = self.link.execute([("SET", name, head, *self._expiry, "NX")])
        if _any_failed(replies):
            return None
        if replies == [None]:
            return False
        tails: list[Command] = []
        for part, start in enumerate(range(PART_BYTES, record.nbytes, PART_BYTES), start=1):
            tail = (nonce, record[start : start + PART_BYTES])
            tails.append(("SET", b"%s:%d" % (name, part), tail, *self._expiry))
        if tails and _any_failed(self.link.execute(tails)):
            self.link.execute([("UNLINK", part_name) for part_name in self._part_names(name)])
            return None
        return True


def _any_failed(replies: list[Any] | None) -> bool:
    return replies is None or any(isinstance(reply, RefusedError) for reply in replies)


class _OwnMemory:
    """Lands each record in memory of its own."""

    def __init__(self, count: int) -> None:
        self.leases: list[Lease | None] = [None] * count
        self._arriving: dict[int, memoryview] = {}

    def allocate(self, index: int, num_bytes: int) -> memoryview:
        self._arriving[index] = memoryview(bytearray(num_bytes))
        return self._arriving[index]

    def complete(self, index: int) -> None:
        self.leases[index] = Lease(self._arriving.pop(index).toreadonly(), RedisTier.name)

    def abandon(self, index: int) -> None:
        del self._arriving[index]


class _Assembly:
    """Puts records together from their parts, which arrive in order, on one connection."""

    def __init__(self, share: Sequence[int], num_parts: int, max_record_bytes: int, landing: Landing) -> None:
        self.hits = 0
        self.read_bytes = 0
        self.damaged: list[int] = []
        self._share = share
        self._num_parts = num_parts
        self._max_record_bytes = max_record_bytes
        self._landing = landing
        # The record in hand: its memory once the first part is there, and what it says of itself.
        self._index = -1
        self._target: memoryview | None = None
        self._nonce = b""
        self._is_damaged = self._is_torn = False
        """Torn: parts are missing, or belong to another write."""

    def receive(self, position: int, head: Reply | Bulk, reader: ReplyReader) -> None:
        record, part = divmod(position, self._num_parts)
        if part == 0:
            self._index = self._share[record]
            self._is_damaged = self._is_torn = False
        if isinstance(head, Bulk):
            prefix = bytearray(min(head.length, _NONCE.size if part else _HEAD.size))
            reader.read_into(memoryview(prefix))
            room = self._room(part, bytes(prefix), head.length - len(prefix))
            if room is None:
                reader.skip(head.length - len(prefix))
            else:
                reader.read_into(room)
            reader.end()
        elif isinstance(head, RefusedError) and head.code != "WRONGTYPE":
            self.stop()  # its slot is moving to another node, say: a miss, and nothing wrong with the record
        elif head is not None:
            self._is_damaged = True  # not a string
        elif self._part_of_target(part):
            self._is_torn = True
        if part == self._num_parts - 1:
            self._finish()

    def stop(self) -> None:
        """Give up the record in hand, if there is one."""
        target, self._target = self._target, None
        if target is not None:
            self._landing.abandon(self._index)

    def _room(self, part: int, prefix: bytes, length: int) -> memoryview | None:
        """Say where `length` bytes of this part go; None if they are not wanted."""
        if part == 0:
            total = self._open(prefix)
            if total is None or length != min(total, PART_BYTES):
                self._is_damaged = True
                return None
            self._target = self._landing.allocate(self._index, total)
            return self._target[:PART_BYTES]
        room = self._part_of_target(part)
        if not room:
            return None  # left over from a longer record, or its head is gone
        if prefix != self._nonce:
            self._is_torn = True
            return None
        if length != room.nbytes:
            self._is_damaged = True
            return None
        return room

    def _open(self, prefix: bytes) -> int | None:
        """Read the header: the record's length, or None if it is not ours."""
        if len(prefix) < _HEAD.size:
            return None
        magic, total, self._nonce = _HEAD.unpack(prefix)
        return total if magic == _MAGIC and total <= self._max_record_bytes else None

    def _part_of_target(self, part: int) -> memoryview | None:
        """The memory of this part; empty or None if the record in hand has no such part."""
        return self._target[part * PART_BYTES : (part + 1) * PART_BYTES] if self._target else None

    def _finish(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            if self._is_damaged or self._is_torn:
                self._landing.abandon(self._index)
            else:
                try:
                    self._landing.complete(self._index)
                except ValueError:
                    self._is_damaged = True
                else:
                    self.hits += 1
                    self.read_bytes += target.nbytes
        if self._is_damaged or (self._is_torn and not self._is_being_written):
            self.damaged.append(self._index)

    @property
    def _is_being_written(self) -> bool:
        began, _ = _NONCE.unpack(self._nonce)
        return abs(time.time() - began) < WRITING_SECONDS
