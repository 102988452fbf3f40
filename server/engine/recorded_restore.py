"""Restores that are replayed instead of launched.

A restore launches four kernels per layer on three queues of the device, which takes the host longer than it
takes the device to run them. Long documents are restored in groups of one size, so what a group launches is
recorded once, as a CUDA graph across the queues. Only inputs differ then: where the bytes lie, the angles
of RoPE, and the slots. Imports Triton, so only where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch

from aquifer.server.engine.device_streams import Chain, ChainedSegments, Queues
from aquifer.server.engine.graphs import GraphMemory, record_graph
from aquifer.server.engine.pages import PagePool

log = structlog.get_logger(__name__)


class RecordedRestores:
    """Recordings of full groups, one for each way to cut them: with and without the start of a prompt."""

    def __init__(self, pool: PagePool, group_segments: int) -> None:
        self._pool, self._group_segments = pool, group_segments
        self._memory: GraphMemory = torch.cuda.graph_pool_handle()
        self._recordings: dict[tuple[int, ...], _Recording | None] = {}
        """By the tokens of each segment. None: launched once so far, so that everything is compiled."""
        self._works = True
        self.device_bytes = 0
        """What recordings keep of the device."""

    def restore(self, segments: ChainedSegments, runs: Sequence[tuple[int, int]]) -> bool:
        """Write the KV of a group into the slots of `runs`, if that is recorded. False: launch it."""
        if len(segments.counts) < self._group_segments or not self._works:
            return False
        if segments.counts not in self._recordings:
            self._recordings[segments.counts] = None
            return False
        recording = self._recordings[segments.counts]
        if recording is None:
            try:
                recording = _Recording(segments, self._pool, self._memory)
            except RuntimeError as error:  # out of memory, above all
                log.warning("restores are launched, not replayed", exc_info=error)
                self._works = False
                return False
            self._recordings[segments.counts] = recording
            self.device_bytes += recording.device_bytes
        recording.replay(segments, runs)
        return True


class _Recording:
    """A graph and its inputs."""

    def __init__(self, segments: ChainedSegments, pool: PagePool, memory: GraphMemory) -> None:
        device = pool.keys.device
        self._pool = pool
        self._slices = segments.slices.without_records()
        cos, sin = segments.rope
        self._rope = cos.clone(), sin.clone()
        self._slots = torch.zeros(sum(segments.counts), dtype=torch.int64, device=device)
        # Those that other restores displaced are computed now: while recording nothing comes from the host.
        self._tables = segments.decoder().tables
        # Queues of its own: other engines of this process use the common ones meanwhile.
        queues = Queues(device)

        def launch() -> None:
            # State and landings are taken while recording and dropped, so that recordings share their memory.
            chain = Chain(len(pool.keys), self._slices, segments.decoder(), queues)
            chain.emit_all(self._rope, self._slots, pool)

        self._graph, self.device_bytes = record_graph(launch, memory, torch.cuda.Stream(device))
        self.device_bytes += self._slots.nbytes + cos.nbytes + sin.nbytes

    def replay(self, segments: ChainedSegments, runs: Sequence[tuple[int, int]]) -> None:
        """Restore segments that are cut like the recorded ones."""
        self._slices.follow(segments.slices)
        for own, now in zip(self._rope, segments.rope, strict=True):
            own.copy_(now)
        self._slots.copy_(segments.place_sinks(self._pool, runs))
        self._graph.replay()
