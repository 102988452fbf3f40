"""Small named records: what a document id stands for. Kept in Redis when there is one, and in RAM.

Redis is shared and outlives the process, so what it says goes. The RAM copy serves while Redis is
down, and brings a record back to a Redis that came up empty. A delete leaves an empty value (a
tombstone) in Redis, so that another server's RAM copy cannot bring the record back.
"""

from __future__ import annotations

import math
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
_TOMBSTONE = b""
TOMBSTONE_SECONDS = 7 * 24 * 3600.0
MAX_UNSENT = 100_000


@dataclass(slots=True)
class _Copy:
    """A record in RAM. Times are Unix seconds.

    confirmed_at: when Redis last held it. Older than a tombstone lives, the copy proves nothing.
    """

    blob: bytes
    expires_at: float
    confirmed_at: float


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
            self._keep(name, _Copy(blob, now + (ttl_seconds or math.inf), now))
            self._send(name)

    def get(self, name: str) -> bytes | None:
        with self._lock:
            self._send_unsent()
            copy = self._live_copy(name)
            replies = self._ask([("GET", _key(name)), ("PTTL", _key(name))])
            if replies is None or name in self._unsent:
                return copy.blob if copy else None
            blob, remaining_ms = replies
            now = time.time()
            if isinstance(blob, bytes) and blob != _TOMBSTONE:
                self._keep(
                    name, _Copy(blob, now + (remaining_ms / 1000 if remaining_ms >= 0 else math.inf), now)
                )
                return blob
            if blob == _TOMBSTONE or copy is None or now - copy.confirmed_at > TOMBSTONE_SECONDS:
                self._drop(name)
                return None
            # Redis lost it (restarted empty, or evicted it) and nobody deleted it.
            self._send(name)
            return copy.blob

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

    # Below here the lock is held.

    def _names_in_redis(self, prefix: str) -> set[str]:
        now = time.time()
        replies = self._ask([("ZREMRANGEBYSCORE", _INDEX, "-inf", str(now)), ("ZRANGE", _INDEX, 0, -1)])
        if replies is None:
            return set()
        names = [name for raw in replies[1] if (name := raw.decode()).startswith(prefix)]
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
            copy = self._live_copy(name)
            if copy is None:
                commands: Sequence[Command] = [
                    ("SET", _key(name), _TOMBSTONE, "EX", int(TOMBSTONE_SECONDS)),
                    ("ZREM", _INDEX, name),
                ]
            else:
                lifetime = copy.expires_at - time.time()
                expiry = () if lifetime == math.inf else ("PX", max(1, int(lifetime * 1000)))
                commands = [
                    ("SET", _key(name), copy.blob, *expiry),
                    ("ZADD", _INDEX, str(copy.expires_at), name),
                ]
            if self._ask(commands) is None:
                return
            if copy is not None:
                copy.confirmed_at = time.time()
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
