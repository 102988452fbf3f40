"""`aquifer bench restore` and `store`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from aquifer.benchmarks import engines
from aquifer.server.cli import app


def test_restore_reports_both_tiers_peers_and_limits(bench: Callable[..., Any], redis_server: Any) -> None:
    outcome = bench(
        "restore",
        "--tokens",
        "512",
        "--redis-url",
        redis_server.url,
        "--peer",
        "hf-dynamic",
        "--peer",
        "raw-copy",
    )
    assert set(outcome.rows) == {
        "from RAM, alone",
        "first token, alone",
        "from RAM",
        "from Redis",
        "first token, from RAM",
        "decoding alone",
        "prefill",
        "hf-dynamic",
        "raw-copy",
        "copy of the stored bytes",
        "predictor GEMMs",
    }
    for figures in outcome.rows.values():
        assert figures["tokens_per_second"] == pytest.approx(512 / figures["seconds"])
    assert outcome.rows["from RAM"]["times"] == 1.0
    assert 0 < outcome.rows["from RAM"]["stored_bytes"] < 512 * 2 * 3 * 32 * 4
    assert outcome.line["setup"]["codec"] == "aqua:2"
    assert "random weights and random predictors" in outcome.output


def test_restore_starts_a_redis_server_of_its_own(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "from Redis" in bench("restore", "--tokens", "256").rows


def test_restore_without_redis_says_so(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    outcome = bench("restore", "--tokens", "256")
    assert "no redis-server on PATH" in outcome.line["left_out"]["from Redis"]
    assert "from Redis" not in outcome.rows and "from RAM" in outcome.rows


def test_store_gives_shares_of_a_prefill(bench: Callable[..., Any]) -> None:
    outcome = bench("store", "--tokens", "512", "--codec", "higgs:4")
    rows = outcome.rows
    assert set(rows) == {
        "prefill beside storing",
        "prefill",
        "prefill and store",
        "encoding alone",
        "raw-copy",
    }
    share = 100 * rows["encoding alone"]["seconds"] / rows["prefill"]["seconds"]
    assert rows["encoding alone"]["of_prefill_percent"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        ("hf-offloaded", "needs CUDA"),
        ("hf-static-graph", "needs CUDA"),
        ("vllm", "unknown peer"),
    ],
)
def test_a_peer_that_cannot_take_part_is_left_out_with_its_reason(
    bench: Callable[..., Any], peer: str, reason: str
) -> None:
    outcome = bench("store", "--tokens", "256", "--peer", peer)
    assert reason in outcome.line["left_out"][peer]
    assert f"left out: {peer}" in outcome.output
    assert peer not in outcome.rows


def test_a_part_of_a_segment_is_refused_with_a_message() -> None:
    result = CliRunner().invoke(app, ["bench", "store", "--tokens", "300", "--device", "cpu"])
    assert result.exit_code == 2
    assert "multiple of 256" in result.output


def test_several_prompts_are_restored_at_once(bench_once: Callable[..., Any]) -> None:
    outcome = bench_once(
        "restore", "--repeat", "1", "--tokens", "512", "--requests", "3", "--peer", "raw-copy"
    )
    assert outcome.line["setup"]["requests"] == 3
    assert outcome.rows["from RAM"]["seconds"] > 0
