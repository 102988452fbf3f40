"""Every number the service exposes to Prometheus, in one place.

Counters hold bytes, tokens and seconds; ratios (hit ratio, compression ratio, GB/s) are made in
PromQL. What the engine and the tiers already count themselves is read from them at scrape time, so
no number is kept twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aquifer.cachestore.tier import TierStats

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine
    from aquifer.server.engine.types import EngineLoad

# One more series per counter, with the time it was made: nobody asks for it.
disable_created_metrics()

# A cold read of a long document takes minutes, a warm question milliseconds: both ends count.
_WAIT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The service's metrics in a registry of their own (several services fit in one process).

    Each attribute is named as its metric without the `aquifer_` prefix and the `_total` suffix.
    The engine observes what happens to tokens (queue, first token, gaps between tokens, prompt and
    generated tokens, codec work); the HTTP layer observes what happens to requests
    (`requests`, `e2e_request_latency_seconds`).
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _WAIT_BUCKETS
        )
        self.inter_token_latency_seconds = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one answer.", _TOKEN_BUCKETS
        )
        self.e2e_request_latency_seconds = self._histogram(
            "e2e_request_latency_seconds",
            "From the first byte of a request to the last of its answer.",
            _WAIT_BUCKETS,
        )
        self.request_queue_seconds = self._histogram(
            "request_queue_seconds", "From submission until the engine starts on it.", _WAIT_BUCKETS
        )
        self.requests = self._counter(
            "requests",
            "Requests answered, by HTTP status; 499: the client left. Probes and scrapes are not counted.",
            "status",
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens by where their KV came from: computed, gpu, ram, redis.", "source"
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.kv_raw_bytes = self._counter("kv_raw_bytes", "Bytes of KV that were compressed.")
        self.kv_stored_bytes = self._counter("kv_stored_bytes", "Bytes they were compressed to.")
        self.codec_tokens = self._counter("codec_tokens", "Tokens encoded or decoded.", "op")
        self.codec_seconds = self._counter("codec_seconds", "Seconds spent encoding or decoding.", "op")
        self.selected_tokens = self._counter(
            "selected_tokens", "Rows (a token of one layer and KV head) that selective attention chose."
        )
        self.selected_hits = self._counter("selected_hits", "Chosen rows that were on the device already.")
        self.fetched_bytes = self._counter(
            "fetched_bytes", "Bytes that decoding fetched from host memory.", "mode"
        )
        self.draft_tokens = self._counter(
            "draft_tokens", "Drafted tokens, by what the check over the whole cache said.", "result"
        )

        # A series that appears only with its first event hides that event from rate().
        for source in ("computed", "gpu", "ram", "redis"):
            self.prompt_tokens.labels(source=source)
        for op in ("encode", "decode"):
            self.codec_tokens.labels(op=op)
            self.codec_seconds.labels(op=op)
        for mode in ("streamed", "selective"):
            self.fetched_bytes.labels(mode=mode)
        for result in ("accepted", "rejected"):
            self.draft_tokens.labels(result=result)

    def observe(self, engine: Engine) -> None:
        """From now on, scrapes read this engine's load and its tiers. Call it once per engine."""
        self.registry.register(_EngineCollector(engine))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"aquifer_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"aquifer_{name}", help_text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        # Nothing: registering must not ask the tiers (Redis may be down at that moment).
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from _load_metrics(self._engine.load())
        yield from _tier_metrics(self._engine.store.stats())


def _load_metrics(load: EngineLoad) -> Iterator[Metric]:
    yield GaugeMetricFamily("aquifer_requests_running", "Requests being served.", value=load.running)
    yield GaugeMetricFamily("aquifer_requests_waiting", "Requests in the queue.", value=load.waiting)
    memory = GaugeMetricFamily("aquifer_gpu_memory_bytes", "Device memory by use.", labels=["use"])
    for use, used_bytes in load.device_bytes.items():
        memory.add_metric([use], used_bytes)
    yield memory


def _tier_metrics(tiers: Sequence[TierStats]) -> Iterator[Metric]:
    lookups = CounterMetricFamily(
        "aquifer_tier_lookups",
        "Segments asked for: hit or miss. error, corrupt: misses (and failed writes) with that cause.",
        labels=["tier", "result"],
    )
    for tier in tiers:
        lookups.add_metric([tier.name, "hit"], tier.hits)
        lookups.add_metric([tier.name, "miss"], tier.misses)
        lookups.add_metric([tier.name, "error"], tier.errors)
        lookups.add_metric([tier.name, "corrupt"], tier.corrupt)
    yield lookups

    counters = {
        "tier_read_bytes": ("Bytes read from a tier.", "read_bytes"),
        "tier_read_seconds": ("Seconds spent reading from a tier.", "read_seconds"),
        "tier_write_bytes": ("Bytes written to a tier.", "write_bytes"),
        "tier_write_seconds": ("Seconds spent writing to a tier.", "write_seconds"),
        "tier_evictions": ("Records pushed out by others.", "evictions"),
        "tier_dropped_writes": ("Records not stored: no room, tier down, queue full.", "dropped_writes"),
    }
    for name, (help_text, field) in counters.items():
        counter = CounterMetricFamily(f"aquifer_{name}", help_text, labels=["tier"])
        for tier in tiers:
            counter.add_metric([tier.name], getattr(tier, field))
        yield counter

    gauges = {
        "tier_used_bytes": ("Bytes a tier holds.", "used_bytes"),
        "tier_capacity_bytes": ("Bytes a tier can hold, where that is known.", "capacity_bytes"),
        "tier_entries": ("Records a tier holds.", "entries"),
        "tier_pinned": ("Records a tier may not evict.", "pinned"),
        "tier_up": ("1 when a tier answers.", "up"),
    }
    for name, (help_text, field) in gauges.items():
        gauge = GaugeMetricFamily(f"aquifer_{name}", help_text, labels=["tier"])
        for tier in tiers:
            value = getattr(tier, field)
            if value is not None:
                gauge.add_metric([tier.name], value)
        yield gauge
