"""Asking an engine: prompts, requests, and a sink that keeps what comes back."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aquifer.server.engine.engine import Engine
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    KVMode,
    SamplingParams,
    TokenEvent,
)

_numbers = itertools.count()


def prompt(seed: int, length: int) -> tuple[int, ...]:
    """Random token ids of a tiny model, none of which ends an answer."""
    return tuple(random.Random(seed).choices(range(299), k=length))


def ask(
    ids: tuple[int, ...], new_tokens: int = 8, *, mode: KVMode = "auto", **fields: Any
) -> GenerateRequest:
    """A greedy request under a name of its own. fields: as of GenerateRequest."""
    sampling = SamplingParams(max_new_tokens=new_tokens)
    return GenerateRequest(f"request-{next(_numbers)}", ids, sampling, mode=mode, **fields)


def text_of(tokens: list[int]) -> str:
    """How an engine over a tiny model spells an answer."""
    return "".join(chr(0x4E00 + token) for token in tokens if token != 299)


def _stack(thread: threading.Thread) -> str:
    """What a thread is doing."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name}:\n{''.join(traceback.format_stack(frame))}" if frame else ""


class Events:
    """A sink that keeps the events of one request. on_event: called for each, on the engine's thread, when it
    has been kept."""

    def __init__(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.all: list[Event] = []
        self._on_event = on_event
        self._over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self._on_event(event)
        if isinstance(event, FinishedEvent | FailedEvent):
            self._over.set()

    def wait(self, seconds: float = 60.0) -> Event:
        """The last event."""
        if not self._over.wait(seconds):
            stacks = "".join(_stack(thread) for thread in threading.enumerate())
            raise AssertionError(f"no end after {seconds:.0f} s, only {len(self.all)} events\n{stacks}")
        return self.all[-1]

    @property
    def finished(self) -> FinishedEvent:
        """The last event, of a request that must not fail."""
        last = self.wait()
        assert isinstance(last, FinishedEvent), last
        return last

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.all if isinstance(event, TokenEvent)]

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens."""
        return [event.logprob for event in self.all if isinstance(event, TokenEvent)]


def submit(
    engine: Engine, request: GenerateRequest, on_event: Callable[[Event], None] = lambda event: None
) -> Events:
    """Submit a request; its events come while the caller goes on."""
    events = Events(on_event)
    engine.submit(request, events)
    return events


@contextmanager
def busy(engine: Engine) -> Iterator[None]:
    """The engine's thread is kept busy, so that what is submitted meanwhile begins together afterwards."""
    go_on = threading.Event()
    engine._inbox.put(lambda: go_on.wait(30))
    try:
        yield
    finally:
        go_on.set()


def answer(engine: Engine, request: GenerateRequest) -> tuple[list[int], FinishedEvent]:
    """Ask and wait: the tokens, and how it ended."""
    events = submit(engine, request)
    finished = events.finished
    return events.tokens, finished
