"""The kernels of selective decoding as `aquifer bench kernels` measures them, in the order of a step. Imports
Triton, so only where it runs.
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


def selection_kernels(shape: Shape, requests: int = 1) -> list[Kernel]:
    """A step of so many requests, none of whose chosen rows is on the device.

    Raises LeftOutError for geometries that recorded steps cannot select in.
    """
    layers = _layers(shape, requests, found=0.0)
    one, heads, who = layers[0], shape.heads, _who(requests)
    tokens = requests * one.tokens
    landmarks = tokens * heads * (shape.head_dim // 4 + SCALE_BYTES)
    scores = 4.0 * shape.query_heads * tokens
    attended = 2.0 * shape.half_bytes(SINK_TOKENS + one.tail)
    attended += heads * one.wanted * (shape.head_dim + SCALES_BYTES)
    kernels = [
        Kernel(
            f"score landmarks{who}",
            [layer.score for layer in layers],
            {Limit.MEMORY: landmarks + scores, Limit.START: 2},
        ),
        Kernel(
            f"select tokens{who}",
            [layer.select for layer in layers],
            {Limit.MEMORY: scores + 4 * requests * heads * one.wanted, Limit.START: 3},
        ),
        *_row_kernels(shape, layers, f"none found{who}"),
        Kernel(
            f"attention over chosen rows{who}",
            [layer.attend for layer in layers],
            {Limit.MEMORY: requests * attended, Limit.START: 2},
        ),
    ]
    return kernels if requests > 1 else [*kernels, _loading(shape, layers)]


def found_kernels(shape: Shape, requests: int = 1) -> list[Kernel]:
    """What takes less time where some of the chosen rows are on the device. Raises LeftOutError, too."""
    layers = _layers(shape, requests, found=FOUND_SHARE)
    return _row_kernels(shape, layers, f"{FOUND_SHARE:.0%} found{_who(requests)}")


def _who(requests: int) -> str:
    return f", {requests} requests" if requests > 1 else ""


def _loading(shape: Shape, layers: Sequence[_Layer]) -> Kernel:
    every_row = float(layers[0].tokens * shape.channels)
    return Kernel(
        "load all rows",
        [layer.load for layer in layers],
        {Limit.BUS: every_row, Limit.MEMORY: every_row, Limit.START: 1},
        note="by few programs, as steps go on beside it",
    )


def _row_kernels(shape: Shape, layers: Sequence[_Layer], suffix: str) -> list[Kernel]:
    one = layers[0]
    missing = float(one.missing.sum())

    def put_back() -> None:
        for layer in layers:
            layer.put_back()

    return [
        Kernel(
            f"find rows, {suffix}",
            [layer.find for layer in layers],
            {Limit.MEMORY: one.missing.numel() * 20.0 * one.wanted + 24.0 * missing, Limit.START: 1},
            prepare=put_back,
            note=f"{one.wanted:,} tokens are chosen for each of {shape.heads} heads",
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


def _layers(shape: Shape, requests: int, found: float) -> list[_Layer]:
    if shape.head_dim not in (64, 128) or not indexed_tokens(shape.tokens):
        raise LeftOutError("recorded steps select tokens of whole segments, in heads of 64 or 128 channels")
    codec, host_bytes = TokenCodec(shape.spec, None, shape.device), requests * shape.tokens * shape.channels
    count = shape.num_layers(host_bytes, span=HOST_SPAN)
    return [_Layer(shape, codec, requests, found) for _ in range(count)]


class _Layer:
    """One layer of some requests, and the steps of its attention; every KV head has its own set of tokens."""

    def __init__(self, shape: Shape, codec: TokenCodec, requests: int, found: float) -> None:
        """found: share of the chosen rows that are on the device."""
        heads, head_dim, device = shape.heads, shape.head_dim, shape.device
        per_slot = codec.rows_per_slot
        selection = Selection.of(shape.tokens, BUDGET, shared=False, rows_per_slot=per_slot)
        segments = (shape.tokens - 1) // SEGMENT_TOKENS
        self.tokens, self.tail = segments * SEGMENT_TOKENS, shape.tokens - segments * SEGMENT_TOKENS + 1
        self.wanted, self.cells = selection.count, selection.cached
        tail_pages, row_pages = pages_of(self.tail), pages_of(SINK_TOKENS + self.tokens // per_slot)
        own_pages = tail_pages + row_pages
        self._codec, self._heads = codec, heads
        self._lanes = [
            Lane(
                (torch.randperm(segments) + segments * request).tolist(),
                range(own_pages * request, own_pages * request + tail_pages),
                range(own_pages * request + tail_pages, own_pages * (request + 1)),
                layers=1,
                sets=heads,
                num_q_heads=shape.query_heads,
                wanted=self.wanted,
                cells=self.cells,
                device=device,
            )
            for request in range(requests)
        ]
        one = self._lanes[0]
        segment = torch.arange(segments, dtype=torch.int32, device=device)
        self._places = segment, SEGMENT_TOKENS * one.index_pages.long(), one.row_pages
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)

        def numbers(*sizes: int) -> Tensor:
            return torch.randint(256, sizes, dtype=torch.uint8, device=device)

        slots = requests * self.tokens
        self._codes = numbers(slots, heads * head_dim // 4)
        self._scales = torch.ones(slots, heads, dtype=torch.float16, device=device)
        self._row_scales = torch.ones(slots, heads * SCALES_BYTES // 2, device=device).half()
        self._rows = torch.empty(
            slots, heads * head_dim, dtype=torch.uint8, pin_memory=device.type == "cuda"
        ).copy_(numbers(slots, heads * head_dim))
        self._query = shape.random(requests, shape.query_heads, head_dim)
        pool = (heads, requests * own_pages * SEGMENT_TOKENS, head_dim)
        self._keys, self._values = shape.random(*pool), shape.random(*pool)
        self._tell(step=1)
        self._lse = self.score()
        self._books = [book for lane in self._lanes for book in self._filled(lane, found)]
        self._tell(ROW_CACHE_STEPS + 1)
        self.missing = self.find()
        """int32 [requests, H]: how many rows of each set are fetched."""

    def _filled(self, lane: Lane, found: float) -> list[tuple[Tensor, Tensor]]:
        """Bring a request's books to where a step finds this share of its tokens, and misses the others.
        Returns them, each with a copy."""
        chosen = self._drawn(self.wanted)
        there = chosen[:, torch.randperm(self.wanted, device=chosen.device)[: round(found * self.wanted)]]
        others = min(self.cells - there.shape[1], self.tokens - SINK_TOKENS - self.wanted)
        held = torch.cat((there, self._drawn(others, apart_from=chosen)), dim=1)
        held = held[:, torch.randperm(held.shape[1], device=held.device)]
        cells = torch.arange(held.shape[1], dtype=torch.int32, device=held.device).expand_as(held)
        lane.chosen.copy_(chosen)
        lane.cell_of[0].scatter_(1, held.long(), cells)
        lane.token_in[0, :, : held.shape[1]] = held
        lane.last_used[0, :, : held.shape[1]].random_(1, ROW_CACHE_STEPS + 1)
        books = lane.chosen, lane.cell_of, lane.token_in, lane.last_used
        return [(book, book.clone()) for book in books]

    def _drawn(self, count: int, apart_from: Tensor | None = None) -> Tensor:
        """int32 [H, count]: random tokens that have a landmark, ascending."""
        order = torch.rand(self._heads, self.tokens, device=self._query.device)
        order[:, :SINK_TOKENS] = 2.0
        if apart_from is not None:
            order.scatter_(1, apart_from.long(), 2.0)
        return order.topk(count, dim=1, largest=False).indices.sort(dim=1).values.int()

    def _tell(self, step: int) -> None:
        rows = [lane.row(step, self.tail) for lane in self._lanes]
        self._table = torch.tensor(rows, dtype=torch.int64, device=self._query.device)

    def put_back(self) -> None:
        """Let the next `find` be the first of its step."""
        for book, saved in self._books:
            book.copy_(saved)

    def score(self) -> Tensor:
        landmarks = self._codes, self._scales, self._codec.landmark_quantizer.grid
        return score_landmarks(self._query, self._codec.signs, *landmarks, self._table, first=SINK_TOKENS)

    def select(self) -> None:
        select_tokens(self._table, self._lse, self._heads, first=SINK_TOKENS)

    def find(self) -> Tensor:
        cells = {"sinks": SINK_TOKENS, "per_slot": self._codec.rows_per_slot}
        return find_rows(self._table, 0, self._heads, self._counters, **cells)

    def fetch(self) -> None:
        fetch_rows(self._table, self.missing, self._rows, self._keys, self._values)

    def load(self) -> None:
        """All rows of the first request."""
        load_rows(*self._places, self._rows, self._keys, self._values, sinks=SINK_TOKENS)

    def attend(self) -> object:
        codec, pool = self._codec, (self._query, self._keys, self._values)
        coded = self._row_scales.view(torch.uint8), codec.row_quantizer.grid, codec.signs, codec.means[0]
        return attend_rows(*pool, *coded, self._table, sets=self._heads, sinks=SINK_TOKENS)
