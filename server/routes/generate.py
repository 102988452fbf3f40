"""POST /generate, /generate_stream and / in TGI's dialect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, ProgressEvent, TokenEvent
from aquifer.server.routes.answer import AnswerStream, sse, whole_answer
from aquifer.server.routes.body import BodyRoute
from aquifer.server.routes.errors import failure, problems
from aquifer.server.routes.prepare import Prepared, prepare
from aquifer.server.routes.schemas import (
    CachedOut,
    Details,
    DraftsOut,
    GenerateAnswer,
    GenerateBody,
    KVOut,
    StreamDetails,
    TimingsOut,
    TokenOut,
)
from aquifer.server.routes.service import CallerDep, Service, ServiceDep

router = APIRouter(route_class=BodyRoute, tags=["generate"])
_PROBLEMS = problems(400, 401, 404, 413, 422, 429, 500, 503)
# The schema is added to the page by the application: no JSON body refers to it.
_AS_EVENTS = {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ServerSentEvent"}}}


@router.post("/generate", responses=_PROBLEMS | {200: {"model": GenerateAnswer, "content": _AS_EVENTS}})
@router.post("/", include_in_schema=False)
async def generate(request: Request, body: GenerateBody, service: ServiceDep, caller: CallerDep) -> Response:
    """Answer a question about a document. With `"stream": true` as /generate_stream does."""
    prepared = await prepare(body, service, caller)
    if body.stream:
        return AnswerStream(service, prepared, TgiEncoder(service, prepared))
    tokens, end = await whole_answer(request, service, prepared)
    details = None
    if body.parameters.details:
        shown = [_token(event) for event in tokens]
        details = Details(**_details(end, prepared), prefill=[], tokens=shown)
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
    prepared = await prepare(body, service, caller)
    return AnswerStream(service, prepared, TgiEncoder(service, prepared))


class TgiEncoder:
    """TGI puts text and details into the last token's event, so a token that may be the last waits for
    the event behind it; all others go out at once."""

    def __init__(self, service: Service, prepared: Prepared) -> None:
        self._prepared = prepared
        self._eos = service.engine.info.eos_token_ids
        self._seen = 0
        self._sent = 0
        self._held: TokenEvent | None = None
        self._last_id = 0

    def encode(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, ProgressEvent):
            if self._prepared.body.stream_progress:
                yield sse(asdict(event), "progress")
        elif isinstance(event, TokenEvent):
            if self._held is not None:
                yield sse(self._token_event(self._held))
            self._seen += 1
            self._last_id = event.token_id
            if self._may_be_last(event):
                self._held = event
            else:
                self._held = None
                yield sse(self._token_event(event))
        elif isinstance(event, FinishedEvent):
            # Without a held token the engine ended for a reason that no token foretold.
            last = self._held or TokenEvent(self._last_id, "", 0.0, special=not event.tail)
            yield sse(self._last_event(last, event))
        elif isinstance(event, FailedEvent):
            yield sse(failure(event).envelope("/generate"))

    def _may_be_last(self, event: TokenEvent) -> bool:
        sampling = self._prepared.request.sampling
        return self._seen == sampling.max_new_tokens or bool(sampling.stop) or event.token_id in self._eos

    def _token_event(self, event: TokenEvent, tail: str = "") -> dict[str, Any]:
        self._sent += 1
        token = _token(event, tail).model_dump()
        return {"index": self._sent, "token": token, "generated_text": None, "details": None}

    def _last_event(self, token: TokenEvent, end: FinishedEvent) -> dict[str, Any]:
        body = self._prepared.body
        details = StreamDetails(**_details(end, self._prepared)) if body.parameters.details else None
        return self._token_event(token, end.tail) | {
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
        "drafts": DraftsOut(**asdict(end.drafts)) if end.drafts else None,
        "timings": timings,
        "seed": end.seed,
    }


def _token(event: TokenEvent, tail: str = "") -> TokenOut:
    return TokenOut(id=event.token_id, text=event.text + tail, logprob=event.logprob, special=event.special)
