"""Documents read ahead of the questions: what an id stands for, and how far the reading is.

    Exception
    ├── UnknownDocumentError    nothing (or nothing any more) has this id
    └── DocumentConflictError   the id stands for another text already

A document is two small records in the record store (Redis when there is one): its token ids,
compressed, so that evicted KV can be recomputed after a restart or by another replica, and its
state. The KV itself lives in the tiers like any other prompt's.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import zlib
from array import array
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import orjson
import structlog
from blake3 import blake3

from aquifer.cachestore.records import RecordStore
from aquifer.server.bridge import EngineStream
from aquifer.server.engine.types import (
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    ProgressEvent,
    SamplingParams,
)

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine

log = structlog.get_logger(__name__)

DocumentStatus = Literal["queued", "reading", "ready", "failed"]
ID_PATTERN = r"^[A-Za-z0-9._-]{1,128}$"
# While a document is read its state is written this often, so that other replicas see it is alive.
HEARTBEAT_SECONDS = 10.0
INTERRUPTED_AFTER_SECONDS = 60.0
_INTERRUPTED = "interrupted while it was read; post it again"


class UnknownDocumentError(Exception):
    def __init__(self, document_id: str) -> None:
        super().__init__(
            f"no document {document_id!r} here: it was never posted, was deleted or has expired;"
            " post its text to /documents again, or send it as `document`"
        )


class DocumentConflictError(Exception):
    def __init__(self, document_id: str) -> None:
        super().__init__(f"document {document_id!r} holds another text; delete it first or choose another id")


# Ends when the document is read, with the reason if it could not be.
Reading = asyncio.Task[FailedEvent | None]


@dataclass(frozen=True)
class Document:
    """State of one document. Times are Unix seconds.

    salt: the cache salt its KV is stored under, tenant included
    digest: of its token ids, to tell whether an id is posted again with another text
    updated: when this was written; a reading nobody writes about any more was interrupted
    tokens, done_tokens: of the whole prompt, BOS included
    raw_bytes, stored_bytes, bits_per_value: None until ready; what the KV takes without and with the codec
    """

    document_id: str
    tenant: str
    salt: str
    digest: str
    status: DocumentStatus
    tokens: int
    done_tokens: int
    pinned: bool
    created: float
    updated: float
    expires: float | None
    error: str | None = None
    raw_bytes: int | None = None
    stored_bytes: int | None = None
    bits_per_value: float | None = None

    @property
    def progress(self) -> float:
        return 1.0 if self.status == "ready" else self.done_tokens / self.tokens


@dataclass
class _Reading:
    """A document this process is reading. `document` is its newest state."""

    document: Document
    task: Reading


class Documents:
    """The documents of all tenants. One object per process, used on the event loop.

    Record store calls may wait for Redis, so they run in threads.
    """

    def __init__(self, engine: Engine, records: RecordStore, bos: array[int]) -> None:
        self._engine = engine
        self._records = records
        self._bos = bos
        self._readings: dict[tuple[str, str], _Reading] = {}
        self._expiries: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._forgetting: set[asyncio.Task[None]] = set()
        self._adding = asyncio.Lock()

    async def add(
        self,
        tenant: str,
        document_id: str | None,
        token_ids: array[int],
        *,
        salt: str,
        pin: bool = False,
        ttl_seconds: float | None = None,
    ) -> tuple[Document, Reading]:
        """Start reading a document of these tokens (without BOS); returns it as queued.

        Posting the same text under the same id again reads it again: what was evicted comes back,
        lifetime and pin are set anew. While it is being read, a post that asks for the same joins that
        reading. Raises DocumentConflictError when it is another text.
        """
        document_id = document_id or uuid.uuid4().hex
        packed = _pack(token_ids)
        digest = blake3(packed + salt.encode()).hexdigest()
        now = time.time()
        document = Document(
            document_id=document_id,
            tenant=tenant,
            salt=salt,
            digest=digest,
            status="queued",
            tokens=len(self._bos) + len(token_ids),
            done_tokens=0,
            pinned=pin,
            created=now,
            updated=now,
            expires=None if ttl_seconds is None else now + ttl_seconds,
        )
        async with self._adding:
            known = await self._find(tenant, document_id)
            if known is not None and known.digest != digest:
                raise DocumentConflictError(document_id)
            reading = self._readings.get((tenant, document_id))
            # A lifetime begins with its post, so only posts without one ask for the same.
            wish = (pin, None) if ttl_seconds is None else None
            if reading is not None and (reading.document.pinned, reading.document.expires) == wish:
                return reading.document, reading.task
            await self._stop(tenant, document_id)
            if known is not None and known.pinned:
                # Pins count: this one would outlive the document if the next came on top of it.
                await asyncio.to_thread(self._engine.unpin, self._bos + token_ids, salt)
            name = _name(tenant, "tokens", document_id)
            await asyncio.to_thread(self._records.put, name, packed, ttl_seconds)
            await self._save(document)
            if ttl_seconds is not None:
                self._expiries[tenant, document_id] = asyncio.get_running_loop().call_later(
                    ttl_seconds, self._expire, document, packed
                )
            task = asyncio.create_task(self._read(document, token_ids))
            self._readings[tenant, document_id] = _Reading(document, task)
        return document, task

    async def get(self, tenant: str, document_id: str) -> Document:
        """The document as it stands. Raises UnknownDocumentError."""
        document = await self._find(tenant, document_id)
        if document is None:
            raise UnknownDocumentError(document_id)
        return document

    async def tokens(self, tenant: str, document_id: str) -> tuple[array[int], str]:
        """Token ids (without BOS) and cache salt of a document. Raises UnknownDocumentError."""
        document = await self.get(tenant, document_id)
        blob = await asyncio.to_thread(self._records.get, _name(tenant, "tokens", document_id))
        if blob is None:
            raise UnknownDocumentError(document_id)
        return _unpack(blob), document.salt

    async def list(self, tenant: str) -> list[Document]:
        """All documents of a tenant, the oldest first."""
        names = await asyncio.to_thread(self._records.list, _name(tenant, "state", ""))
        found = [await self._find(tenant, name.rpartition("/")[2]) for name in names]
        return sorted((document for document in found if document), key=lambda document: document.created)

    async def delete(self, tenant: str, document_id: str) -> int:
        """Forget a document, its records and its KV in every tier; returns the segments deleted.

        Raises UnknownDocumentError.
        """
        token_ids, salt = await self.tokens(tenant, document_id)
        await self._stop(tenant, document_id)
        for part in ("state", "tokens"):
            await asyncio.to_thread(self._records.delete, _name(tenant, part, document_id))
        return await asyncio.to_thread(self._engine.forget, self._bos + token_ids, salt)

    async def close(self) -> None:
        """Stop reading. What was not finished is marked failed; its id can still be asked about."""
        for tenant, document_id in list(self._readings.keys() | self._expiries.keys()):
            await self._stop(tenant, document_id)
        if self._forgetting:
            await asyncio.wait(self._forgetting)

    async def _read(self, document: Document, token_ids: array[int]) -> FailedEvent | None:
        """Have the engine read and store a document; keep its state up to date."""
        request = GenerateRequest(
            request_id=f"document-{uuid.uuid4().hex}",
            token_ids=self._bos + token_ids,
            sampling=SamplingParams(max_new_tokens=0),
            cache_salt=document.salt,
            pin=document.pinned,
        )
        end: FinishedEvent | FailedEvent | None = None
        try:
            async with EngineStream(self._engine, request) as stream:
                while end is None:
                    event = await stream.next(HEARTBEAT_SECONDS)
                    if isinstance(event, FinishedEvent | FailedEvent):
                        end = event
                    elif isinstance(event, ProgressEvent):
                        document = replace(document, status="reading", done_tokens=event.done_tokens)
                        self._readings[document.tenant, document.document_id].document = document
                    if time.time() - document.updated > HEARTBEAT_SECONDS:
                        document = replace(document, updated=time.time())
                        await self._save(document)
        finally:
            await self._save(_ended(document, end))
            self._readings.pop((document.tenant, document.document_id), None)
        return end if isinstance(end, FailedEvent) else None

    async def _find(self, tenant: str, document_id: str) -> Document | None:
        reading = self._readings.get((tenant, document_id))
        if reading is not None:
            return reading.document
        blob = await asyncio.to_thread(self._records.get, _name(tenant, "state", document_id))
        if blob is None:
            return None
        document = Document(**orjson.loads(blob))
        silent_seconds = time.time() - document.updated
        if document.status in ("queued", "reading") and silent_seconds > INTERRUPTED_AFTER_SECONDS:
            return replace(document, status="failed", error=_INTERRUPTED)
        return document

    async def _save(self, document: Document) -> None:
        lifetime = None if document.expires is None else document.expires - time.time()
        if lifetime is not None and lifetime <= 0:
            return
        name = _name(document.tenant, "state", document.document_id)
        await asyncio.to_thread(self._records.put, name, orjson.dumps(asdict(document)), lifetime)

    async def _stop(self, tenant: str, document_id: str) -> None:
        """End the reading of a document and its expiry, if this process has them."""
        expiry = self._expiries.pop((tenant, document_id), None)
        if expiry is not None:
            expiry.cancel()
        reading = self._readings.get((tenant, document_id))
        if reading is not None:
            reading.task.cancel()
            await asyncio.wait([reading.task])
            self._readings.pop((tenant, document_id), None)

    def _expire(self, document: Document, packed: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._forget(document, packed))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def _forget(self, document: Document, packed: bytes) -> None:
        """What expired leaves the tiers too; its records have expired by themselves."""
        await self._stop(document.tenant, document.document_id)
        token_ids = self._bos + _unpack(packed)
        deleted = await asyncio.to_thread(self._engine.forget, token_ids, document.salt)
        log.info("document expired", document_id=document.document_id, deleted_segments=deleted)


def _ended(document: Document, end: FinishedEvent | FailedEvent | None) -> Document:
    if isinstance(end, FinishedEvent) and end.reason != "cancelled":
        return replace(
            document,
            status="ready",
            done_tokens=document.tokens,
            raw_bytes=end.kv.raw_bytes,
            stored_bytes=end.kv.stored_bytes,
            bits_per_value=end.kv.bits_per_value,
        )
    error = end.message if isinstance(end, FailedEvent) else _INTERRUPTED
    return replace(document, status="failed", error=error)


def _pack(token_ids: array[int]) -> bytes:
    """Token ids as a blob: 32-bit integers, deflated (about 1.5 bytes per token of prose)."""
    return zlib.compress(token_ids.tobytes(), 1)


@lru_cache(maxsize=32)
def _unpack(blob: bytes) -> array[int]:
    """Token ids of a blob, to be read only: every question about a document asks for them, and inflating
    131,072 takes 2 ms."""
    return array("i", zlib.decompress(blob))


def _name(tenant: str, part: str, document_id: str) -> str:
    """Name of a record. The tenant is hashed: it may hold any characters."""
    return f"documents/{blake3(tenant.encode()).hexdigest(length=16)}/{part}/{document_id}"
