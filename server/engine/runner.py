"""Forward passes of the model over the caches of many requests at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.kernels.attention import attend, attend_in_pieces, merge_attention
from aquifer.kernels.backend import Backend
from aquifer.server.engine.fetch import StoredSegment
from aquifer.server.engine.host_memory import to_device, until_read
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.sampling import Choice, Pick, Sampler, StepResult, settle
from aquifer.server.engine.streams import SegmentReader, SegmentSource, end_to_end
from aquifer.server.models.adapter import DecoderAdapter, Rotate


@dataclass(frozen=True)
class LayerKV:
    """KV of a chunk before RoPE, as the codec wants it. keys, values: [L, T, C]."""

    keys: Tensor
    values: Tensor

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [T, H, D] of one layer."""
        self.keys[layer].view(k.shape).copy_(k)
        self.values[layer].view(v.shape).copy_(v)


class CachePass(Protocol):
    """One sequence during one forward pass."""

    slots: list[int | None]
    """Where the KV of the new tokens goes in the pool; None: nowhere."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the new tokens to the cache and to each other; called for layers 0 to L-1.

        q: [Hq, R, D], k and v: [H, R, D]; those with a slot stand in the pool already. Returns [Hq, R, D].
        """


class SequenceCache(Protocol):
    """The KV of one sequence, wherever it is."""

    @property
    def held_bytes(self) -> int:
        """What it keeps of the device between passes besides pages and landmarks."""

    def staging_bytes(self, start: int, count: int) -> int:
        """What a pass of `count` new tokens from `start` on takes of the device in addition."""

    def open(self, start: int, count: int) -> CachePass:
        """Begin a pass of `count` new tokens at positions start, start+1, ..."""

    def release(self) -> None:
        """Let go of everything, so that its pages may go to others; no pass may be opened after that."""


@dataclass(frozen=True)
class Rows:
    """What one sequence contributes to a pass: new tokens from position `start`, and its cache.

    pick: how the next token is chosen, if it is all that is asked for.
    """

    token_ids: Sequence[int]
    start: int
    cache: SequenceCache
    pick: Pick | None = None


class FastStep(Protocol):
    """A faster way to compute steps of some kind, one at a time."""

    @property
    def device_bytes(self) -> int:
        """What it holds on the device besides pages and landmarks."""

    def accepts(self, row: Rows) -> bool:
        """Whether it can compute this row, beside any others that it accepts."""

    def start(self, rows: Sequence[Rows]) -> Callable[[], list[StepResult]]:
        """Have the device compute a step. What is returned waits for it, and returns what `ModelRunner.step`
        does."""


class FastChunk(Protocol):
    """A faster way to compute chunks of prompts of some kind."""

    @property
    def device_bytes(self) -> int:
        """What it holds on the device besides pages and landmarks."""

    def accepts(self, row: Rows) -> bool:
        """Whether it can compute this chunk."""

    def run(self, row: Rows) -> tuple[Tensor, LayerKV]:
        """As `ModelRunner.prefill`."""


