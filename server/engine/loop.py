"""The step loop: where a request's document is found, restored, computed, stored and answered.

Each turn does a little of everything: admit what fits, read one piece of one prompt (a group of
restored segments, or one chunk of prefill), decode one token of every running answer, write some
finished segments to the tiers. So a long document being read delays other answers by one chunk at
most. A loop belongs to one thread, the engine's.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import structlog
import torch
from torch import Tensor

from aquifer.cachestore.keys import SegmentKey
from aquifer.cachestore.store import TieredStore
from aquifer.compression.codec import Codec
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.server.engine.gate import LoadGate
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.records import prompt_usage
from aquifer.server.engine.restore import GROUP_SEGMENTS, Fetched, Fetcher, Restorer
from aquifer.server.engine.runner import LayerKV, ModelRunner
from aquifer.server.engine.state import Phase, RequestState
from aquifer.server.engine.types import FailedEvent, FinishReason
from aquifer.server.engine.writer import SegmentWriter, split_segments
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

log = structlog.get_logger(__name__)

_WRITE_BATCH = 8
"""Segments encoded in one pass when nothing waits for it: 2,048 tokens."""

_MAX_BACKLOG = 128
"""Segments waiting to be encoded before reading a prompt has to wait for them; bounds memory."""

_SCORE_ROWS = 256
"""Positions whose full logits exist at once while scoring."""


class StepLoop:
    """All running requests of one model."""

    def __init__(
        self,
        *,
        adapter: DecoderAdapter,
        codec: Codec,
        raw: Codec,
        store: TieredStore,
        pool: PagePool,
        gate: LoadGate,
        eos_token_ids: frozenset[int],
        max_running: int,
        chunk_tokens: int,
        metrics: Metrics,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """raw: the codec of sink records. max_running: requests admitted at once. chunk_tokens: prompt
        tokens computed in one turn. post: runs an action on the loop's thread, from any thread."""
        self._adapter, self._codec, self._raw, self._store, self._pool = adapter, codec, raw, store, pool
        self._gate, self._metrics, self._post = gate, metrics, post
        self._eos, self._max_running, self._chunk_tokens = eos_token_ids, max_running, chunk_tokens
        self._runner = ModelRunner(adapter, pool)
        self._fetcher = Fetcher(codec, raw, store, gate)
        self._restorer = Restorer(adapter, codec, raw, self._runner, metrics)
        self._writer = SegmentWriter(codec, raw, store, metrics)
        self._requests: dict[str, RequestState] = {}
        self._waiting: deque[RequestState] = deque()
        self._reading: deque[RequestState] = deque()
        self._decoding: list[RequestState] = []
        self._claims: dict[SegmentKey, RequestState] = {}  # segments that a request is producing
        self._fetch_threads = ThreadPoolExecutor(2, thread_name_prefix="aquifer-fetch")

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing."""
        return not (self._reading or self._decoding or self._writer.backlog)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._requests) - len(self._waiting)

    @property
    def write_backlog(self) -> int:
        """Computed segments that are not in the tiers yet."""
        return self._writer.backlog

    def enqueue(self, state: RequestState) -> None:
        self._requests[state.request.request_id] = state
        self._waiting.append(state)

    def cancel(self, request_id: str) -> None:
        state = self._requests.get(request_id)
        if state is not None:
            self._finish(state, "cancelled")

    def turn(self) -> None:
        """Bring everything one step further."""
        self._admit()
        self._read()
        self._decode()
        self._writer.pump(self._write_limit())

    def end_all(self, farewell: FailedEvent) -> None:
        """End all requests with this event."""
        for state in list(self._requests.values()):
            self._drop(state)
            state.sink(farewell)

    def close(self, farewell: FailedEvent) -> None:
        """End all requests with this event; what was computed still goes to the tiers."""
        self.end_all(farewell)
        while self._writer.backlog:
            self._writer.pump(_WRITE_BATCH)
        self._fetch_threads.shutdown()

    # Admission

    def _admit(self) -> None:
        """Start waiting requests for which there is room, in the order they came.

        One whose segments another request is producing right now is passed over: when those stand, it
        shares their pages instead of computing them again."""
        for state in list(self._waiting):
            if self.num_running >= self._max_running:
                break
            wanted = state.keys.segments[: state.reusable_segments]
            if any(key in self._claims for key in wanted):
                continue
            if not self._allocate(state, wanted):
                break
            self._waiting.remove(state)
            self._fetch(state)

    def _allocate(self, state: RequestState, wanted: Sequence[SegmentKey]) -> bool:
        """Give a request its pages: shared ones where a wanted segment is on the device, private ones
        for all the rest, now, so that it can never be stopped by a lack of pages. False: no room."""
        pages = [self._pool.acquire(key) for key in wanted]
        shared = [page for page in pages if page is not None]
        pages += [None] * (pages_of(state.total_tokens) - len(pages))
        private = self._pool.allocate(pages.count(None))
        if private is None:
            self._pool.release(shared)
            return False
        fresh = iter(private)
        state.admitted(
            BlockTable([next(fresh) if page is None else page for page in pages]),
            missing=[index for index in range(len(wanted)) if pages[index] is None],
        )
        return True

    def _fetch(self, state: RequestState) -> None:
        """Ask the tiers for what is not on the device; nothing waits for the answer."""
        state.phase = Phase.FETCHING
        self._metrics.request_queue_seconds.observe(state.queue_seconds)
        claimed = [*state.missing, *range(state.reusable_segments, len(state.keys.segments))]
        for index in claimed:
            self._claims.setdefault(state.keys.segments[index], state)
        if not state.missing:
            self._fetched(state, Fetched([], set(), 0.0))
            return
        future = self._fetch_threads.submit(self._fetcher.fetch, state.keys, state.missing)
        future.add_done_callback(lambda done: self._post(lambda: self._fetched(state, _result(done))))

    def _fetched(self, state: RequestState, fetched: Fetched) -> None:
        if state.phase is not Phase.FETCHING:  # cancelled meanwhile
            for segment in fetched.segments:
                segment.release()
            return
        state.fetch_seconds = fetched.seconds
        state.plan_reading(fetched.segments, fetched.known)
        self._reading.append(state)

    # Reading a prompt

    def _read(self) -> None:
        """Bring one prompt a step further. Prompts take turns, so that a short one is not stuck behind
        a long one."""
        if not self._reading:
            return
        state = self._reading.popleft()
        try:
            if state.restores:
                self._restore_group(state)
            elif state.ranges:
                self._compute_chunk(state)
            if state.phase is Phase.READING:
                state.report_progress()
        except Exception as error:
            self._fail(state, error)
            return
        if state.restores or state.ranges:
            self._reading.append(state)
        elif state.phase is Phase.READING:
            self._reading_done(state)

    def _restore_group(self, state: RequestState) -> None:
        started = time.perf_counter()
        group = [state.restores.popleft() for _ in range(min(GROUP_SEGMENTS, len(state.restores)))]
        try:
            self._restorer.restore(group, state.table)
        finally:
            for segment in group:
                segment.release()
        for segment in group:
            self._share(state, segment.index)
        seconds = time.perf_counter() - started
        state.restore_seconds += seconds
        if len({segment.tier for segment in group}) == 1:
            fetch_share = state.fetch_seconds * len(group) / max(1, len(state.missing))
            self._gate.measured(group[0].tier, len(group) * SEGMENT_TOKENS, seconds + fetch_share)

    def _compute_chunk(self, state: RequestState) -> None:
        started = time.perf_counter()
        start, stop = state.next_chunk(self._chunk_tokens)
        hidden, kv = self._runner.prefill(state.inputs[start:stop], start, state.table)
        self._keep_segments(state, start, stop, kv)
        if state.request.score_ids:
            self._score(state, start, hidden)
        elif not state.ranges and not state.prompt_only:
            # Reading the logits also waits for the device, so the chunk's time below is its own.
            logits = self._runner.logits(hidden[-1:]).cpu()
            state.prefill_seconds += time.perf_counter() - started
            self._reading_done(state)
            self._emit(state, logits[0])
            return
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        seconds = time.perf_counter() - started
        state.prefill_seconds += seconds
        self._gate.measured("computed", stop - start, seconds)

    def _keep_segments(self, state: RequestState, start: int, stop: int, kv: LayerKV) -> None:
        """Share the prompt's segments that this chunk completed, and queue them for the tiers."""
        complete = range(start // SEGMENT_TOKENS, min(stop // SEGMENT_TOKENS, len(state.keys.segments)))
        for index in complete:
            self._share(state, index)
        if not state.request.store:
            return
        wanted = [(index, state.keys.segments[index]) for index in complete if index not in state.known]
        jobs = split_segments(kv, start, wanted, state.keys.sinks, lambda: self._written(state))
        state.writes_pending += len(jobs)
        self._writer.add(jobs)

    def _share(self, state: RequestState, index: int) -> None:
        key = state.keys.segments[index]
        self._pool.register(state.table.pages[index], key)
        if self._claims.get(key) is state:
            del self._claims[key]

    def _score(self, state: RequestState, start: int, hidden: Tensor) -> None:
        """Log probabilities of the scored tokens that this chunk predicts. hidden: [T, hidden] at start.."""
        last = len(state.request.token_ids) - 1  # the position that predicts the first scored token
        first = max(0, last - start)
        scored = start + first - last
        targets = state.request.score_ids[scored : scored + max(0, hidden.shape[0] - first)]
        for at in range(0, len(targets), _SCORE_ROWS):
            ids = torch.tensor(targets[at : at + _SCORE_ROWS], device=hidden.device)
            logits = self._runner.logits(hidden[first + at : first + at + len(ids)])
            logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
            state.score_logprobs += logprobs.tolist()

    def _reading_done(self, state: RequestState) -> None:
        for source, tokens in state.tokens_by_source.items():
            self._metrics.prompt_tokens.labels(source=source).inc(tokens)
        if state.request.sampling.max_new_tokens and not state.request.score_ids:
            state.phase = Phase.DECODING
            self._decoding.append(state)
            return
        state.phase = Phase.STORING
        if not (state.prompt_only and state.writes_pending):
            self._stored(state)

    def _written(self, state: RequestState) -> None:
        state.writes_pending -= 1
        if state.phase is Phase.STORING and not state.writes_pending:
            self._stored(state)

    def _stored(self, state: RequestState) -> None:
        if state.request.pin:
            self._store.pin(state.keys.records)
        self._finish(state, "length")

    # Answering

    def _decode(self) -> None:
        """One more token for every running answer, in one pass."""
        batch = list(self._decoding)
        if not batch:
            return
        inputs = [state.next_input for state in batch]
        try:
            logits = self._runner.decode(
                [token for token, _ in inputs], [at for _, at in inputs], [state.table for state in batch]
            ).cpu()
        except Exception as error:
            for state in batch:
                self._fail(state, error)
            return
        for state, row in zip(batch, logits, strict=True):
            self._emit(state, row)

    def _emit(self, state: RequestState, logits: Tensor) -> None:
        """Choose and send one token; logits: [vocab] on the CPU."""
        first = not state.generated
        gap, reason = state.emit(state.choose(logits), self._eos)
        self._metrics.generation_tokens.inc()
        if first:
            self._metrics.time_to_first_token_seconds.observe(state.ttft_seconds)
        else:
            self._metrics.inter_token_latency_seconds.observe(gap)
        if reason is not None:
            self._finish(state, reason)

    def _write_limit(self) -> int:
        """Segments to encode in this turn. On CUDA that happens beside the model; on a CPU it competes
        with running requests, so those go first as long as the backlog stays small."""
        if self._adapter.device.type == "cuda" or self._writer.backlog > _MAX_BACKLOG:
            return _WRITE_BATCH
        if self._reading:
            return 0
        return 1 if self._decoding else _WRITE_BATCH

    # The ends of a request

    def _finish(self, state: RequestState, reason: FinishReason) -> None:
        self._drop(state)
        state.finish(reason, prompt_usage(self._codec, self._raw, len(state.request.token_ids)))

    def _fail(self, state: RequestState, error: Exception) -> None:
        log.error("request failed", request_id=state.request.request_id, exc_info=error)
        self._drop(state)
        state.sink(FailedEvent("internal", f"generation failed: {type(error).__name__}: {error}"))

    def _drop(self, state: RequestState) -> None:
        """Take a request out of every list and give back what it holds."""
        state.phase = Phase.DONE
        self._requests.pop(state.request.request_id, None)
        for queue in (self._waiting, self._reading, self._decoding):
            with contextlib.suppress(ValueError):
                queue.remove(state)
        for segment in state.restores:
            segment.release()
        state.restores.clear()
        for key in [key for key, owner in self._claims.items() if owner is state]:
            del self._claims[key]
        self._pool.release(state.table.pages)


def _result(done: Future[Fetched]) -> Fetched:
    """What a fetch brought. One that failed brought nothing: a cache never fails a request."""
    error = done.exception()
    if error is None:
        return done.result()
    log.error("fetch failed; recomputing", exc_info=error)
    return Fetched([], set(), 0.0)


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // SEGMENT_TOKENS)
