"""The engine as the rest of the service sees it: thread-safe, one model, one loop on its own thread.

The thread owns the device and everything that touches requests; other threads only leave commands in
its inbox. What a turn of the loop does stands in loop.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
import structlog
import torch

from aquifer.cachestore.keys import PromptKeys, PromptNamer, make_namespace, pack_ids
from aquifer.server.engine.admission import Admission
from aquifer.server.engine.host_memory import until_idle
from aquifer.server.engine.loop import StepLoop
from aquifer.server.engine.parts import EngineParts
from aquifer.server.engine.state import RequestState
from aquifer.server.engine.types import (
    EngineInfo,
    EngineLoad,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Sink,
)

T = TypeVar("T")

log = structlog.get_logger(__name__)


class EngineError(RuntimeError):
    """A request that `Engine.generate` waited for failed; the message is the failure's."""


class Engine:
    """Serves requests on one model. Every method may be called from any thread."""

    def __init__(
        self,
        parts: EngineParts,
        info: EngineInfo,
        decode_text: Callable[[Sequence[int]], str],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """decode_text: the tokenizer's, from ids to text. on_close: called when nothing uses the store's
        memory any more, before it is given back."""
        self.info = info
        self.store = parts.store
        self._parts, self._decode_text, self._on_close = parts, decode_text, on_close
        self._weight_bytes = parts.adapter.weight_bytes()
        self._namer = PromptNamer()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closing = self._closed = False
        self._posting = threading.Lock()
        """Nothing is put into the inbox once it is closed: nobody would look there."""
        self._admission = Admission(parts)
        self._loop = StepLoop(parts, self._admission, self._inbox.put)
        device, stream = parts.adapter.device, None
        if device.type == "cuda":
            until_idle(device)  # what was built so far was built on another stream
            # Ahead of the writer's, which gets what is left of the device between kernels.
            stream = torch.cuda.Stream(device, priority=-1)
        self._thread = threading.Thread(target=self._run, args=(stream,), name="aquifer-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Take a request; its events arrive through `sink`, on the engine's thread. Returns at once.

        request_id must differ from those of all running requests. A sink that raises ends its request.
        Raises ValueError for token ids that the model does not know: a device would fail at them for good.
        """
        submitted = time.perf_counter()
        plan = self._refusal(request) or self._admission.plan(request)
        if isinstance(plan, FailedEvent):
            sink(plan)
            return
        keys = self._keys(request.token_ids, request.cache_salt)
        self._packed(request.score_ids)

        def guarded(event: Event) -> None:
            try:
                sink(event)
            except Exception as error:
                log.warning("nobody takes the answer", request_id=request.request_id, exc_info=error)
                self.cancel(request.request_id)

        state = RequestState(request, plan, guarded, keys, self._decode_text, submitted)
        if not self._post(lambda: self._enqueue(state)):
            guarded(_SHUTTING_DOWN)

    def cancel(self, request_id: str) -> None:
        """End a request early; it still gets its last event. Unknown or finished ids are ignored."""
        self._post(lambda: self._loop.cancel(request_id))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[FinishedEvent]:
        """Submit requests together and wait for all of them. Raises EngineError if one fails."""
        results: list[Future[FinishedEvent]] = [Future() for _ in requests]

        def sink_of(result: Future[FinishedEvent]) -> Sink:
            def sink(event: object) -> None:
                if isinstance(event, FinishedEvent):
                    result.set_result(event)
                elif isinstance(event, FailedEvent):
                    result.set_exception(EngineError(event.message))

            return sink

        for request, result in zip(requests, results, strict=True):
            self.submit(request, sink_of(result))
        return [result.result() for result in results]

    def forget(self, token_ids: Sequence[int], cache_salt: str) -> int:
        """Delete a prompt's segments from every tier, except those that are pinned. Requests that read it go
        on, and keep nothing of it. Returns the number of records."""
        segments = self.store.unpinned(self._keys(token_ids, cache_salt).segments)
        futures.wait(self._call(lambda: self._loop.forget(segments)))
        return self.store.delete(segments)  # every prompt that begins alike needs the sinks

    def pin(self, token_ids: Sequence[int], cache_salt: str) -> None:
        """Keep a prompt's records in RAM, now or when they arrive. Pins count."""
        self.store.pin(self._keys(token_ids, cache_salt).records)

    def unpin(self, token_ids: Sequence[int], cache_salt: str) -> None:
        """Lift one pin of a prompt's segments; they stay until they are evicted."""
        self.store.unpin(self._keys(token_ids, cache_salt).records)

    def flush(self, timeout: float) -> bool:
        """Wait until everything computed so far is in its tiers; False when `timeout` seconds pass."""
        deadline = time.monotonic() + timeout
        # Asked on the engine's thread, between turns: in a turn records are in hand, in no queue.
        while self._call(lambda: self._loop.write_backlog):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return self.store.flush(max(0.0, deadline - time.monotonic()))

    def load(self) -> EngineLoad:
        """A snapshot of what is going on."""
        by_use = {
            "weights": self._weight_bytes,
            "resident": self._parts.pool.used_bytes,
            "landmarks": self._parts.index.used_bytes,
            "staging": self._loop.staging_bytes,
        }
        return EngineLoad(
            running=self._loop.num_running,
            waiting=self._loop.num_waiting,
            device_bytes=by_use,
            device_capacity_bytes=self.info.device_kv_bytes,
        )

    def close(self) -> None:
        """Stop; a second call does nothing. Requests still running get a FailedEvent: `shutting_down`."""
        if self._closing:
            return
        self._post(self._shut_down)
        self._thread.join()
        with self._posting:
            self._closed = True
        self._obey(wait=False)  # what was asked for in the meantime gets its answer too
        self._on_close()
        self.store.close()

    def _run(self, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():  # and on its device
            self._serve()

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._obey(wait=self._loop.idle)
                self._loop.turn()
            except Exception as error:
                # Failures of one request are handled inside; this is anything else. Nobody may wait
                # forever for a thread that is gone, so all are told and the loop goes on.
                log.error("engine turn failed", exc_info=error)
                self._loop.end_all(FailedEvent("internal", f"engine error: {type(error).__name__}: {error}"))

    def _post(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread do something; at the very end, the one that closes. False: it is over."""
        with self._posting:
            if not self._closed:
                self._inbox.put(command)
            return not self._closed

    def _obey(self, *, wait: bool) -> None:
        """Carry out all commands that are there; wait: for the first one, if there is none."""
        with contextlib.suppress(Empty):
            self._inbox.get(block=wait)()
            while True:
                self._inbox.get_nowait()()

    def _keys(self, token_ids: Sequence[int], cache_salt: str) -> PromptKeys:
        namespace = make_namespace(self.info.model_fingerprint, self.info.codec_fingerprint, cache_salt)
        return self._namer.keys(namespace, self._packed(token_ids))

    def _packed(self, token_ids: Sequence[int]) -> bytes:
        """Token ids as they are hashed. Raises ValueError for one that the model does not know."""
        packed = pack_ids(token_ids)
        unknown = np.frombuffer(packed, "<u4") >= self.info.vocab_size  # negative ones are the largest
        if unknown.any():
            place = int(unknown.argmax())
            raise ValueError(
                f"token id {token_ids[place]:,} at place {place:,} is none of this model's, which go from 0 "
                f"to {self.info.vocab_size - 1:,}"
            )
        return packed

    def _refusal(self, request: GenerateRequest) -> FailedEvent | None:
        """Why a request cannot be taken, if so."""
        if self._closing:
            return _SHUTTING_DOWN
        prompt, asked = len(request.token_ids), request.sampling.max_new_tokens + len(request.score_ids)
        if prompt > self.info.max_prompt_tokens:
            return FailedEvent(
                "too_long",
                f"prompt has {prompt:,} tokens; this server takes {self.info.max_prompt_tokens:,} "
                "(AQUIFER_MAX_PROMPT_TOKENS)",
            )
        if prompt + asked > self.info.max_total_tokens:
            return FailedEvent(
                "too_long",
                f"prompt of {prompt:,} and answer of up to {asked:,} tokens exceed the "
                f"{self.info.max_total_tokens:,} tokens this model takes; ask for fewer with max_new_tokens",
            )
        if self._loop.num_waiting + self._inbox.qsize() > self._parts.limits.max_waiting:
            return FailedEvent(
                "overloaded",
                f"{self._loop.num_waiting:,} requests are waiting already; try again later "
                "(AQUIFER_MAX_WAITING_REQUESTS)",
            )
        return None

    def _call(self, action: Callable[[], T]) -> T:
        """Run something on the engine's thread and wait for what it returns. Raises EngineError after
        `close`."""
        done: Future[T] = Future()

        def command() -> None:
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

        if self._closing or not self._post(command):
            raise EngineError(_SHUTTING_DOWN.message)
        return done.result()

    def _enqueue(self, state: RequestState) -> None:
        if self._closing:
            state.sink(_SHUTTING_DOWN)
        else:
            self._loop.enqueue(state)

    def _shut_down(self) -> None:
        self._closing = True
        self._loop.close(_SHUTTING_DOWN)


_SHUTTING_DOWN = FailedEvent(
    "shutting_down", "the service is shutting down; ask another replica or try again"
)