class ModelRunner:
    """Joins the adapter (arithmetic of the model) with the pool (where its KV lies)."""

    def __init__(
        self,
        adapter: DecoderAdapter,
        pool: PagePool,
        fast: Sequence[FastStep] = (),
        fast_chunk: FastChunk | None = None,
        *,
        staging_limit: int | None = None,
    ) -> None:
        """staging_limit: device bytes that sequences of one pass may take besides pages; None: any."""
        self._adapter = adapter
        self._pool = pool
        self._fast, self._fast_chunk = fast, fast_chunk
        self._staging_limit = staging_limit
        self._pass_bytes = 0

    @property
    def staging_bytes(self) -> int:
        """Device bytes of the pass that is running or was the last step, and of what waits for the next."""
        kept = sum(fast.device_bytes for fast in self._fast)
        return self._pass_bytes + kept + (self._fast_chunk.device_bytes if self._fast_chunk else 0)

    def prefill(self, token_ids: Sequence[int], start: int, cache: SequenceCache) -> tuple[Tensor, LayerKV]:
        """Compute a chunk of one sequence. Returns hidden states [T, hidden] and the KV before RoPE."""
        row = Rows(token_ids, start, cache)
        if self._fast_chunk and self._fast_chunk.accepts(row):
            self._pass_bytes = 0
            return self._fast_chunk.run(row)
        spec, device = self._adapter.spec, self._adapter.device
        shape = (spec.num_layers, len(token_ids), spec.channels)
        keys, values = (torch.empty(shape, dtype=spec.dtype, device=device) for _ in range(2))
        kept = LayerKV(keys, values)
        return self._forward([row], kept), kept

    def next_choice(self, hidden: Tensor, sampler: Sampler) -> Choice:
        """The token after a prompt. hidden: [1, hidden] of its last token."""
        (result,) = self._settled(self._adapter.logits(hidden), [1], [sampler.pick])
        if isinstance(result, Tensor):
            return sampler.choose(result[0])
        assert isinstance(result, Choice)  # it was one token
        return result

    def step(self, rows: Sequence[Rows], meanwhile: Callable[[], None] = lambda: None) -> list[StepResult]:
        """Compute new tokens of many sequences together. meanwhile: called once, while the device computes
        where it can do that by itself.

        Returns for each sequence, in order, the logits [R, vocab] float32 on the CPU after its R new tokens;
        or the tokens that follow, if it said how to choose and the device is better at that than the CPU.
        """
        started: list[tuple[list[int], Callable[[], list[StepResult]]]] = []
        left = list(range(len(rows)))
        for fast in self._fast:
            own = [number for number in left if fast.accepts(rows[number])]
            if own:
                started.append((own, fast.start([rows[number] for number in own])))
                left = [number for number in left if number not in own]
        meanwhile()
        results: dict[int, StepResult] = {}
        for own, finish in started:
            results |= zip(own, finish(), strict=True)
        if not left:
            self._pass_bytes = 0  # what the last pass took is free again
        for group in self._passes(rows, left):
            results |= zip(group, self._step_plainly([rows[number] for number in group]), strict=True)
        return [results[number] for number in range(len(rows))]

    def _passes(self, rows: Sequence[Rows], numbers: Sequence[int]) -> list[list[int]]:
        """Which of the rows are computed together: as many as the device has room for."""
        passes: list[list[int]] = []
        taken = 0
        for number in numbers:
            needed = _staging_bytes(rows[number])
            taken += needed
            if not passes or (self._staging_limit is not None and taken > self._staging_limit):
                passes.append([])
                taken = needed
            passes[-1].append(number)
        return passes

    def _step_plainly(self, rows: Sequence[Rows]) -> list[StepResult]:
        logits = self._adapter.logits(self._forward(rows))
        return self._settled(logits, [len(row.token_ids) for row in rows], [row.pick for row in rows])

    def _settled(self, logits: Tensor, counts: list[int], picks: Sequence[Pick | None]) -> list[StepResult]:
        """What follows tokens of sequences of so many each. logits: [N, vocab]."""
        if self._adapter.backend.fuses:
            return settle(logits.split(counts), picks)
        return list(logits.cpu().split(counts))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden]. Returns [N, vocab] float32."""
        return self._adapter.logits(hidden)

    def _forward(self, rows: Sequence[Rows], kept: LayerKV | None = None) -> Tensor:
        """kept: gets the KV of all new tokens."""
        device, pool = self._adapter.device, self._pool
        self._pass_bytes = sum(map(_staging_bytes, rows))
        passes = [row.cache.open(row.start, len(row.token_ids)) for row in rows]
        spans: list[slice] = []
        for row in rows:
            first = spans[-1].stop if spans else 0
            spans.append(slice(first, first + len(row.token_ids)))
        slots = [-1 if slot is None else slot for one in passes for slot in one.slots]
        rotate = rotating_into(pool, to_device(torch.tensor(slots), device), self._adapter.backend)

        def attention(layer: int, q: Tensor, k_pre: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if kept is not None:
                kept.keep(layer, k_pre, v)
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            outs = [
                one.attend(layer, q[:, span], k[:, span], v[:, span])
                for one, span in zip(passes, spans, strict=True)
            ]
            return end_to_end(outs, dim=1).transpose(0, 1)

        token_ids = to_device(torch.tensor([token for row in rows for token in row.token_ids]), device)
        positions = torch.cat(
            [torch.arange(row.start, row.start + len(row.token_ids), device=device) for row in rows]
        )
        return self._adapter.forward(token_ids, positions, attention, rotate)


def _staging_bytes(row: Rows) -> int:
    return row.cache.staging_bytes(row.start, len(row.token_ids))


def rotating_into(pool: PagePool, slots: Tensor, backend: Backend) -> Rotate:
    """RoPE that stores keys and values in the pool. slots: [N], of the new tokens; -1: nowhere."""

    def rotate(
        layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return backend.rotate_and_store(q, k, v, cos, sin, slots, pool.keys[layer], pool.values[layer])

    return rotate


class PagedCache:
    """The whole KV of a sequence: pages on the device, and stored segments for those that have no page.

    Segments without a page are reconstructed layer by layer in every pass and forgotten again, so a pass
    costs the same however many new tokens it computes.
    """

    def __init__(self, pool: PagePool, table: BlockTable, reader: SegmentReader | None = None) -> None:
        """reader: needed when the table lacks pages."""
        self.table = table
        self._pool = pool
        self._reader = reader
        self.host: dict[int, StoredSegment] = {}
        """Segments without a page that are read from the store, by index."""
        self._prepared: tuple[list[int], SegmentSource] | None = None

    @property
    def held_bytes(self) -> int:
        return self._prepared[1].held_bytes if self._prepared else 0

    def staging_bytes(self, start: int, count: int) -> int:
        source = self._source(start)
        return source.staging_bytes(count) if source else 0

    def open(self, start: int, count: int) -> PagedPass:
        table = self.table
        # A single token reads itself from its page. Several attend to the past in full and to each other
        # causally, because fused kernels are slow (or wrong) at a mask whose corner is not the matrix's.
        causal = count > 1
        past = table.runs([(0, start if causal else start + 1)])
        source = self._source(start)
        if source is not None and self._reader is not None:
            self._reader.metrics.fetched_bytes.labels(mode="streamed").inc(source.num_bytes)
        slots = [table.slot(at) for at in range(start, start + count)]
        return PagedPass(self._pool, slots, past, source, causal=causal)

    def _source(self, start: int) -> SegmentSource | None:
        """The segments before `start` that have no page, if there are any; while a prompt is read they
        become more, then they stay the same."""
        absent = [i for i, page in enumerate(self.table.pages[: start // SEGMENT_TOKENS]) if page is None]
        if not absent:
            return None
        assert self._reader is not None
        if self._prepared is None or self._prepared[0] != absent:
            # The device has read what the one before copied: storing what has no page waits for it.
            self._prepared = absent, self._reader.source([self.host[index] for index in absent])
        return self._prepared[1]

    def release(self) -> None:
        """End the leases of the stored segments; see SequenceCache."""
        try:
            if self.host:
                until_read(self._pool.keys.device)
        finally:  # a device that failed reads nothing any more
            for segment in self.host.values():
                segment.release()
            self.host.clear()
            self._prepared = None

    def read(self, layer: int, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, D] in the slots of `runs`."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        return (
            torch.cat([keys[:, first:last] for first, last in runs], dim=1),
            torch.cat([values[:, first:last] for first, last in runs], dim=1),
        )


class PagedPass:
    """See CachePass. past: runs of slots that every new token sees. source: segments that it sees, too."""

    def __init__(
        self,
        pool: PagePool,
        slots: list[int | None],
        past: Sequence[tuple[int, int]],
        source: SegmentSource | None,
        *,
        causal: bool,
    ) -> None:
        self.slots = slots
        self._pool, self._past, self._causal = pool, past, causal
        self._stream = source.open() if source else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        parts: list[tuple[Tensor, Tensor]] = []
        for first, last in self._past:
            parts += attend_in_pieces(q, keys[:, first:last], values[:, first:last])
        if self._stream is not None:
            parts += self._stream.attend(q)
        if self._causal:
            parts.append(attend(q, k, v, causal=True))
        return merge_attention(parts)


def attend_run(pool: PagePool, layer: int, q: Tensor, run: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Attention of q [Hq, R, D] to the slots of one run; as `attend` returns it."""
    first, last = run
    return attend(q, pool.keys[layer, :, first:last], pool.values[layer, :, first:last])
