"""Short chunks of prompts that are replayed instead of launched.

A question behind a cached document is a chunk of some dozen tokens. Launching its kernels one by one takes
the host several times as long as they take the device, and the question's first token waits for it. So a
chunk is recorded once per size, as decode steps are (graphs.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.graphs import GraphMemory, Recordings, host_and_device
from aquifer.server.engine.pages import PagePool, pages_of
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.runner import LayerKV, PagedCache, Rows, rotating_into
from aquifer.server.models.adapter import DecoderAdapter

LARGEST = SEGMENT_TOKENS
"""Of the sizes that are recorded, which are the powers of two from SMALLEST on. A question is as long if all
segments before it are cached; what comes in longer chunks keeps the device busy anyway."""

SMALLEST = 16


def graphed_chunks(parts: EngineParts) -> GraphedChunks | None:
    """None where kernels or model do not allow it."""
    adapter = parts.adapter
    if not adapter.graphable:
        return None
    return GraphedChunks(adapter, parts.pool, torch.cuda.graph_pool_handle())


class GraphedChunks:
    """See FastChunk. Chunks of sequences whose whole KV lies in pages of the pool."""

    def __init__(self, adapter: DecoderAdapter, pool: PagePool, memory: GraphMemory | None) -> None:
        """memory: as for Recordings."""
        spec, device = adapter.spec, adapter.device
        self._adapter, self._pool = adapter, pool
        width = min(pages_of(adapter.max_positions), pool.num_pages)
        # Token ids, positions, slots, and how many tokens each one sees; then the pages.
        self._host, self._inputs = host_and_device(4 * LARGEST + width, device)
        self._ids, self._positions, self._slots, self._lengths = self._inputs[: 4 * LARGEST].view(4, LARGEST)
        self._table = self._inputs[4 * LARGEST :][None]
        self._hidden = torch.empty(LARGEST, adapter.hidden_size, dtype=spec.dtype, device=device)
        self._keys, self._values = torch.empty(
            2, spec.num_layers, LARGEST, spec.channels, dtype=spec.dtype, device=device
        )
        self._recordings = Recordings(self._compute, memory)
        self._sent: torch.cuda.Event | None = None

    @property
    def device_bytes(self) -> int:
        own = sum(t.nbytes for t in (self._inputs, self._hidden, self._keys, self._values))
        return own + self._recordings.device_bytes

    def accepts(self, row: Rows) -> bool:
        if not isinstance(row.cache, PagedCache) or len(row.token_ids) > LARGEST:
            return False
        return None not in row.cache.table.pages

    @torch.inference_mode()
    def run(self, row: Rows) -> tuple[Tensor, LayerKV]:
        count = len(row.token_ids)
        size = max(SMALLEST, 1 << (count - 1).bit_length())
        if self._recordings.wants(size):
            self._fill(None)
            self._recordings.record(size)
        self._fill(row)
        self._recordings.run(size)
        kept = (rows[:, :count].clone() for rows in (self._keys, self._values))
        return self._hidden[:count].clone(), LayerKV(*kept)

    def _fill(self, row: Rows | None) -> None:
        """What is not the row's attends to nothing and is stored nowhere."""
        if self._sent is not None:
            self._sent.synchronize()  # the device has read what was filled before
        host = self._host.numpy()
        ids, positions, slots, lengths = host[: 4 * LARGEST].reshape(4, LARGEST)
        ids[:], positions[:], slots[:], lengths[:] = 0, 0, -1, 0
        if row is not None:
            assert isinstance(row.cache, PagedCache)
            count, start, table = len(row.token_ids), row.start, row.cache.table
            ids[:count] = row.token_ids
            positions[:count] = range(start, start + count)
            slots[:count] = [table.slot(at) for at in range(start, start + count)]
            lengths[:count] = range(start + 1, start + count + 1)
            host[4 * LARGEST :][: len(table.pages)] = table.pages
        self._inputs.copy_(self._host, non_blocking=True)
        if self._inputs.is_cuda:
            self._sent = torch.cuda.current_stream().record_event()

    def _compute(self, size: int) -> None:
        """What a graph holds."""
        lengths, pool, backend = self._lengths[:size], self._pool, self._adapter.backend
        kept = LayerKV(self._keys[:, :size], self._values[:, :size])
        rotate = rotating_into(pool, self._slots[:size], backend)

        def attend(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.keep(layer, k_pre, v)
            return backend.attend_pages(q, pool.keys[layer], pool.values[layer], self._table, lengths)[0]

        self._hidden[:size] = self._adapter.forward(self._ids[:size], self._positions[:size], attend, rotate)
