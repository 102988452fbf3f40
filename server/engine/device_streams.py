"""Stored segments as a stream of layers on a CUDA device.

Three queues run beside the caller's: one brings the bytes of the next layers out of the arena, one moves the
chain over the layers on, one writes keys and values to where they are wanted. The caller waits for the last
one only, so that one layer is attended to while the next one is decoded and the bytes of a third arrive. A
single new token reads the chain's state itself, on the caller's queue, which must go ahead of the chain's.

Import this module only where a CUDA device is in use, or Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from aquifer.compression.chain import ChainDecoder, Half, SegmentDecoder
from aquifer.compression.codec import Codec
from aquifer.compression.spec import KVSpec
from aquifer.kernels.attention import attend, attend_in_pieces
from aquifer.kernels.rope import apply_rope
from aquifer.server.engine.fetch import StoredRecord
from aquifer.server.engine.host_memory import to_device
from aquifer.server.engine.host_slices import HostRecords, HostSlices
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.records import joined, numbers_of

LANDINGS = 3


class Queue:
    """Device work that runs beside the caller's."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._stream = torch.cuda.Stream(device, priority)

    def here(self) -> AbstractContextManager[object]:
        """Work started inside belongs to this queue."""
        return torch.cuda.stream(self._stream)

    def after(self, *events: torch.cuda.Event | None) -> None:
        """Do nothing more before these have happened; None has."""
        for event in events:
            if event is not None:
                self._stream.wait_event(event)

    def mark(self) -> torch.cuda.Event:
        """What happens when all work of this queue up to now is done."""
        return self._stream.record_event()

    def hold(self, *tensors: Tensor) -> None:
        """Keep memory from other owners until what is in this queue now is done."""
        for tensor in tensors:
            tensor.record_stream(self._stream)


class Queues:
    """copies: of bytes from host memory, and reading them; chain: from layer to layer; emits: keys and
    values; rows: of selective decoding, for which no step waits; sinks: beside a restore that is replayed."""

    def __init__(self, device: torch.device, priority: int = 0, copies: Queue | None = None) -> None:
        """copies: of others, which share the bus."""
        self._device = device
        # Work of the small kernels is needed first: a GEMM's tiles would keep them waiting.
        self.copies, self.emits = copies or Queue(device, priority - 1), Queue(device, priority - 1)
        self.chain = Queue(device, priority)
        self._priority = priority

    @cached_property
    def rows(self) -> Queue:
        """Made where it is used: never by the queues that restores are recorded on."""
        return Queue(self._device, self._priority)

    @cached_property
    def sinks(self) -> Queue:
        """Never of the priority of these queues, on whose streams others may be recording."""
        return Queue(self._device)

    def callers(self) -> torch.cuda.Event:
        """What happens when all of the caller's work up to now is done."""
        return torch.cuda.current_stream(self._device).record_event()

    def let_caller_wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


@cache
def queues_of(device: torch.device) -> Queues:
    """One set for all streams of a device; they follow each other."""
    return Queues(device)


class Landing:
    """Buffers through which the layers of some records arrive: one is read, one is full, one fills."""

    def __init__(self, slices: HostSlices, copies: Queue) -> None:
        self._slices, self._copies = slices, copies
        sizes, device = landing_sizes(slices.layer_bytes), slices.tables[0].device
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._buffers = self._memory.split(sizes)
        copies.hold(self._memory, *slices.tables)

    @property
    def memory(self) -> Tensor:
        return self._memory

    def layer(self, layer: int) -> Tensor:
        """The bytes of a layer, when they are there."""
        return self._buffers[layer % LANDINGS][: self._slices.layer_bytes[layer]]

    def fetch(self, layer: int, free: torch.cuda.Event | None) -> None:
        """Queue a layer's copy. free: when the layer LANDINGS before it has been read."""
        self._copies.after(free)
        with self._copies.here():
            self._slices.land(layer, self.layer(layer))


def landing_sizes(layer_bytes: Sequence[int]) -> list[int]:
    """Bytes of each buffer: layers take turns, and the first one has more bits than all others."""
    return [max(layer_bytes[number::LANDINGS], default=0) for number in range(LANDINGS)]


class LandedLayers:
    """The layers of some records for a decoder that knows nothing of queues; one layer travels ahead."""

    def __init__(self, slices: HostSlices, decoder: SegmentDecoder, sizes: Sequence[Sequence[int]]) -> None:
        """sizes: of the slices of each layer."""
        device = slices.tables[0].device
        self._decoder, self._sizes, self._queues = decoder, sizes, queues_of(device)
        self._landing = Landing(slices, self._queues.copies)
        self._layer = 0
        self._queues.copies.after(self._queues.callers())  # the buffers may have had other users
        self._fetch(0, None)

    def __call__(self) -> tuple[Tensor, Tensor]:
        layer = self._layer
        self._layer += 1
        self._queues.let_caller_wait(self._arrived)
        if self._layer < len(self._sizes):
            # The readers of all layers before this one are queued by now.
            self._fetch(self._layer, self._queues.callers())
        return self._decoder.decode_layer(self._landing.layer(layer).split(list(self._sizes[layer])))

    def _fetch(self, layer: int, free: torch.cuda.Event | None) -> None:
        self._landing.fetch(layer, free)
        self._arrived = self._queues.copies.mark()


