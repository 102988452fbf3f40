"""POST /generate, /generate_stream and / in TGI's dialect.

A request is prepared (tokens, limits, sampling), submitted, and answered in one piece or as
server-sent events. A client that leaves cancels its request.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from aquifer.server.bridge import EngineStream
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    ProgressEvent,
    SamplingParams,
    TokenEvent,
)
from aquifer.server.routes.body import BodyRoute
from aquifer.server.routes.errors import ApiError, failure, problems
from aquifer.server.routes.schemas import (
    CachedOut,
    Details,
    GenerateAnswer,
    GenerateBody,
    KVOptions,
    KVOut,
    Parameters,
    StreamDetails,
    TimingsOut,
    TokenOut,
)
from aquifer.server.routes.service import Caller, CallerDep, Service, ServiceDep

AVAILABLE_MODES = ("auto", "resident")
# The status line waits this long for the first event: a request that fails at once gets its own
# status instead of a 200 and an error event.
_STATUS_WAIT_SECONDS = 0.5
_CLIENT_LEFT = 499

router = APIRouter(route_class=BodyRoute, tags=["generate"])
_PROBLEMS = problems(400, 401, 404, 413, 422, 429, 500, 503)
# The schema is added to the page by the application: no JSON body refers to it.
_AS_EVENTS = {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ServerSentEvent"}}}


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine, and what its answer needs besides the engine's events."""

    request: GenerateRequest
    body: GenerateBody
    tokenize_seconds: float


@router.post("/generate", responses=_PROBLEMS | {200: {"model": GenerateAnswer, "content": _AS_EVENTS}})
@router.post("/", include_in_schema=False)
async def generate(request: Request, body: GenerateBody, service: ServiceDep, caller: CallerDep) -> Response:
    """Answer a question about a document. With `"stream": true` as /generate_stream does."""
    prepared = await prepare(body, service, caller)
    if body.stream:
        return EventStream(service, prepared)
    async with EngineStream(service.engine, prepared.request) as stream:
        events = await _collect_unless_gone(request, stream)
    if events is None:
        request.state.outcome = _CLIENT_LEFT
        return Response(status_code=_CLIENT_LEFT)
    tokens = [_token(event) for event in events if isinstance(event, TokenEvent)]
    end = events[-1]
    if isinstance(end, FailedEvent):
        raise failure(end)
    assert isinstance(end, FinishedEvent)
    details = None
    if body.parameters.details:
        details = Details(**_details(end, prepared), prefill=[], tokens=tokens)
    answer = GenerateAnswer(generated_text=_full_text(end, body), details=details)
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post(
    "/generate_stream",
    response_class=Response,
    responses=_PROBLEMS | {200: {"description": "server-sent events", "content": _AS_EVENTS}},
)
async def generate_stream(body: GenerateBody, service: ServiceDep, caller: CallerDep) -> Response:
    """Answer token by token, as server-sent events. Comments keep the line alive while a long document is
    being read; `"stream_progress": true` adds `progress` events."""
    return EventStream(service, await prepare(body, service, caller))


async def prepare(body: GenerateBody, service: Service, caller: Caller) -> Prepared:
    """Tokenize, check limits, settle sampling. Raises ApiError, TooLongError, UnknownDocumentError."""
    _check_mode(body.kv)
    started = time.perf_counter()
    document: str | tuple[int, ...] | None = body.document
    salt = caller.salt(body.cache_salt)
    if body.document_id is not None:
        document, document_salt = await service.documents.tokens(caller.tenant, body.document_id)
        if body.cache_salt is None:
            salt = document_salt
    token_ids = await service.tokenizer.prompt(
        body.inputs, document, truncate=body.parameters.truncate, salt=salt
    )
    request = GenerateRequest(
        # Not the caller's request id: two requests may carry the same one.
        request_id=uuid.uuid4().hex,
        token_ids=token_ids,
        sampling=_sampling(body.parameters, len(token_ids), service),
        cache_salt=salt,
        mode=body.kv.mode,
    )
    return Prepared(request, body, time.perf_counter() - started)


def _check_mode(kv: KVOptions) -> None:
    if kv.mode not in AVAILABLE_MODES:
        available = ", ".join(AVAILABLE_MODES)
        raise ApiError(422, f"kv.mode {kv.mode!r} is not available in this version; available: {available}")
    if kv.budget is not None and kv.budget < 1:
        raise ApiError(422, f"kv.budget has no effect in mode {kv.mode!r}, which attends to everything")


