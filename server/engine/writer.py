"""Encodes finished segments and hands them to the tiers, off the path of running requests.

On CUDA a thread does all of it on a side stream, while the next chunk is being computed. On a CPU there is no
other place: the engine calls `pump` between its steps with a small limit, so that a running answer waits for
one segment at most, and with none when it is idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from torch import Tensor

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Fill, Lease, lease_of_own, released_if_it_fails
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS, Encoded
from aquifer.compression.wire import RecordHeader, RecordKind, body_of, record_bytes, seal
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


log = structlog.get_logger(__name__)

_PATIENCE_SECONDS = 0.1

_Queued = tuple[WriteJob, Callable[[], None]]
"""A job, and what to call on the engine's thread when its record is in the RAM tier or was refused by it."""


_Bodies = tuple[Sequence[Tensor], Sequence[bool]]
"""Encoded records in host memory, and which of them must not be used."""


@dataclass(frozen=True)
class _Batch:
    """Encoded records on their way to the tiers. done: when they are there, or are refused."""

    jobs: list[_Queued]
    done: Future[None]


class SegmentWriter:
    """The queue between prefill and the tiers. Only the engine's thread uses it."""

    def __init__(
        self, codec: Codec, raw: Codec, store: TieredStore, metrics: Metrics, device: torch.device
    ) -> None:
        """raw: the codec of sink records. device: where keys and values come from."""
        self._codecs: dict[RecordKind, Codec] = {"segment": codec, "sinks": raw}
        self._store = store
        self._metrics = metrics
        self._jobs: deque[_Queued] = deque()
        self._waited_for = 0  # jobs that the last call of pump left
        self._batches: deque[_Batch] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # It launches, waits, hashes and copies, while the engine's thread is busy with the next chunk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aquifer-write") if self._stream else None

    @property
    def backlog(self) -> int:
        """Records not in the tiers yet."""
        return len(self._jobs) + sum(len(batch.jobs) for batch in self._batches)

    @property
    def waiting(self) -> set[SegmentKey]:
        """Keys of these records."""
        return {job.key for jobs in (self._jobs, *(batch.jobs for batch in self._batches)) for job, _ in jobs}

    def add(self, jobs: Sequence[WriteJob], on_done: Callable[[], None]) -> None:
        """Queue records; on_done is called once for each of them."""
        self._jobs.extend((job, on_done) for job in jobs)

    def forget(self, keys: set[SegmentKey]) -> list[Future[None]]:
        """Store none of these any more, but for what is being stored: returns when that is done."""
        forgotten = [entry for entry in self._jobs if entry[0].key in keys]
        self._jobs = deque(entry for entry in self._jobs if entry[0].key not in keys)
        for _, on_done in forgotten:
            on_done()
        return [batch.done for batch in self._batches]

    def pump(self, limit: int) -> None:
        """Encode up to `limit` waiting records, and report those that were stored. On the thread a batch
        starts when it is full or nothing was added since the last call: few large ones cost the engine's
        thread, and the device, less than many."""
        grows = self._waited_for < len(self._jobs) < limit
        later = self._thread is not None and (grows or len(self._batches) > 0)
        queued = [] if later else [self._jobs.popleft() for _ in range(min(limit, len(self._jobs)))]
        self._waited_for = len(self._jobs)
        for kind in self._codecs:
            jobs = [entry for entry in queued if entry[0].kind == kind]
            if jobs:
                self._batches.append(_Batch(jobs, self._start(kind, [job for job, _ in jobs])))
        while self._batches and self._batches[0].done.done():
            batch = self._batches.popleft()
            error = batch.done.exception()
            if error is not None:
                # What is not stored costs a later request its time, and none its answer.
                log.error("segments not stored", count=len(batch.jobs), exc_info=error)
            for _, on_done in batch.jobs:
                on_done()

    def wait(self, seconds: float) -> None:
        """Let the thread work, if there is something to wait for."""
        if self._batches:
            futures.wait([self._batches[0].done], seconds)

    def close(self) -> None:
        """Store everything that is waiting."""
        while self.backlog:
            self.pump(self.backlog)
            self.wait(_PATIENCE_SECONDS)
        if self._thread is not None:
            self._thread.shutdown()

    def store_now(self, jobs: Sequence[WriteJob], *, keep: bool) -> list[StoredRecord]:
        """Encode records that are needed right away, and lease them.

        keep: whether they are stored for others, too. Without it, or if the RAM tier has no room, the
        lease holds memory of its own. Raises ValueError for values that are not finite.
        """
        leases: list[Lease] = []
        with released_if_it_fails(leases):
            for job in jobs:
                (body,), (damaged,) = self._encode(self._codecs[job.kind], [job], _mark(job.keys))
                if damaged:
                    raise ValueError(f"{_name(job)} holds values that are not finite")
                lease = self._store_record(job, body) if keep else None
                leases.append(lease or lease_of_own(*self._sealing(job, body), "own"))
        return [StoredRecord(lease, body_of(lease.data)) for lease in leases]

    def _start(self, kind: RecordKind, jobs: Sequence[WriteJob]) -> Future[None]:
        """Encode and store, on a device's side on the thread."""
        computed = _mark(jobs[0].keys)
        if computed is not None:
            assert self._thread is not None
            return self._thread.submit(self._write, kind, jobs, computed)
        done: Future[None] = Future()
        try:
            self._write(kind, jobs, None)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def _write(self, kind: RecordKind, jobs: Sequence[WriteJob], computed: torch.cuda.Event | None) -> None:
        for job, body, damaged in zip(jobs, *self._encode(self._codecs[kind], jobs, computed), strict=True):
            if damaged:
                # What it would spread to is this segment only: the request goes on without storing it.
                log.warning("segment not stored: values that are not finite", segment=_name(job))
                continue
            lease = self._store_record(job, body)
            if lease is not None:
                lease.release()

    def _encode(self, codec: Codec, jobs: Sequence[WriteJob], computed: torch.cuda.Event | None) -> _Bodies:
        """Bodies of the records in host memory, and which of them must not be used.

        computed: when a device has the keys and values (None: it is no device).
        """
        started = time.perf_counter()
        counts = [job.num_tokens for job in jobs]
        if computed is None:
            encoded = codec.encode_unchecked(*_joined(jobs), counts)
        else:
            encoded = self._encode_beside(codec, jobs, counts, computed)
        self._metrics.codec_tokens.labels(op="encode").inc(sum(counts))
        self._metrics.codec_seconds.labels(op="encode").inc(time.perf_counter() - started)
        if encoded.damaged is None:
            return encoded.bodies, [False] * len(jobs)
        return encoded.bodies, [bool(rows.any()) for rows in encoded.damaged.split(counts)]

    @torch.inference_mode()
    def _encode_beside(
        self, codec: Codec, jobs: Sequence[WriteJob], counts: list[int], computed: torch.cuda.Event
    ) -> Encoded:
        """On the side stream, and in one copy to page-locked memory."""
        assert self._stream is not None
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            for job in jobs:
                # The allocator must not hand these to the main stream while this one reads them.
                job.keys.record_stream(self._stream)
                job.values.record_stream(self._stream)
            encoded = codec.encode_unchecked(*_joined(jobs), counts)
            sizes = [body.numel() for body in encoded.bodies]
            host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
            host.copy_(torch.cat(encoded.bodies), non_blocking=True)
            damaged = None if encoded.damaged is None else encoded.damaged.cpu()
            self._stream.synchronize()
        return Encoded(list(host.split(sizes)), damaged)

    def _store_record(self, job: WriteJob, body: Tensor) -> Lease | None:
        """Hand a record to the tiers. Returns the lease of what RAM holds, if it has room."""
        size, fill = self._sealing(job, body)
        lease, is_new = self._store.insert(job.key, size, fill)
        if is_new:
            spec = self._codecs[job.kind].spec
            self._metrics.kv_raw_bytes.inc(job.num_tokens * spec.bytes_per_token)
            self._metrics.kv_stored_bytes.inc(size)
        return lease

    def _sealing(self, job: WriteJob, body: Tensor) -> tuple[int, Fill]:
        """The size of a record, and what writes it: copying and hashing leave the interpreter to others."""
        fingerprint = self._codecs[job.kind].fingerprint
        header = RecordHeader(job.kind, fingerprint, job.key.digest, job.start, job.num_tokens)

        def fill(record: memoryview) -> None:
            # By one thread: torch would wake one per core for it, beside the engine's.
            np.frombuffer(body_of(record), dtype=np.uint8)[:] = body.numpy()
            seal(record, header)

        return record_bytes(body.numel()), fill


def _mark(keys: Tensor) -> torch.cuda.Event | None:
    """What happens when a device has computed what was queued so far; None without a device."""
    return torch.cuda.current_stream(keys.device).record_event() if keys.is_cuda else None


def _joined(jobs: Sequence[WriteJob]) -> tuple[Tensor, Tensor]:
    """Keys and values [L, T, C] of all jobs."""
    return torch.cat([job.keys for job in jobs], dim=1), torch.cat([job.values for job in jobs], dim=1)


def _name(job: WriteJob) -> str:
    return f"{job.kind} from token {job.start:,}"


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
