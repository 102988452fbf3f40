"""Stored segments as a stream of layers: the one place where records turn back into keys and values.

Restoring writes the layers into pages, streamed decoding attends to them and forgets them, selective
decoding turns them into landmarks and rows. On a CPU the bytes are read straight out of the arena. On CUDA
the codes of the next layer travel while this one is reconstructed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine.fetch import StoredRecord, StoredSegment
from aquifer.server.engine.records import segment_span
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter


@dataclass(frozen=True)
class SegmentReader:
    """Opens streams over the records of one model. raw: the codec of sink records."""

    adapter: DecoderAdapter
    codec: Codec
    raw: Codec
    metrics: Metrics

    def open(self, segments: Sequence[StoredSegment], *, sinks_only: bool = False) -> SegmentStream:
        """segments: ascending, at least one. sinks_only: of the first segment, which must be number 0."""
        return SegmentStream(self, segments, sinks_only=sinks_only)


class SegmentStream:
    """Keys and values of some segments, one layer after the other. Their leases must outlive it."""

    def __init__(
        self, reader: SegmentReader, segments: Sequence[StoredSegment], *, sinks_only: bool = False
    ) -> None:
        adapter = reader.adapter
        self._spec, device = adapter.spec, adapter.device
        self.spans: list[tuple[int, int]] = []
        """(first token, number of tokens) of each piece, in the order of the rows."""
        self._parts: list[_RecordLayers] = []
        if segments[0].sinks is not None:
            self.spans.append((0, SINK_TOKENS))
            self._parts.append(_RecordLayers(reader.raw, [segments[0].sinks], [SINK_TOKENS], device))
        if not sinks_only:
            spans = [segment_span(segment.index) for segment in segments]
            self.spans += spans
            records, counts = [segment.record for segment in segments], [count for _, count in spans]
            self._parts.append(_RecordLayers(reader.codec, records, counts, device))
        positions = torch.cat([torch.arange(at, at + count, device=device) for at, count in self.spans])
        self.num_tokens = len(positions)
        self._cos, self._sin = adapter.rope_table(positions)

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the records, all layers."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def staging_bytes(self) -> int:
        """About what a layer in work takes on the device besides its bytes: chain state, keys, values."""
        return 2 * self.num_tokens * 2 * self._spec.channels * self._spec.dtype.itemsize

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values [H, T, D], in the model's dtype, rows in the order of `spans`."""
        layers = [part.next_layer() for part in self._parts]
        keys, values = (
            torch.cat([half.to(self._spec.dtype) for half in halves]).view(
                -1, self._spec.num_kv_heads, self._spec.head_dim
            )
            for halves in zip(*layers, strict=True)
        )
        return apply_rope(keys, self._cos, self._sin).transpose(0, 1), values.transpose(0, 1)


class _RecordLayers:
    """The decoded layers of several records of one codec, before RoPE."""

    def __init__(
        self, codec: Codec, records: Sequence[StoredRecord], counts: Sequence[int], device: torch.device
    ) -> None:
        self.num_bytes = sum(record.body.nbytes for record in records)
        self._decoder = codec.decoder(counts, device)
        layers = range(codec.spec.num_layers)
        sizes = {count: [codec.layer_bytes(layer, count) for layer in layers] for count in set(counts)}
        bodies = [_as_tensor(record.body).split(sizes[n]) for record, n in zip(records, counts, strict=True)]
        by_layer = [list(slices) for slices in zip(*bodies, strict=True)]
        self._feed: _Feed = _InPlace(by_layer) if device.type == "cpu" else _InFlight(by_layer, device)

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys and values [T, C]."""
        return self._decoder.decode_layer(self._feed.next_layer())


class _Feed(Protocol):
    def next_layer(self) -> list[Tensor]:
        """The bytes of the next layer, one tensor per record, on the device."""


class _InPlace:
    """Reads records where they lie."""

    def __init__(self, by_layer: Sequence[list[Tensor]]) -> None:
        self._layers = iter(by_layer)

    def next_layer(self) -> list[Tensor]:
        return next(self._layers)


class _InFlight:
    """Sends a layer ahead: gathered into page-locked memory on a thread, then one copy on a side stream.

    One copy per layer, because a copy per segment and layer costs more in launches than in bytes. Two
    buffers on each side: while one layer is read, the next one arrives in the other.
    """

    # One thread for all streams: what they do is bound by memory bandwidth.
    _gatherer = ThreadPoolExecutor(1, thread_name_prefix="aquifer-gather")

    def __init__(self, by_layer: Sequence[list[Tensor]], device: torch.device) -> None:
        self._by_layer = by_layer
        self._copies = torch.cuda.Stream(device)
        largest = max(sum(piece.numel() for piece in layer) for layer in by_layer)
        self._host = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._device = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._copies.wait_stream(torch.cuda.current_stream(device))  # the buffers may have had other users
        self._layer = 0
        self._next: Future[None] = self._gatherer.submit(self._send, 0, None)

    def next_layer(self) -> list[Tensor]:
        layer, side = self._layer, self._layer % 2
        self._next.result()
        current = torch.cuda.current_stream()
        current.wait_event(self._arrived[side])
        self._layer += 1
        if self._layer < len(self._by_layer):
            # The other buffer belongs to the layer before this one, whose readers are all queued by now.
            self._next = self._gatherer.submit(self._send, self._layer, current.record_event())
        sizes = [piece.numel() for piece in self._by_layer[layer]]
        self._device[side].record_stream(current)
        return list(self._device[side][: sum(sizes)].split(sizes))

    def _send(self, layer: int, readers_done: torch.cuda.Event | None) -> None:
        side, pieces = layer % 2, self._by_layer[layer]
        count = sum(piece.numel() for piece in pieces)
        if layer >= 2:
            self._arrived[side].synchronize()  # the copy that still reads this host buffer
        torch.cat(pieces, out=self._host[side][:count])
        with torch.cuda.stream(self._copies):
            if readers_done is not None:
                self._copies.wait_event(readers_done)
            self._device[side][:count].copy_(self._host[side][:count], non_blocking=True)
            self._arrived[side].record(self._copies)


def _as_tensor(body: memoryview) -> Tensor:
    with warnings.catch_warnings():
        # Records are leased read-only, and torch warns that it cannot promise not to write them.
        # Decoders do not write their input.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(body, dtype=torch.uint8)
