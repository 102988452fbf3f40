"""Restores that are replayed instead of launched.

A restore launches four kernels per layer on three queues of the device, which takes the host longer than it
takes the device to run them. So all that a restore does is recorded, as a CUDA graph across the queues, once
for each of a few numbers of segments; in a smaller group the last ones are missing: they have no bytes to
copy, and their tokens no slots to be written to. What differs between restores is the graph's input, three
numbers per segment: where its record lies, its first slot, and its first token.

A group is decoded in two parts whose chains run side by side: a step of a chain waits for the one before, and
where that one leaves multiprocessors idle at its end, the other part's step goes on. Imports Triton, so only
where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import structlog
import torch
from torch import Tensor

from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.device_streams import Chain, ChainedSegments, Queues, emit_all
from aquifer.server.engine.graphs import RECORDING_PRIORITY, GraphMemory, record_graph
from aquifer.server.engine.host_memory import to_device
from aquifer.server.engine.host_slices import HostSlices
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.records import numbers_of

log = structlog.get_logger(__name__)

FEWEST, STEP = 8, 16
"""Groups are recorded for 8, 16, 32, 48, ... segments. Sixteen are as many rows as an H200 multiplies at
once: what is missing of the last sixteen costs next to nothing. Only eight are not parted."""

_ABSENT = (0, -SEGMENT_TOKENS, 0)
"""Inputs for a segment that is missing: no record, and slots that are all negative."""


class RecordedRestores:
    """Recordings, one for each number of segments and way to cut them: with and without a prompt's start."""

    def __init__(
        self,
        codec: Codec,
        pool: PagePool,
        rope_table: Callable[[Tensor], tuple[Tensor, Tensor]],
        most_segments: int,
    ) -> None:
        """codec: with a chain. rope_table: gives cos and sin [T, D] of positions [T], without waiting for
        them. most_segments: in a group."""
        self._codec, self._pool, self._rope_table = codec, pool, rope_table
        self._most = most_segments
        # Queues of its own: other engines of this process use the common ones while this one records.
        first = Queues(pool.keys.device, RECORDING_PRIORITY)
        self._queues = first, Queues(pool.keys.device, RECORDING_PRIORITY, first.copies)
        self._memory: GraphMemory = torch.cuda.graph_pool_handle()
        self._recordings: dict[tuple[int, ...], Recording | None] = {}
        """By the tokens of each segment. None: it could not be recorded."""

    @property
    def device_bytes(self) -> int:
        """What recordings keep of the device; another thread may ask while there is a new one."""
        return sum(recording.device_bytes for recording in list(self._recordings.values()) if recording)

    def of(self, segments: ChainedSegments) -> Recording | None:
        """What restores a group like this one, recorded when it is first asked for. None: launch it."""
        if len(segments.counts) > self._most:
            return None
        counts = segments.counts + (SEGMENT_TOKENS,) * (self._bucket(segments) - len(segments.counts))
        # The largest recording comes first, so that the others find room in its memory.
        for wanted in ((SEGMENT_TOKENS,) * self._most, counts):
            if wanted not in self._recordings:
                self._recordings[wanted] = self._record(wanted)
        return self._recordings[counts]

    def _bucket(self, segments: ChainedSegments) -> int:
        count = len(segments.counts)
        return min(self._most, FEWEST if count <= FEWEST else -(-count // STEP) * STEP)

    def _record(self, counts: tuple[int, ...]) -> Recording | None:
        try:
            return Recording(self._codec, counts, self._pool, self._rope_table, self._queues, self._memory)
        except RuntimeError as error:  # out of memory, above all
            log.warning("restores are launched, not replayed", segments=len(counts), exc_info=error)
            return None


class Recording:
    """A graph and its inputs."""

    def __init__(
        self,
        codec: Codec,
        counts: tuple[int, ...],
        pool: PagePool,
        rope_table: Callable[[Tensor], tuple[Tensor, Tensor]],
        queues: Sequence[Queues],
        memory: GraphMemory,
    ) -> None:
        """counts: tokens of each segment. queues: of each part."""
        device = pool.keys.device
        self._pool, self._queues = pool, queues[0]
        self._inputs = torch.tensor(_ABSENT)[:, None].repeat(1, len(counts)).to(device)
        """int64 [3, N]: where the records lie, first slots, first tokens."""
        half = -(-len(counts) // 2) if len(counts) > FEWEST else len(counts)
        cuts = slice(half), slice(half, None)
        self._parts = [
            _Part(codec, counts[cut], self._inputs[:, cut], own)
            for cut, own in zip(cuts, queues, strict=True)
            if counts[cut]
        ]

        def launch() -> None:
            # States and landings are taken while recording and dropped: recordings share their memory.
            emit_all([part.begin(len(pool.keys), rope_table) for part in self._parts], pool)

        self._graph, grown = record_graph(launch, memory)
        self.device_bytes = grown + self._inputs.nbytes + sum(part.device_bytes for part in self._parts)

    def replay(self, segments: ChainedSegments, table: BlockTable) -> None:
        """Write the KV of at most as many segments, cut like the recorded ones, into the table's pages."""
        tokens = [first for first, _ in segments.spans]
        slots = [slot for token in tokens if (slot := table.slot(token)) is not None]
        present = segments.records.addresses, slots, tokens
        missing = self._inputs.shape[1] - len(tokens)
        numbers = [[*known, *[absent] * missing] for known, absent in zip(present, _ABSENT, strict=True)]
        self._inputs.copy_(to_device(torch.from_numpy(np.array(numbers)), self._inputs.device))
        queues, beside = self._queues, self._queues.sinks
        before = queues.callers() if segments.first else None
        self._graph.replay()
        if segments.first:
            # Launched while the graph runs, and done beside it.
            beside.after(before)
            with beside.here():
                segments.place_sinks(self._pool, numbers_of(table.runs([(0, segments.first)])))
            queues.let_caller_wait(beside.mark())


class _Part:
    """Neighbouring segments of a recording, whose layers are decoded together."""

    def __init__(self, codec: Codec, counts: tuple[int, ...], inputs: Tensor, queues: Queues) -> None:
        """inputs: int64 [3, N], see Recording."""
        assert codec.chain is not None
        self._codec, self._counts, self._inputs, self._queues = codec.chain, counts, inputs, queues
        device, lengths = inputs.device, torch.tensor(counts)
        self._segment_of = torch.arange(len(counts)).repeat_interleave(lengths).to(device)
        self._within = torch.cat([torch.arange(count) for count in counts]).to(device)
        self._slices = HostSlices(codec, counts, inputs[0])
        # Held, because the codec forgets the tables of groups that were not asked for lately.
        self._tables = self._codec.chain_decoder(counts, device).tables

    @property
    def device_bytes(self) -> int:
        """Beside the inputs and what is computed."""
        tables = self._segment_of, self._within, self._slices.layout, *self._tables
        return sum(table.nbytes for table in tables)

    def begin(
        self, num_layers: int, rope_table: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Chain, tuple[Tensor, Tensor], Tensor]:
        """Start with layer 0. Returns its chain, cos and sin [T, D], and slots [T]."""
        decoder = self._codec.chain_decoder(self._counts, self._inputs.device)
        chain = Chain(num_layers, self._slices, decoder, self._queues)
        slots, positions = self._inputs[1:, self._segment_of] + self._within
        return chain, rope_table(positions), slots