def _sampling(parameters: Parameters, prompt_tokens: int, service: Service) -> SamplingParams:
    room = service.engine.info.max_total_tokens - prompt_tokens
    if room < 1:
        raise ApiError(413, f"prompt has {prompt_tokens:,} tokens, which leaves no room for an answer")
    max_new_tokens = parameters.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = min(service.settings.max_new_tokens, room)
    elif max_new_tokens > room:
        total = service.engine.info.max_total_tokens
        raise ApiError(
            422,
            f"prompt has {prompt_tokens:,} tokens and max_new_tokens is {max_new_tokens:,}, together more"
            f" than the {total:,} this server takes: ask for at most {room:,} new tokens",
        )
    sampled = parameters.sampled
    seed = parameters.seed
    if sampled and seed is None:
        seed = secrets.randbits(63)
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature if sampled else 0.0,
        top_k=parameters.top_k or 0,
        top_p=parameters.top_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        seed=seed,
        stop=tuple(parameters.stop),
    )


async def _collect_unless_gone(request: Request, stream: EngineStream) -> list[Event] | None:
    """All events up to the last; None when the client left before it."""
    collecting = asyncio.create_task(_collect(stream))
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        collecting.cancel()
        leaving.cancel()


async def _collect(stream: EngineStream) -> list[Event]:
    events: list[Event] = []
    while not stream.ended:
        event = await stream.next()
        if event is not None:
            events.append(event)
    return events


async def _client_leaves(request: Request) -> None:
    # The body is read, so the only message that can still come is the client's leaving.
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events. The request runs exactly as long as this response is sent."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        super().__init__()
        self._service = service
        self._prepared = prepared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with EngineStream(self._service.engine, self._prepared.request) as stream:
            first = await stream.next(_STATUS_WAIT_SECONDS)
            if isinstance(first, FailedEvent):
                await failure(first).response()(scope, receive, send)
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
        """TGI puts text and details into the last token's event, so a token that may be the last waits
        for the event behind it; all others go out at once."""
        index = 0
        held: TokenEvent | None = None
        last_id = 0
        while True:
            if event is None:
                yield b": ping\n\n"
            elif isinstance(event, ProgressEvent):
                if self._prepared.body.stream_progress:
                    yield b"event: progress\n" + _data(asdict(event))
            elif isinstance(event, TokenEvent):
                if held is not None:
                    yield _data(_stream_event(index, held))
                index += 1
                last_id = event.token_id
                held = event if self._may_be_last(event, index) else None
                if held is None:
                    yield _data(_stream_event(index, event))
            elif isinstance(event, FinishedEvent):
                last = held or TokenEvent(last_id, "", 0.0, special=not event.tail)
                yield _data(self._last_event(max(index, 1), last, event))
                return
            else:
                problem = failure(event)
                state["outcome"] = problem.status_code
                yield _data(problem.envelope)
                return
            event = await stream.next(self._service.settings.ping_seconds)

    def _may_be_last(self, event: TokenEvent, index: int) -> bool:
        sampling = self._prepared.request.sampling
        return (
            index == sampling.max_new_tokens
            or bool(sampling.stop)
            or event.token_id in self._service.engine.info.eos_token_ids
        )

    def _last_event(self, index: int, token: TokenEvent, end: FinishedEvent) -> dict[str, Any]:
        body = self._prepared.body
        details = StreamDetails(**_details(end, self._prepared)) if body.parameters.details else None
        return _stream_event(index, token, end.tail) | {
            "generated_text": _full_text(end, body),
            "details": details.model_dump() if details else None,
        }


def _full_text(end: FinishedEvent, body: GenerateBody) -> str:
    return body.inputs + end.text if body.parameters.return_full_text else end.text


def _details(end: FinishedEvent, prepared: Prepared) -> dict[str, Any]:
    """The fields of StreamDetails, which both kinds of answer have."""
    timings = TimingsOut(tokenize_seconds=prepared.tokenize_seconds, **asdict(end.timings))
    return {
        "finish_reason": end.reason,
        "generated_tokens": end.generated_tokens,
        "prompt_tokens": end.prompt_tokens,
        "cached_tokens": CachedOut(**asdict(end.cached)),
        "kv": KVOut(**asdict(end.kv)),
        "timings": timings,
        "seed": end.seed,
    }


def _token(event: TokenEvent, tail: str = "") -> TokenOut:
    return TokenOut(id=event.token_id, text=event.text + tail, logprob=event.logprob, special=event.special)


def _stream_event(index: int, event: TokenEvent, tail: str = "") -> dict[str, Any]:
    token = _token(event, tail).model_dump()
    return {"index": index, "token": token, "generated_text": None, "details": None}


def _data(payload: dict[str, Any]) -> bytes:
    return b"data:" + orjson.dumps(payload) + b"\n\n"