@dataclass(frozen=True)
class Sinks:
    """The first tokens of a prompt.

    rows: [L, 2, S, C] before RoPE, in host memory; rope: cos and sin [S, D]."""

    rows: Tensor
    rope: tuple[Tensor, Tensor]


class ChainedSegments:
    """Segments of a codec whose decoder has steps of its own, and perhaps sinks before them."""

    def __init__(
        self,
        codec: Codec,
        records: Sequence[StoredRecord],
        spans: Sequence[tuple[int, int]],
        rope_table: Callable[[Tensor], tuple[Tensor, Tensor]],
        sinks: Sinks | None,
        device: torch.device,
    ) -> None:
        """records: one per segment; they must stay as they are.
        spans: (first token, number of tokens) of each segment.
        rope_table: gives cos and sin [T, D] of positions [T]; asked while bytes are on their way."""
        assert codec.chain is not None
        self._codec, self._chain, self._spec, self._device = codec, codec.chain, codec.spec, device
        self.spans = spans
        self.counts = tuple(count for _, count in spans)
        self.records = HostRecords(records, device)
        self._rope_table, self._sinks = rope_table, sinks
        self.first = 0 if sinks is None else sinks.rows.shape[2]
        """Row of the first token that is no sink."""

    @cached_property
    def slices(self) -> HostSlices:
        return HostSlices(self._codec, self.counts, self.records.on_device())

    @cached_property
    def rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of the tokens that are no sinks."""
        return self._rope_table(to_device(numbers_of(joined(self.spans)), self._device))

    @cached_property
    def sinks(self) -> Tensor | None:
        """Keys after RoPE and values, [L, 2, H, S, D]."""
        if self._sinks is None:
            return None
        rows = self._sinks.rows.to(self._device, non_blocking=True)
        return _emitted_sinks(rows, self._spec, self._sinks.rope)

    @property
    def num_tokens(self) -> int:
        """Sinks included."""
        return self.first + sum(self.counts)

    def staging_bytes(self, rows: int, query_heads: int) -> int:
        """What a stream takes of the device while queries [Hq, R, D] attend to it. Keys and values of a layer
        are written for several rows; a single one leaves its scores between two kernels."""
        tokens, spec = sum(self.counts), self._spec
        layer = 2 * self.num_tokens * spec.channels * spec.dtype.itemsize
        scores = tokens * query_heads * torch.float32.itemsize
        landings = sum(landing_sizes(self.slices.layer_bytes))
        return self._chain.chain_bytes(tokens) + landings + (scores if rows == 1 else layer)

    def open(self) -> ChainStream:
        """Begin with layer 0."""
        chain = Chain(self._spec.num_layers, self.slices, self.decoder(), queues_of(self._device))
        return ChainStream(self, chain)

    def decoder(self) -> ChainDecoder:
        return self._chain.chain_decoder(self.counts, self._device)

    def place_sinks(self, pool: PagePool, slots: Tensor) -> None:
        """Write the sinks, if there are some. slots: int64 [S], theirs, in host memory."""
        if self.sinks is not None:
            there = to_device(slots, self._device)
            pool.keys.index_copy_(2, there, self.sinks[:, 0])
            pool.values.index_copy_(2, there, self.sinks[:, 1])

    def new_layer(self) -> Tensor:
        """Room for keys and values of a layer, [2, H, T, D]."""
        spec = self._spec
        shape = (2, spec.num_kv_heads, self.num_tokens, spec.head_dim)
        return torch.empty(shape, dtype=spec.dtype, device=self._device)


class ChainStream:
    """See SegmentStream."""

    def __init__(self, segments: ChainedSegments, chain: Chain) -> None:
        self._segments, self._chain = segments, chain
        self._staged: tuple[Tensor, Tensor] | None = None
        self._layer = 0

    def next_layer(self) -> tuple[Tensor, Tensor]:
        segments = self._segments
        if self._staged is None:
            room = segments.new_layer()
            self._staged = room, torch.arange(segments.first, segments.num_tokens, device=room.device)
        room, slots = self._staged
        if segments.sinks is not None:
            room[:, :, : segments.first] = segments.sinks[self._layer]
        self._layer += 1
        self._chain.emit_next(segments.rope, slots, room[0], room[1], after_caller=True)
        return room[0], room[1]

    def attend(self, q: Tensor) -> list[tuple[Tensor, Tensor]]:
        if q.shape[1] > 1:
            return attend_in_pieces(q, *self.next_layer())
        layer, sinks = self._layer, self._segments.sinks
        self._layer += 1
        out, lse = self._chain.attend_next(self._segments.rope, q[:, 0])
        parts = [(out[:, None], lse[:, None])]
        if sinks is not None:
            parts.append(attend(q, *sinks[layer]))
        return parts

    def restore(self, pool: PagePool, runs: Sequence[tuple[int, int]]) -> None:
        segments = self._segments
        sinks, slots = numbers_of(runs).tensor_split([segments.first])
        segments.place_sinks(pool, sinks)
        emit_all([(self._chain, segments.rope, to_device(slots, pool.keys.device))], pool)


class Chain:
    """The steps of a decoder on their queues."""

    def __init__(self, num_layers: int, slices: HostSlices, decoder: ChainDecoder, queues: Queues) -> None:
        self._num_layers, self._decoder, self._queues = num_layers, decoder, queues
        self._landing = Landing(slices, queues.copies)
        started = queues.callers()
        for queue in (queues.copies, queues.chain, queues.emits):
            queue.hold(self._landing.memory, *decoder.buffers)
            queue.after(started)  # the memory may have had other users
        none: list[torch.cuda.Event | None] = [None] * num_layers
        # By layer: when its bytes are there, its state stands, and it is written or attended to.
        self._arrived, self._advanced, self._used = none[:], none[:], none[:]
        self._layer = 0
        self._feed(0)
        self._advance(0)
        self._feed(1)

    def emit_next(
        self,
        rope: tuple[Tensor, Tensor],
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        after_caller: bool,
    ) -> None:
        """Write the next layer, and begin with the one behind it.

        rope: cos and sin [T, D]; slots: int64 [T]; keys, values: [H, slots, D]. after_caller: not before what
        the caller has queued so far is done. What the caller queues from now on finds the layer written.
        """
        layer, queues = self._layer, self._queues
        self._layer += 1
        queues.emits.after(self._advanced[layer], queues.callers() if after_caller else None)
        with queues.emits.here():
            self._decoder.emit(layer, rope, slots, keys, values)
        queues.emits.hold(slots, keys, values, *rope)
        self._used[layer] = done = queues.emits.mark()
        queues.let_caller_wait(done)
        self._advance(layer + 1)
        self._feed(layer + 2)

    def attend_next(self, rope: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q [Hq, D] to the next layer, which is not written; begin with the one behind it.

        rope: cos and sin [T, D]."""
        layer, queues = self._layer, self._queues
        self._layer += 1
        queues.let_caller_wait(self._advanced[layer])
        part = self._decoder.attend(layer, rope, q)
        self._used[layer] = queues.callers()
        self._advance(layer + 1)
        self._feed(layer + 2)
        return part

    def _feed(self, layer: int) -> None:
        """Bring the bytes of a layer, as soon as buffers are free."""
        if layer >= self._num_layers:
            return
        self._landing.fetch(layer, self._advanced[layer - LANDINGS] if layer >= LANDINGS else None)
        self._arrived[layer] = self._queues.copies.mark()

    def _advance(self, layer: int) -> None:
        """Move the chain on to a layer."""
        if layer >= self._num_layers:
            return
        chain, data = self._queues.chain, self._landing.layer(layer)
        chain.after(self._arrived[layer])
        with chain.here():
            self._decoder.advance(layer, Half.KEYS, data)
            chain.after(self._used[layer - 1] if layer else None)
            self._decoder.advance(layer, Half.VALUES, data)
        self._advanced[layer] = chain.mark()


def emit_all(chains: Sequence[tuple[Chain, tuple[Tensor, Tensor], Tensor]], pool: PagePool) -> None:
    """Write all layers of some chains, side by side, into pages.

    chains: each with cos and sin [T, D] and slots, int64 [T]."""
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        for chain, rope, slots in chains:
            chain.emit_next(rope, slots, keys, values, after_caller=layer == 0)


def _emitted_sinks(rows: Tensor, spec: KVSpec, rope: tuple[Tensor, Tensor]) -> Tensor:
    """rows: [L, 2, S, C] before RoPE. Returns keys after RoPE and values, [L, 2, H, S, D]."""
    layers = len(rows)
    rows = rows.unflatten(3, (spec.num_kv_heads, spec.head_dim))
    cos, sin = (table.repeat(layers, 1) for table in rope)
    keys = apply_rope(rows[:, 0].flatten(0, 1), cos, sin).view_as(rows[:, 0])
    return torch.stack((keys, rows[:, 1]), dim=1).transpose(2, 3).contiguous()
