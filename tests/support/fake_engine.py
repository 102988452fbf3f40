"""An engine that answers with the prompt's own tokens, and can be told to wait, refuse or fail.

The routes' faults cannot be had from a real engine at will; everything that can is tested with one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from aquifer.cachestore.tier import TierStats
from aquifer.server.engine.types import (
    CachedTokens,
    EngineInfo,
    EngineLoad,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    KVUsage,
    ProgressEvent,
    RequestTimings,
    Sink,
    TokenEvent,
)

EOS = 298


def tier(name: str, **changes: object) -> TierStats:
    stats = TierStats(
        name=name,
        up=True,
        used_bytes=1000,
        capacity_bytes=4000,
        entries=3,
        hits=5,
        misses=2,
        errors=0,
        corrupt=0,
        read_bytes=700,
        read_seconds=0.5,
        write_bytes=900,
        write_seconds=0.25,
        evictions=1,
        dropped_writes=0,
        pinned=0,
    )
    return replace(stats, **changes)  # type: ignore[arg-type]  # the names are checked by replace itself


@dataclass
class FakeStore:
    tiers: list[TierStats] = field(default_factory=lambda: [tier("ram"), tier("redis", capacity_bytes=None)])

    def stats(self) -> list[TierStats]:
        return self.tiers


class FakeEngine:
    """Echoes the prompt, the BOS left out, then ends with EOS; an empty prompt only reads.

    refuse_with:   refuse every request with this event
    fail_after:    fail each request after so many tokens
    go_on:         clear it to keep every request waiting before its next token
    hold_reading:  set it to keep every prompt half read
    requests, cancelled, forgotten, pinned, unpinned: what was asked of the engine
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], **limits: int) -> None:
        self._decode = decode
        self.store = FakeStore()
        self.info = EngineInfo(
            model="fake",
            model_fingerprint="f00d",
            codec="higgs:4",
            codec_fingerprint="beef",
            codec_note="no matching predictors",
            device="cpu",
            dtype="float32",
            max_prompt_tokens=limits.get("max_prompt_tokens", 4000),
            max_total_tokens=limits.get("max_total_tokens", 4096),
            segment_tokens=256,
            device_kv_bytes=1 << 20,
            vocab_size=299,
            eos_token_ids=(EOS,),
        )
        self.refuse_with: FailedEvent | None = None
        self.fail_after: int | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.hold_reading = threading.Event()
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.forgotten: list[tuple[tuple[int, ...], str]] = []
        self.pinned: list[tuple[tuple[int, ...], str]] = []
        self.unpinned: list[tuple[tuple[int, ...], str]] = []
        self._running: set[str] = set()

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        self.requests.append(replace(request, token_ids=tuple(request.token_ids)))  # tests compare them
        if self.refuse_with is not None:
            sink(self.refuse_with)
            return
        self._running.add(request.request_id)
        threading.Thread(target=self._serve, args=(request, sink), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def forget(self, token_ids: Sequence[int], cache_salt: str) -> int:
        self.forgotten.append((tuple(token_ids), cache_salt))
        return len(token_ids) // self.info.segment_tokens

    def pin(self, token_ids: Sequence[int], cache_salt: str) -> None:
        self.pinned.append((tuple(token_ids), cache_salt))

    def unpin(self, token_ids: Sequence[int], cache_salt: str) -> None:
        self.unpinned.append((tuple(token_ids), cache_salt))

    def load(self) -> EngineLoad:
        return EngineLoad(len(self._running), 0, {"weights": 100, "resident": 20}, 1 << 20)

    def _serve(self, request: GenerateRequest, sink: Sink) -> None:
        total = len(request.token_ids)
        sink(ProgressEvent(total // 2, total))
        while self.hold_reading.is_set():
            if request.request_id in self.cancelled:
                self._finish(request, sink, "cancelled", "", 0)
                return
            time.sleep(0.002)
        sink(ProgressEvent(total, total))
        answer = [*request.token_ids[1:], EOS][: request.sampling.max_new_tokens]
        text = ""
        for count, token_id in enumerate(answer):
            while not self.go_on.is_set() and request.request_id not in self.cancelled:
                time.sleep(0.002)
            if request.request_id in self.cancelled:
                self._finish(request, sink, "cancelled", text, count)
                return
            if count == self.fail_after:
                self._running.discard(request.request_id)
                sink(FailedEvent("internal", "generation failed: the device is gone"))
                return
            shown = "" if token_id == EOS else self._decode([token_id])
            text += shown
            sink(TokenEvent(token_id, shown, -0.5, token_id == EOS))
        ended = bool(answer) and answer[-1] == EOS
        self._finish(request, sink, "eos_token" if ended else "length", text, len(answer))

    def _finish(
        self, request: GenerateRequest, sink: Sink, reason: FinishReason, text: str, count: int
    ) -> None:
        self._running.discard(request.request_id)
        sink(
            FinishedEvent(
                reason=reason,
                text=text,
                tail="",
                prompt_tokens=len(request.token_ids),
                generated_tokens=count,
                computed_tokens=len(request.token_ids),
                cached=CachedTokens(),
                timings=RequestTimings(ttft_seconds=0.001),
                kv=KVUsage("resident", "higgs:4", 1024, 256, 4.0),
                seed=request.sampling.seed,
            )
        )
