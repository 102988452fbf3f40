"""Decode steps that are replayed instead of launched.

A step in which every sequence contributes one new token runs the same kernels over the same memory each time,
whatever the lengths of the sequences. So it is recorded once per number of rows as a CUDA graph, and later
steps fill the graph's inputs and replay it: one launch in place of hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.kernels.backend import Backend
from aquifer.server.engine.host_memory import recording
from aquifer.server.engine.pages import PagePool, pages_of
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.runner import FastStep, PagedCache, Rows, rotating_into
from aquifer.server.engine.sampling import Choice, StepResult, settle
from aquifer.server.engine.selective import selects_on_device
from aquifer.server.models.adapter import DecoderAdapter

log = structlog.get_logger(__name__)

GraphMemory = Any  # torch names its type privately
"""Memory that graphs share: one is replayed at a time, and none keeps anything there."""


RECORDING_PRIORITY = -2
"""Of streams on which graphs are recorded, and no others. torch hands out 32 streams per priority and begins
again then: what another thread takes for its own may be the same one, and its work would end a recording."""


class GraphedAttention(Protocol):
    """Attention of one new token of each of B sequences, in a form that a CUDA graph can hold: fixed shapes,
    fixed addresses, no wait for the device.

    `prepare` runs on the host before every replay; what it fills must lie at the same address each time.
    `attend` runs once per layer while a graph is recorded, and its kernels again in every replay. Before a
    graph is recorded the step runs once with `prepare([], bucket)`, so that everything is compiled.
    """

    @property
    def device_bytes(self) -> int:
        """What it holds on the device besides pages and landmarks."""

    def accepts(self, row: Rows) -> bool:
        """Whether it can serve this row now: one new token over a cache of the kind it knows."""

    def prepare(self, rows: Sequence[Rows], bucket: int) -> Sequence[int]:
        """Fill the inputs of `rows`, and of bucket - len(rows) more that attend to nothing.

        The device has read what was filled before. Returns the slot in the pool of each row's new token; the
        step stores keys and values there."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [bucket, Hq, D] after RoPE; the new tokens' keys and values stand in the pool already.

        Returns [bucket, Hq, D]; anything finite in rows that attend to nothing."""

    def done(self) -> None:
        """The device has computed the step."""


def graphed_steps(parts: EngineParts) -> list[FastStep]:
    """The kinds of steps that this engine replays; none where kernels or model do not allow it."""
    adapter, most = parts.adapter, parts.limits.max_running
    if not adapter.graphable:
        return []
    memory = torch.cuda.graph_pool_handle()
    kinds: list[GraphedAttention] = [
        PagedLanes(parts.pool, adapter.backend, most, pages_of(adapter.max_positions))
    ]
    if selects_on_device(parts):
        from aquifer.server.engine.lanes import SelectiveLanes  # Triton is optional

        kinds.append(SelectiveLanes(parts))
    return [GraphedStep(adapter, parts.pool, kind, most, memory) for kind in kinds]


class GraphedStep:
    """Steps over caches of one kind."""

    def __init__(
        self,
        adapter: DecoderAdapter,
        pool: PagePool,
        attention: GraphedAttention,
        max_rows: int,
        memory: GraphMemory | None,
    ) -> None:
        """memory: of the graphs. None: compute every step instead of recording it, as a CPU must."""
        self._adapter, self._pool, self._attention = adapter, pool, attention
        self._max_rows = max_rows
        # Token ids, positions and slots.
        self._host, self._inputs = host_and_device(3 * max_rows, adapter.device)
        self._ids, self._positions, self._slots = self._inputs.view(3, max_rows)
        self._logits = torch.empty(max_rows, adapter.vocab_size, device=adapter.device)
        # The most likely tokens and the bits of their log probabilities: read back in one piece.
        self._best = torch.empty(2, max_rows, dtype=torch.int32, device=adapter.device)
        self._recordings = Recordings(self._compute, memory)

    @property
    def device_bytes(self) -> int:
        own = sum(t.nbytes for t in (self._inputs, self._logits, self._best))
        return own + self._recordings.device_bytes + self._attention.device_bytes

    def accepts(self, row: Rows) -> bool:
        return self._attention.accepts(row)

    @torch.inference_mode()
    def start(self, rows: Sequence[Rows]) -> Callable[[], list[StepResult]]:
        bucket = bucket_of(len(rows), self._max_rows)
        if self._recordings.wants(bucket):
            self._fill([], bucket)
            self._recordings.record(bucket)
        self._fill(rows, bucket)
        self._recordings.run(bucket)
        return partial(self._finish, rows)

    @torch.inference_mode()
    def _finish(self, rows: Sequence[Rows]) -> list[StepResult]:
        results = self._read(rows)
        self._attention.done()
        return results

    def _fill(self, rows: Sequence[Rows], bucket: int) -> None:
        slots = self._attention.prepare(rows, bucket)
        unused = bucket - len(rows)
        host = self._host.view(3, -1).numpy()
        host[0, :bucket] = [row.token_ids[0] for row in rows] + [0] * unused
        host[1, :bucket] = [row.start for row in rows] + [0] * unused
        host[2, :bucket] = [*slots] + [-1] * unused
        self._inputs.copy_(self._host, non_blocking=True)

    def _compute(self, bucket: int) -> None:
        """What a graph holds."""
        rotate = rotating_into(self._pool, self._slots[:bucket], self._adapter.backend)

        def attend(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attention.attend(layer, q)

        hidden = self._adapter.forward(self._ids[:bucket], self._positions[:bucket], attend, rotate)
        logits = self._adapter.logits(hidden, self._logits[:bucket])
        ids, logprobs = self._best[:, :bucket]
        self._adapter.backend.most_likely(logits, ids, logprobs.view(torch.float32))

    def _read(self, rows: Sequence[Rows]) -> list[StepResult]:
        """As `ModelRunner.step`."""
        results: dict[int, StepResult] = {}
        greedy = [n for n, row in enumerate(rows) if row.pick and row.pick.temperature == 0.0]
        if greedy:
            ids, bits = self._best[:, : len(rows)].cpu()
            tokens, logprobs = ids.tolist(), bits.view(torch.float32).tolist()
            results |= {number: Choice(tokens[number], logprobs[number]) for number in greedy}
        others = [number for number in range(len(rows)) if number not in results]
        if others:
            logits = [self._logits[number : number + 1] for number in others]
            results |= zip(others, settle(logits, [rows[number].pick for number in others]), strict=True)
        return [results[number] for number in range(len(rows))]


class Recordings:
    """A computation that is recorded once per size, and replayed then."""

    def __init__(self, compute: Callable[[int], None], memory: GraphMemory | None) -> None:
        """compute: starts what a graph of a size holds; its inputs lie at the same addresses each time.
        memory: of the graphs. None: compute every time instead of recording, as a CPU must."""
        self._compute, self._memory = compute, memory
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        """By size. None: it could not be recorded, so it is computed."""
        self.device_bytes = 0
        """What the graphs keep."""

    def wants(self, size: int) -> bool:
        """Whether to call `record` before this size runs for the first time."""
        return self._memory is not None and size not in self._graphs

    def record(self, size: int) -> None:
        """Compute once, so that everything is compiled, and record. Inputs must be harmless."""
        try:
            self._graphs[size] = self._record(size, self._memory)
        except RuntimeError as error:  # out of memory, above all
            log.warning("computed, not replayed", size=size, exc_info=error)
            self._graphs[size] = None

    def run(self, size: int) -> None:
        graph = self._graphs.get(size)
        if graph is None:
            self._compute(size)
        else:
            graph.replay()

    def _record(self, size: int, memory: GraphMemory) -> torch.cuda.CUDAGraph:
        graph, num_bytes = record_graph(lambda: self._compute(size), memory)
        self.device_bytes += num_bytes
        return graph


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: graphs share the memory of what they compute only on the same one, and
    libraries keep working memory for each stream they see."""
    return torch.cuda.Stream(device, RECORDING_PRIORITY)


