"""Documents read ahead of the questions: what an id stands for, and how far the reading is.

    Exception
    ├── UnknownDocumentError    nothing (or nothing any more) has this id
    └── DocumentConflictError   the id stands for another text already

What is kept of them stands in document_records.py; pins and lifetimes in held_documents.py. The KV itself
lives in the tiers like any other prompt's.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog

from aquifer.server.bridge import EngineStream
from aquifer.server.document_records import Document, DocumentRecords, Place, digest_of, pack, unpack
from aquifer.server.engine.types import (
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    ProgressEvent,
    SamplingParams,
)
from aquifer.server.held_documents import Held, HeldDocuments

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine

log = structlog.get_logger(__name__)

# While a document is read its state is written this often, so that other servers see it is alive; and this
# often pins are compared with the records, which other servers change, too.
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


# Ends when the document is read, with its state then, or with the reason if it could not be read.
Reading = asyncio.Task[Document | FailedEvent]


@dataclass
class _Reading:
    """A document this process is reading. document: its newest state; before: how it stood when it was
    posted, unless it had failed; ending: it is being settled, and must not be disturbed."""

    document: Document
    before: Document | None
    task: Reading
    ending: bool = False
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)


class Documents:
    """The documents of all tenants. One object per process, used on the event loop.

    Record store calls may wait for Redis, so they run in threads.
    """

    def __init__(self, engine: Engine, records: DocumentRecords, bos: array[int]) -> None:
        self._engine = engine
        self._records = records
        self._bos = bos
        self._readings: dict[Place, _Reading] = {}
        self._held = HeldDocuments(engine, bos, self._expired)
        self._watching: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    def start(self) -> None:
        """Take up pins and lifetimes of documents that were read before, and watch over them."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

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

        Posting the same text under the same id again reads it again: what was evicted comes back, lifetime
        and pin are set anew; if that fails, the document stays as it was. While it is being read, a post
        joins that reading. Raises DocumentConflictError when it is another text.
        """
        document_id = document_id or uuid.uuid4().hex
        packed, now = pack(token_ids), time.time()
        document = Document(
            document_id=document_id,
            tenant=tenant,
            salt=salt,
            digest=digest_of(token_ids, salt),
            status="queued",
            tokens=len(self._bos) + len(token_ids),
            done_tokens=0,
            pinned=pin,
            created=now,
            updated=now,
            expires=None if ttl_seconds is None else now + ttl_seconds,
        )
        place = document.place
        async with self._changing:
            known = await self._check(place)
            if known is not None and known.digest != document.digest:
                raise DocumentConflictError(document_id)
            await self._held.unpin(place)
            reading = self._readings.get(place)
            if reading is not None and known is not None:
                await self._join(reading, known, document)
            await self._hold(document, packed)
            if reading is None:
                await asyncio.to_thread(self._records.save, document)
                before = None if known is None or known.status == "failed" else known
                task = asyncio.create_task(self._read(document, token_ids))
                reading = self._readings[place] = _Reading(document, before, task)
            elif await self._failed(place):  # while it was joined
                await self._held.unpin(place)
        return reading.document, reading.task

    async def get(self, tenant: str, document_id: str) -> Document:
        """The document as it stands. Raises UnknownDocumentError."""
        document = await self._find((tenant, document_id))
        if document is None:
            raise UnknownDocumentError(document_id)
        return document

    async def tokens(self, tenant: str, document_id: str) -> tuple[array[int], str]:
        """Token ids (without BOS) and cache salt of a document. Raises UnknownDocumentError."""
        document = await self.get(tenant, document_id)
        packed = await asyncio.to_thread(self._records.tokens, document)
        if packed is None:
            raise UnknownDocumentError(document_id)
        return unpack(packed), document.salt

    async def list(self, tenant: str) -> list[Document]:
        """All documents of a tenant, the oldest first."""
        found = await asyncio.to_thread(self._records.all, tenant)
        return sorted(map(self._as_it_stands, found), key=lambda document: document.created)

    async def delete(self, tenant: str, document_id: str) -> int:
        """Forget a document, its records and its KV in every tier; returns the segments deleted. What another
        document shares with it, and has pinned, stays.

        Raises UnknownDocumentError.
        """
        place = tenant, document_id
        async with self._changing:
            document = await self._check(place)
            if document is None:
                raise UnknownDocumentError(document_id)
            held = self._held.held(place)
            packed = held.packed if held else await asyncio.to_thread(self._records.tokens, document)
            await self._end(place)
            await self._held.let_go(place)
            await asyncio.to_thread(self._records.delete, tenant, document_id)
            return await self._held.forget(packed, document.salt) if packed is not None else 0

    async def close(self) -> None:
        """Stop reading. What was not finished is marked failed; its id can still be asked about."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for place in list(self._readings):
            await self._end(place)
        await self._held.close()

    async def _read(self, document: Document, token_ids: array[int]) -> Document | FailedEvent:
        """Have the engine read and store a document; keep its state up to date."""
        place = document.place
        reading = self._readings[place]

        def now(**changes: Any) -> None:
            # A post that joined may have changed its lifetime.
            reading.document = replace(reading.document, **changes)

        request = GenerateRequest(
            request_id=f"document-{uuid.uuid4().hex}",
            token_ids=self._bos + token_ids,
            sampling=SamplingParams(max_new_tokens=0),
            cache_salt=document.salt,
        )
        end: FinishedEvent | FailedEvent | None = None
        kept: Document | None = document
        try:
            async with EngineStream(self._engine, request) as stream:
                while kept is not None and end is None:
                    event = await stream.next(HEARTBEAT_SECONDS)
                    if isinstance(event, FinishedEvent | FailedEvent):
                        end = event
                    elif isinstance(event, ProgressEvent):
                        now(status="reading", done_tokens=event.done_tokens)
                    if time.time() - reading.document.updated > HEARTBEAT_SECONDS:
                        now(updated=time.time())
                        kept = await self._save(reading)
        finally:
            reading.ending = True
            reading.document = _ended(reading.document, end)
            restored = False
            if reading.document.status != "ready":
                await self._held.unpin(place)
                if reading.before is not None and reading.document.created == document.created:  # none joined
                    reading.document = replace(reading.before, created=document.created)
                    restored = True
            saved = None
            while kept is not None and saved != reading.document:  # a post that joins changes its lifetime
                saved, kept = reading.document, await self._save(reading)
            if kept is None:
                await self._held.let_go(place)
                await asyncio.to_thread(self._engine.forget, request.token_ids, document.salt)
            elif restored:
                await self._hold(kept, pack(token_ids))
            self._readings.pop(place, None)
        if kept is None:
            raise asyncio.CancelledError  # as where it is deleted here
        return end if isinstance(end, FailedEvent) else kept

    async def _save(self, reading: _Reading) -> Document | None:
        """Keep the newest state of a reading; the document as it stands then. None: another server has
        deleted or replaced it."""

        async def save() -> Document | None:
            async with reading.saving:
                keep = self._records.finish if reading.ending else self._records.update
                return await asyncio.to_thread(keep, reading.document)

        return await asyncio.shield(save())  # a thread goes on when nobody waits for it any more

    async def _join(self, reading: _Reading, known: Document, posted: Document) -> None:
        """Have a post's lifetime and pin count for what is being read. known: as its record says."""

        def latest(document: Document) -> Document:
            return replace(document, created=posted.created, pinned=posted.pinned, expires=posted.expires)

        reading.document = latest(reading.document)
        async with reading.saving:
            state = latest(known) if known.status == "ready" else reading.document
            await asyncio.to_thread(self._records.save, state)

    async def _find(self, place: Place) -> Document | None:
        reading = self._readings.get(place)
        if reading is not None:
            return reading.document
        document = await asyncio.to_thread(self._records.find, *place)
        return self._as_it_stands(document) if document else None

    def _as_it_stands(self, document: Document) -> Document:
        """The newest state of a document, given what its record says."""
        reading = self._readings.get(document.place)
        if reading is not None:
            return reading.document
        silent_seconds = time.time() - document.updated
        if document.status in ("queued", "reading") and silent_seconds > INTERRUPTED_AFTER_SECONDS:
            return replace(document, status="failed", error=_INTERRUPTED)
        return document

    async def _failed(self, place: Place) -> bool:
        document = await self._find(place)
        return document is None or document.status == "failed"

    async def _end(self, place: Place) -> None:
        """End the reading of a document, if this process reads it."""
        reading = self._readings.get(place)
        if reading is not None:
            if not reading.ending:
                reading.task.cancel()
            await asyncio.wait([reading.task])
            self._readings.pop(place, None)

    async def _hold(self, document: Document, packed: bytes) -> None:
        """Keep a document's tokens, pin it if that is wanted, and see to its end."""
        await asyncio.to_thread(self._records.save_tokens, document, packed)
        await self._held.hold(document, packed)

    async def _expired(self, held: Held) -> None:
        """What expired leaves the tiers too; its records have expired by themselves."""
        expired, place = held.document, held.document.place
        async with self._changing:
            # What a reading here says of it may be older.
            current = await asyncio.to_thread(self._records.find, *place)
            same = current if current and current.digest == expired.digest else None
            if same is not None and same.expires != expired.expires:  # posted again, maybe elsewhere
                self._held.schedule(same, held.packed)
                return
            if current is None or same is not None:  # or else the id is another text's by now
                await self._end(place)
                await self._held.let_go(place)
            deleted = await self._held.forget(held.packed, expired.salt)
        log.info("document expired", document_id=expired.document_id, deleted_segments=deleted)

    async def _watch(self) -> None:
        """Take up what an earlier process held, then let go of what is no more."""
        taken_up = False
        while True:
            try:
                await asyncio.to_thread(self._records.touch)
                if not taken_up:
                    for document in await asyncio.to_thread(self._records.all):
                        if document.pinned or document.expires is not None:
                            async with self._changing:
                                await self._take_up(document.place)
                    taken_up = True
                for place in self._held.places():
                    async with self._changing:
                        await self._check(place)
            except Exception as error:  # of Redis, say; the next round may go better
                log.error("documents not checked", exc_info=error)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _take_up(self, place: Place) -> None:
        """Pin a document, and see to its end, unless it was posted meanwhile."""
        document = await self._find(place)
        if document is None or document.status != "ready" or place in self._held.places():
            return
        packed = await asyncio.to_thread(self._records.tokens, document)
        if packed is not None:
            await self._held.hold(document, packed)

    async def _check(self, place: Place) -> Document | None:
        """A document as it stands in the records. Lets go of what another server has deleted, replaced by
        another text, or unpinned."""
        document, reading = await asyncio.to_thread(self._records.find, *place), self._readings.get(place)
        if reading is not None and (document is None or document.digest != reading.document.digest):
            await self._end(place)  # which forgets it
        held = self._held.held(place)
        if held is None:
            return document
        if document is None or document.digest != held.document.digest:
            await self._held.let_go(place)
            await self._held.forget(held.packed, held.document.salt)
        elif not document.pinned:
            await self._held.unpin(place)
        return document


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
