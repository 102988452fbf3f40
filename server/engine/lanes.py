"""Selective decoding in recorded steps: landmarks choose, rows are fetched, attention reads a list of slots.

The same method as selective.py, kernel by kernel on the device: nothing comes back to the host within a step,
and nothing it starts depends on how long a request is. Imports Triton, so only where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.kernels.triton.cells import find_rows
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import FIELDS, NOBODY, Lane, LaneRow
from aquifer.kernels.triton.row_attention import attend_rows
from aquifer.kernels.triton.rows import fetch_rows
from aquifer.kernels.triton.select import select_tokens
from aquifer.server.engine.pages import BlockTable
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.runner import CachePass, Rows
from aquifer.server.engine.selective import Selection


class LaneCache:
    """The KV of a sequence as selective decoding sees it; for recorded steps only."""

    def __init__(
        self,
        parts: EngineParts,
        table: BlockTable,
        index_pages: Sequence[int],
        row_pages: Sequence[int],
        selection: Selection,
    ) -> None:
        """See SelectiveCache."""
        spec = parts.adapter.spec
        self._table = table
        self._tail_from = len(index_pages) * SEGMENT_TOKENS
        tail_pages = table.pages[len(index_pages) :]
        self._lane = Lane(
            index_pages,
            [page for page in tail_pages if page is not None],
            row_pages,
            layers=spec.num_layers,
            sets=1 if selection.shared else spec.num_kv_heads,
            num_q_heads=parts.adapter.num_q_heads,
            wanted=selection.count,
            cells=selection.cached,
            device=parts.pool.keys.device,
        )
        self._step = 0

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
        slot = self._table.slot(position)
        assert slot is not None  # the tail has pages
        return self._lane.row(self._step, position + 1 - self._tail_from), slot


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

    @property
    def device_bytes(self) -> int:
        return self._table.nbytes + self._counters.nbytes

    def accepts(self, row: Rows) -> bool:
        return isinstance(row.cache, LaneCache) and len(row.token_ids) == 1

    def prepare(self, rows: Sequence[Rows], bucket: int) -> Sequence[int]:
        caches = [row.cache for row in rows if isinstance(row.cache, LaneCache)]
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
        counted = self._counters.tolist()  # the device is idle anyway
        chosen, fetched = (now - old for now, old in zip(counted, self._reported, strict=True))
        self._reported = counted
        self._metrics.selected_tokens.inc(chosen * self._rows_each)
        self._metrics.selected_hits.inc((chosen - fetched) * self._rows_each)
        self._fetched_bytes.inc(fetched * self._rows_each * self._index.row_bytes)
