"""Stored segments as a stream of layers: the one place where records turn back into keys and values.

Restoring writes the layers into pages, streamed decoding attends to them and forgets them, selective
decoding turns them into landmarks and rows. On a CPU the bytes are read straight out of the arena; see
device_streams.py for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.compression.raw import RawCodec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.kernels.attention import attend_in_pieces
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine.fetch import StoredRecord, StoredSegment
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.records import as_tensor, joined, numbers_of, segment_span
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

if TYPE_CHECKING:
    from aquifer.server.engine.device_streams import ChainedSegments
    from aquifer.server.engine.host_slices import HostSlices


@dataclass(frozen=True)
class SegmentReader:
    """Reads the records of one model. raw: the codec of sink records."""

    adapter: DecoderAdapter
    codec: Codec
    raw: RawCodec
    metrics: Metrics

    def source(self, segments: Sequence[StoredSegment], *, sinks_only: bool = False) -> SegmentSource:
        """segments: ascending, at least one. sinks_only: of the first segment, which must be number 0."""
        return SegmentSource(self, segments, sinks_only=sinks_only)

    @cached_property
    def sink_rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin [S, D] of the sinks, whose places are those of every prompt. Made once, on the caller's
        queue: models multiply for it, and cuBLAS keeps working memory for each queue."""
        return self.adapter.rope_table(torch.arange(SINK_TOKENS, device=self.adapter.device))


class SegmentStream(Protocol):
    """Keys and values of a source. Either all layers are taken one by one, or the whole is restored."""

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values [H, T, D], in the model's dtype, rows in the order of the source's
        `spans`. On CUDA they are overwritten by the next call."""

    def attend(self, q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Attention of q [Hq, R, D] to all tokens of the next layer, in place of `next_layer`; as parts for
        `merge_attention`."""

    def restore(self, pool: PagePool, runs: Sequence[tuple[int, int]]) -> None:
        """Write all layers into the slots of `runs`, which have room for all tokens."""


