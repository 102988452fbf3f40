"""From stored records to KV in the pages of a request. Only the engine's thread restores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aquifer.server.engine.clock import Clock
from aquifer.server.engine.fetch import StoredSegment
from aquifer.server.engine.pages import BlockTable, PagePool, pages_of
from aquifer.server.engine.streams import SegmentReader, SegmentSource

if TYPE_CHECKING:
    from aquifer.server.engine.recorded_restore import RecordedRestores

GROUP_SEGMENTS = 32
"""Segments decoded in one pass; running answers wait for one group."""

CUDA_GROUP_SEGMENTS = 128
"""On CUDA: 32,768 tokens take a device about 15 ms, and smaller groups leave more of it unused."""


class Restorer:
    """Decodes stored segments into pages."""

    def __init__(self, reader: SegmentReader, pool: PagePool) -> None:
        self._reader = reader
        self._pool = pool
        self._recorded: RecordedRestores | None = None
        if pool.keys.is_cuda and reader.codec.chain is not None:
            from aquifer.server.engine.recorded_restore import RecordedRestores

            most = min(self.group_segments, pool.num_pages, pages_of(reader.adapter.max_positions))
            self._recorded = RecordedRestores(reader.codec, pool, reader.adapter.rope_table, most)

    @property
    def device_bytes(self) -> int:
        """What it keeps of the device between restores."""
        return self._recorded.device_bytes if self._recorded else 0

    @property
    def group_segments(self) -> int:
        """How many segments to restore in one call."""
        return CUDA_GROUP_SEGMENTS if self._pool.keys.is_cuda else GROUP_SEGMENTS

    def restore(self, segments: Sequence[StoredSegment], table: BlockTable) -> tuple[Clock, SegmentSource]:
        """Write the KV of these segments, in ascending order, into the table's pages.

        A device does so in its own time; whatever it is asked from now on finds them there. Returns a clock,
        which does not time what is recorded once, and what must live until this is over, as leases must: it
        may hold page-locked copies of records."""
        source = self._reader.source(segments)
        chained = source.chained
        recording = None if chained is None or self._recorded is None else self._recorded.of(chained)
        clock = Clock(self._pool.keys.device)
        if chained is not None and recording is not None:
            recording.replay(chained, table)
        else:
            source.open().restore(self._pool, table.runs(source.spans))
        clock.stop()
        return clock, source
