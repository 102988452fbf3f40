"""Sending an answer: in one piece, or as server-sent events. A client that leaves cancels its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import orjson
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from aquifer.server.bridge import EngineStream
from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, TokenEvent
from aquifer.server.routes.errors import ApiError, failure
from aquifer.server.routes.prepare import Prepared
from aquifer.server.routes.service import Service

# The status line waits this long for the first event: a request that fails at once gets its own
# status instead of a 200 and an error event.
_STATUS_WAIT_SECONDS = 0.5
_CLIENT_LEFT = 499


class Encoder(Protocol):
    """A dialect of server-sent events; one object per answer."""

    def encode(self, event: Event) -> Iterator[bytes]:
        """What is sent when the engine reports `event`: any number of events, each with its empty line."""


def sse(payload: dict[str, Any], event: str = "message") -> bytes:
    """One server-sent event with JSON in it."""
    name = b"" if event == "message" else f"event: {event}\n".encode()
    return name + b"data:" + one_line(payload) + b"\n\n"


def one_line(payload: dict[str, Any]) -> bytes:
    """JSON without the line ends beyond ASCII, at which many clients would cut an event in two."""
    line = orjson.dumps(payload)
    for end in ("\u2028", "\u2029", "\u0085"):
        line = line.replace(end.encode(), b"\\u%04x" % ord(end))
    return line


async def whole_answer(
    request: Request, service: Service, prepared: Prepared
) -> tuple[list[TokenEvent], FinishedEvent]:
    """Run a request to its end. Raises ApiError: the engine's refusal, or 499 when the client left."""
    async with EngineStream(service.engine, prepared.request) as stream:
        collecting = asyncio.create_task(_collect(stream))
        leaving = asyncio.create_task(_client_leaves(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(_CLIENT_LEFT, "the client left before the answer was complete")
            tokens, end = collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()
    if isinstance(end, FailedEvent):
        raise failure(end)
    return tokens, end


class AnswerStream(Response):
    """An answer as server-sent events. The request runs exactly as long as this response is sent."""

    def __init__(self, service: Service, prepared: Prepared, encoder: Encoder) -> None:
        super().__init__()
        self._service = service
        self._prepared = prepared
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with EngineStream(self._service.engine, self._prepared.request) as stream:
            first = await stream.next(_STATUS_WAIT_SECONDS)
            if isinstance(first, FailedEvent):
                await failure(first).response(scope["path"])(scope, receive, send)
                return
            lines = self._lines(stream, first, scope["state"])
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            await StreamingResponse(lines, media_type="text/event-stream", headers=headers)(
                scope, receive, send
            )
            if not stream.ended:
                scope["state"]["outcome"] = _CLIENT_LEFT

    async def _lines(
        self, stream: EngineStream, event: Event | None, state: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        while True:
            if event is None:
                # A comment: silence for a minute looks like a hang, and proxies cut it off.
                yield b": ping\n\n"
            else:
                for lines in self._encoder.encode(event):
                    yield lines
                if isinstance(event, FailedEvent):
                    state["outcome"] = failure(event).status_code
                if stream.ended:
                    return
            event = await stream.next(self._service.settings.ping_seconds)


async def _collect(stream: EngineStream) -> tuple[list[TokenEvent], FinishedEvent | FailedEvent]:
    tokens: list[TokenEvent] = []
    while True:
        event = await stream.next()
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, FinishedEvent | FailedEvent):
            return tokens, event


async def _client_leaves(request: Request) -> None:
    # The body is read, so the only message that can still come is the client's leaving.
    while (await request.receive())["type"] != "http.disconnect":
        pass