class SegmentSource:
    """Some segments, laid out for streaming any number of times. Their leases must outlive it."""

    def __init__(self, reader: SegmentReader, segments: Sequence[StoredSegment], *, sinks_only: bool) -> None:
        adapter = reader.adapter
        self.spec, self._device = adapter.spec, adapter.device
        self._query_heads = adapter.num_q_heads
        self.spans: list[tuple[int, int]] = []
        """(first token, number of tokens) of each piece, in the order of the rows."""
        parts: list[tuple[Codec, list[StoredRecord], list[int]]] = []
        if segments[0].sinks is not None:
            self.spans.append((0, SINK_TOKENS))
            parts.append((reader.raw, [segments[0].sinks], [SINK_TOKENS]))
        if not sinks_only:
            spans = [segment_span(segment.index) for segment in segments]
            self.spans += spans
            parts.append((reader.codec, [s.record for s in segments], [count for _, count in spans]))
        # It does not know this object, which is gone with its last user, and not when cycles are looked for:
        # with it go rows, angles and page-locked copies.
        self._rope = cache(partial(_rope_table, adapter, self.spans))
        self.num_tokens = sum(count for _, count in self.spans)
        self.num_bytes = sum(record.body.nbytes for _, records, _ in parts for record in records)
        """Bytes of the records, all layers."""
        self.chained: ChainedSegments | None = None
        """The same for kernels, where the codec has some."""
        self._parts: list[_Records] = []
        if not sinks_only and reader.codec.chain is not None:
            from aquifer.server.engine.device_streams import ChainedSegments, Sinks

            sinks = None
            if len(parts) == 2:
                sinks = Sinks(reader.raw.rows(as_tensor(parts[0][1][0].body)), reader.sink_rope)
            self.chained = ChainedSegments(
                reader.codec, parts[-1][1], spans, adapter.rope_table, sinks, self._device
            )
        else:
            self._parts = [_Records(codec, records, counts, self._device) for codec, records, counts in parts]

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of the rows."""
        return self._rope()

    @property
    def held_bytes(self) -> int:
        """What it keeps of the device from its first use on: angles of RoPE."""
        return 2 * self.num_tokens * self.spec.head_dim * self.spec.dtype.itemsize

    def staging_bytes(self, rows: int) -> int:
        """About what a layer in work takes on the device while so many new tokens attend to it: chain state,
        keys, values, bytes on the way."""
        if self.chained is not None:
            return self.chained.staging_bytes(rows, self._query_heads)
        landings = sum(part.landing_bytes for part in self._parts)
        return landings + 2 * self.num_tokens * 2 * self.spec.channels * self.spec.dtype.itemsize

    def open(self) -> SegmentStream:
        """Begin with layer 0."""
        if self.chained is not None:
            return self.chained.open()
        return _PlainStream(self, [part.open() for part in self._parts])


class _PlainStream:
    """See SegmentStream."""

    def __init__(self, source: SegmentSource, parts: Sequence[Callable[[], tuple[Tensor, Tensor]]]) -> None:
        """parts: each gives the next layer of some of the rows, [T, C] before RoPE."""
        self._source, self._parts = source, parts

    def next_layer(self) -> tuple[Tensor, Tensor]:
        spec = self._source.spec
        layers = [next_layer() for next_layer in self._parts]
        keys, values = (
            end_to_end([half.to(spec.dtype) for half in halves]).view(-1, spec.num_kv_heads, spec.head_dim)
            for halves in zip(*layers, strict=True)
        )
        return apply_rope(keys, *self._source.rope).transpose(0, 1), values.transpose(0, 1)

    def attend(self, q: Tensor) -> list[tuple[Tensor, Tensor]]:
        return attend_in_pieces(q, *self.next_layer())

    def restore(self, pool: PagePool, runs: Sequence[tuple[int, int]]) -> None:
        for layer in range(self._source.spec.num_layers):
            pool.write(layer, runs, *self.next_layer())


def end_to_end(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Parts one behind the other; not copied where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Records:
    """Several records of one codec, cut into layers."""

    def __init__(
        self, codec: Codec, records: Sequence[StoredRecord], counts: Sequence[int], device: torch.device
    ) -> None:
        self._codec, self._counts, self._device = codec, counts, device
        layers = range(codec.spec.num_layers)
        sizes = {count: [codec.layer_bytes(layer, count) for layer in layers] for count in set(counts)}
        by_record = [sizes[count] for count in counts]
        self._sizes = list(zip(*by_record, strict=True))
        self._slices: HostSlices | None = None
        if device.type == "cuda":
            from aquifer.server.engine.host_slices import HostRecords, HostSlices

            self._records = HostRecords(records, device)
            self._slices = HostSlices(codec, counts, self._records.on_device())
        else:
            bodies = [as_tensor(record.body) for record in records]
            parts = [body.split(own) for body, own in zip(bodies, by_record, strict=True)]
            self._by_layer = [list(slices) for slices in zip(*parts, strict=True)]

    @property
    def landing_bytes(self) -> int:
        """Of the device, through which bytes arrive."""
        if self._slices is None:
            return 0
        from aquifer.server.engine.device_streams import landing_sizes

        return sum(landing_sizes(self._slices.layer_bytes))

    def open(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """What gives the next decoded layer at each call: keys and values [T, C] before RoPE."""
        decoder = self._codec.decoder(self._counts, self._device)
        if self._slices is not None:
            from aquifer.server.engine.device_streams import LandedLayers

            return LandedLayers(self._slices, decoder, self._sizes)
        layers = iter(self._by_layer)
        return lambda: decoder.decode_layer(next(layers))


def _rope_table(adapter: DecoderAdapter, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of the tokens of some spans."""
    return adapter.rope_table(numbers_of(joined(spans)).to(adapter.device))
