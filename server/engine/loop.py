"""The step loop: where a request's document is found, restored, computed, stored and answered.

Each turn does a little of everything: admit what fits, read one piece of one prompt (a group of
restored segments, or one chunk of prefill), decode one token of every running answer, write some
finished segments to the tiers. So a long document being read delays other answers by one chunk at
most. A loop belongs to one thread, the engine's.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import structlog

from aquifer.cachestore.keys import SegmentKey
from aquifer.server.engine.admission import Admission
from aquifer.server.engine.decoding import OneByOne, Verified
from aquifer.server.engine.fetch import Fetched, Fetcher
from aquifer.server.engine.graphed_chunks import graphed_chunks
from aquifer.server.engine.graphs import graphed_steps
from aquifer.server.engine.host_memory import until_idle
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.reading import Claims, PromptReader
from aquifer.server.engine.records import prompt_usage
from aquifer.server.engine.runner import ModelRunner, PagedCache
from aquifer.server.engine.sampling import Choice
from aquifer.server.engine.selective import fill_sinks, selective_cache
from aquifer.server.engine.state import Phase, RequestState
from aquifer.server.engine.streams import SegmentReader
from aquifer.server.engine.types import FailedEvent, FinishReason
from aquifer.server.engine.writer import SegmentWriter

log = structlog.get_logger(__name__)

_WRITE_BATCH = 8
"""Segments encoded in one pass when nothing waits for it: 2,048 tokens."""

_CUDA_WRITE_BATCH = 32
"""Segments encoded in one pass on CUDA. They take 1 GB of the device meanwhile, for a model of 8B."""

_WRITE_POLL_SECONDS = 0.001
"""How long a turn that did nothing else waits for the writer: spinning would keep its thread from working."""

_MAX_BACKLOG = 128
"""Segments waiting to be encoded before reading a prompt has to wait for them; bounds memory."""


class StepLoop:
    """All running requests of one model."""

    def __init__(
        self, parts: EngineParts, admission: Admission, post: Callable[[Callable[[], None]], None]
    ) -> None:
        """post: runs an action on the loop's thread, from any thread."""
        self._parts, self._admission, self._post = parts, admission, post
        self._limits, self._metrics = parts.limits, parts.metrics
        self._runner = ModelRunner(
            parts.adapter,
            parts.pool,
            graphed_steps(parts),
            graphed_chunks(parts),
            staging_limit=parts.limits.staging_bytes,
        )
        self._reader = SegmentReader(parts.adapter, parts.codec, parts.raw, parts.metrics)
        self._fetcher = Fetcher(parts.codec, parts.raw, parts.store, parts.gate)
        self._writer = SegmentWriter(parts.codec, parts.raw, parts.store, parts.metrics, parts.adapter.device)
        self._claims = Claims()
        self._prompts = PromptReader(
            parts, self._runner, self._reader, self._writer, self._claims, self._written
        )
        self._requests: dict[str, RequestState] = {}
        self._waiting: deque[RequestState] = deque()
        self._reading: deque[RequestState] = deque()
        self._decoding: list[RequestState] = []
        self._unsent: deque[tuple[RequestState, Choice, bool]] = deque()
        """Tokens of the last step, and whether they end their answer."""
        self._sends_beside_steps = parts.adapter.device.type == "cuda"
        """Whether tokens wait until the next step is being computed."""
        self._room_came_back = False
        """Since waiting requests were looked at."""
        self._unsendable: dict[RequestState, Exception] = {}
        """Answers whose tokens could not be sent. The step that was running then still reads their caches."""
        self._fetch_threads = ThreadPoolExecutor(2, thread_name_prefix="aquifer-fetch")

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing."""
        # A request may have ended in the turn that is over, making room for a waiting one.
        can_admit = self._waiting and (self._room_came_back or not self.num_running)
        return not (self._reading or self._decoding or self._writer.backlog or can_admit)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._requests) - len(self._waiting)

    @property
    def staging_bytes(self) -> int:
        """Device bytes of what the last pass reconstructed and did not keep, of what running answers keep
        between steps, and of what is recorded."""
        answers = [state.decoding for state in list(self._decoding)]  # which another thread may ask for
        held = sum(decoding.held_bytes for decoding in answers if decoding)
        return self._runner.staging_bytes + self._prompts.device_bytes + held

    @property
    def write_backlog(self) -> int:
        """Computed segments that are not in the tiers yet."""
        return self._writer.backlog

    def enqueue(self, state: RequestState) -> None:
        self._requests[state.request.request_id] = state
        self._waiting.append(state)

    def cancel(self, request_id: str) -> None:
        state = self._requests.get(request_id)
        if state is None:
            return
        try:
            self._finish(state, "cancelled")
        except Exception as error:
            self._fail(state, error)

    def forget(self, segments: Sequence[SegmentKey]) -> list[Future[None]]:
        """Drop these from the device, and let no request that is here now, or was, keep them in a tier. What
        is being stored cannot be held up: returns when that is done."""
        self._parts.pool.forget(segments)
        self._parts.index.forget(segments)
        keys = set(segments)
        for state in self._requests.values():
            state.forgotten.update(index for index, key in enumerate(state.keys.segments) if key in keys)
        return self._writer.forget(keys)

    def turn(self) -> None:
        """Bring everything one step further."""
        self._prompts.settle()
        self._admit()
        self._read()
        self._decode()
        if not self._sends_beside_steps:
            self._send_tokens()
        self._writer.pump(self._write_limit())
        if not (self._reading or self._decoding):
            self._prompts.settle(most=0)
            self._writer.wait(_WRITE_POLL_SECONDS)

    def end_all(self, farewell: FailedEvent) -> None:
        """End all requests with this event."""
        self._send_tokens()
        for state in list(self._requests.values()):
            self._drop(state)
            state.sink(farewell)
        self._prompts.settle(most=0)

    def close(self, farewell: FailedEvent) -> None:
        """End all requests with this event; what was computed still goes to the tiers."""
        self.end_all(farewell)
        self._writer.close()
        self._fetch_threads.shutdown()

    # Admission

    def _admit(self) -> None:
        """Start waiting requests for which there is room, in the order they came.

        One whose segments another request is producing right now is passed over: when those stand, it
        shares them instead of computing them again."""
        self._room_came_back = False
        for state in list(self._waiting):
            if self.num_running >= self._limits.max_running:
                break
            wanted = state.keys.segments[: state.plan.segments]
            if self._claims.any_of(wanted):
                continue
            state.lost = self._prompts.lost(state)
            room = self._admission.admit(state.plan, wanted, state.lost)
            if isinstance(room, str):
                if self._limits.refuse_when_full:
                    self._refuse(state, room)
                    continue
                break
            self._waiting.remove(state)
            state.admitted(room, PagedCache(self._parts.pool, room.table, self._reader))
            self._fetch(state)

    def _refuse(self, state: RequestState, lacking: str) -> None:
        self._drop(state)
        message = f"mode {state.plan.mode} needs {lacking}; AQUIFER_WHEN_FULL=wait would queue it"
        state.sink(FailedEvent("overloaded", message))

    def _fetch(self, state: RequestState) -> None:
        """Ask the tiers for what is not on the device; nothing waits for an answer that takes time."""
        state.phase = Phase.FETCHING
        self._metrics.request_queue_seconds.observe(state.queue_seconds)
        self._claims.add(state)
        at_hand = self._fetcher.fetch_at_hand(state.keys, state.missing)
        if at_hand is not None:
            self._fetched(state, at_hand)
            return
        future = self._fetch_threads.submit(self._fetcher.fetch, state.keys, state.missing)
        future.add_done_callback(lambda done: self._post(lambda: self._fetched(state, done.result())))

    def _fetched(self, state: RequestState, fetched: Fetched) -> None:
        if state.phase is not Phase.FETCHING:  # cancelled meanwhile
            for segment in fetched.segments:
                segment.release()
            return
        state.fetch_seconds = fetched.seconds
        state.plan_reading(fetched.segments, fetched.known)
        self._claims.drop(state, state.cache.host)
        self._reading.append(state)

    # Reading a prompt

    def _read(self) -> None:
        """Bring one prompt a step further. Prompts take turns, so that a short one is not stuck behind
        a long one."""
        if not self._reading:
            return
        self._send_tokens()  # the next step is some time off
        if self._writer.backlog > _MAX_BACKLOG:
            self._writer.wait(_WRITE_POLL_SECONDS)
            return
        state = self._reading.popleft()
        try:
            self._prompts.advance(state)
            if state.phase is Phase.READING:
                self._went_on(state)
        except Exception as error:
            self._fail(state, error)
            return
        if state.phase is Phase.READING:
            self._reading.append(state)

    def _went_on(self, state: RequestState) -> None:
        """Report how far the prompt is read; if all of it is, send the first token and go on."""
        if not state.read:
            state.report_progress()
        if state.restores or state.ranges:
            return
        if not state.read:
            state.read = True
            for source, tokens in state.tokens_by_source.items():
                self._metrics.prompt_tokens.labels(source=source).inc(tokens)
            if state.first_choice is not None:
                self._emit(state, [state.first_choice])
                self._send_tokens()
                state.let_go()
        if state.phase is Phase.READING and not state.unindexed:
            self._reading_done(state)

    def _reading_done(self, state: RequestState) -> None:
        """The prompt stands; go on to answering, or to storing if there is no answer."""
        if state.request.sampling.max_new_tokens and not state.request.score_ids:
            self._begin_decoding(state)
            return
        self._prompts.settle(most=0)  # what was asked for is that it stands
        state.phase = Phase.STORING
        if not (state.request.prompt_only and state.writes_pending):
            self._finish(state, "length")

    def _begin_decoding(self, state: RequestState) -> None:
        parts, plan, room, cache = self._parts, state.plan, state.room, state.cache
        if plan.selection is None:
            state.decoding = OneByOne(cache, state.sampler)
        else:
            pages, filled = (room.index_pages, room.row_pages), state.cells is not None
            rows = selective_cache(parts, cache.table, *pages, plan.selection, filled=filled)
            fill_sinks(parts.pool, room.row_pages, cache, self._reader)
            if plan.mode == "verified":
                state.decoding = Verified(rows, cache, state.sampler, parts.eos_token_ids, self._metrics)
            else:
                state.decoding = OneByOne(rows, state.sampler)
                self._admission.leave_document(room, plan.segments)
                cache.release()
        state.phase = Phase.DECODING
        self._decoding.append(state)

    def _written(self, state: RequestState) -> None:
        state.writes_pending -= 1
        if state.phase is Phase.STORING and not state.writes_pending:
            self._finish(state, "length")

    # Answering

    def _decode(self) -> None:
        """One step of every running answer, in one pass."""
        batch = list(self._decoding)
        if not batch:
            return
        try:
            rows = [state.next_rows() for state in batch]
            results = self._runner.step(rows, self._try_to_send)
        except Exception as error:
            self._send_tokens()
            for state in self._decoding.copy():
                self._fail(state, error)
            return
        self._send_tokens()
        for state, result in zip(batch, results, strict=True):
            if state.phase is Phase.DONE:  # what it gave before could not be sent
                continue
            try:
                self._emit(state, state.take(result))
            except Exception as error:
                self._fail(state, error)

    def _emit(self, state: RequestState, choices: Sequence[Choice]) -> None:
        """Add tokens to an answer, up to the one that ends it. They are sent while the device computes the
        next step, unless they end it or their text may."""
        for choice in choices:
            reason = state.add(choice, self._parts.eos_token_ids)
            self._unsent.append((state, choice, reason == "eos_token"))
            if reason is None and not state.request.sampling.stop:
                continue
            self._send_tokens()
            if state.stopped and reason != "eos_token":
                reason = "stop_sequence"
            if reason is not None:
                self._finish(state, reason)
            if state.phase is Phase.DONE:
                return

    def _send_tokens(self) -> None:
        """Send what was not sent yet, and end answers where that fails."""
        self._try_to_send()
        while self._unsendable:
            self._fail(*self._unsendable.popitem())

    def _try_to_send(self) -> None:
        """Send what was not sent yet, and end nothing."""
        while self._unsent:
            state, choice, ended = self._unsent.popleft()
            if state.phase is Phase.DONE or state in self._unsendable:
                continue
            try:
                gap = state.send(choice, ended=ended)
            except Exception as error:
                self._unsendable[state] = error
                continue
            self._metrics.generation_tokens.inc()
            if gap is None:
                self._metrics.time_to_first_token_seconds.observe(state.ttft_seconds)
            else:
                self._metrics.inter_token_latency_seconds.observe(gap)

    def _write_limit(self) -> int:
        """Segments to encode in this turn. On CUDA that happens beside the model; on a CPU it competes
        with running requests, so those go first as long as the backlog stays small."""
        if self._parts.adapter.device.type == "cuda":
            return _CUDA_WRITE_BATCH
        if self._writer.backlog > _MAX_BACKLOG:
            return _WRITE_BATCH
        if self._reading:
            return 0
        return 1 if self._decoding else _WRITE_BATCH

    # The ends of a request

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        self._send_tokens()
        if state.phase is Phase.DONE:  # that failed
            return
        self._drop(state)
        parts, prompt_tokens = self._parts, len(state.request.token_ids)
        state.finish(reason, prompt_usage(parts.codec, parts.raw, prompt_tokens, state.plan.mode))
        found = state.tokens_by_source
        if found["gpu"] + found["ram"] and state.request.store and not state.forgotten:
            parts.store.used(state.keys.records, again=state.request.prompt_only)

    def _fail(self, state: RequestState, error: Exception) -> None:
        log.error("request failed", request_id=state.request.request_id, exc_info=error)
        until_idle(self._parts.adapter.device)
        self._drop(state)
        state.sink(FailedEvent("internal", f"generation failed: {type(error).__name__}: {error}"))

    def _drop(self, state: RequestState) -> None:
        """Take a request out of every list and give back what it holds."""
        running = state.phase not in (Phase.WAITING, Phase.DONE)
        state.phase = Phase.DONE
        self._room_came_back = True
        self._requests.pop(state.request.request_id, None)
        for queue in (self._waiting, self._reading, self._decoding):
            with contextlib.suppress(ValueError):
                queue.remove(state)
        for segment in state.restores:
            segment.release()
        state.restores.clear()
        state.let_go()
        self._claims.drop_all(state)
        if running:
            for cache in (state.decoding, state.cache):
                try:
                    if cache is not None:
                        cache.release()
                except RuntimeError as error:  # the device does nothing any more, then
                    log.error("the device failed", exc_info=error)
            self._admission.release(state.room)
