"""Selective decoding: landmarks choose a few tokens, and only their rows are fetched.

One token at a time: score the landmarks, take the best tokens, fetch the rows of those that were not fetched
lately, attend to sinks + selected + the exact tail of the prompt + what was generated. Fetched rows live in
pages of the pool, a slot per row; each layer (and each head, unless heads share a set) fills the slots in its
own order.
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
    from aquifer.server.engine.lanes import LaneCache

MIN_SELECTED = 64
"""Tokens selected at least. The tail of a prompt is up to 256 tokens long and counts in the budget; without a
floor, a prompt of 4,095 tokens would select one token where one of 4,097 selects two hundred."""

ROW_CACHE_STEPS = 4
"""Rows kept on the device, as a multiple of those that one step selects."""

LISTED_TOKENS = 1 << 15
"""Most that a recorded step attends to per request: sinks, chosen tokens, tail and answer. The lists are
there all the time, for as many requests as may run."""


@dataclass(frozen=True)
class Selection:
    """How many tokens of a prompt are attended to, and how they are chosen.

    count: selected tokens per step and layer, besides sinks, tail and generated tokens.
    row_slots: slots on the device for sinks and fetched rows.
    shared: whether all KV heads of a layer use one set.
    """

    count: int
    row_slots: int
    shared: bool

    @classmethod
    def of(cls, prompt_tokens: int, budget: float, *, shared: bool) -> Selection:
        """budget: (sinks + tail + selected) / prompt; more if that leaves less than MIN_SELECTED."""
        indexed = indexed_tokens(prompt_tokens)
        exact = prompt_tokens - indexed  # sinks and tail
        count = min(indexed, max(MIN_SELECTED, round(budget * prompt_tokens) - exact))
        return cls(count, SINK_TOKENS + min(indexed, ROW_CACHE_STEPS * count), shared)

    @property
    def row_pages(self) -> int:
        return pages_of(self.row_slots)

    def listed(self, tail_pages: int) -> int:
        """Slots that a step attends to at most, if the tail and the answer take so many pages."""
        return SINK_TOKENS + self.count + tail_pages * SEGMENT_TOKENS


def indexed_tokens(prompt_tokens: int) -> int:
    """Tokens of a prompt that have a landmark: those of its stored segments, less the sinks. The last
    token of a prompt is always computed, so it belongs to no stored segment of this prompt."""
    return max(0, (prompt_tokens - 1) // SEGMENT_TOKENS * SEGMENT_TOKENS - SINK_TOKENS)


class RowCache:
    """Rows of one request that were fetched lately, least recently used ones replaced.

    Sets of tokens are numbered 0..S-1: one per KV head, or one for all. Tokens are numbered as in the index
    table's runs, slots from 0 in the request's own row pages.
    """

    def __init__(
        self, pool: PagePool, index: IndexPool, tokens: Tensor, slots: Tensor, selection: Selection
    ) -> None:
        """tokens: int64 [T], where each token lies in the index. slots: int64 [N], where rows may go."""
        spec, device = index.codec.spec, pool.keys.device
        self._pool, self._index, self._shared = pool, index, selection.shared
        self._tokens, self._slots = tokens, slots
        sets = 1 if selection.shared else spec.num_kv_heads
        shape = (spec.num_layers, sets)
        self._slot_of = torch.full((*shape, len(tokens)), -1, dtype=torch.int32, device=device)
        self._token_in = torch.full((*shape, len(slots)), -1, dtype=torch.int32, device=device)
        self._last_used = torch.full((*shape, len(slots)), -1, dtype=torch.int32, device=device)
        self._heads = torch.arange(spec.num_kv_heads, device=device)

    @property
    def map_bytes(self) -> int:
        """Device bytes of the books about rows."""
        maps = (self._slot_of, self._token_in, self._last_used)
        return sum(t.numel() * t.element_size() for t in maps)

    def fetch(self, layer: int, chosen: Tensor, now: int) -> tuple[Tensor, int]:
        """Bring rows to the device.

        chosen: int64 [S, K], ascending tokens per set. now: number of the step.
        Returns their slots in the pool, int64 [S, K], and how many of the S*K rows had to be fetched.
        """
        slot_of, token_in, last_used = (t[layer] for t in (self._slot_of, self._token_in, self._last_used))
        slots = slot_of.gather(1, chosen)
        missing = slots < 0
        set_of, place = missing.nonzero(as_tuple=True)
        if len(set_of):
            # Stamp the hits first, so that no victim is wanted in this very step.
            stamps = torch.where(missing, -1, now).to(last_used.dtype)
            last_used.scatter_reduce_(1, slots.clamp(min=0).long(), stamps, "amax")
            most = int(missing.sum(dim=1).max())
            victims = last_used.topk(most, dim=1, largest=False).indices
            victim = victims[set_of, missing.cumsum(dim=1)[set_of, place] - 1]
            token = chosen[set_of, place]
            old = token_in[set_of, victim].long()
            slot_of[set_of[old >= 0], old[old >= 0]] = -1
            slot_of[set_of, token] = victim.to(slot_of.dtype)
            token_in[set_of, victim] = token.to(token_in.dtype)
            self._load(layer, set_of, token, self._slots[victim])
            slots = slot_of.gather(1, chosen)
        last_used.scatter_(1, slots.long(), now)
        return self._slots[slots.long()], len(set_of)

    def _load(self, layer: int, set_of: Tensor, token: Tensor, slot: Tensor) -> None:
        """Copy rows from host memory and decode them into slots of the pool."""
        heads = self._heads.repeat(len(token)) if self._shared else set_of
        if self._shared:
            slot = slot.repeat_interleave(len(self._heads))
        where = self._tokens[token]
        if self._shared:
            where = where.repeat_interleave(len(self._heads))
        rows = self._index.read(layer, where, heads)
        keys, values = self._index.codec.decode_rows(layer, heads, rows)
        self._pool.keys[layer][heads, slot] = keys.to(self._pool.keys.dtype)
        self._pool.values[layer][heads, slot] = values.to(self._pool.values.dtype)


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
        slots = _flat(rows.runs([(SINK_TOKENS, selection.row_slots - SINK_TOKENS)]), device)
        self._rows = RowCache(parts.pool, parts.index, _flat(self._landmarks, device), slots, selection)
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
        heads, head_dim = self.pool.keys.shape[1], q.shape[-1]
        chosen = select_tokens(scores, heads, self._selection.count, shared=self._selection.shared)
        slots, fetched = self._rows.fetch(layer, chosen, self._step)
        self._count(chosen, fetched, heads)
        wanted = torch.cat((self._sink_slots.expand(heads, -1), slots.expand(heads, -1)), dim=1)
        where = wanted[..., None].expand(-1, -1, head_dim)
        keys, values = (t[layer].gather(1, where) for t in (self.pool.keys, self.pool.values))
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


def selective_cache(
    parts: EngineParts,
    table: BlockTable,
    index_pages: Sequence[int],
    row_pages: Sequence[int],
    selection: Selection,
) -> SelectiveCache | LaneCache:
    """See SelectiveCache, which it is unless recorded steps can serve the request."""
    listed = selection.listed(len(table.pages) - len(index_pages))
    if not selects_on_device(parts) or listed > LISTED_TOKENS:
        return SelectiveCache(parts, table, index_pages, row_pages, selection)
    from aquifer.server.engine.lanes import LaneCache  # Triton is optional

    return LaneCache(parts, table, index_pages, row_pages, selection)


def build_index(
    index: IndexPool, pages: Sequence[int], numbers: Sequence[int], cache: PagedCache, reader: SegmentReader
) -> None:
    """Encode some segments for selection: from their pages where they have some, else from the store.

    pages: of the index, one per stored segment. numbers: of the segments to encode, ascending.
    """
    target, layers = BlockTable(pages), range(index.codec.spec.num_layers)
    paged = [number for number in numbers if cache.table.pages[number] is not None]
    spans = [(number * SEGMENT_TOKENS, SEGMENT_TOKENS) for number in paged]
    source, runs = cache.table.runs(spans), target.runs(spans)
    for layer in layers if paged else ():
        index.write(layer, runs, *cache.read(layer, source))
    absent = [cache.host[number] for number in numbers if number not in paged]
    if absent:
        stream = reader.source(absent).open()
        runs = target.runs(stream.spans)
        for layer in layers:
            index.write(layer, runs, *stream.next_layer())
        until_read(index.codes.device)  # copies of records may go with the stream


def fill_sinks(pool: PagePool, row_pages: Sequence[int], cache: PagedCache, reader: SegmentReader) -> None:
    """Put the KV of the first tokens where selective attention reads it. row_pages: see SelectiveCache."""
    source, sinks = (table.runs([(0, SINK_TOKENS)]) for table in (cache.table, BlockTable(row_pages)))
    stream = None if source else reader.source([cache.host[0]], sinks_only=True).open()
    for layer in range(reader.adapter.spec.num_layers):
        pool.write(layer, sinks, *(stream.next_layer() if stream else cache.read(layer, source)))
    if stream:
        until_read(pool.keys.device)


def _flat(runs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, last, device=device) for first, last in runs])
