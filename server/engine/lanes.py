"""Selective decoding in recorded steps: landmarks choose, rows are fetched, attention reads them packed.

The same method as selective.py, kernel by kernel on the device: nothing comes back to the host within a step,
and nothing it starts depends on how long a request is. Where a request has room for all rows of its document,
they come there as they are made, or beside its steps, so that later ones fetch nothing. Imports Triton, so
only where it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.kernels.triton.cells import find_rows
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import FIELDS, NOBODY, Lane, LaneRow
from aquifer.kernels.triton.row_attention import attend_rows
from aquifer.kernels.triton.rows import fetch_rows, load_rows
from aquifer.kernels.triton.select import select_tokens
from aquifer.server.engine.device_streams import queues_of
from aquifer.server.engine.host_memory import to_device
from aquifer.server.engine.pages import BlockTable
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.runner import CachePass, Rows
from aquifer.server.engine.selective import Selection

STEPS_BEFORE_LOADING = 8
"""Of a request, in which it fetches what is missing: an answer of a few tokens needs few of the rows."""

LAYERS_ON_THE_WAY = 8
"""Whose rows are being loaded at a time. Those of 131,072 tokens take about 3 ms, and a request that ends
waits for its own, and so does every step after it."""


class OwnCells:
    """Cells of one request, which has one for every token behind the sinks."""

    def __init__(self, parts: EngineParts, row_pages: Sequence[int]) -> None:
        """row_pages: see SelectiveCache."""
        self._pool = parts.pool
        self._device = parts.pool.keys.device
        self._row_pages = to_device(torch.tensor(row_pages, dtype=torch.int32), self._device)

    def filling(self, spans: Sequence[tuple[int, int]]) -> Callable[[int, Tensor], None]:
        """What fills the cells of some segments, given a layer and its rows.

        spans: first token and number of tokens of each segment, in the order of the rows, side by side. One
        begins at a segment's first token, or behind the sinks."""
        segments = [divmod(start, SEGMENT_TOKENS) for start, _ in spans]
        ends = accumulate(count for _, count in spans)
        places = zip(ends, spans, segments, strict=True)
        starts = [end - count - skipped for end, (_, count), (_, skipped) in places]
        return self.filling_from(starts, [number for number, _ in segments])

    def filling_from(self, starts: Sequence[int], segments: Sequence[int]) -> Callable[[int, Tensor], None]:
        """The same for segments whose rows begin anywhere."""
        whence = to_device(torch.tensor(starts, dtype=torch.int64), self._device)
        which = to_device(torch.tensor(segments, dtype=torch.int32), self._device)

        def fill(layer: int, rows: Tensor) -> None:
            kv = self._pool.keys[layer], self._pool.values[layer]
            load_rows(which, whence, self._row_pages, rows, *kv, sinks=SINK_TOKENS)

        return fill


class LaneCache:
    """The KV of a sequence as selective decoding sees it; for recorded steps only."""

    def __init__(
        self,
        parts: EngineParts,
        table: BlockTable,
        index_pages: Sequence[int],
        row_pages: Sequence[int],
        selection: Selection,
        *,
        filled: bool = False,
    ) -> None:
        """See SelectiveCache. filled: all rows are in cells of their own."""
        spec = parts.adapter.spec
        self._parts, self._table = parts, table
        self._tail_from = len(index_pages) * SEGMENT_TOKENS
        every_token = selection.keeps_all(len(index_pages))
        assert every_token or not filled
        tail_pages = table.pages[len(index_pages) :]
        self._lane = Lane(
            index_pages,
            [page for page in tail_pages if page is not None],
            row_pages,
            layers=0 if filled else spec.num_layers,
            sets=1 if selection.shared else spec.num_kv_heads,
            num_q_heads=parts.adapter.num_q_heads,
            wanted=selection.count,
            cells=0 if every_token else selection.cached,
            device=parts.pool.keys.device,
        )
        self._step = 0
        self._pages = index_pages, row_pages
        self._loaded = spec.num_layers if filled else 0
        """Layers of which all rows are in cells of their own."""
        self._layers = spec.num_layers if every_token else 0
        """Of which they can be."""
        self._loads: deque[torch.cuda.Event] = deque()
        """When those of the next ones are."""

    @property
    def held_bytes(self) -> int:
        return self._lane.nbytes

    def staging_bytes(self, start: int, count: int) -> int:
        return 0

    def open(self, start: int, count: int) -> CachePass:
        raise ValueError(f"a lane takes one new token in a recorded step, not {count} in a pass")

    def next_step(self, position: int) -> tuple[LaneRow, int]:
        """What kernels are told of the step whose new token stands at `position`, and that token's slot."""
        self._step += 1
        while self._loads and self._loads[0].query():
            self._loads.popleft()
            self._loaded += 1
        slot = self._table.slot(position)
        assert slot is not None  # the tail has pages
        return self._lane.row(self._step, position + 1 - self._tail_from, self._loaded), slot

    @cached_property
    def _fill(self) -> Callable[[int, Tensor], None]:
        index_pages, row_pages = self._pages
        slots = [page * SEGMENT_TOKENS for page in index_pages]
        return OwnCells(self._parts, row_pages).filling_from(slots, range(len(slots)))

    def load_layer(self) -> torch.cuda.Event | None:
        """Begin to load the rows of the next layer. Returns when they are there. None: there is no next one,
        no room for all rows, or it is early yet.

        Steps go on meanwhile: what they fetch themselves are the same bytes in the same places."""
        layer = self._loaded + len(self._loads)
        if self._step < STEPS_BEFORE_LOADING or layer >= self._layers:
            return None
        index, queues = self._parts.index, queues_of(self._parts.pool.keys.device)
        loading = queues.rows
        loading.after(queues.callers())  # who makes the rows, and may have had the pages
        with loading.here():
            self._fill(layer, index.rows[layer])
        self._loads.append(loading.mark())
        rows = (self._tail_from - SINK_TOKENS) * self._parts.adapter.spec.num_kv_heads
        self._parts.metrics.fetched_bytes.labels(mode="selective").inc(rows * index.row_bytes)
        return self._loads[-1]

    def release(self) -> None:
        """See SequenceCache: what is queued from now on comes after what is being loaded."""
        if self._loads:
            queues_of(self._parts.pool.keys.device).let_caller_wait(self._loads[-1])


