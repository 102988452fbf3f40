"""`aquifer bench prefill`, `decode` and `throughput`: the model at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import cache, partial
from queue import SimpleQueue
from time import perf_counter

import torch

from aquifer.benchmarks.acceptance import imposed_acceptance
from aquifer.benchmarks.engines import FIRST_ID, Needs, engine_for, plant, random_prompt, request, timed_read
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, LeftOutError, Report, Row, Run
from aquifer.benchmarks.limits import decode_bytes, measure_limits, prefill_flop
from aquifer.benchmarks.memory import DecodingMemory
from aquifer.benchmarks.peers import PeerName, hf_decode, hf_prefill, load_hf, taking_part
from aquifer.benchmarks.selection import Rows, RowsKind, check_imposable
from aquifer.benchmarks.transfer import check_whole, new_report
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.selective import Selection
from aquifer.server.engine.types import DraftCounts, Event, FailedEvent, FinishedEvent, KVMode, TokenEvent
from aquifer.server.metrics import Metrics
from aquifer.server.settings import load_settings

Prompt = tuple[int, ...]

QUESTION_TOKENS = 16
"""Computed behind a context before an answer begins."""

_ROWS_NAMES: dict[RowsKind, str] = {
    "own": "",
    "misses": ", no row found",
    "trace": ", rows found as in the trace",
}

_TOGETHER_SECONDS = 0.0005
"""No step is as short as this."""

_SELECTING: frozenset[KVMode] = frozenset({"selective", "verified"})
"""Modes that choose rows."""

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


@dataclass(frozen=True)
class Decoding:
    """How contexts are decoded. budget: share of the context that selective attention reads; None: the
    server's default. rows: where it does, which of the chosen rows are on the device already. accept: share
    of the drafts that checks of mode verified accept; None: the model's own."""

    modes: Sequence[KVMode]
    budget: float | None = None
    rows: Sequence[RowsKind] = ("own",)
    accept: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an `accept` that would say nothing."""
        if self.accept is not None and "verified" not in self.modes:
            raise ValueError(
                f"--accept {self.accept:g} is the share of drafts that mode verified accepts; measured here: "
                f"{', '.join(self.modes)}. Add --mode verified"
            )

    @property
    def selects(self) -> bool:
        return bool(_SELECTING & set(self.modes))

    @property
    def cases(self) -> list[tuple[str, KVMode, RowsKind]]:
        """What is measured: a name, the mode, and the rows."""
        return [
            (mode + _ROWS_NAMES[kind], mode, kind)
            for mode in self.modes
            for kind in (self.rows if mode in _SELECTING else ("own",))
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the figures."""
        notes = ["contexts are random KV: row hits and accepted drafts are not those of a text"]
        if self.accept is not None:
            notes.append(f"checks accept {self.accept:.0%} of the drafts, whatever the model says")
        return notes

    @contextmanager
    def imposed(self, subject: Subject, tokens: int) -> Iterator[Rows | None]:
        """Within it, engines accept the share of drafts that is asked for. What makes them choose rows other
        than the model's own, where any are asked for.

        Raises ValueError if that cannot be done."""
        accepted = nullcontext() if self.accept is None else imposed_acceptance(self.accept)
        with accepted, self._imposed_rows(subject, tokens) as rows:
            yield rows

    @contextmanager
    def _imposed_rows(self, subject: Subject, tokens: int) -> Iterator[Rows | None]:
        if set(self.rows) == {"own"}:
            yield None
            return
        budget = load_settings().selective_budget if self.budget is None else self.budget
        prompt_tokens = tokens + QUESTION_TOKENS
        check_imposable(prompt_tokens, Selection.of(prompt_tokens, budget, shared=False).count)
        rows = Rows(subject.spec, subject.device)
        with rows.imposed():
            yield rows


