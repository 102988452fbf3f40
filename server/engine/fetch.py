"""Finding a prompt's records in the tiers. Moves bytes only (Redis to RAM), on threads of its own; what is
all in RAM is found at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import structlog

from aquifer.cachestore.keys import PromptKeys, SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Lease, released_if_it_fails
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.compression.wire import HEADER_BYTES, RecordKind, RecordOpener, WireError
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.records import segment_span

log = structlog.get_logger(__name__)

_Place = tuple[RecordKind, int, SegmentKey]
"""A record of a prompt: of which segment, and its key. The sinks go with segment 0."""


@dataclass(slots=True, eq=False)  # not frozen: one is made for each record, and a device waits meanwhile
class StoredRecord:
    """An opened record: `body` is valid until the lease is released."""

    lease: Lease
    body: memoryview

    @property
    def address(self) -> int | None:
        """Where the body lies, if that is in the arena; see Lease."""
        address = self.lease.address
        return None if address is None else address + HEADER_BYTES


@dataclass(slots=True, eq=False)
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
        self._opener = cache(self._new_opener)

    def fetch(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched:
        """Lease the records of these segments, and open them. All are asked for at once: a hole is
        recomputed and what lies behind it still used. Bad data is a miss, never an error; so is a failure."""
        return _tried(self._fetch, keys, indices, "recomputing") or Fetched([], set(), 0.0)

    def fetch_at_hand(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched | None:
        """As `fetch`, if all of it is in RAM and sound; else None. Waits for nobody."""
        return _tried(self._fetch_at_hand, keys, indices, "asking the tiers again")

    def _fetch(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched:
        started = time.perf_counter()
        tiers = self._store.contains([keys.segments[index] for index in indices])
        held = {index: tier for index, tier in zip(indices, tiers, strict=True) if tier is not None}
        wanted = [index for index, tier in held.items() if self._gate.worth_loading(tier)]
        places = _places(keys, wanted)
        leases = self._store.get([key for _, _, key in places]) if places else []
        with released_if_it_fails(leases):
            pairs = zip(places, leases, strict=True)
            records = [self._open_or_refuse(place, lease) for place, lease in pairs]
        found = _segments(wanted, records)
        for index in set(wanted).difference(segment.index for segment in found):
            del held[index]
        return Fetched(found, set(held), time.perf_counter() - started)

    def _fetch_at_hand(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched | None:
        started = time.perf_counter()
        ram, places = self._store.ram, _places(keys, indices)
        if indices and not self._gate.faster(ram.name):
            return None
        leases = ram.get_all([key for _, _, key in places])
        if leases is None:
            return None
        try:
            with released_if_it_fails(leases):
                records = [self._open(place, lease) for place, lease in zip(places, leases, strict=True)]
        except WireError:  # `fetch` refuses it
            return None
        found = _segments(indices, records)
        return Fetched(found, {segment.index for segment in found}, time.perf_counter() - started)

    def _open(self, place: _Place, lease: Lease) -> StoredRecord:
        """Raises WireError for a record that must not be used."""
        kind, index, key = place
        return StoredRecord(lease, self._opener(kind, index).open(lease.data, key.digest))

    def _open_or_refuse(self, place: _Place, lease: Lease | None) -> StoredRecord | None:
        if lease is None:
            return None
        try:
            return self._open(place, lease)
        except WireError as error:
            kind, _, key = place
            log.warning("record refused", tier=lease.tier, kind=kind, reason=str(error))
            lease.release()
            self._store.delete([key])
            return None

    def _new_opener(self, kind: RecordKind, index: int) -> RecordOpener:
        """Of the segment, or the sinks, at this place of a prompt."""
        codec = self._codecs[kind]
        start, num_tokens = segment_span(index) if kind == "segment" else (0, SINK_TOKENS)
        return RecordOpener(kind, codec.fingerprint, start, num_tokens, codec.segment_bytes(num_tokens))


def _tried(
    fetch: Callable[[PromptKeys, Sequence[int]], Fetched | None],
    keys: PromptKeys,
    indices: Sequence[int],
    instead: str,
) -> Fetched | None:
    """What a fetch brings; None if it fails: a cache never fails a request. instead: what is done then."""
    try:
        return fetch(keys, indices)
    except Exception as error:
        log.error("fetch failed", instead=instead, exc_info=error)
        return None


def _places(keys: PromptKeys, indices: Sequence[int]) -> list[_Place]:
    """The records of some segments, in the order of the prompt, whose end is evicted first."""
    places: list[_Place] = [("segment", index, keys.segments[index]) for index in indices]
    if keys.sinks is not None and 0 in indices:
        places.insert(0, ("sinks", 0, keys.sinks))
    return places


def _segments(indices: Sequence[int], records: Sequence[StoredRecord | None]) -> list[StoredSegment]:
    """Some segments of the records at their `_places`; None: it was not found."""
    own = records[len(records) - len(indices) :]
    sinks = records[0] if len(records) > len(indices) else None
    found = []
    for index, record in zip(indices, own, strict=True):
        if index > 0 and record:
            found.append(StoredSegment(index, record))
        elif index == 0 and record and sinks:
            found.append(StoredSegment(index, record, sinks))
        elif index == 0:
            # One without the other is a miss: both are recomputed.
            for half in (record, sinks):
                if half:
                    half.lease.release()
    return found
