"""The kernels of selective decoding as `aquifer bench kernels` measures them, in the order in which a step of
one request runs them. Imports Triton, so only where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from aquifer.benchmarks.device_shape import HOST_SPAN, Shape
from aquifer.benchmarks.harness import LeftOutError
from aquifer.benchmarks.roofline import Kernel, Limit
from aquifer.compression.aqua import SCALE_BYTES
from aquifer.compression.landmarks import LANDMARK_BITS, ROW_BITS, TokenCodec
from aquifer.compression.spec import SEGMENT_TOKENS, SINK_TOKENS
from aquifer.kernels.higgs import Quantizer
from aquifer.kernels.triton.cells import find_rows
from aquifer.kernels.triton.higgs import higgs_encode
from aquifer.kernels.triton.landmarks import score_landmarks
from aquifer.kernels.triton.lanes import Lane
from aquifer.kernels.triton.row_attention import SCALES_BYTES, attend_rows
from aquifer.kernels.triton.rows import fetch_rows, load_rows
from aquifer.kernels.triton.select import select_tokens
from aquifer.server.engine.pages import pages_of
from aquifer.server.engine.selective import ROW_CACHE_STEPS, Selection, indexed_tokens

BUDGET = 0.032
"""Sinks, tail and chosen tokens, as a share of the prompt."""

FOUND_SHARE = 0.93
"""Of the chosen rows that are on the device already, as in the trace of selection.npz."""


def token_kernels(shape: Shape) -> list[Kernel]:
    """What makes tokens of a prompt selectable."""
    codec = TokenCodec(shape.spec, None, shape.device)
    kernels = []
    for name, bits, quantizer in (
        ("landmarks", LANDMARK_BITS, codec.landmark_quantizer),
        ("rows", ROW_BITS, codec.row_quantizer),
    ):
        num_scales = shape.channels // codec.group
        coded = quantizer.code_bytes(shape.channels) + num_scales * SCALE_BYTES
        moved = float(shape.tokens * (4 * shape.channels + coded))

        def layer(quantizer: Quantizer = quantizer) -> partial[tuple[Tensor, Tensor]]:
            rotated = torch.randn(shape.tokens, shape.channels, device=shape.device)
            return partial(higgs_encode, rotated, quantizer, codec.group)

        needs = {Limit.MEMORY: moved, Limit.START: 1}
        kernels.append(Kernel(f"encode {name}, {bits} bits", shape.layers(moved, layer), needs))
    return kernels


def selection_kernels(shape: Shape) -> list[Kernel]:
    """A step of which no chosen row is on the device.

    Raises LeftOutError for geometries that recorded steps cannot select in.
    """
    layers = _layers(shape, found=0.0)
    one, tokens, heads = layers[0], layers[0].tokens, shape.heads
    landmarks = tokens * heads * (shape.head_dim // 4 + SCALE_BYTES)
    scores = 4.0 * shape.query_heads * tokens
    attended = 2.0 * shape.half_bytes(SINK_TOKENS + one.tail)
    attended += heads * one.wanted * (shape.head_dim + SCALES_BYTES)
    every_row = float(tokens * heads * shape.head_dim)
    return [
        Kernel(
            "score landmarks",
            [layer.score for layer in layers],
            {Limit.MEMORY: landmarks + scores, Limit.START: 2},
        ),
        Kernel(
            "select tokens",
            [layer.select for layer in layers],
            {Limit.MEMORY: scores + 4 * heads * one.wanted, Limit.START: 3},
        ),
        *_row_kernels(shape, layers, "none found"),
        Kernel(
            "attention over chosen rows",
            [layer.attend for layer in layers],
            {Limit.MEMORY: attended, Limit.START: 2},
        ),
        Kernel(
            "load all rows",
            [layer.load for layer in layers],
            {Limit.BUS: every_row, Limit.MEMORY: every_row, Limit.START: 1},
            note="by few programs, as steps go on beside it",
        ),
    ]


def found_kernels(shape: Shape) -> list[Kernel]:
    """What takes less time where some of the chosen rows are on the device. Raises LeftOutError, too."""
    layers = _layers(shape, found=FOUND_SHARE)
    return _row_kernels(shape, layers, f"{FOUND_SHARE:.0%} found")


def _row_kernels(shape: Shape, layers: Sequence[_Layer], suffix: str) -> list[Kernel]:
    one, heads = layers[0], shape.heads
    missing = float(one.missing.sum())

    def put_back() -> None:
        for layer in layers:
            layer.put_back()

    return [
        Kernel(
            f"find rows, {suffix}",
            [layer.find for layer in layers],
            {Limit.MEMORY: heads * 20.0 * one.wanted + 24.0 * missing, Limit.START: 1},
            prepare=put_back,
            note=f"{one.wanted:,} tokens are chosen for each of {heads} heads",
        ),
        Kernel(
            f"fetch rows, {suffix}",
            [layer.fetch for layer in layers],
            {
                Limit.BUS: missing * shape.head_dim,
                Limit.MEMORY: missing * shape.head_dim,
                Limit.START: 1,
            },
            note=f"{missing:,.0f} rows of {shape.head_dim} bytes travel in one operation",
        ),
    ]


def _layers(shape: Shape, found: float) -> list[_Layer]:
    if shape.head_dim not in (64, 128) or not indexed_tokens(shape.tokens):
        raise LeftOutError("recorded steps select tokens of whole segments, in heads of 64 or 128 channels")
    codec, host_bytes = TokenCodec(shape.spec, None, shape.device), shape.tokens * shape.channels
    return [_Layer(shape, codec, found) for _ in range(shape.num_layers(host_bytes, span=HOST_SPAN))]


class _Layer:
    """One layer of one request, and the steps of its attention; every KV head has its own set of tokens."""

    def __init__(self, shape: Shape, codec: TokenCodec, found: float) -> None:
        """found: share of the chosen rows that are on the device."""
        heads, head_dim, device = shape.heads, shape.head_dim, shape.device
        per_slot = codec.rows_per_slot
        selection = Selection.of(shape.tokens, BUDGET, shared=False, rows_per_slot=per_slot)
        segments = (shape.tokens - 1) // SEGMENT_TOKENS
        self.tokens, self.tail = segments * SEGMENT_TOKENS, shape.tokens - segments * SEGMENT_TOKENS + 1
        self.wanted, self.cells = selection.count, selection.cached
        tail_pages, row_pages = pages_of(self.tail), pages_of(SINK_TOKENS + self.tokens // per_slot)
        self._codec, self._heads = codec, heads
        self._lane = Lane(
            torch.randperm(segments).tolist(),
            range(tail_pages),
            range(tail_pages, tail_pages + row_pages),
            layers=1,
            sets=heads,
            num_q_heads=shape.query_heads,
            wanted=self.wanted,
            cells=self.cells,
            device=device,
        )
        segment = torch.arange(segments, dtype=torch.int32, device=device)
        self._places = segment, SEGMENT_TOKENS * self._lane.index_pages.long(), self._lane.row_pages
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)

        def numbers(*sizes: int) -> Tensor:
            return torch.randint(256, sizes, dtype=torch.uint8, device=device)

        self._codes = numbers(self.tokens, heads * head_dim // 4)
        self._scales = torch.ones(self.tokens, heads, dtype=torch.float16, device=device)
        self._row_scales = torch.ones(self.tokens, heads * SCALES_BYTES // 2, device=device).half()
        self._rows = torch.empty(
            self.tokens, heads * head_dim, dtype=torch.uint8, pin_memory=device.type == "cuda"
        ).copy_(numbers(self.tokens, heads * head_dim))
        self._query = shape.random(1, shape.query_heads, head_dim)
        pool = (heads, (tail_pages + row_pages) * SEGMENT_TOKENS, head_dim)
        self._keys, self._values = shape.random(*pool), shape.random(*pool)
        self._tell(step=1)
        self._lse = self.score()
        self._fill(found)
        self.missing = self.find()
        """int32 [1, H]: how many rows of each set are fetched."""

    def _fill(self, found: float) -> None:
        """Bring the books to where a step finds this share of its tokens, and misses the others."""
        lane, chosen = self._lane, self._drawn(self.wanted)
        there = chosen[:, torch.randperm(self.wanted, device=chosen.device)[: round(found * self.wanted)]]
        others = min(self.cells - there.shape[1], self.tokens - SINK_TOKENS - self.wanted)
        held = torch.cat((there, self._drawn(others, apart_from=chosen)), dim=1)
        held = held[:, torch.randperm(held.shape[1], device=held.device)]
        cells = torch.arange(held.shape[1], dtype=torch.int32, device=held.device).expand_as(held)
        lane.chosen.copy_(chosen)
        lane.cell_of[0].scatter_(1, held.long(), cells)
        lane.token_in[0, :, : held.shape[1]] = held
        lane.last_used[0, :, : held.shape[1]].random_(1, ROW_CACHE_STEPS + 1)
        self._tell(ROW_CACHE_STEPS + 1)
        books = lane.chosen, lane.cell_of, lane.token_in, lane.last_used
        self._books = [(book, book.clone()) for book in books]

    def _drawn(self, count: int, apart_from: Tensor | None = None) -> Tensor:
        """int32 [H, count]: random tokens that have a landmark, ascending."""
        order = torch.rand(self._heads, self.tokens, device=self._query.device)
        order[:, :SINK_TOKENS] = 2.0
        if apart_from is not None:
            order.scatter_(1, apart_from.long(), 2.0)
        return order.topk(count, dim=1, largest=False).indices.sort(dim=1).values.int()

    def _tell(self, step: int) -> None:
        self._lanes = torch.tensor(
            [self._lane.row(step, self.tail)], dtype=torch.int64, device=self._query.device
        )

    def put_back(self) -> None:
        """Let the next `find` be the first of its step."""
        for book, saved in self._books:
            book.copy_(saved)

    def score(self) -> Tensor:
        landmarks = self._codes, self._scales, self._codec.landmark_quantizer.grid
        return score_landmarks(self._query, self._codec.signs, *landmarks, self._lanes, first=SINK_TOKENS)

    def select(self) -> None:
        select_tokens(self._lanes, self._lse, self._heads, first=SINK_TOKENS)

    def find(self) -> Tensor:
        cells = {"sinks": SINK_TOKENS, "per_slot": self._codec.rows_per_slot}
        return find_rows(self._lanes, 0, self._heads, self._counters, **cells)

    def fetch(self) -> None:
        fetch_rows(self._lanes, self.missing, self._rows, self._keys, self._values)

    def load(self) -> None:
        load_rows(*self._places, self._rows, self._keys, self._values, sinks=SINK_TOKENS)

    def attend(self) -> object:
        codec, pool = self._codec, (self._query, self._keys, self._values)
        coded = self._row_scales.view(torch.uint8), codec.row_quantizer.grid, codec.signs, codec.means[0]
        return attend_rows(*pool, *coded, self._lanes, sets=self._heads, sinks=SINK_TOKENS)
