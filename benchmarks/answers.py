"""Answers behind several contexts at once, timed step by step."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from queue import SimpleQueue
from time import perf_counter

from aquifer.benchmarks.engines import FIRST_ID, request
from aquifer.benchmarks.harness import LeftOutError
from aquifer.benchmarks.memory import DecodingMemory
from aquifer.benchmarks.selection import Rows, RowsKind
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.restore import GROUP_SEGMENTS
from aquifer.server.engine.types import DraftCounts, Event, FailedEvent, FinishedEvent, KVMode, TokenEvent
from aquifer.server.metrics import Metrics

QUESTION_TOKENS = 16
"""Computed behind a context before an answer begins."""

_TOGETHER_SECONDS = 0.0005
"""No step is as short as this."""


def longest_answer(tokens: int, contexts: int, steps: int) -> int:
    """Tokens of an answer that still goes on when all contexts, of so many tokens each, are being answered
    and have taken so many steps: while others are read, one takes a step for every piece of them."""
    groups = -(-tokens // (SEGMENT_TOKENS * GROUP_SEGMENTS))
    pieces = 2 * groups + 3  # each is restored and made selectable; and the question
    return steps + 2 + (pieces * contexts if contexts > 1 else 0)


@dataclass(frozen=True)
class Stage:
    """What answers of one measurement share. imposed: None leaves the choice of rows alone."""

    engine: Engine
    metrics: Metrics
    steps: int
    budget: float | None
    imposed: Rows | None
    memory: DecodingMemory


class Answers:
    """Answers to several contexts at once, asked for again and again."""

    def __init__(self, stage: Stage, prompts: Sequence[array[int]], mode: KVMode, rows: RowsKind) -> None:
        self._stage, self._engine = stage, stage.engine
        self._prompts, self._mode, self._rows = prompts, mode, rows
        self._selected = self._hits = 0.0
        self._drafts = DraftCounts()
        self._books_bytes = self._measured_bytes = 0

    def run(self) -> float:
        """Seconds per step, from when all of them are being answered until the first one ends."""
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
        return pace(answers)

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
        question = array("i", range(FIRST_ID, FIRST_ID + QUESTION_TOKENS))
        steps, budget, mode = self._stage.steps, self._stage.budget, self._mode
        longest = longest_answer(len(self._prompts[0]), len(queues), steps)
        asked = [
            request(prompt + question, longest, mode=mode, budget=budget, store=False)
            for prompt in self._prompts
        ]
        tokens = [0] * len(queues)

        def stamp(number: int, queue: SimpleQueue[tuple[float, Event]], event: Event) -> None:
            """On the engine's thread."""
            queue.put((perf_counter(), event))
            if not isinstance(event, TokenEvent):
                return
            tokens[number] += 1
            if number == 0 and min(tokens) > 1:  # once per step; the first token comes from reading
                self._stage.memory.step_taken()
            if tokens[number] == min(tokens) == steps + 2:
                for each in asked:
                    self._engine.cancel(each.request_id)

        for number, queue in enumerate(queues):
            self._engine.submit(asked[number], partial(stamp, number, queue))
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


def pace(answers: Sequence[Sequence[float]]) -> float:
    """Seconds per token of an answer, from when all of them are being answered until the first one ends.

    answers: when each token of each came; the first two not counted: one comes from reading the prompt, and
    before the other a document is made selectable. Each is timed by its own tokens, because those of one step
    come one after the other. Raises LeftOutError if they were not all going on at once.
    """
    first = max(_settled(times) for times in answers)
    last = min(times[-1] for times in answers)
    if first >= last:
        raise LeftOutError(f"{len(answers)} contexts do not fit the device at once")
    rates = []
    for times in answers:
        begin, end = bisect_right(times, first) - 1, bisect_right(times, last) - 1
        rates.append((end - begin) / (times[end] - times[begin]) if end > begin else 0.0)
    return len(rates) / sum(rates)


def _settled(times: Sequence[float]) -> float:
    """When an answer's first step has given its last token: those that one check accepts come together."""
    at = 1
    while at + 1 < len(times) and times[at + 1] - times[at] < _TOGETHER_SECONDS:
        at += 1
    return times[at]
