"""From a request's body to what the engine is asked: tokens, limits, sampling."""

from __future__ import annotations

import secrets
import time
import uuid
from array import array
from dataclasses import dataclass

from aquifer.server.engine.types import GenerateRequest, SamplingParams
from aquifer.server.routes.errors import ApiError
from aquifer.server.routes.schemas import GenerateBody, KVOptions, Parameters
from aquifer.server.routes.service import Caller, Service

_ATTEND_TO_EVERYTHING = ("resident", "streamed")


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine, and what its answer needs besides the engine's events."""

    request: GenerateRequest
    body: GenerateBody
    tokenize_seconds: float


async def prepare(body: GenerateBody, service: Service, caller: Caller) -> Prepared:
    """Tokenize, check limits, settle sampling. Raises ApiError, TooLongError, UnknownDocumentError."""
    _check_budget(body.kv)
    started = time.perf_counter()
    document: str | array[int] | None = body.document
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
        budget=body.kv.budget,
    )
    return Prepared(request, body, time.perf_counter() - started)


def _check_budget(kv: KVOptions) -> None:
    if kv.budget is not None and kv.budget < 1 and kv.mode in _ATTEND_TO_EVERYTHING:
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