class SelectiveLanes:
    """See GraphedAttention: sequences of which each layer reads sinks, chosen tokens and the exact tail."""

    def __init__(self, parts: EngineParts) -> None:
        spec, most = parts.adapter.spec, parts.limits.max_running
        device = parts.pool.keys.device
        self._pool, self._index, self._metrics = parts.pool, parts.index, parts.metrics
        self._fetched_bytes = parts.metrics.fetched_bytes.labels(mode="selective")
        shared = parts.limits.shared_selection
        self._sets = 1 if shared else spec.num_kv_heads
        # (Token, head) pairs in what counts as one.
        self._rows_each = spec.num_kv_heads if shared else 1
        pinned = device.type == "cuda"
        self._host = torch.tensor([NOBODY] * most, dtype=torch.int64, pin_memory=pinned)
        self._table = torch.zeros(most, FIELDS.value, dtype=torch.int64, device=device)
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)
        self._reported = [0, 0]
        self._loads: deque[torch.cuda.Event] = deque()
        """Of rows of all requests, those that are over included."""

    @property
    def device_bytes(self) -> int:
        return self._table.nbytes + self._counters.nbytes

    def accepts(self, row: Rows) -> bool:
        return isinstance(row.cache, LaneCache) and len(row.token_ids) == 1

    def prepare(self, rows: Sequence[Rows], bucket: int) -> Sequence[int]:
        caches = [row.cache for row in rows if isinstance(row.cache, LaneCache)]
        load_rows_of(caches, self._loads)
        steps = [cache.next_step(row.start) for cache, row in zip(caches, rows, strict=True)]
        told = [lane for lane, _ in steps] + [NOBODY] * (bucket - len(steps))
        self._host.numpy()[:bucket] = told
        self._table.copy_(self._host, non_blocking=True)
        return [slot for _, slot in steps]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        lanes, index, codec = self._table[: len(q)], self._index, self._index.codec
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        landmarks = index.codes[layer], index.scales[layer], codec.landmark_quantizer.grid
        lse = score_landmarks(q, codec.signs, *landmarks, lanes, first=SINK_TOKENS)
        select_tokens(lanes, lse, self._sets, first=SINK_TOKENS)
        cells = {"sinks": SINK_TOKENS, "per_slot": codec.rows_per_slot}
        missing = find_rows(lanes, layer, self._sets, self._counters, **cells)
        fetch_rows(lanes, missing, index.rows[layer], keys, values)
        coded = index.row_scales[layer], codec.row_quantizer.grid, codec.signs, codec.means[layer]
        return attend_rows(q, keys, values, *coded, lanes, sets=self._sets, sinks=SINK_TOKENS)

    def done(self) -> None:
        counted = self._counters.tolist()  # the step that was waited for was the last to count
        chosen, fetched = (now - old for now, old in zip(counted, self._reported, strict=True))
        self._reported = counted
        self._metrics.selected_tokens.inc(chosen * self._rows_each)
        self._metrics.selected_hits.inc((chosen - fetched) * self._rows_each)
        self._fetched_bytes.inc(fetched * self._rows_each * self._index.row_bytes)


def load_rows_of(caches: Sequence[LaneCache], on_the_way: deque[torch.cuda.Event]) -> None:
    """Keep layers of rows on their way, of the first request that has some to load."""
    while on_the_way and on_the_way[0].query():
        on_the_way.popleft()
    for cache in caches:
        while len(on_the_way) < LAYERS_ON_THE_WAY and (load := cache.load_layer()):
            on_the_way.append(load)
