"""Finding a prompt's records in the tiers. Moves bytes only (Redis to RAM), on threads of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import structlog

from aquifer.cachestore.keys import PromptKeys, SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Lease
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.compression.wire import RecordHeader, RecordKind, WireError, open_record
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.records import segment_span

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoredRecord:
    """An opened record: `body` is valid until the lease is released."""

    lease: Lease
    body: memoryview


@dataclass(frozen=True)
class StoredSegment:
    """A segment that was found. sinks: the record of the first tokens; only with segment 0."""

    index: int
    record: StoredRecord
    sinks: StoredRecord | None = None

    @property
    def tier(self) -> str:
        return self.record.lease.tier

    def release(self) -> None:
        self.record.lease.release()
        if self.sinks is not None:
            self.sinks.lease.release()


@dataclass(frozen=True)
class Fetched:
    """What came back for a prompt. known: segments that need not be stored again, loaded or not."""

    segments: list[StoredSegment]
    known: set[int]
    seconds: float


class Fetcher:
    """Looks a prompt's segments up in the tiers. Thread-safe."""

    def __init__(self, codec: Codec, raw: Codec, store: TieredStore, gate: LoadGate) -> None:
        """raw: the codec of sink records."""
        self._codecs: dict[RecordKind, Codec] = {"segment": codec, "sinks": raw}
        self._store = store
        self._gate = gate
        self._body_bytes = cache(lambda kind, num_tokens: self._codecs[kind].segment_bytes(num_tokens))

    def fetch(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched:
        """Lease the records of these segments, and open them. All are asked for at once: a hole is
        recomputed and what lies behind it still used. Bad data is a miss, never an error."""
        started = time.perf_counter()
        tiers = self._store.contains([keys.segments[index] for index in indices])
        held = {index: tier for index, tier in zip(indices, tiers, strict=True) if tier is not None}
        wanted = [index for index, tier in held.items() if self._gate.worth_loading(tier)]
        asked = [keys.segments[index] for index in wanted]
        sinks_key = keys.sinks if 0 in wanted else None
        if sinks_key:
            asked.insert(0, sinks_key)  # at its place in the prefix, whose end is evicted first
        leases = self._store.get(asked) if asked else []
        sinks = leases.pop(0) if sinks_key else None
        found = []
        for index, lease in zip(wanted, leases, strict=True):
            segment = self._open_segment(index, keys, lease, sinks)
            if segment is None:
                del held[index]
            else:
                found.append(segment)
        return Fetched(found, set(held), time.perf_counter() - started)

    def _open_segment(
        self, index: int, keys: PromptKeys, lease: Lease | None, sinks_lease: Lease | None
    ) -> StoredSegment | None:
        """sinks_lease: for segment 0."""
        record = self._open("segment", keys.segments[index], lease, *segment_span(index))
        if index > 0:
            return StoredSegment(index, record) if record else None
        sinks = self._open("sinks", keys.sinks, sinks_lease, 0, SINK_TOKENS) if keys.sinks else None
        if record and sinks:
            return StoredSegment(index, record, sinks)
        # One without the other is a miss: both are recomputed.
        for half in (record, sinks):
            if half:
                half.lease.release()
        return None

    def _open(
        self, kind: RecordKind, key: SegmentKey, lease: Lease | None, start: int, num_tokens: int
    ) -> StoredRecord | None:
        if lease is None:
            return None
        codec, expected = self._codecs[kind], self._body_bytes(kind, num_tokens)
        try:
            body = open_record(
                lease.data, RecordHeader(kind, codec.fingerprint, key.digest, start, num_tokens)
            )
            if body.nbytes != expected:
                raise WireError(f"body of {body.nbytes} bytes, expected {expected}")
        except WireError as error:
            log.warning("record refused", tier=lease.tier, kind=kind, reason=str(error))
            lease.release()
            self._store.delete([key])
            return None
        return StoredRecord(lease, body)
