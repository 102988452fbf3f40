"""`aquifer bench longdoc`: the workload others publish. Several long documents, each asked about twice.

The second round finds every document where the path under test keeps it; the first round finds nothing
and shows what keeping costs. Paths are measured one after the other, each with an engine of its own; so
each is compared with a few documents that the same engine recomputes right before, and not with the
path `recompute`, when the machine may have been busier.

recompute    nothing is kept: the yardstick
gpu          KV stays on the device
ram-raw      uncompressed in host memory        ram-codec    compressed in host memory
redis-raw    uncompressed in Redis              redis-codec  compressed in Redis
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Literal, get_args

from aquifer.benchmarks.engines import (
    QUESTION_TOKENS,
    Needs,
    drop_from_ram,
    engine_for,
    random_prompt,
    redis_at,
    request,
    wait_until_stored,
)
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import LeftOutError, Report, Row
from aquifer.benchmarks.transfer import new_report
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import FinishedEvent

PathName = Literal["recompute", "gpu", "ram-raw", "ram-codec", "redis-raw", "redis-codec"]
PATHS: tuple[PathName, ...] = get_args(PathName)


@dataclass(frozen=True)
class LongDocs:
    """tokens: of each document. in_flight: questions that are out at the same time."""

    documents: int = 8
    tokens: int = 20_000
    new_tokens: int = 100
    in_flight: int = 2


@dataclass(frozen=True)
class _Round:
    """Every document asked once. seconds: from the first question to the last answer's end."""

    seconds: float
    events: list[FinishedEvent]

    @property
    def ttft_seconds(self) -> list[float]:
        return [event.timings.ttft_seconds for event in self.events]

    @property
    def seconds_per_document(self) -> float:
        return self.seconds / len(self.events)

    @property
    def tokens_per_second(self) -> float:
        return sum(event.generated_tokens for event in self.events) / self.seconds


def bench_longdoc(
    subject: Subject, work: LongDocs, codec: str, paths: Sequence[PathName], redis_url: str | None
) -> Report:
    """codec: of the compressed paths.

    speedup: of the first token in the second round. cold_extra_percent: what the first round takes longer
    than recomputing, because documents are looked up and stored.
    """
    report = new_report("longdoc", subject, codec=codec, **asdict(work))
    with ExitStack() as stack:
        url = None
        if any(path.startswith("redis") for path in paths):
            try:
                url = stack.enter_context(redis_at(redis_url))
            except LeftOutError as error:
                report.left_out["redis"] = str(error)
        for path in sorted(paths, key=PATHS.index):
            if url or not path.startswith("redis"):
                report.rows.append(_measure(subject, work, codec, path, url))
    return report


def _measure(subject: Subject, work: LongDocs, codec: str, path: PathName, redis_url: str | None) -> Row:
    place, _, form = path.partition("-")
    answer = work.tokens + QUESTION_TOKENS + work.new_tokens
    held = work.documents if place == "gpu" else work.in_flight
    needs = Needs(
        codec=codec if form == "codec" else "raw",
        tokens=work.tokens + QUESTION_TOKENS,
        contexts=work.documents,
        new_tokens=work.new_tokens,
        on_device=place == "gpu",
        redis_url=redis_url if place == "redis" else None,
        # Answers in flight stand beside the documents that stay.
        device_bytes=subject.spec.bytes_per_token
        * (held * (answer + 2 * SEGMENT_TOKENS) + work.in_flight * (work.new_tokens + 2 * SEGMENT_TOKENS)),
    )
    documents = [random_prompt(subject, work.tokens) for _ in range(work.documents)]
    with engine_for(subject, needs) as engine:
        # One document first, so that those measured do not pay for what happens once.
        _ask_twice(engine, subject, replace(work, new_tokens=2), place, [random_prompt(subject, work.tokens)])
        recomputed = _recompute_some(engine, subject, work)
        cold, warm = _ask_twice(engine, subject, work, place, documents)
    hits = sum(getattr(event.cached, place, 0) for event in warm.events)
    figures = {
        "ttft_p50_seconds": statistics.median(warm.ttft_seconds),
        "ttft_p99_seconds": _percentile(warm.ttft_seconds, 99),
        "tokens_per_second": warm.tokens_per_second,
        "hit_percent": 100 * hits / (work.documents * work.tokens),
        "bytes_per_token": _bytes_per_token(subject, warm.events[0], place),
        "cold_ttft_p50_seconds": statistics.median(cold.ttft_seconds),
        "speedup": statistics.median(recomputed.ttft_seconds) / statistics.median(warm.ttft_seconds),
        "cold_extra_percent": 100 * (cold.seconds_per_document / recomputed.seconds_per_document - 1),
    }
    return Row(path, "peer" if place == "recompute" else "ours", figures)


def _ask_twice(
    engine: Engine, subject: Subject, work: LongDocs, place: str, documents: Sequence[array[int]]
) -> tuple[_Round, _Round]:
    """The second time every document is where it is kept. Nothing of them is left."""
    keeps = place in ("ram", "redis")
    cold = _ask_all(engine, subject, work, documents, store=keeps)
    if keeps:
        wait_until_stored(engine, documents)
    if place == "redis":
        for document in documents:
            drop_from_ram(engine, document)
    warm = _ask_all(engine, subject, work, documents, store=keeps)
    for document in documents:
        engine.forget(document, "")
    return cold, warm


def _recompute_some(engine: Engine, subject: Subject, work: LongDocs) -> _Round:
    """As many documents as are in flight at once, without a trace."""
    documents = [random_prompt(subject, work.tokens) for _ in range(min(work.in_flight, work.documents))]
    answers = _ask_all(engine, subject, work, documents, store=False)
    for document in documents:
        engine.forget(document, "")
    return answers


def _ask_all(
    engine: Engine, subject: Subject, work: LongDocs, documents: Sequence[array[int]], *, store: bool
) -> _Round:
    def ask(document: array[int]) -> FinishedEvent:
        question = random_prompt(subject, QUESTION_TOKENS)
        (event,) = engine.generate([request(document + question, work.new_tokens, store=store)])
        return event

    with ThreadPoolExecutor(work.in_flight) as askers:
        started = perf_counter()
        events = list(askers.map(ask, documents))
        return _Round(perf_counter() - started, events)


def _bytes_per_token(subject: Subject, event: FinishedEvent, place: str) -> float:
    """What a token of the document takes where it is kept; of whole segments, which alone are kept."""
    if place == "recompute":
        return 0.0
    if place == "gpu":
        return float(subject.spec.bytes_per_token)
    kept = event.prompt_tokens // SEGMENT_TOKENS * SEGMENT_TOKENS
    return event.kv.stored_bytes / kept


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
