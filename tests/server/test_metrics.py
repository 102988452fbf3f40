"""Every metric the documentation names is there under its name, and shows what the engine says."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine, tier
from prometheus_client.parser import text_string_to_metric_families
from tiny_tokenizer import tiny_tokenizer

from aquifer.server.metrics import Metrics

NAMES = {
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_seconds": "histogram",
    "requests": "counter",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "tier_lookups": "counter",
    "tier_read_bytes": "counter",
    "tier_read_seconds": "counter",
    "tier_write_bytes": "counter",
    "tier_write_seconds": "counter",
    "tier_used_bytes": "gauge",
    "tier_capacity_bytes": "gauge",
    "tier_evictions": "counter",
    "tier_up": "gauge",
    "kv_raw_bytes": "counter",
    "kv_stored_bytes": "counter",
    "codec_tokens": "counter",
    "codec_seconds": "counter",
    "gpu_memory_bytes": "gauge",
}


@pytest.fixture
def engine() -> Any:
    return FakeEngine(tiny_tokenizer().decode)


@pytest.fixture
def metrics(engine: Any) -> Metrics:
    made = Metrics()
    made.observe(engine)
    return made


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"aquifer_{name}", labels)


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_documented_metrics_are_exposed(metrics: Metrics, name: str, kind: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert families[f"aquifer_{name}"].type == kind


def test_attributes_are_named_as_their_metrics(metrics: Metrics) -> None:
    metrics.generation_tokens.inc(3)
    metrics.prompt_tokens.labels(source="ram").inc(256)
    metrics.codec_seconds.labels(op="encode").inc(0.5)
    metrics.time_to_first_token_seconds.observe(90)
    assert value(metrics, "generation_tokens_total") == 3
    assert value(metrics, "prompt_tokens_total", source="ram") == 256
    assert value(metrics, "codec_seconds_total", op="encode") == 0.5
    assert value(metrics, "time_to_first_token_seconds_bucket", le="60.0") == 0
    assert value(metrics, "time_to_first_token_seconds_bucket", le="120.0") == 1


@pytest.mark.parametrize("source", ["computed", "gpu", "ram", "redis"])
def test_sources_stand_at_zero_before_their_first_token(metrics: Metrics, source: str) -> None:
    assert value(metrics, "prompt_tokens_total", source=source) == 0


def test_tiers_and_load_are_read_at_scrape_time(metrics: Metrics, engine: Any) -> None:
    assert value(metrics, "tier_lookups_total", tier="ram", result="hit") == 5
    engine.store.tiers = [tier("ram", hits=9, errors=2, corrupt=1, used_bytes=77), tier("redis", up=False)]
    assert value(metrics, "tier_lookups_total", tier="ram", result="hit") == 9
    assert value(metrics, "tier_lookups_total", tier="ram", result="error") == 2
    assert value(metrics, "tier_lookups_total", tier="ram", result="corrupt") == 1
    assert value(metrics, "tier_used_bytes", tier="ram") == 77
    assert value(metrics, "tier_up", tier="redis") == 0
    assert value(metrics, "gpu_memory_bytes", use="resident") == 20


def test_an_unknown_capacity_is_left_out(metrics: Metrics, engine: Any) -> None:
    engine.store.tiers = [tier("ram"), tier("redis", capacity_bytes=None)]
    assert value(metrics, "tier_capacity_bytes", tier="ram") == 4000
    assert value(metrics, "tier_capacity_bytes", tier="redis") is None


def test_two_services_in_one_process_count_apart(metrics: Metrics) -> None:
    other = Metrics()
    metrics.generation_tokens.inc()
    assert value(other, "generation_tokens_total") == 0
