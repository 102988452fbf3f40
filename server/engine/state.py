"""One request from submission to its last event. The engine decides; this remembers and reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from aquifer.cachestore.keys import PromptKeys, SegmentKey
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.admission import Plan, Room
from aquifer.server.engine.decoding import Decoding
from aquifer.server.engine.fetch import StoredSegment
from aquifer.server.engine.runner import PagedCache, Rows
from aquifer.server.engine.sampling import Choice, Sampler, StepResult
from aquifer.server.engine.text import TextStream
from aquifer.server.engine.types import (
    CachedTokens,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    KVUsage,
    ProgressEvent,
    RequestTimings,
    Sink,
    TokenEvent,
)

if TYPE_CHECKING:
    from aquifer.server.engine.lanes import OwnCells


class Phase(Enum):
    WAITING = auto()  # for pages, for its turn, or for a request that computes the same segments
    FETCHING = auto()  # its records are on their way from the tiers
    READING = auto()  # the prompt is being restored and computed
    DECODING = auto()
    STORING = auto()  # prompt only: its records are being written
    DONE = auto()


class RequestState:
    """A submitted request. Tokens count from 0; `inputs` is what gets KV: the prompt, and in scoring
    all but the last of the scored tokens."""

    room: Room
    cache: PagedCache
    """What it holds and where its KV is, from admission on."""

    def __init__(
        self,
        request: GenerateRequest,
        plan: Plan,
        sink: Sink,
        keys: PromptKeys,
        decode: Callable[[Sequence[int]], str],
        submitted: float,
    ) -> None:
        """decode: the tokenizer's, from ids to text. submitted: when the engine got the request, before its
        prompt was named, by `perf_counter`."""
        self.request = request
        self.plan = plan
        self.keys = keys
        self.sink = sink
        self.phase = Phase.WAITING
        self.inputs = (
            [*request.token_ids, *request.score_ids[:-1]] if request.score_ids else request.token_ids
        )
        self.decoding: Decoding | None = None  # once the prompt has been read
        self.restores: deque[StoredSegment] = deque()
        self.fetched = 0  # segments, of those missing
        self.spent: list[StoredSegment] = []  # restored, and not given back yet
        self.ranges: deque[tuple[int, int]] = deque()  # [start, stop) to be computed, ascending
        self.unindexed: deque[int] = deque()  # segments that selective decoding cannot find yet
        self.cells: OwnCells | None = None  # for their rows, if they all go there
        self.missing: list[int] = []  # reusable segments that are not on the device
        self.lost: set[SegmentKey] = set()  # segments that the device has, and RAM should
        self.known: set[int] = set()  # segments that need not be stored
        self.forgotten: set[int] = set()  # segments that are nobody else's any more: they are kept nowhere
        self.read = False  # whether all of the prompt stands
        self.first_choice: Choice | None = None
        self.writes_pending = 0
        self.generated: list[int] = []
        self.score_logprobs: list[float] = []
        self._cached = {"gpu": 0, "ram": 0, "redis": 0}
        self._computed = 0
        self.sampler = Sampler(request.sampling, request.token_ids)
        self._text = TextStream(decode, request.sampling.stop)
        self._submitted = submitted
        self._admitted = self._first_token = self._last_token = 0.0
        self.fetch_seconds = self.restore_seconds = self.prefill_seconds = 0.0

    def next_rows(self) -> Rows:
        """What the next decode step computes for this request."""
        assert self.decoding is not None
        position = len(self.inputs) + len(self.generated) - 1
        remaining = self.request.sampling.max_new_tokens - len(self.generated)
        return self.decoding.rows(self.generated[-1], position, remaining)

    def take(self, result: StepResult) -> list[Choice]:
        """The tokens that a decode step settled. result: what it gave for this request's rows."""
        assert self.decoding is not None
        return self.decoding.take(result)

    @property
    def ttft_seconds(self) -> float:
        return self._first_token - self._submitted

    @property
    def queue_seconds(self) -> float:
        return self._admitted - self._submitted

    @property
    def tokens_by_source(self) -> dict[str, int]:
        return {**self._cached, "computed": self._computed}

    def admitted(self, room: Room, cache: PagedCache) -> None:
        """Room was found; of the plan's segments, those whose pages are shared stand there already."""
        self._admitted = time.perf_counter()
        self.room, self.cache = room, cache
        self.missing = room.unread
        self.unindexed = deque(room.unindexed)
        self._cached["gpu"] = SEGMENT_TOKENS * (self.plan.segments - len(self.missing))

    def plan_reading(self, found: Sequence[StoredSegment], known: set[int]) -> None:
        """found: those missing segments that were fetched; they go into their pages, or are read from where
        they are if they have none. The other ones, and the tail, are to be computed. known: segments that
        some tier holds; what is in Redis only is stored again for a document, which is to be in RAM."""
        self.phase = Phase.READING
        self.known = {segment.index for segment in found} if self.request.prompt_only else known
        self.fetched = len(found)
        for segment in found:
            self._cached[segment.tier] += SEGMENT_TOKENS
            if self.cache.table.pages[segment.index] is None:
                self.cache.host[segment.index] = segment
            else:
                self.restores.append(segment)
        holes = sorted(set(self.missing) - {segment.index for segment in found})
        spans = [(index * SEGMENT_TOKENS, (index + 1) * SEGMENT_TOKENS) for index in holes]
        if not self.request.prompt_only:
            spans.append((self.plan.segments * SEGMENT_TOKENS, len(self.inputs)))
        for start, stop in spans:
            if self.ranges and self.ranges[-1][1] == start:
                self.ranges[-1] = (self.ranges[-1][0], stop)
            else:
                self.ranges.append((start, stop))

    def let_go(self) -> None:
        """Give back the segments that are restored."""
        for segment in self.spent:
            segment.release()
        self.spent.clear()

    def next_chunk(self, limit: int) -> tuple[int, int]:
        """Take the next [start, stop) to compute, at most `limit` tokens."""
        start, stop = self.ranges.popleft()
        if stop - start > limit:
            self.ranges.appendleft((start + limit, stop))
            stop = start + limit
        self._computed += stop - start
        return start, stop

    def report_progress(self) -> None:
        left = sum(stop - start for start, stop in self.ranges) + SEGMENT_TOKENS * len(self.restores)
        total = len(self.request.token_ids)
        self.sink(ProgressEvent(max(0, min(total, len(self.inputs) - left)), total))

    def add(self, choice: Choice, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """The next token of the answer. Returns the reason to stop, unless that is in its text."""
        self.generated.append(choice.token_id)
        sampling = self.request.sampling
        if choice.token_id in eos_token_ids and not sampling.ignore_eos:
            return "eos_token"
        return "length" if len(self.generated) >= sampling.max_new_tokens else None

    def send(self, choice: Choice, *, ended: bool) -> float | None:
        """Send a token that was added. ended: it ends the answer, and has no text. Returns the seconds since
        the one before; None for the first."""
        now = time.perf_counter()
        gap = now - self._last_token if self._last_token else None
        if gap is None:
            self._first_token = now
        self._last_token = now
        piece = "" if ended else self._text.push(choice.token_id)
        self.sink(TokenEvent(choice.token_id, piece, choice.logprob, special=ended))
        return gap

    @property
    def stopped(self) -> bool:
        """Whether the text that was sent is complete, by a stop sequence."""
        return self._text.stopped

    def finish(self, reason: FinishReason, kv: KVUsage) -> None:
        """Send the last event."""
        self.phase = Phase.DONE
        now = time.perf_counter()
        tail = self._text.finish()
        self.sink(
            FinishedEvent(
                reason=reason,
                text=self._text.text,
                tail=tail,
                prompt_tokens=len(self.request.token_ids),
                generated_tokens=len(self.generated),
                computed_tokens=self._computed,
                cached=CachedTokens(**self._cached),
                timings=RequestTimings(
                    queue_seconds=(self._admitted or now) - self._submitted,
                    restore_seconds=self.fetch_seconds + self.restore_seconds,
                    prefill_seconds=self.prefill_seconds,
                    ttft_seconds=(self._first_token or now) - self._submitted,
                    decode_seconds=self._last_token - self._first_token,
                ),
                kv=kv,
                seed=self.request.sampling.seed,
                score_logprobs=tuple(self.score_logprobs),
                drafts=self.decoding.drafts if self.decoding else None,
            )
        )
