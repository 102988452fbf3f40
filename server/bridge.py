"""The engine's thread and the event loop, joined: one request's events as they arrive."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, GenerateRequest

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine


class EngineStream:
    """Submits a request on entry; leaving before its last event cancels it.

    The engine never waits for a slow reader: events queue up here, at most one per token.
    """

    def __init__(self, engine: Engine, request: GenerateRequest) -> None:
        self._engine = engine
        self._request = request
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the last event was handed out."""
        return self._ended

    async def next(self, timeout_seconds: float | None = None) -> Event | None:
        """The next event; None when none came in time. Not to be called after the last one."""
        try:
            async with asyncio.timeout(timeout_seconds):
                event = await self._queue.get()
        except TimeoutError:
            return None
        self._ended = isinstance(event, FinishedEvent | FailedEvent)
        return event

    async def __aenter__(self) -> Self:
        self._engine.submit(self._request, self._sink)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._engine.cancel(self._request.request_id)

    def _sink(self, event: Event) -> None:
        # A closed loop means the process is going down and nobody is left to read the event.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
