"""`aquifer bench prefill`, `decode` and `throughput`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aquifer.benchmarks.engines import Needs, engine_for, plant, random_prompt, timed_read
from aquifer.benchmarks.geometries import make_subject
from aquifer.benchmarks.limits import decode_bytes, prefill_flop, weight_count
from aquifer.server.cli import app


def test_prefill_stands_beside_its_peer_and_its_arithmetic(bench: Callable[..., Any]) -> None:
    outcome = bench("prefill", "--tokens", "512")
    assert set(outcome.rows) == {"prefill", "hf-dynamic", "its arithmetic at the rate of a large GEMM"}
    assert outcome.rows["prefill"]["times"] == 1.0


def test_every_mode_of_decoding_can_be_measured(bench: Callable[..., Any]) -> None:
    modes = ("resident", "streamed", "selective", "verified")
    flags = [flag for mode in modes for flag in ("--mode", mode)]
    outcome = bench("decode", "--tokens", "1024", "--new-tokens", "6", "--budget", "0.1", *flags)
    assert set(modes) < set(outcome.rows)
    assert 0 <= outcome.rows["selective"]["row_hit_percent"] <= 100
    assert 0 <= outcome.rows["verified"]["accepted_percent"] <= 100
    assert all(outcome.rows[mode]["device_kv_bytes"] > 0 for mode in modes)


def test_an_imposed_share_of_the_drafts_is_accepted(bench_once: Callable[..., Any]) -> None:
    outcome = bench_once(
        "decode",
        *(
            "--repeat",
            "1",
            "--tokens",
            "1280",
            "--new-tokens",
            "12",
            "--budget",
            "0.06",
            "--mode",
            "verified",
        ),
        *("--accept", "1", "--rows", "misses"),
    )
    figures = outcome.rows["verified, no row found"]
    assert figures["row_hit_percent"] == 0
    assert figures["accepted_percent"] == 100 and figures["accepted"] == figures["drafted"]
    assert figures["tokens_per_check"] == pytest.approx(1 + figures["drafted"] / figures["checks"])
    assert "accept 100% of the drafts" in outcome.output and outcome.line["setup"]["accept"] == 1


def test_decode_reports_modes_and_names_peers_that_cannot_run(bench: Callable[..., Any]) -> None:
    peers = ("hf-dynamic", "hf-offloaded", "hf-static-graph", "raw-copy")
    flags = [flag for peer in peers for flag in ("--peer", peer)]
    outcome = bench("decode", "--tokens", "512", "--new-tokens", "12", "--batch", "2", *flags)
    assert set(outcome.rows) == {"resident", "hf-dynamic", "weights and KV through memory once"}
    for row in outcome.rows.values():
        assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"])
    assert outcome.line["left_out"]["hf-offloaded"] == "needs CUDA"
    assert "does not do this" in outcome.line["left_out"]["raw-copy"]


def test_throughput_stops_where_memory_is_full(bench: Callable[..., Any], weights: Path) -> None:
    page = 256 * 2 * 3 * 32 * 4
    outcome = bench(
        "throughput",
        *("--tokens", "512", "--new-tokens", "12", "--contexts", "1,2,3", "--gpu-kv-bytes", str(6 * page)),
    )
    assert set(outcome.rows) == {"resident, 1 contexts", "resident, 2 contexts"}
    assert "resident, 3 contexts" in outcome.line["left_out"]
    two = outcome.rows["resident, 2 contexts"]
    assert two["tokens_per_second"] == pytest.approx(2 / two["seconds"])
    assert 0 < two["device_kv_bytes"] <= 6 * page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["throughput", "--contexts", "one"], "numbers"),
        (["throughput", "--contexts", "0,2"], "at least 1"),
        (["decode", "--mode", "fast"], "no mode"),
        (["decode", "--geometry", "gpt-5"], "no geometry"),
        (["decode", "--accept", "0.8", "--mode", "selective"], "--mode verified"),
        (["throughput", "--accept", "0.8"], "--mode verified"),
    ],
)
def test_a_bad_argument_ends_with_a_message(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])
    assert result.exit_code == 2
    assert words in result.output


def test_a_planted_context_is_restored_like_a_stored_one(tiny: None, weights: Path) -> None:
    subject = make_subject("tiny", None, torch.device("cpu"), weights)
    with engine_for(subject, Needs("aqua:2", 768)) as engine:
        prompt = random_prompt(subject, 768)
        plant(engine, subject, subject.codec("aqua:2"), prompt)
        _, event = timed_read(engine, prompt, store=True)
    assert (event.cached.ram, event.computed_tokens) == (768, 0)


def test_limits_count_weights_operations_and_bytes(tiny: None, weights: Path) -> None:
    subject = make_subject("tiny", None, torch.device("cpu"), weights)
    layer = 48 * (2 * 96 + 2 * 32) + 3 * 48 * 96
    assert weight_count(subject) == 3 * layer + 300 * 48
    assert decode_bytes(subject, 100, 2) == 4 * weight_count(subject) + 2 * 100 * 2 * 3 * 32 * 4
    causal_attention = 2 * 10**2 * 96 * 3
    assert prefill_flop(subject, 10) == 2 * 10 * 3 * layer + 2 * 300 * 48 + causal_attention
