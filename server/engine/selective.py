"""Selective decoding: landmarks choose a few tokens, and only their rows are fetched.

One token at a time: score the landmarks, take the best tokens, fetch the rows of those that were not fetched
lately, attend to sinks + selected + the exact tail of the prompt + what was generated. Fetched rows live in
pages of the pool, packed as they came, so that a slot holds several; each layer (and each head, unless heads
share a set) fills these cells in its own order. Where a device records its steps and has room for all rows,
they all come there; see lanes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.kernels.attention import attend, merge_attention
from aquifer.kernels.landmarks import select_tokens
from aquifer.server.engine.host_memory import until_read
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.pages import BlockTable, PagePool, pages_of
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.records import segment_span
from aquifer.server.engine.runner import CachePass, PagedCache, attend_run
from aquifer.server.engine.streams import SegmentReader

if TYPE_CHECKING:
    from aquifer.server.engine.lanes import LaneCache, OwnCells

MIN_SELECTED = 64
"""Tokens selected at least. The tail of a prompt is up to 256 tokens long and counts in the budget; without a
floor, a prompt of 4,095 tokens would select one token where one of 4,097 selects two hundred."""

ROW_CACHE_STEPS = 16
"""Rows kept on the device at least, as a multiple of those that one step selects: while the bundled model
answers a question about 8,169 tokens, 92 % of what it selects is found among them, 78 % in 8 steps' worth, 62
in 4."""


@dataclass(frozen=True)
class Selection:
    """How many tokens of a prompt are attended to, and how they are chosen.

    count: selected tokens per step and layer, besides sinks, tail and generated tokens.
    cached: rows on the device, per layer and set; at least `count`.
    row_pages: pages of the pool for sinks and cached rows.
    shared: whether all KV heads of a layer use one set.
    """

    count: int
    cached: int
    row_pages: int
    shared: bool

    @classmethod
    def of(
        cls, prompt_tokens: int, budget: float, *, shared: bool, rows_per_slot: int, share_pages: int = 0
    ) -> Selection:
        """budget: see `selected_tokens`. rows_per_slot: see TokenCodec. share_pages: of the pool, that rows
        may fill although fewer would do."""
        count = selected_tokens(prompt_tokens, budget)
        share = (share_pages * SEGMENT_TOKENS - SINK_TOKENS) * rows_per_slot
        cached = min(indexed_tokens(prompt_tokens), max(ROW_CACHE_STEPS * count, share))
        return cls(count, cached, pages_of(SINK_TOKENS + -(-cached // rows_per_slot)), shared)

    def keeps_all(self, segments: int) -> bool:
        """Whether every token of so many stored segments that may be chosen has a cell of its own."""
        return self.cached == segments * SEGMENT_TOKENS - SINK_TOKENS


def indexed_tokens(prompt_tokens: int) -> int:
    """Tokens of a prompt that have a landmark: those of its stored segments, less the sinks. The last
    token of a prompt is always computed, so it belongs to no stored segment of this prompt."""
    return max(0, (prompt_tokens - 1) // SEGMENT_TOKENS * SEGMENT_TOKENS - SINK_TOKENS)


def selected_tokens(prompt_tokens: int, budget: float) -> int:
    """Tokens selected per step and layer.

    budget: (sinks + tail + selected) / prompt; more if that leaves less than MIN_SELECTED."""
    indexed = indexed_tokens(prompt_tokens)
    exact = prompt_tokens - indexed  # sinks and tail
    return min(indexed, max(MIN_SELECTED, round(budget * prompt_tokens) - exact))


class RowCache:
    """Rows of one request that were fetched lately, least recently used ones replaced.

    Sets of tokens are numbered 0..S-1: one per KV head, or one for all. Tokens are numbered as in the index
    table's runs, cells from 0 in the request's own row pages.
    """

    def __init__(
        self, pool: PagePool, index: IndexPool, tokens: Tensor, cells: Tensor, selection: Selection
    ) -> None:
        """tokens: int64 [T], where each token lies in the index. cells: int64 [N], where rows may go; see
        `PagePool.cells`."""
        spec, device = index.codec.spec, pool.keys.device
        self._pool, self._index, self._shared = pool, index, selection.shared
        self._tokens, self._cells = tokens, cells
        sets = 1 if selection.shared else spec.num_kv_heads
        shape = (spec.num_layers, sets)
        self._cell_of = torch.full((*shape, len(tokens)), -1, dtype=torch.int32, device=device)
        self._token_in = torch.full((*shape, len(cells)), -1, dtype=torch.int32, device=device)
        self._last_used = torch.full((*shape, len(cells)), -1, dtype=torch.int32, device=device)
        self._heads = torch.arange(spec.num_kv_heads, device=device)

    @property
    def map_bytes(self) -> int:
        """Device bytes of the books about rows."""
        maps = (self._cell_of, self._token_in, self._last_used)
        return sum(t.numel() * t.element_size() for t in maps)

    def fetch(self, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
        """Bring rows to the device.

        chosen: int64 [S, K], ascending tokens per set. now: number of the step.
        Returns their cells in the pool, int64 [S, K], and how many of the S*K rows had to be fetched.
        """
        cell_of, token_in, last_used = (t[layer] for t in (self._cell_of, self._token_in, self._last_used))
        cells = cell_of.gather(1, chosen)
        missing = cells < 0
        set_of, place = missing.nonzero(as_tuple=True)
        if len(set_of):
            # Stamp the hits first, so that no victim is wanted in this very step.
            stamps = torch.where(missing, -1, now).to(last_used.dtype)
            last_used.scatter_reduce_(1, cells.clamp(min=0).long(), stamps, "amax")
            most = int(missing.sum(dim=1).max())
            victims = last_used.topk(most, dim=1, largest=False).indices
            victim = victims[set_of, missing.cumsum(dim=1)[set_of, place] - 1]
            token = chosen[set_of, place]
            old = token_in[set_of, victim].long()
            cell_of[set_of[old >= 0], old[old >= 0]] = -1
            cell_of[set_of, token] = victim.to(cell_of.dtype)
            token_in[set_of, victim] = token.to(token_in.dtype)
            self._load(layer, set_of, token, self._cells[victim])
            cells = cell_of.gather(1, chosen)
        last_used.scatter_(1, cells.long(), now)
        return self._cells[cells.long()], len(set_of)

    def _load(self, layer: int, set_of: Tensor, token: Tensor, cell: Tensor) -> None:
        """Copy rows from host memory into cells of the pool."""
        heads, where = set_of, self._tokens[token]
        if self._shared:
            heads = self._heads.repeat(len(token))
            where, cell = (t.repeat_interleave(len(self._heads)) for t in (where, cell))
        codes = self._index.read_codes(layer, where, heads)
        for half, own in zip(self._pool_cells(layer), codes, strict=True):
            half[heads, cell] = own

    def read(self, layer: int, chosen: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values of chosen tokens whose rows are on the device, [H, K, D] each in the
        pool's dtype. chosen, cells: int64 [S, K], as `fetch` takes and returns them."""
        count, codec = chosen.shape[1], self._index.codec
        heads = self._heads.repeat_interleave(count)
        where, cell = (t.expand(len(self._heads), -1).flatten() for t in (self._tokens[chosen], cells))
        codes = [half[heads, cell] for half in self._pool_cells(layer)]
        rows = torch.cat((*codes, self._index.read_scales(layer, where, heads)), dim=1)
        keys, values = codec.decode_rows(layer, heads, rows)
        shape, dtype = (len(self._heads), count, -1), self._pool.keys.dtype
        return keys.view(shape).to(dtype), values.view(shape).to(dtype)

    def _pool_cells(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._pool.cells(layer, self._index.row_bytes // 2)


class SelectiveCache:
    """The KV of a sequence as selective decoding sees it."""

    def __init__(
        self,
        parts: EngineParts,
        table: BlockTable,
        index_pages: Sequence[int],
        row_pages: Sequence[int],
        selection: Selection,
    ) -> None:
        """table: of the whole sequence, of which only tail and generated tokens are read. index_pages: of the
        stored segments, in order, all filled. row_pages: pages of the pool for sinks and fetched rows."""
        self.pool, self._index, self._table = parts.pool, parts.index, table
        self._metrics, self._selection = parts.metrics, selection
        self._fetched_bytes = parts.metrics.fetched_bytes.labels(mode="selective")
        self._segments = len(index_pages)
        spans = [segment_span(number) for number in range(self._segments)]
        self._landmarks = BlockTable(index_pages).runs(spans)
        device = parts.pool.keys.device
        rows = BlockTable(row_pages)
        self._sink_slots = _flat(rows.runs([(0, SINK_TOKENS)]), device)
        per_slot = parts.index.codec.rows_per_slot
        room = rows.runs([(SINK_TOKENS, len(row_pages) * SEGMENT_TOKENS - SINK_TOKENS)])
        cells = _flat([(first * per_slot, last * per_slot) for first, last in room], device)
        tokens = _flat(self._landmarks, device)
        self._rows = RowCache(parts.pool, parts.index, tokens, cells[: selection.cached], selection)
        self._step = 0

    @property
    def held_bytes(self) -> int:
        return self._rows.map_bytes

    def staging_bytes(self, start: int, count: int) -> int:
        return 0

    def open(self, start: int, count: int) -> CachePass:
        """count must be 1: what one token selects is not what another one needs."""
        if count != 1:
            raise ValueError(f"selective attention takes one new token at a time, not {count}")
        self._step += 1
        first = self._segments * SEGMENT_TOKENS
        tail = self._table.runs([(first, start + 1 - first)])
        return _SelectivePass(self, tail, self._table.slot(start))

    def release(self) -> None:
        """Nothing is under way between passes."""

    def attend_selected(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the sinks and to the tokens that q [Hq, 1, D] selects; returns what `attend` does."""
        index = self._index
        scores = torch.cat(
            [
                index.codec.score(q[:, 0], index.codes[layer, first:last], index.scales[layer, first:last])
                for first, last in self._landmarks
            ],
            dim=1,
        )
        heads = self.pool.keys.shape[1]
        chosen = select_tokens(scores, heads, self._selection.count, shared=self._selection.shared)
        cells, fetched = self._rows.fetch(layer, chosen, self._step)
        self._count(chosen, fetched, heads)
        sinks = (half[layer][:, self._sink_slots] for half in (self.pool.keys, self.pool.values))
        rows = self._rows.read(layer, chosen, cells)
        keys, values = (torch.cat(halves, dim=1) for halves in zip(sinks, rows, strict=True))
        return attend(q, keys, values)

    def _count(self, chosen: Tensor, fetched: int, heads: int) -> None:
        per_row = heads if self._selection.shared else 1  # (token, head) pairs in what was chosen as one
        self._metrics.selected_tokens.inc(chosen.numel() * per_row)
        self._metrics.selected_hits.inc((chosen.numel() - fetched) * per_row)
        self._fetched_bytes.inc(fetched * per_row * self._index.row_bytes)


class _SelectivePass:
    """See CachePass."""

    def __init__(self, cache: SelectiveCache, tail: Sequence[tuple[int, int]], slot: int | None) -> None:
        self.slots = [slot]
        self._cache, self._tail = cache, tail

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [attend_run(self._cache.pool, layer, q, run) for run in self._tail]
        parts.append(self._cache.attend_selected(layer, q))
        return merge_attention(parts)


def selects_on_device(parts: EngineParts) -> bool:
    """Whether recorded steps can select: the kernels know the geometry, and the device can read the rows."""
    adapter, spec = parts.adapter, parts.adapter.spec
    if not adapter.graphable or spec.head_dim not in (64, 128):
        return False
    return parts.index.num_pages > 0 and parts.index.rows.is_pinned()


def cells_to_fill(
    parts: EngineParts,
    selection: Selection | None,
    index_pages: Sequence[int],
    unindexed: Sequence[int],
    row_pages: Sequence[int],
) -> OwnCells | None:
    """Where a request's rows go as they are made, if all are made for it and each has a cell of its own.

    unindexed: of its stored segments, those that the index does not have when it starts. Others: see
    SelectiveCache."""
    made = len(unindexed) == len(index_pages)
    if selection is None or not made or not selection.keeps_all(len(index_pages)):
        return None
    if not selects_on_device(parts):
        return None
    from aquifer.server.engine.lanes import OwnCells  # Triton is optional

    return OwnCells(parts, row_pages)


def selective_cache(
    parts: EngineParts,
    table: BlockTable,
    index_pages: Sequence[int],
    row_pages: Sequence[int],
    selection: Selection,
    *,
    filled: bool,
) -> SelectiveCache | LaneCache:
    """See SelectiveCache, which it is unless recorded steps can serve the request. filled: all rows are in
    their cells; see `cells_to_fill`."""
    if not selects_on_device(parts):
        return SelectiveCache(parts, table, index_pages, row_pages, selection)
    from aquifer.server.engine.lanes import LaneCache  # Triton is optional

    return LaneCache(parts, table, index_pages, row_pages, selection, filled=filled)


def build_index(
    index: IndexPool,
    pages: Sequence[int],
    numbers: Sequence[int],
    cache: PagedCache,
    reader: SegmentReader,
    cells: OwnCells | None = None,
) -> None:
    """Encode some segments for selection: from their pages where they have some, else from the store.

    pages: of the index, one per stored segment. numbers: of the segments to encode, ascending. cells: where
    their rows go besides.
    """
    target, layers = BlockTable(pages), range(index.codec.spec.num_layers)
    paged = [number for number in numbers if cache.table.pages[number] is not None]
    spans = [(number * SEGMENT_TOKENS, SEGMENT_TOKENS) for number in paged]
    source, runs = cache.table.runs(spans), target.runs(spans)
    fill = cells.filling(spans) if cells else _leave
    for layer in layers if paged else ():
        fill(layer, index.write(layer, runs, *cache.read(layer, source)))
    absent = [cache.host[number] for number in numbers if number not in paged]
    if absent:
        origin = reader.source(absent)
        stream, runs = origin.open(), target.runs(origin.spans)
        fill = cells.filling(origin.spans) if cells else _leave
        for layer in layers:
            fill(layer, index.write(layer, runs, *stream.next_layer()))
        until_read(index.codes.device)  # copies of records may go with their source


def fill_sinks(pool: PagePool, row_pages: Sequence[int], cache: PagedCache, reader: SegmentReader) -> None:
    """Put the KV of the first tokens where selective attention reads it. row_pages: see SelectiveCache."""
    source, sinks = (table.runs([(0, SINK_TOKENS)]) for table in (cache.table, BlockTable(row_pages)))
    stream = None if source else reader.source([cache.host[0]], sinks_only=True).open()
    for layer in range(reader.adapter.spec.num_layers):
        pool.write(layer, sinks, *(stream.next_layer() if stream else cache.read(layer, source)))
    if stream:
        until_read(pool.keys.device)


def _leave(layer: int, rows: Tensor) -> None:
    """Rows that go nowhere else."""


def _flat(runs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in runs])
