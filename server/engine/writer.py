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
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.compression.wire import RecordHeader, RecordKind, seal
from aquifer.server.engine.records import segment_span
from aquifer.server.engine.runner import LayerKV
from aquifer.server.metrics import Metrics


@dataclass(frozen=True)
class WriteJob:
    """One record to be: `keys` and `values` [L, T, C] before RoPE, of T tokens from `start`.

    on_done is called on the engine's thread when the record is in the RAM tier or was refused by it.
    """

    key: SegmentKey
    kind: RecordKind
    start: int
    keys: Tensor
    values: Tensor
    on_done: Callable[[], None]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class _Flight:
    """Encoded bytes on their way to host memory; ready when the event is (None: ready now)."""

    jobs: list[WriteJob]
    bodies: list[Tensor]
    event: torch.cuda.Event | None


class SegmentWriter:
    """The queue between prefill and the tiers. Only the engine's thread uses it."""

    def __init__(self, codec: Codec, raw: Codec, store: TieredStore, metrics: Metrics) -> None:
        """raw: the codec of sink records."""
        self._codecs: dict[RecordKind, Codec] = {"segment": codec, "sinks": raw}
        self._store = store
        self._metrics = metrics
        self._jobs: deque[WriteJob] = deque()
        self._flights: deque[_Flight] = deque()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @property
    def backlog(self) -> int:
        """Records not in the tiers yet."""
        return len(self._jobs) + sum(len(flight.jobs) for flight in self._flights)

    def add(self, jobs: Sequence[WriteJob]) -> None:
        self._jobs.extend(jobs)

    def pump(self, limit: int) -> None:
        """Encode up to `limit` waiting records, and store those whose bytes have arrived."""
        jobs = [self._jobs.popleft() for _ in range(min(limit, len(self._jobs)))]
        for kind, codec in self._codecs.items():
            batch = [job for job in jobs if job.kind == kind]
            if batch:
                self._flights.append(self._encode(codec, batch))
        while self._flights and (self._flights[0].event is None or self._flights[0].event.query()):
            self._land(self._flights.popleft())

    def _encode(self, codec: Codec, jobs: list[WriteJob]) -> _Flight:
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
        return _Flight(jobs, bodies, event)

    def _land(self, flight: _Flight) -> None:
        for job, body in zip(flight.jobs, flight.bodies, strict=True):
            codec = self._codecs[job.kind]
            header = RecordHeader(job.kind, codec.fingerprint, job.key.digest, job.start, job.num_tokens)
            record = seal(header, body.numpy().data)
            if self._store.put(job.key, record):
                self._metrics.kv_raw_bytes.inc(job.num_tokens * codec.spec.bytes_per_token)
                self._metrics.kv_stored_bytes.inc(len(record))
            job.on_done()


def _to_pinned(body: Tensor) -> Tensor:
    host = torch.empty(body.shape, dtype=body.dtype, pin_memory=True)
    return host.copy_(body, non_blocking=True)


def split_segments(
    kv: LayerKV,
    start: int,
    wanted: Sequence[tuple[int, SegmentKey]],
    sinks: SegmentKey | None,
    on_done: Callable[[], None],
) -> list[WriteJob]:
    """Cut the KV of a chunk that begins at token `start` into records.

    wanted: (index, key) of the segments inside the chunk that are to be stored.
    sinks: key of the sink record, which goes along with segment 0.
    """

    def job(key: SegmentKey, kind: RecordKind, first: int, count: int) -> WriteJob:
        rows = slice(first - start, first - start + count)
        return WriteJob(key, kind, first, kv.keys[:, rows], kv.values[:, rows], on_done)

    jobs = []
    for index, key in wanted:
        if index == 0 and sinks is not None:
            jobs.append(job(sinks, "sinks", 0, SINK_TOKENS))
        jobs.append(job(key, "segment", *segment_span(index)))
    return jobs