def record_graph(launch: Callable[[], None], memory: GraphMemory) -> tuple[torch.cuda.CUDAGraph, int]:
    """Record what `launch` starts, on a stream of its own and on those that follow it. It runs once before,
    so that everything is compiled.

    Returns the graph, and by how many bytes it made the memory grow. Raises RuntimeError if the device has no
    room, or if something was started that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    current, side = torch.cuda.current_stream(), _recording_stream(torch.cuda.current_device())
    with recording:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            launch()
        current.wait_stream(side)
        before = _num_bytes(memory)
        # Waits for the device first. Other threads may go on using it while this one records.
        with torch.cuda.graph(graph, pool=memory, stream=side, capture_error_mode="thread_local"):
            launch()
        return graph, _num_bytes(memory) - before


def _num_bytes(memory: GraphMemory) -> int:
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == memory)


class PagedLanes:
    """See GraphedAttention: sequences whose whole KV lies in pages of the pool."""

    def __init__(self, pool: PagePool, backend: Backend, max_rows: int, max_pages: int) -> None:
        self._pool, self._backend = pool, backend
        width = min(max_pages, pool.num_pages)
        self._host, self._inputs = host_and_device(max_rows * (1 + width), pool.keys.device)
        self._host_lengths, self._host_tables = _lengths_and_tables(self._host, max_rows)
        self._lengths, self._tables = _lengths_and_tables(self._inputs, max_rows)
        self._filled: list[list[int | None]] = [[] for _ in range(max_rows)]
        """Pages that stand in the tables already: most steps add none."""

    @property
    def device_bytes(self) -> int:
        return self._inputs.numel() * self._inputs.element_size()

    def accepts(self, row: Rows) -> bool:
        if not isinstance(row.cache, PagedCache) or len(row.token_ids) != 1:
            return False
        return None not in row.cache.table.pages

    def prepare(self, rows: Sequence[Rows], bucket: int) -> Sequence[int]:
        lengths, tables = self._host_lengths.numpy(), self._host_tables.numpy()
        lengths[:bucket] = [row.start + 1 for row in rows] + [0] * (bucket - len(rows))
        slots: list[int] = []
        for number, row in enumerate(rows):
            assert isinstance(row.cache, PagedCache)
            pages = row.cache.table.pages
            if self._filled[number] != pages:
                self._filled[number] = list(pages)
                tables[number, : len(pages)] = pages
            page, offset = divmod(row.start, SEGMENT_TOKENS)
            slots.append(tables[number, page] * SEGMENT_TOKENS + offset)
        self._inputs.copy_(self._host, non_blocking=True)
        return slots

    def attend(self, layer: int, q: Tensor) -> Tensor:
        bucket = q.shape[0]
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        out, _ = self._backend.attend_pages(q, keys, values, self._tables[:bucket], self._lengths[:bucket])
        return out

    def done(self) -> None:
        """Nothing was counted."""


def bucket_of(rows: int, most: int) -> int:
    """Rows of the graph that serves so many: a power of two up to 16, then a multiple of 8."""
    bucket = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 8) * 8
    return min(bucket, most)


def host_and_device(numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two int32 tensors of so many zeros: one to fill, page-locked if that helps, and one to copy it to."""
    host = torch.zeros(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host, torch.zeros(numbers, dtype=torch.int32, device=device)


def _lengths_and_tables(numbers: Tensor, max_rows: int) -> tuple[Tensor, Tensor]:
    """[max_rows] and [max_rows, pages], views of one tensor, which is copied in one piece."""
    return numbers[:max_rows], numbers[max_rows:].view(max_rows, -1)
