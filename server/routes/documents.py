"""POST, GET and DELETE /documents: read a text now, ask about it later."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Response

from aquifer.server.document_records import ID_PATTERN, Document
from aquifer.server.engine.types import FailedEvent
from aquifer.server.routes.body import BodyRoute
from aquifer.server.routes.errors import ApiError, failure, problems
from aquifer.server.routes.schemas import DocumentBody, DocumentDeleted, DocumentList, DocumentOut
from aquifer.server.routes.service import CallerDep, Service, ServiceDep

# The engine refuses at once or not at all: worth a moment, so that "overloaded" is said now instead
# of being found by polling.
_REFUSAL_WAIT_SECONDS = 0.2

router = APIRouter(prefix="/documents", route_class=BodyRoute, tags=["documents"])
DocumentIdPath = Annotated[str, Path(pattern=ID_PATTERN)]


@router.post(
    "",
    response_model=DocumentOut,
    responses=problems(400, 401, 409, 413, 422, 429, 500, 503)
    | {200: {"description": "read"}, 202: {"model": DocumentOut, "description": "being read: poll its id"}},
)
async def read_document(
    body: DocumentBody, response: Response, service: ServiceDep, caller: CallerDep
) -> DocumentOut:
    """Read a document, compress its KV and keep it. 202 with a status to poll, or 200 with `"wait": true`."""
    salt = caller.salt(body.cache_salt)
    document, reading = await service.documents.add(
        caller.tenant,
        body.document_id,
        await _token_ids(body, salt, service),
        salt=salt,
        pin=body.pin,
        ttl_seconds=body.ttl_seconds,
    )
    await asyncio.wait([reading], timeout=None if body.wait else _REFUSAL_WAIT_SECONDS)
    if reading.cancelled():
        raise ApiError(409, f"{document.document_id!r} was deleted while it was read")
    if not body.wait:
        response.status_code = 202
    if not reading.done():
        return _out(await service.documents.get(caller.tenant, document.document_id))
    result = reading.result()
    if isinstance(result, FailedEvent):
        raise failure(result)
    return _out(result)


@router.get("", responses=problems(401))
async def list_documents(service: ServiceDep, caller: CallerDep) -> DocumentList:
    """The caller's documents, the oldest first."""
    return DocumentList(
        documents=[_out(document) for document in await service.documents.list(caller.tenant)]
    )


@router.get("/{document_id}", responses=problems(401, 404, 422))
async def get_document(document_id: DocumentIdPath, service: ServiceDep, caller: CallerDep) -> DocumentOut:
    """How far the reading is, and what the document takes in the tiers."""
    return _out(await service.documents.get(caller.tenant, document_id))


@router.delete("/{document_id}", responses=problems(401, 404, 422))
async def delete_document(
    document_id: DocumentIdPath, service: ServiceDep, caller: CallerDep
) -> DocumentDeleted:
    """Forget a document and its KV in every tier. What another document shares with it, and has pinned,
    stays; and what questions stored behind its last full segment stays until it is evicted or expires."""
    deleted = await service.documents.delete(caller.tenant, document_id)
    return DocumentDeleted(document_id=document_id, deleted_segments=deleted)


async def _token_ids(body: DocumentBody, salt: str, service: Service) -> array[int]:
    """The document's tokens without BOS. Raises ApiError, TooLongError."""
    if body.document is not None:
        return await service.tokenizer.document(body.document, salt=salt)
    given = body.token_ids or []
    service.tokenizer.check_length(len(service.tokenizer.bos) + len(given))
    vocab_size = service.engine.info.vocab_size
    if max(given) >= vocab_size:
        raise ApiError(422, f"token_ids: {max(given)} is not below the vocabulary's {vocab_size:,}")
    token_ids = array("i", given)
    # A leading BOS is the caller's way to say the same: it is added once.
    bos = service.tokenizer.bos
    return token_ids[len(bos) :] if bos and token_ids[: len(bos)] == bos else token_ids


def _out(document: Document) -> DocumentOut:
    fields = asdict(document) | {"progress": document.progress}
    return DocumentOut(**{name: fields[name] for name in DocumentOut.model_fields})
