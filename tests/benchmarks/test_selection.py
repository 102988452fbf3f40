"""Selection traces: what is recorded, and that imposed rows are found as often as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from aquifer.benchmarks.selection import Rows, SelectionTrace, check_imposable, found
from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import KVSpec
from aquifer.server.cli import app
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.selective import ROW_CACHE_STEPS, RowCache, Selection

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, rope="")
CPU = torch.device("cpu")
COUNT, TOKENS = 20, 512


def shares_found(rows: Rows, steps: int) -> list[float]:
    """Shares of rows found in each step of a request, over all layers."""
    pool = PagePool(SPEC, 4 * 256 * SPEC.bytes_per_token, CPU, keep=False)
    index = IndexPool(TokenCodec(SPEC, None, CPU), 2, CPU, keep=False)
    index.rows.zero_()
    tokens, cells = torch.arange(TOKENS), torch.arange(ROW_CACHE_STEPS * COUNT)
    shares = []
    with rows.imposed():
        selection = Selection(COUNT, len(cells), 1, shared=False)
        cache = RowCache(pool, index, tokens, cells, selection)
        for step in range(1, steps + 1):
            own = torch.randint(TOKENS - COUNT, (2, 1)) + torch.arange(COUNT)
            fetched = sum(cache.fetch(layer, own, step)[1] for layer in range(SPEC.num_layers))
            shares.append(1 - fetched / (SPEC.num_layers * 2 * COUNT))
    return shares


def test_without_hits_every_row_is_fetched_however_long_the_answer() -> None:
    rows = Rows(SPEC, CPU)
    rows.use("misses")
    assert shares_found(rows, 60) == [0.0] * 60


def test_rows_are_found_as_often_as_in_the_trace() -> None:
    rows = Rows(SPEC, CPU)
    rows.use("trace")
    trace = SelectionTrace.load().for_model(2, 2)[0].mean(dim=(1, 2))
    shares = shares_found(rows, 60)
    assert shares[0] == 0.0, "the row cache was empty"
    assert shares[1:] == pytest.approx(trace[66:125].tolist(), abs=2 / COUNT)


def test_rows_of_its_own_are_left_alone() -> None:
    rows = Rows(SPEC, CPU)
    rows.use("misses")
    rows.use("own")
    torch.manual_seed(0)
    shares = shares_found(rows, 30)
    assert any(share > 0 for share in shares)


def test_the_bundled_trace_is_of_a_whole_answer_and_small() -> None:
    trace = SelectionTrace.load()
    cases, steps, *sets = trace.hits.shape
    assert (cases, sets) == (2, [8, 4])
    assert steps > 100
    assert trace.hits[:, 0].max() == 0
    some, every = trace.hits.mean(axis=(1, 2, 3))
    assert 0.3 < some < every < 1
    json.loads(trace.about["answer"])
    assert trace.for_model(32, 8).shape == (2, steps, 32, 8)


def test_kept_are_those_chosen_most_recently() -> None:
    chosen = np.array([[0, 1], [2, 3], [0, 2], [1, 3], [4, 5]])
    assert found(chosen, 6).tolist() == [0, 0, 1, 1, 0]
    assert found(chosen, 4).tolist() == [0, 0, 1, 1, 0]
    assert found(chosen, 3).tolist() == [0, 0, 0.5, 0.5, 0]


def test_a_trace_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    hits = np.random.default_rng(0).integers(0, 257, (2, 5, 2, 2)).astype(np.float32) / 256
    SelectionTrace(hits, {"prompt_tokens": 7}).save(tmp_path / "trace.npz")
    loaded = SelectionTrace.load(tmp_path / "trace.npz")
    assert np.abs(loaded.hits - hits).max() < 1e-3
    assert loaded.about == {"prompt_tokens": 7}


def test_imposing_rows_needs_more_tokens_than_the_row_cache_remembers() -> None:
    check_imposable(8192, 400)
    with pytest.raises(ValueError, match=r"500 of 7,932 tokens are too many"):
        check_imposable(8192, 500)


def test_throughput_with_imposed_rows_says_how_many_were_found(bench_once: Callable[..., Any]) -> None:
    flags = [flag for kind in ("own", "misses", "trace") for flag in ("--rows", kind)]
    outcome = bench_once(
        "throughput",
        *("--repeat", "1", "--tokens", "1280", "--new-tokens", "4", "--contexts", "1", "--mode", "selective"),
        *("--budget", "0.06", *flags),
    )
    hits = {name: figures["row_hit_percent"] for name, figures in outcome.rows.items()}
    assert set(hits) == {
        "selective, 1 contexts",
        "selective, no row found, 1 contexts",
        "selective, rows found as in the trace, 1 contexts",
    }
    assert hits["selective, no row found, 1 contexts"] == 0
    assert 40 < hits["selective, rows found as in the trace, 1 contexts"] < 100


def test_rows_that_there_are_not_are_named() -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--rows", "some", "--device", "cpu"])
    assert result.exit_code == 2
    assert "no rows 'some'" in result.output
