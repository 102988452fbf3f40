"""Stored segments as a stream of layers: the one place where records turn back into keys and values.

Restoring writes the layers into pages, streamed decoding attends to them and forgets them, selective
decoding turns them into landmarks and rows. On a CPU the bytes are read straight out of the arena. On CUDA
the codes of the next layer travel while this one is reconstructed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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
    """Reads the records of one model. raw: the codec of sink records."""

    adapter: DecoderAdapter
    codec: Codec
    raw: Codec
    metrics: Metrics

    def source(self, segments: Sequence[StoredSegment], *, sinks_only: bool = False) -> SegmentSource:
        """segments: ascending, at least one. sinks_only: of the first segment, which must be number 0."""
        return SegmentSource(self, segments, sinks_only=sinks_only)


class SegmentSource:
    """Some segments, laid out for streaming any number of times. Their leases must outlive it."""

    def __init__(self, reader: SegmentReader, segments: Sequence[StoredSegment], *, sinks_only: bool) -> None:
        adapter = reader.adapter
        self.spec, self._device = adapter.spec, adapter.device
        self.spans: list[tuple[int, int]] = []
        """(first token, number of tokens) of each piece, in the order of the rows."""
        self._parts: list[_Records] = []
        if segments[0].sinks is not None:
            self.spans.append((0, SINK_TOKENS))
            self._parts.append(_Records(reader.raw, [segments[0].sinks], [SINK_TOKENS]))
        if not sinks_only:
            spans = [segment_span(segment.index) for segment in segments]
            self.spans += spans
            records = [segment.record for segment in segments]
            self._parts.append(_Records(reader.codec, records, [count for _, count in spans]))
        starts = [torch.arange(at, at + count, device=self._device) for at, count in self.spans]
        positions = torch.cat(starts)
        self.num_tokens = len(positions)
        self.rope = adapter.rope_table(positions)

    @property
    def num_bytes(self) -> int:
        """Bytes of the records, all layers."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def staging_bytes(self) -> int:
        """About what a layer in work takes on the device besides its bytes: chain state, keys, values."""
        return 2 * self.num_tokens * 2 * self.spec.channels * self.spec.dtype.itemsize

    def open(self) -> SegmentStream:
        """Begin with layer 0."""
        return SegmentStream(self, [part.open(self._device) for part in self._parts])


class SegmentStream:
    """Keys and values of a source, one layer after the other."""

    def __init__(self, source: SegmentSource, parts: Sequence[Callable[[], tuple[Tensor, Tensor]]]) -> None:
        """parts: each gives the next layer of some of the rows, [T, C] before RoPE."""
        self.spans = source.spans
        self._source, self._parts = source, parts

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values [H, T, D], in the model's dtype, rows in the order of `spans`."""
        spec = self._source.spec
        layers = [next_layer() for next_layer in self._parts]
        keys, values = (
            torch.cat([half.to(spec.dtype) for half in halves]).view(-1, spec.num_kv_heads, spec.head_dim)
            for halves in zip(*layers, strict=True)
        )
        return apply_rope(keys, *self._source.rope).transpose(0, 1), values.transpose(0, 1)


class _Records:
    """Several records of one codec, cut into layers."""

    def __init__(self, codec: Codec, records: Sequence[StoredRecord], counts: Sequence[int]) -> None:
        self._codec, self._counts = codec, counts
        self.num_bytes = sum(record.body.nbytes for record in records)
        layers = range(codec.spec.num_layers)
        sizes = {count: [codec.layer_bytes(layer, count) for layer in layers] for count in set(counts)}
        bodies = [_as_tensor(record.body).split(sizes[n]) for record, n in zip(records, counts, strict=True)]
        self._by_layer = [list(slices) for slices in zip(*bodies, strict=True)]

    def open(self, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
        """What gives the next decoded layer at each call: keys and values [T, C] before RoPE."""
        decoder = self._codec.decoder(self._counts, device)
        feed: _Feed = _InPlace(self._by_layer) if device.type == "cpu" else _InFlight(self._by_layer, device)
        return lambda: decoder.decode_layer(feed.next_layer())


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
        self._current = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        largest = max(sum(piece.numel() for piece in layer) for layer in by_layer)
        self._host = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._device = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        for buffer in self._device:
            # A pass that breaks off leaves a copy behind, which must not hit the next owner of the memory.
            buffer.record_stream(self._copies)
        self._arrived = [torch.cuda.Event() for _ in range(2)]
        self._copies.wait_stream(self._current)  # the buffers may have had other users
        self._layer = 0
        self._next: Future[None] = self._gatherer.submit(self._send, 0, None)

    def next_layer(self) -> list[Tensor]:
        layer, side = self._layer, self._layer % 2
        self._next.result()
        self._current.wait_event(self._arrived[side])
        self._layer += 1
        if self._layer < len(self._by_layer):
            # The other buffer belongs to the layer before this one, whose readers are all queued by now.
            self._next = self._gatherer.submit(self._send, self._layer, self._current.record_event())
        sizes = [piece.numel() for piece in self._by_layer[layer]]
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


# Records are leased read-only, and torch warns, once, that it cannot promise not to write them. Nothing here
# does, so it is let off here, where nobody sees it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(memoryview(b"read only"), dtype=torch.uint8)


def _as_tensor(body: memoryview) -> Tensor:
    return torch.frombuffer(body, dtype=torch.uint8)
