"""From stored records to KV in the pages of a request.

`Fetcher` runs on threads of its own and only moves bytes (Redis to RAM). `Restorer` runs on the
engine's thread: it decodes a group of segments in one pass, layer by layer, applies RoPE and writes
the pages. On a CPU it reads straight out of the arena. On CUDA a record is copied as a whole: one copy
per segment and layer would cost more than the bytes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from aquifer.cachestore.keys import PromptKeys, SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Lease
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.compression.wire import RecordKind, WireError, open_record
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.pages import BlockTable
from aquifer.server.engine.records import segment_span
from aquifer.server.engine.runner import ModelRunner
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

log = structlog.get_logger(__name__)

GROUP_SEGMENTS = 32
"""Segments decoded in one pass: 8,192 tokens fill a GPU's GEMMs; running answers wait for one group."""


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

    def fetch(self, keys: PromptKeys, indices: Sequence[int]) -> Fetched:
        """Lease the records of these segments, and open them. All are asked for at once: a hole is
        recomputed and what lies behind it still used. Bad data is a miss, never an error."""
        started = time.perf_counter()
        tiers = self._store.contains([keys.segments[index] for index in indices])
        held = {index: tier for index, tier in zip(indices, tiers, strict=True) if tier is not None}
        wanted = [index for index, tier in held.items() if self._gate.worth_loading(tier)]
        asked = [keys.segments[index] for index in wanted]
        if 0 in wanted and keys.sinks is not None:
            asked.insert(0, keys.sinks)  # at its place in the prefix, whose end is evicted first
        leases = dict(zip(asked, self._store.get(asked), strict=True)) if asked else {}
        found = []
        for index in wanted:
            segment = self._open_segment(index, keys, leases)
            if segment is None:
                del held[index]
            else:
                found.append(segment)
        return Fetched(found, set(held), time.perf_counter() - started)

    def _open_segment(
        self, index: int, keys: PromptKeys, leases: Mapping[SegmentKey, Lease | None]
    ) -> StoredSegment | None:
        record = self._open("segment", keys.segments[index], leases, segment_span(index)[1])
        if index > 0:
            return StoredSegment(index, record) if record else None
        sinks = self._open("sinks", keys.sinks, leases, SINK_TOKENS) if keys.sinks else None
        if record and sinks:
            return StoredSegment(index, record, sinks)
        # One without the other is a miss: both are recomputed.
        for half in (record, sinks):
            if half:
                half.lease.release()
        return None

    def _open(
        self, kind: RecordKind, key: SegmentKey, leases: Mapping[SegmentKey, Lease | None], num_tokens: int
    ) -> StoredRecord | None:
        lease = leases[key]
        if lease is None:
            return None
        codec = self._codecs[kind]
        try:
            body = open_record(
                lease.data, kind=kind, codec=codec.fingerprint, chain=key.digest, num_tokens=num_tokens
            )
            if body.nbytes != codec.segment_bytes(num_tokens):
                raise WireError(f"body of {body.nbytes} bytes, expected {codec.segment_bytes(num_tokens)}")
        except WireError as error:
            log.warning("record refused", tier=lease.tier, kind=kind, reason=str(error))
            lease.release()
            self._store.delete([key])
            return None
        return StoredRecord(lease, body)


class Restorer:
    """Decodes stored segments into pages. Only the engine's thread uses it."""

    def __init__(
        self, adapter: DecoderAdapter, codec: Codec, raw: Codec, runner: ModelRunner, metrics: Metrics
    ) -> None:
        """raw: the codec of sink records."""
        self._adapter = adapter
        self._codec = codec
        self._raw = raw
        self._runner = runner
        self._metrics = metrics

    def restore(self, segments: Sequence[StoredSegment], table: BlockTable) -> None:
        """Write the KV of these segments, in ascending order, into the table's pages."""
        started = time.perf_counter()
        spec, device = self._codec.spec, self._adapter.device
        spans = [segment_span(segment.index) for segment in segments]
        records = [segment.record for segment in segments]
        streams = [_LayerStream(self._codec, records, [count for _, count in spans], device)]
        if segments[0].sinks is not None:
            spans.insert(0, (0, SINK_TOKENS))
            streams.insert(0, _LayerStream(self._raw, [segments[0].sinks], [SINK_TOKENS], device))
        positions = torch.cat([torch.arange(start, start + count, device=device) for start, count in spans])
        cos, sin = self._adapter.rope_table(positions)
        runs = table.runs(spans)
        for layer in range(spec.num_layers):
            parts = [stream.next_layer() for stream in streams]
            keys, values = (
                torch.cat([part.to(spec.dtype) for part in kv]).view(-1, spec.num_kv_heads, spec.head_dim)
                for kv in zip(*parts, strict=True)
            )
            rotated = apply_rope(keys, cos, sin)
            self._runner.write(layer, runs, rotated.transpose(0, 1), values.transpose(0, 1))
        if device.type == "cuda":
            # The leases may be released when this returns, so the copies must have been made.
            torch.cuda.synchronize(device)
        self._metrics.codec_tokens.labels(op="decode").inc(len(segments) * SEGMENT_TOKENS)
        self._metrics.codec_seconds.labels(op="decode").inc(time.perf_counter() - started)


class _LayerStream:
    """The layers of several records of one codec, in order."""

    def __init__(
        self, codec: Codec, records: Sequence[StoredRecord], counts: Sequence[int], device: torch.device
    ) -> None:
        self._decoder = codec.decoder(counts, device)
        layers = range(codec.spec.num_layers)
        sizes = {count: [codec.layer_bytes(layer, count) for layer in layers] for count in set(counts)}
        self._slices = []
        for record, count in zip(records, counts, strict=True):
            with warnings.catch_warnings():
                # Records are leased read-only, and torch warns that it cannot promise not to write them.
                # Decoders do not write their input.
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                body = torch.frombuffer(record.body, dtype=torch.uint8).to(device, non_blocking=True)
            self._slices.append(body.split(sizes[count]))
        self._next = 0

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of the next layer, [T, C] each."""
        slices = [layers[self._next] for layers in self._slices]
        self._next += 1
        return self._decoder.decode_layer(slices)
