"""The kernel by which benchmarks decide what recorded steps choose; see aquifer.benchmarks.selection."""

from collections import deque
from typing import cast, get_args

import pytest
import torch

from aquifer.benchmarks.selection import Rows, RowsKind
from aquifer.benchmarks.selection_cuda import imposed_on_lanes
from aquifer.compression.spec import KVSpec
from aquifer.kernels.triton.lanes import NOBODY, Lane
from aquifer.server.engine import lanes as engine_lanes
from aquifer.server.engine import reading
from aquifer.server.engine.parts import EngineParts

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, rope="")
SINKS = 4


@pytest.mark.parametrize("cells", [120, 0])
def test_the_kernel_chooses_what_the_row_cache_is_told_elsewhere(
    cells: int, device: torch.device, launched: list[str]
) -> None:
    tokens = 3 * 256 - SINKS
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    rows, own = Rows(SPEC, device), torch.arange(SINKS, SINKS + 30, device=device).expand(2, -1)
    fetched = {}
    with imposed_on_lanes(rows._missed, lambda: True):
        for kind in get_args(RowsKind):
            rows.use(kind)
            counters.zero_()
            lane = Lane(
                *([2, 0, 1], [5, 1], [3, 2]),
                layers=2,
                sets=2,
                num_q_heads=2,
                wanted=30,
                cells=cells,
                device=device,
            )
            for step in range(1, 5):
                for layer in range(2):
                    lane.chosen.copy_(own)
                    table = torch.tensor([NOBODY, lane.row(step, 3)], device=device)
                    engine_lanes.find_rows(table, layer, 2, counters, sinks=SINKS, per_slot=8)
                    among = own - SINKS, tokens, layer, step
                    expected = rows._impose(*among, all_kept=cells == 0) + SINKS
                    assert lane.chosen.tolist() == expected.tolist()
            fetched[kind] = int(counters[1])
    assert fetched["own"] == 2 * 2 * 30, "only its first step finds nothing"
    assert fetched["own"] < fetched["trace"] < fetched["misses"] == 4 * 2 * 2 * 30
    assert set(launched) == {"_impose", "_find"}


def test_where_no_row_may_be_found_none_comes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[str] = []
    monkeypatch.setattr(engine_lanes, "load_rows_of", lambda *args: came.append("loaded"))
    monkeypatch.setattr(reading, "cells_to_fill", lambda *args: came.append("filled"))
    rows = Rows(SPEC, torch.device("cpu"))
    for kind in get_args(RowsKind):
        rows.use(kind)
        with imposed_on_lanes(rows._missed, lambda: rows.lets_rows_come):
            engine_lanes.load_rows_of([], deque())
            reading.cells_to_fill(cast(EngineParts, None), None, [], [], [])
    assert came == ["loaded", "filled"] * (len(get_args(RowsKind)) - 1)
