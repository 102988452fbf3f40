"""`aquifer bench prefill`, `decode` and `throughput`: the model at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from queue import SimpleQueue
from time import perf_counter

from aquifer.benchmarks.engines import Needs, engine_for, plant, random_prompt, request, timed_read
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, LeftOutError, Report, Row, Run
from aquifer.benchmarks.limits import decode_bytes, measure_limits, prefill_flop
from aquifer.benchmarks.peers import PeerName, hf_decode, hf_prefill, load_hf, taking_part
from aquifer.benchmarks.transfer import check_whole, new_report
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, KVMode, TokenEvent

Prompt = tuple[int, ...]

QUESTION_TOKENS = 16
"""Computed behind a context before an answer begins."""

_DECODING_PEERS: tuple[PeerName, ...] = ("hf-dynamic", "hf-offloaded", "hf-quanto", "hf-static-graph")


def bench_prefill(subject: Subject, tokens: int, repeat: int, peers: Sequence[str]) -> Report:
    """A prompt read for the first time, and not stored. Raises ValueError unless it is whole segments."""
    check_whole(tokens)
    report = new_report("prefill", subject, tokens=tokens, repeat=repeat)
    limits = measure_limits(subject)
    with engine_for(subject, Needs("raw", tokens)) as engine:

        def prefill() -> float:
            return timed_read(engine, random_prompt(subject, tokens), store=False)[0]

        makers: dict[str, Callable[[], Run]] = {
            "hf-dynamic": lambda: hf_prefill(subject, load_hf(subject), tokens)
        }
        others = taking_part(report, subject, peers, makers)
        report.measure([Contestant("prefill", "ours", prefill), *others], repeat)
    seconds = prefill_flop(subject, tokens) / limits.flop_per_second
    report.rows.append(Row("its arithmetic at the rate of a large GEMM", "limit", {"seconds": seconds}))
    for row in report.rows:
        row.figures["tokens_per_second"] = tokens / row.figures["seconds"]
    report.compare()
    return report


def bench_decode(
    subject: Subject,
    needs: Needs,
    repeat: int,
    modes: Sequence[KVMode],
    peers: Sequence[str],
) -> Report:
    """One step behind a long context. needs.contexts sequences decode together, those of peers alone.

    Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("decode", subject, **_described(needs), repeat=repeat)
    limits = measure_limits(subject)
    steps = needs.new_tokens
    with engine_for(subject, needs) as engine:
        prompts = _plant_all(engine, subject, needs, needs.contexts)
        ours = [Contestant(mode, "ours", _decode(engine, prompts, steps, mode)) for mode in modes]
        load = cache(lambda: load_hf(subject))

        def maker(name: PeerName) -> Callable[[], Run]:
            return lambda: hf_decode(name, subject, load(), needs.tokens, steps)

        makers: dict[str, Callable[[], Run]] = {name: maker(name) for name in _DECODING_PEERS}
        report.measure([*ours, *taking_part(report, subject, peers, makers)], repeat)
    seconds = decode_bytes(subject, needs.tokens, needs.contexts) / limits.bytes_per_second
    report.rows.append(Row("weights and KV through memory once", "limit", {"seconds": seconds}))
    for row in report.rows:
        sequences = 1 if row.role == "peer" else needs.contexts
        row.figures["tokens_per_second"] = sequences / row.figures["seconds"]
    report.compare()
    return report


def bench_throughput(
    subject: Subject, needs: Needs, repeat: int, modes: Sequence[KVMode], counts: Sequence[int]
) -> Report:
    """Tokens per second while so many contexts are being answered at once, until memory is full.

    needs.contexts is the most of `counts`. Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("throughput", subject, **_described(needs), repeat=repeat)
    with engine_for(subject, needs) as engine:
        prompts = _plant_all(engine, subject, needs, max(counts))
        for mode in modes:
            for count in counts:
                name = f"{mode}, {count} contexts"
                run = _decode(engine, prompts[:count], needs.new_tokens, mode)
                rows = report.measure([Contestant(name, "ours", run)], repeat)
                if name not in rows:
                    break  # with more it will not work either
                figures = rows[name].figures
                figures["contexts"] = count
                figures["tokens_per_second"] = count / figures["seconds"]
                figures["resident_bytes"] = engine.load().device_bytes["resident"]
    return report


def _described(needs: Needs) -> dict[str, str | int | float | None]:
    return {
        "codec": needs.codec,
        "tokens": needs.tokens,
        "contexts": needs.contexts,
        "new_tokens": needs.new_tokens,
    }


def _plant_all(engine: Engine, subject: Subject, needs: Needs, count: int) -> list[Prompt]:
    codec = subject.codec(needs.codec)
    prompts = [random_prompt(subject, needs.tokens) for _ in range(count)]
    for prompt in prompts:
        plant(engine, subject, codec, prompt)
    return prompts


def _decode(engine: Engine, prompts: Sequence[Prompt], steps: int, mode: KVMode) -> Run:
    """Ask a question about every prompt at once; seconds per step while all of them are being answered."""

    def run() -> float:
        answers = _answer(engine, prompts, steps, mode)
        first = max(times[0] for times in answers)
        last = min(times[-1] for times in answers)
        if first >= last:
            raise LeftOutError(f"{len(prompts)} contexts do not fit the device at once")
        tokens = Counter(first < at <= last for times in answers for at in times)[True]
        return (last - first) * len(prompts) / tokens

    return run


def _answer(engine: Engine, prompts: Sequence[Prompt], steps: int, mode: KVMode) -> list[list[float]]:
    """When each token of each answer came."""
    queues: list[SimpleQueue[tuple[float, Event]]] = [SimpleQueue() for _ in prompts]

    def sink_of(queue: SimpleQueue[tuple[float, Event]]) -> Callable[[Event], None]:
        return lambda event: queue.put((perf_counter(), event))

    for prompt, queue in zip(prompts, queues, strict=True):
        question = tuple(range(3, 3 + QUESTION_TOKENS))
        engine.submit(request(prompt + question, steps + 1, mode=mode, store=False), sink_of(queue))
    answers = []
    for queue in queues:
        times = []
        while True:
            at, event = queue.get()
            if isinstance(event, TokenEvent):
                times.append(at)
            elif isinstance(event, FailedEvent):
                raise LeftOutError(event.message)
            elif isinstance(event, FinishedEvent):
                break
        if mode not in ("auto", event.kv.mode):
            raise LeftOutError(f"the engine answered in mode {event.kv.mode} instead")
        answers.append(times)
    return answers
