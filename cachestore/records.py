"""Small named records: what a document id stands for. Kept in Redis when there is one, and in RAM.

Redis is shared and outlives the process, so what it says goes. RAM copies serve while it is down, and bring
back what it lost: all records when it came up empty, one when it was evicted. What is missing because it was
deleted, replaced or has expired must not come back, so an index in Redis tells these apart:

    aquifer:r:<name>        expiry, and the blob
    aquifer:record-names    a sorted set of names by expiry; no two puts have one in common, so it says which
                            put of a record is the latest. And the epoch, drawn anew when the set was lost
"""

from __future__ import annotations

import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_wire import Command

_PREFIX = b"aquifer:r:"
# Names by time of expiry. Finding them with SCAN would walk over every segment in the server.
_INDEX = b"aquifer:record-names"
_EPOCH = ""
_EXPIRY = struct.Struct("<d")
# Added to the time of a put without a lifetime. At this size a float still tells microseconds apart.
_NEVER = 2.0**32
BELIEVED_SECONDS = 7 * 24 * 3600.0
MAX_UNSENT = 100_000


@dataclass(slots=True)
class _Copy:
    """A record in RAM. Times are Unix seconds.

    epoch: of the Redis that last held it, as far as known
    confirmed_at: when that was. After BELIEVED_SECONDS the copy proves nothing any more.
    """

    blob: bytes
    expires_at: float
    confirmed_at: float
    epoch: float | None = None