def bench_decode(
    subject: Subject, needs: Needs, decoding: Decoding, repeat: int, peers: Sequence[str]
) -> Report:
    """One step behind long contexts, needs.contexts of them at once.

    Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("decode", subject, **_described(needs, decoding), repeat=repeat)
    report.notes += decoding.notes
    limits, metrics = measure_limits(subject), Metrics()
    on_cuda = subject.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    with decoding.imposed(subject, needs.tokens) as imposed, engine_for(subject, needs, metrics) as engine:
        load = engine.load()
        if on_cuda:
            pools = torch.cuda.memory_allocated() - before - load.device_bytes["weights"]
            report.setup |= {"pools_bytes": load.device_capacity_bytes, "pools_allocated_bytes": pools}
        prompts = _plant_all(engine, subject, needs)
        stage = _Stage(engine, metrics, needs.new_tokens, decoding.budget, imposed, DecodingMemory(engine))
        ours = {name: _Answers(stage, prompts, mode, kind) for name, mode, kind in decoding.cases}
        load_peer = cache(lambda: load_hf(subject))

        def maker(name: PeerName) -> Callable[[], Run]:
            tokens, steps, batch = needs.tokens, needs.new_tokens, needs.contexts
            return lambda: hf_decode(name, subject, load_peer(), tokens, steps, batch)

        makers: dict[str, Callable[[], Run]] = {name: maker(name) for name in _DECODING_PEERS}
        contestants = [Contestant(name, "ours", answers.run) for name, answers in ours.items()]
        rows = report.measure([*contestants, *taking_part(report, subject, peers, makers)], repeat)
    for name in ours.keys() & rows.keys():
        rows[name].figures.update(ours[name].figures)
    seconds = decode_bytes(subject, needs.tokens, needs.contexts) / limits.bytes_per_second
    report.rows.append(Row("weights and KV through memory once", "limit", {"seconds": seconds}))
    for row in report.rows:
        row.figures["tokens_per_second"] = needs.contexts / row.figures["seconds"]
    report.compare()
    return report


def bench_throughput(
    subject: Subject, needs: Needs, decoding: Decoding, repeat: int, counts: Sequence[int]
) -> Report:
    """Tokens per second while so many contexts are being answered at once, until memory is full.

    needs.contexts is the most of `counts`. Raises ValueError unless the contexts are whole segments.
    """
    check_whole(needs.tokens)
    report = new_report("throughput", subject, **_described(needs, decoding), repeat=repeat)
    report.notes += decoding.notes
    metrics = Metrics()
    with decoding.imposed(subject, needs.tokens) as imposed, engine_for(subject, needs, metrics) as engine:
        prompts = _plant_all(engine, subject, needs)
        stage = _Stage(engine, metrics, needs.new_tokens, decoding.budget, imposed, DecodingMemory(engine))
        for case, mode, kind in decoding.cases:
            for count in counts:
                name = f"{case}, {count} contexts"
                answers = _Answers(stage, prompts[:count], mode, kind)
                rows = report.measure([Contestant(name, "ours", answers.run)], repeat)
                if name not in rows:
                    break  # with more it will not work either
                figures = rows[name].figures
                figures["contexts"] = count
                figures["tokens_per_second"] = count / figures["seconds"]
                figures.update(answers.figures)
    return report


def _described(needs: Needs, decoding: Decoding) -> dict[str, str | int | float | None]:
    return {
        "codec": needs.codec,
        "tokens": needs.tokens,
        "contexts": needs.contexts,
        "new_tokens": needs.new_tokens,
        "budget": decoding.budget,
        "accept": decoding.accept,
    }


def _plant_all(engine: Engine, subject: Subject, needs: Needs) -> list[Prompt]:
    codec = subject.codec(needs.codec)
    prompts = [random_prompt(subject, needs.tokens) for _ in range(needs.contexts)]
    for prompt in prompts:
        plant(engine, subject, codec, prompt)
    return prompts


@dataclass(frozen=True)
class _Stage:
    """What answers of one measurement share. imposed: None leaves the choice of rows alone."""

    engine: Engine
    metrics: Metrics
    steps: int
    budget: float | None
    imposed: Rows | None
    memory: DecodingMemory


class _Answers:
    """Answers to several contexts at once, asked for again and again."""

    def __init__(self, stage: _Stage, prompts: Sequence[Prompt], mode: KVMode, rows: RowsKind) -> None:
        self._stage, self._engine = stage, stage.engine
        self._prompts, self._mode, self._rows = prompts, mode, rows
        self._selected = self._hits = 0.0
        self._drafts = DraftCounts()
        self._books_bytes = self._measured_bytes = 0

    def run(self) -> float:
        """Seconds per step, from when all of them are being answered until the first one ends. An answer's
        first token comes from reading its prompt; before the second one a document is made selectable."""
        if self._stage.imposed:
            self._stage.imposed.use(self._rows)
        before = self._row_counts()
        memory = self._stage.memory
        with memory.watched():
            answers = self._ask()
        self._books_bytes, self._measured_bytes = memory.books_bytes, memory.measured_bytes
        selected, hits = (new - old for new, old in zip(self._row_counts(), before, strict=True))
        self._selected += selected
        self._hits += hits
        first = max(_settled(times) for times in answers)
        last = min(times[-1] for times in answers)
        if first >= last:
            raise LeftOutError(f"{len(self._prompts)} contexts do not fit the device at once")
        tokens = sum(first < at <= last for times in answers for at in times)
        return (last - first) * len(self._prompts) / tokens

    @property
    def figures(self) -> dict[str, float]:
        """Device memory for KV while answering, by the engine's books, and on CUDA as allocated, both of the
        last run; of selected rows those already on the device; of drafted tokens those that the check
        accepted."""
        figures = {"device_kv_bytes": float(self._books_bytes)}
        if self._measured_bytes:
            figures["device_measured_bytes"] = float(self._measured_bytes)
            figures["measured_percent"] = 100 * self._measured_bytes / self._books_bytes
        if self._selected:
            figures["row_hit_percent"] = 100 * self._hits / self._selected
        if self._drafts.drafted:
            drafts = self._drafts
            figures |= {"drafted": drafts.drafted, "accepted": drafts.accepted, "checks": drafts.checks}
            figures["accepted_percent"] = 100 * drafts.accepted / drafts.drafted
            figures["tokens_per_check"] = 1 + drafts.accepted / drafts.checks
        return figures

    def _ask(self) -> list[list[float]]:
        """When each token of each answer came."""
        queues: list[SimpleQueue[tuple[float, Event]]] = [SimpleQueue() for _ in self._prompts]
        question = tuple(range(FIRST_ID, FIRST_ID + QUESTION_TOKENS))
        tokens = [0] * len(queues)

        def stamp(number: int, queue: SimpleQueue[tuple[float, Event]], event: Event) -> None:
            """On the engine's thread."""
            queue.put((perf_counter(), event))
            if isinstance(event, TokenEvent):
                tokens[number] += 1
                if min(tokens) > 1:  # the first one comes from reading
                    self._stage.memory.step_taken()

        for number, (prompt, queue) in enumerate(zip(self._prompts, queues, strict=True)):
            steps, budget = self._stage.steps, self._stage.budget
            asked = request(prompt + question, steps + 2, mode=self._mode, budget=budget, store=False)
            self._engine.submit(asked, partial(stamp, number, queue))
        return [self._times_of(queue) for queue in queues]

    def _times_of(self, queue: SimpleQueue[tuple[float, Event]]) -> list[float]:
        times: list[float] = []
        while True:
            at, event = queue.get()
            if isinstance(event, TokenEvent):
                times.append(at)
            elif isinstance(event, FailedEvent):
                raise LeftOutError(event.message)
            elif isinstance(event, FinishedEvent):
                if event.kv.mode != self._mode:
                    raise LeftOutError(f"the engine answered in mode {event.kv.mode} instead")
                if event.drafts:
                    old, new = astuple(self._drafts), astuple(event.drafts)
                    self._drafts = DraftCounts(*(a + b for a, b in zip(old, new, strict=True)))
                return times

    def _row_counts(self) -> tuple[float, float]:
        """Rows that selection chose so far, and those of them that needed no fetch."""
        registry = self._stage.metrics.registry
        names = ("aquifer_selected_tokens_total", "aquifer_selected_hits_total")
        selected, hits = (registry.get_sample_value(name) or 0.0 for name in names)
        return selected, hits


def _settled(times: Sequence[float]) -> float:
    """When an answer's first step has given its last token: those that one check accepts come together."""
    at = 1
    while at + 1 < len(times) and times[at + 1] - times[at] < _TOGETHER_SECONDS:
        at += 1
    return times[at]
