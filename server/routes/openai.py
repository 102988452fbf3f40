"""/v1/completions, /v1/chat/completions and /v1/models in OpenAI's dialect.

Both completions become a GenerateBody and go the same way as /generate; only the envelopes differ.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from aquifer.server.engine.types import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from aquifer.server.routes.answer import AnswerStream, one_line, whole_answer
from aquifer.server.routes.body import BodyRoute
from aquifer.server.routes.errors import OPENAI_PREFIX, ApiError, failure, invalid, openai_problems
from aquifer.server.routes.openai_schemas import (
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionBody,
    CompletionChoice,
    Model,
    ModelList,
    OpenAIFinishReason,
    PromptTokensDetails,
    Usage,
)
from aquifer.server.routes.prepare import prepare
from aquifer.server.routes.schemas import GenerateBody
from aquifer.server.routes.service import CallerDep, Service, ServiceDep
from aquifer.server.tokenization import ChatTemplateError

router = APIRouter(prefix=OPENAI_PREFIX.rstrip("/"), route_class=BodyRoute, tags=["openai"])
_PROBLEMS = openai_problems(400, 401, 404, 413, 429, 500, 503)
_EVENTS = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}}


@router.post("/completions", responses=_PROBLEMS | {200: {"model": Completion, "content": _EVENTS}})
async def complete(
    request: Request, body: CompletionBody, service: ServiceDep, caller: CallerDep
) -> Response:
    """Continue a text."""
    _check_model(body, service)
    generate = _generate_body(
        request, body, body.text, body.max_tokens, document=body.document, document_id=body.document_id
    )
    prepared = await prepare(generate, service, caller)
    head = _Head.of("cmpl", "text_completion", service)
    if body.stream:
        return AnswerStream(service, prepared, CompletionEncoder(head, body.include_usage))
    _, end = await whole_answer(request, service, prepared)
    choice = CompletionChoice(index=0, text=end.text, finish_reason=_reason(end.reason))
    answer = Completion(**head.fields, choices=[choice], usage=_usage(end))
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post("/chat/completions", responses=_PROBLEMS | {200: {"model": ChatCompletion, "content": _EVENTS}})
async def chat(request: Request, body: ChatBody, service: ServiceDep, caller: CallerDep) -> Response:
    """Answer the last message of a conversation, through the model's chat template."""
    _check_model(body, service)
    document, inputs = await _render(body, service)
    max_tokens = body.max_completion_tokens or body.max_tokens
    generate = _generate_body(request, body, inputs, max_tokens, document=document)
    prepared = await prepare(generate, service, caller)
    if body.stream:
        head = _Head.of("chatcmpl", "chat.completion.chunk", service)
        return AnswerStream(service, prepared, ChatEncoder(head, body.include_usage))
    _, end = await whole_answer(request, service, prepared)
    message = ChatMessage(role="assistant", content=end.text)
    choice = ChatChoice(index=0, message=message, finish_reason=_reason(end.reason))
    head = _Head.of("chatcmpl", "chat.completion", service)
    answer = ChatCompletion(**head.fields, choices=[choice], usage=_usage(end))
    return Response(answer.model_dump_json(), media_type="application/json")


@router.get("/models", responses=openai_problems(401))
async def models(service: ServiceDep) -> ModelList:
    """The one model that is served."""
    model = Model(id=service.model_name, created=service.started, owned_by="aquifer")
    return ModelList(data=[model])


@dataclass(frozen=True)
class _Head:
    """What all pieces of an answer begin with."""

    id: str
    object: Any
    created: int
    model: str

    @classmethod
    def of(cls, prefix: str, kind: str, service: Service) -> _Head:
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), service.model_name)

    @property
    def fields(self) -> dict[str, Any]:
        return dict(vars(self))


class CompletionEncoder:
    """Chunks of text_completion, then [DONE]."""

    def __init__(self, head: _Head, include_usage: bool) -> None:
        self._head = head.fields
        self._include_usage = include_usage

    def encode(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, TokenEvent) and event.text:
            yield self._chunk([self._choice(event.text, None)])
        elif isinstance(event, FinishedEvent):
            yield self._chunk([self._choice(event.tail, _reason(event.reason))])
            if self._include_usage:
                yield self._chunk([], _usage(event))
            yield b"data: [DONE]\n\n"
        elif isinstance(event, FailedEvent):
            yield _data(failure(event).envelope(OPENAI_PREFIX))
            yield b"data: [DONE]\n\n"

    def _choice(self, text: str, finish_reason: OpenAIFinishReason | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        chunk = self._head | {"choices": choices}
        if self._include_usage:
            chunk["usage"] = usage.model_dump() if usage else None
        return _data(chunk)


class ChatEncoder(CompletionEncoder):
    """Chunks of chat.completion.chunk, the first one with the role."""

    def __init__(self, head: _Head, include_usage: bool) -> None:
        super().__init__(head, include_usage)
        self._role: dict[str, str] = {"role": "assistant"}

    def _choice(self, text: str, finish_reason: OpenAIFinishReason | None) -> dict[str, Any]:
        delta = self._role | ({"content": text} if text or self._role else {})
        self._role = {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _data(payload: dict[str, Any]) -> bytes:
    # With a space: many hand-written clients of this dialect look for it.
    return b"data: " + one_line(payload) + b"\n\n"


def _reason(reason: FinishReason) -> OpenAIFinishReason:
    return "length" if reason == "length" else "stop"


def _usage(end: FinishedEvent) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.generated_tokens,
        total_tokens=end.prompt_tokens + end.generated_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=end.cached.total),
    )


def _check_model(body: CompletionBody | ChatBody, service: Service) -> None:
    if body.model not in (None, service.model_name):
        raise ApiError(
            404, f"no model {body.model!r} here; this server has {service.model_name!r}", param="model"
        )


def _generate_body(
    request: Request,
    body: CompletionBody | ChatBody,
    inputs: str,
    max_tokens: int | None,
    *,
    document: str | None,
    document_id: str | None = None,
) -> GenerateBody:
    """The same request in this server's own words. Raises ApiError."""
    temperature = 1.0 if body.temperature is None else body.temperature
    parameters = {
        "max_new_tokens": max_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "stop": body.stop_strings,
    }
    try:
        return GenerateBody.model_validate(
            {
                "inputs": inputs,
                "document": document,
                "document_id": document_id,
                "parameters": parameters,
                "kv": body.kv,
                "cache_salt": body.cache_salt,
            }
        )
    except ValidationError as error:
        raise invalid(error.errors(), request) from None


async def _render(body: ChatBody, service: Service) -> tuple[str | None, str]:
    """The conversation as (document with what stands before it, the rest); None without a document.

    The document goes in front of the first user message. The split is at the document's end, so that its
    tokens do not depend on what is asked about it.
    """
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    # Templates trim what they insert; the document is looked for below as it stands there.
    document = None if body.document is None else body.document.strip()
    if document is not None:
        asked = next((message for message in messages if message["role"] == "user"), None)
        if asked is None:
            raise ApiError(422, "a document needs a user message to stand in", param="messages")
        asked["content"] = f"{document}\n\n{asked['content']}"
    try:
        text = await service.tokenizer.render_chat(messages)
    except ChatTemplateError as error:
        raise ApiError(422, str(error), param="messages") from None
    if document is None:
        return None, text
    end = text.index(document) + len(document)
    return text[:end], text[end:]
