"""Encodes finished segments and hands them to the tiers, off the path of running requests.

On CUDA a batch is encoded on a side stream and copied to pinned memory while the next chunk is being
computed. On a CPU there is no other stream: the engine calls `pump` between its steps with a small
limit, so that a running answer waits for one segment at most, and with none when it is idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Lease
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.compression.wire import RecordHeader, RecordKind, body_of, seal
from aquifer.server.engine.fetch import StoredRecord
from aquifer.server.engine.records import segment_span
from aquifer.server.engine.runner import LayerKV
from aquifer.server.metrics import Metrics


@dataclass(frozen=True)
class WriteJob:
    """One record to be: `keys` and `values` [L, T, C] before RoPE, of T tokens from `start`."""

    key: SegmentKey
    kind: RecordKind
    start: int
    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


_Queued = tuple[WriteJob, Callable[[], None]]
"""A job, and what to call on the engine's thread when its record is in the RAM tier or was refused by it."""


@dataclass(frozen=True)
class _Flight:
    """Encoded bytes on their way to host memory; ready when the event is (None: ready now)."""

    jobs: list[_Queued]
    bodies: list[Tensor]
    event: torch.cuda.Event | None


class SegmentWriter:
    """The queue between prefill and the tiers. Only the engine's thread uses it."""

    def __init__(self, codec: Codec, raw: Codec, store: TieredStore, metrics: Metrics) -> None:
        """raw: the codec of sink records."""
        self._codecs: dict[RecordKind, Codec] = {"segment": codec, "sinks": raw}
        self._store = store
        self._metrics = metrics
        self._jobs: deque[_Queued] = deque()
        self._flights: deque[_Flight] = deque()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @property
    def backlog(self) -> int:
        """Records not in the tiers yet."""
        return len(self._jobs) + sum(len(flight.jobs) for flight in self._flights)

    def add(self, jobs: Sequence[WriteJob], on_done: Callable[[], None]) -> None:
        """Queue records; on_done is called once for each of them."""
        self._jobs.extend((job, on_done) for job in jobs)

    def pump(self, limit: int) -> None:
        """Encode up to `limit` waiting records, and store those whose bytes have arrived."""
        queued = [self._jobs.popleft() for _ in range(min(limit, len(self._jobs)))]
        for kind, codec in self._codecs.items():
            batch = [entry for entry in queued if entry[0].kind == kind]
            if batch:
                bodies, event = self._encode(codec, [job for job, _ in batch])
                self._flights.append(_Flight(batch, bodies, event))
        while self._flights and (self._flights[0].event is None or self._flights[0].event.query()):
            flight = self._flights.popleft()
            for (job, on_done), body in zip(flight.jobs, flight.bodies, strict=True):
                lease = self._store_record(job, self._seal(job, body))
                if lease is not None:
                    lease.release()
                on_done()

    def store_now(self, jobs: Sequence[WriteJob], *, keep: bool) -> list[StoredRecord]:
        """Encode records that are needed right away, and lease them.

        keep: whether they are stored for others, too. Without it, or if the RAM tier has no room, the
        lease holds memory of its own.
        """
        records = []
        for job in jobs:
            (body,), event = self._encode(self._codecs[job.kind], [job])
            if event is not None:
                event.synchronize()
            sealed = self._seal(job, body)
            lease = self._store_record(job, sealed) if keep else None
            lease = lease or Lease(memoryview(sealed), "own")
            records.append(StoredRecord(lease, body_of(lease.data)))
        return records

    def _encode(self, codec: Codec, jobs: Sequence[WriteJob]) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Bodies of the records, in host memory when the event has happened (None: now)."""
        started = time.perf_counter()
        keys = torch.cat([job.keys for job in jobs], dim=1)
        values = torch.cat([job.values for job in jobs], dim=1)
        counts = [job.num_tokens for job in jobs]
        event = None
        if keys.is_cuda:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                bodies = [_to_pinned(body) for body in codec.encode(keys, values, counts)]
                event = self._stream.record_event()
            # The allocator must not hand these to the main stream while the side stream reads them.
            keys.record_stream(self._stream)
            values.record_stream(self._stream)
        else:
            bodies = codec.encode(keys, values, counts)
        self._metrics.codec_tokens.labels(op="encode").inc(sum(counts))
        self._metrics.codec_seconds.labels(op="encode").inc(time.perf_counter() - started)
        return bodies, event

    def _store_record(self, job: WriteJob, record: bytes) -> Lease | None:
        """Hand a record to the tiers. Returns the lease of what RAM holds, if it has room."""
        lease, is_new = self._store.insert(job.key, record)
        if is_new:
            spec = self._codecs[job.kind].spec
            self._metrics.kv_raw_bytes.inc(job.num_tokens * spec.bytes_per_token)
            self._metrics.kv_stored_bytes.inc(len(record))
        return lease

    def _seal(self, job: WriteJob, body: Tensor) -> bytes:
        fingerprint = self._codecs[job.kind].fingerprint
        header = RecordHeader(job.kind, fingerprint, job.key.digest, job.start, job.num_tokens)
        return seal(header, body.numpy().data)


def _to_pinned(body: Tensor) -> Tensor:
    host = torch.empty(body.shape, dtype=body.dtype, pin_memory=True)
    return host.copy_(body, non_blocking=True)


def split_segments(
    kv: LayerKV,
    start: int,
    wanted: Sequence[tuple[int, SegmentKey]],
    sinks: SegmentKey | None,
) -> list[WriteJob]:
    """Cut the KV of a chunk that begins at token `start` into records.

    wanted: (index, key) of the segments inside the chunk that are to be stored.
    sinks: key of the sink record, which goes along with segment 0.
    """

    def job(key: SegmentKey, kind: RecordKind, first: int, count: int) -> WriteJob:
        rows = slice(first - start, first - start + count)
        return WriteJob(key, kind, first, kv.keys[:, rows], kv.values[:, rows])

    jobs = []
    for index, key in wanted:
        if index == 0 and sinks is not None:
            jobs.append(job(sinks, "sinks", 0, SINK_TOKENS))
        jobs.append(job(key, "segment", *segment_span(index)))
    return jobs