class RecordStore:
    """Blobs by name with a lifetime. Thread-safe; a Redis failure is never an exception.

    ram_bytes: bound of the RAM copies; the least recently used go first
    """

    def __init__(self, link: RedisLink | None, *, ram_bytes: int = 64 << 20) -> None:
        self._link = link
        self._ram_bytes = ram_bytes
        # Held over round trips as well: records are touched once a request, and order matters.
        self._lock = threading.RLock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._used_bytes = 0
        # Names whose latest put (a copy is there) or delete (none is) Redis has not heard of yet.
        self._unsent: OrderedDict[str, None] = OrderedDict()

    def put(self, name: str, blob: bytes, ttl_seconds: float | None) -> None:
        """Keep a record, replacing one of the same name. ttl_seconds None: no expiry.

        Raises ValueError for an empty blob, one above `ram_bytes`, or a lifetime that is not positive.
        """
        if not 0 < len(blob) <= self._ram_bytes:
            raise ValueError(f"record {name!r} has {len(blob)} bytes; 1 to {self._ram_bytes} are possible")
        if ttl_seconds is not None and ttl_seconds <= 0:
            raise ValueError(f"record {name!r} has a lifetime of {ttl_seconds} seconds; it must be positive")
        now = time.time()
        with self._lock:
            self._keep(name, _Copy(blob, now + (ttl_seconds or _NEVER), now))
            self._send(name)

    def get(self, name: str) -> bytes | None:
        with self._lock:
            self._send_unsent()
            copy = self._live_copy(name)
            replies = self._ask([("GET", _key(name)), ("ZSCORE", _INDEX, name), ("ZSCORE", _INDEX, _EPOCH)])
            if replies is None or name in self._unsent:
                return copy.blob if copy else None
            value, expires_at, epoch = replies[0], *map(_score, replies[1:])
            now = time.time()
            if value is None and copy is not None and _lost(copy, expires_at, epoch, now):
                self._send(name)
                return copy.blob
            found = _parsed(value, now, epoch)
            if found is None:
                self._drop(name)
                return None
            self._keep(name, found)
            return found.blob

    def delete(self, name: str) -> bool:
        """Forget a record; say whether there was one."""
        with self._lock:
            existed = self.get(name) is not None
            if existed:
                self._drop(name)
                self._send(name)
            return existed

    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, sorted."""
        with self._lock:
            self._send_unsent()
            names = self._names_in_redis(prefix)
            only_here = [name for name in self._copies if name.startswith(prefix) and name not in names]
            return sorted(names | {name for name in only_here if self.get(name) is not None})

    def touch(self) -> None:
        """Use the index, so that a Redis that is full does not evict it for not being used."""
        with self._lock:
            self._send_unsent()
            self._ask([("ZSCORE", _INDEX, _EPOCH)])

    # Below here the lock is held.

    def _names_in_redis(self, prefix: str) -> set[str]:
        now = time.time()
        replies = self._ask([("ZREMRANGEBYSCORE", _INDEX, "-inf", str(now)), ("ZRANGE", _INDEX, 0, -1)])
        if replies is None:
            return set()
        names = [name for raw in replies[1] if (name := raw.decode()) != _EPOCH and name.startswith(prefix)]
        # The index may name records that Redis evicted meanwhile.
        lengths = self._ask([("STRLEN", _key(name)) for name in names]) if names else []
        return {name for name, length in zip(names, lengths or [], strict=False) if length}

    def _ask(self, commands: Sequence[Command]) -> Sequence[Any] | None:
        """Replies, or None if Redis is not there or refused one of the commands."""
        replies = self._link.execute(commands) if self._link else None
        if replies is None or any(isinstance(reply, Exception) for reply in replies):
            return None
        return replies

    def _send(self, name: str) -> None:
        """Tell Redis about the latest put or delete of a name, now or when it is back."""
        if self._link is None:
            return
        self._unsent[name] = None
        if len(self._unsent) > MAX_UNSENT:
            self._unsent.popitem(last=False)
        self._send_unsent()

    def _send_unsent(self) -> None:
        for name in list(self._unsent):
            copy, now = self._live_copy(name), time.time()
            if copy is None:
                # In this order: a value that only the index knows of counts as evicted.
                commands: Sequence[Command] = [("ZREM", _INDEX, name), ("DEL", _key(name))]
            else:
                lifetime = copy.expires_at - now
                until = () if copy.expires_at > _NEVER else ("PX", max(1, int(lifetime * 1000)))
                commands = [
                    ("ZADD", _INDEX, "NX", repr(_NEVER + now), _EPOCH),
                    ("SET", _key(name), _EXPIRY.pack(copy.expires_at) + copy.blob, *until),
                    ("ZADD", _INDEX, repr(copy.expires_at), name),
                    ("ZSCORE", _INDEX, _EPOCH),
                ]
            replies = self._ask(commands)
            if replies is None:
                return
            if copy is not None:
                copy.confirmed_at, copy.epoch = now, _score(replies[-1])
            del self._unsent[name]

    def _live_copy(self, name: str) -> _Copy | None:
        copy = self._copies.get(name)
        if copy is None:
            return None
        if copy.expires_at <= time.time():
            self._drop(name)
            return None
        self._copies.move_to_end(name)
        return copy

    def _keep(self, name: str, copy: _Copy) -> None:
        self._drop(name)
        self._copies[name] = copy
        self._used_bytes += len(copy.blob)
        while self._used_bytes > self._ram_bytes:
            oldest = next(iter(self._copies))
            self._drop(oldest)
            # Without its copy an unsent put would be taken for a delete.
            self._unsent.pop(oldest, None)

    def _drop(self, name: str) -> None:
        copy = self._copies.pop(name, None)
        if copy is not None:
            self._used_bytes -= len(copy.blob)


def _key(name: str) -> bytes:
    return _PREFIX + name.encode()


def _score(reply: bytes | None) -> float | None:
    return None if reply is None else float(reply)


def _parsed(value: bytes | None, now: float, epoch: float | None) -> _Copy | None:
    """A record as Redis has it. None: it has none, or what it has has expired or is none of ours."""
    if value is None or len(value) <= _EXPIRY.size:
        return None
    (expires_at,) = _EXPIRY.unpack_from(value)
    return _Copy(value[_EXPIRY.size :], expires_at, now, epoch) if expires_at > now else None


def _lost(copy: _Copy, expires_at: float | None, epoch: float | None, now: float) -> bool:
    """Whether Redis, which has no value, lost just this record, and nobody deleted or replaced it.

    expires_at: what the index says of the name; epoch: its own."""
    if now - copy.confirmed_at > BELIEVED_SECONDS:
        return False
    if expires_at is not None:
        return expires_at == copy.expires_at
    return epoch is None or (copy.epoch is not None and copy.epoch != epoch)
