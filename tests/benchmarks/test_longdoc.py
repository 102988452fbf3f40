"""`aquifer bench longdoc` and `redis`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from aquifer.server.cli import app

SMALL = ("--documents", "2", "--tokens", "600", "--new-tokens", "3")


def test_every_path_is_compared_with_recomputing(bench_once: Callable[..., Any], redis_server: Any) -> None:
    outcome = bench_once("longdoc", *SMALL, "--redis-url", redis_server.url)
    assert list(outcome.rows) == ["recompute", "gpu", "ram-raw", "ram-codec", "redis-raw", "redis-codec"]
    hits = {name: figures["hit_percent"] for name, figures in outcome.rows.items()}
    found = 100 * 512 / 600
    assert hits == {name: 0 if name == "recompute" else pytest.approx(found) for name in hits}
    weight = {name: figures["bytes_per_token"] for name, figures in outcome.rows.items()}
    assert weight["recompute"] == 0 and weight["gpu"] == 2 * 3 * 32 * 4
    assert weight["ram-codec"] < weight["ram-raw"] and weight["redis-codec"] == weight["ram-codec"]
    for figures in outcome.rows.values():
        assert figures["ttft_p99_seconds"] >= figures["ttft_p50_seconds"] > 0
        assert {"tokens_per_second", "speedup", "cold_extra_percent", "cold_ttft_p50_seconds"} <= set(figures)


def test_paths_can_be_chosen(bench_once: Callable[..., Any]) -> None:
    outcome = bench_once("longdoc", *SMALL, "--path", "ram-codec", "--path", "recompute")
    assert list(outcome.rows) == ["recompute", "ram-codec"]


def test_an_unknown_path_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "longdoc", "--path", "disk"])
    assert result.exit_code == 2
    assert "redis-codec" in result.output


def test_redis_is_measured_against_redis_py_and_leaves_nothing_behind(
    bench: Callable[..., Any], redis_server: Any
) -> None:
    outcome = bench("redis", "--tokens", "512", "--redis-url", redis_server.url)
    rows = outcome.rows
    assert set(rows) == {
        "write records",
        "read records",
        "redis-py SET",
        "redis-py GET",
        "Redis to ready KV",
        "prefill instead",
    }
    assert rows["redis-py GET"]["times"] == pytest.approx(
        rows["redis-py GET"]["seconds"] / rows["read records"]["seconds"]
    )
    assert all(rows[name]["gb_per_second"] > 0 for name in rows if name != "prefill instead")
    with redis.Redis(port=redis_server.port) as client:
        left = client.keys()
    assert len(left) <= 1  # the sinks, which every prompt that begins alike shares
