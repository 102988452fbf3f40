"""The same for recorded steps: one small kernel between ranking and looking rows up. See selection.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from torch import Tensor

from aquifer.compression.spec import SINK_TOKENS
from aquifer.kernels.triton.lanes import CELLS, CHOSEN, STEP, TOKENS, WANTED, memory, number
from aquifer.server.engine import lanes as engine_lanes
from aquifer.server.engine import reading


@triton.jit(do_not_specialize=["layer_at"])  # one program for all layers
def _impose(
    lanes: tl.tensor,
    missed: tl.tensor,
    layer_at: tl.tensor,
    case_stride: tl.tensor,
    steps: tl.tensor,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One set of one request."""
    own_set, request = tl.program_id(0), tl.program_id(1)
    tokens, count = number(lanes, request, TOKENS), number(lanes, request, WANTED)
    if tokens > 0:
        step = number(lanes, request, STEP) % steps
        all_kept = number(lanes, request, CELLS) == 0
        share = tl.load(missed + tl.where(all_kept, case_stride, 0) + layer_at + own_set * steps + step)
        if share >= 0:
            chosen = memory(lanes, request, CHOSEN, tl.int32) + own_set * count
            width = (tokens - FIRST) // count
            for at in range(0, count, BLOCK):
                own = at + tl.arange(0, BLOCK)
                golden = own.to(tl.float32) * 0.6180339887498949
                offset = (share + golden - tl.floor(golden)).to(tl.int32) % width
                tl.store(chosen + own, FIRST + own * width + offset, mask=own < count)


@contextmanager
def imposed_on_lanes(missed: Tensor, rows_may_come: Callable[[], bool]) -> Iterator[None]:
    """missed: float32 [2, L, H, steps], see Rows. rows_may_come: whether rows come before they are chosen."""
    find_rows, load_rows_of = engine_lanes.find_rows, engine_lanes.load_rows_of
    cells_to_fill = reading.cells_to_fill

    def find_imposed(lanes: Tensor, layer: int, sets: int, *rest: Any, **options: Any) -> Tensor:
        _, _, heads, steps = missed.shape
        places = layer * heads * steps, missed.stride(0), steps
        _impose[(sets, len(lanes))](lanes, missed, *places, FIRST=SINK_TOKENS, BLOCK=1024)
        return find_rows(lanes, layer, sets, *rest, **options)

    def load_if_allowed(*args: Any) -> None:
        if rows_may_come():
            load_rows_of(*args)

    def fill_if_allowed(*args: Any) -> engine_lanes.OwnCells | None:
        return cells_to_fill(*args) if rows_may_come() else None

    with (
        patch.object(engine_lanes, "find_rows", find_imposed),
        patch.object(engine_lanes, "load_rows_of", load_if_allowed),
        patch.object(reading, "cells_to_fill", fill_if_allowed),
    ):
        yield
