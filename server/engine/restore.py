"""From stored records to KV in the pages of a request. Only the engine's thread restores."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.fetch import StoredSegment
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.streams import SegmentReader

GROUP_SEGMENTS = 32
"""Segments decoded in one pass: 8,192 tokens fill a GPU's GEMMs; running answers wait for one group."""


class Restorer:
    """Decodes stored segments into pages."""

    def __init__(self, reader: SegmentReader, pool: PagePool) -> None:
        self._reader = reader
        self._pool = pool

    def restore(self, segments: Sequence[StoredSegment], table: BlockTable) -> None:
        """Write the KV of these segments, in ascending order, into the table's pages."""
        started = time.perf_counter()
        stream = self._reader.source(segments).open()
        runs = table.runs(stream.spans)
        for layer in range(self._reader.codec.spec.num_layers):
            self._pool.write(layer, runs, *stream.next_layer())
        device = self._reader.adapter.device
        if device.type == "cuda":
            # So that the time below is that of the arithmetic, not of its launch.
            torch.cuda.synchronize(device)
        self._reader.metrics.codec_tokens.labels(op="decode").inc(len(segments) * SEGMENT_TOKENS)
        self._reader.metrics.codec_seconds.labels(op="decode").inc(time.perf_counter() - started)
