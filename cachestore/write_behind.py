"""Writes that nobody waits for: records on their way from RAM to a slower tier."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import structlog

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.tier import Lease, Tier

log = structlog.get_logger(__name__)


class WriteBehind:
    """A queue bounded in bytes, and the thread that empties it into a tier.

    Queued records are leases: nothing is copied, and an arena slot cannot be evicted before its
    record is on its way. A tier that is down refuses at once, so during an outage the
    queue empties instead of growing.
    """

    def __init__(self, tier: Tier, *, capacity_bytes: int) -> None:
        self._tier = tier
        self._capacity_bytes = capacity_bytes
        self._waiting: OrderedDict[SegmentKey, Lease] = OrderedDict()
        self._writing: set[SegmentKey] = set()
        self._queued_bytes = 0  # waiting and being written
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"{tier.name}-write", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records that found the queue full, failed unexpectedly, or were still in it at the close."""
        return self._dropped

    def offer(self, key: SegmentKey, lease: Lease) -> bool:
        """Take over a lease and write its record later. False: full, dropped, and the lease released."""
        size = lease.data.nbytes
        with self._changed:
            known = key in self._waiting or key in self._writing
            fits = self._queued_bytes + size <= self._capacity_bytes and not self._closed
            if fits and not known:
                self._waiting[key] = lease
                self._queued_bytes += size
                self._changed.notify_all()
                return True
            self._dropped += not known
        lease.release()
        return known

    def cancel(self, keys: Sequence[SegmentKey]) -> None:
        """Make sure that none of these will be written from now on.

        Waits for one that is being written: at most as long as its tier takes for a write.
        """
        wanted = set(keys)
        with self._changed:
            for key in wanted & self._waiting.keys():
                self._forget(self._waiting.pop(key))
            self._changed.notify_all()
            self._changed.wait_for(lambda: not wanted & self._writing)

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty; False if that takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def close(self, timeout: float) -> None:
        """Drain for at most `timeout` seconds, drop and count the rest, and stop the thread."""
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        with self._changed:
            self._closed = True
            self._dropped += len(self._waiting)
            while self._waiting:
                self._forget(self._waiting.popitem()[1])
            self._changed.notify_all()
        # A write may still be stuck in a socket timeout; a daemon thread may be left behind.
        self._thread.join(max(0.1, deadline - time.monotonic()))

    def _forget(self, lease: Lease) -> None:
        self._queued_bytes -= lease.data.nbytes
        lease.release()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                key, lease = self._waiting.popitem(last=False)
                self._writing.add(key)
            failed = 0
            try:
                self._tier.put(key, lease.data)
            except Exception as error:  # a tier counts what it expects to fail
                log.error("write failed", tier=self._tier.name, exc_info=error)
                failed = 1
            finally:
                with self._changed:
                    self._dropped += failed
                    self._writing.discard(key)
                    self._forget(lease)
                    self._changed.notify_all()
