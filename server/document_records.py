"""What is kept of a document, and what of that is believed.

Two small records in the record store (Redis when there is one): the document's token ids, compressed, so that
evicted KV can be recomputed after a restart or by another server, and its state. Token ids mean something to
one model and tokenizer only, so the names of records begin with these: servers of other models may share
the Redis. A record that is damaged, or another document's, counts as missing.
"""

from __future__ import annotations

import time
import zlib
from array import array
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

import orjson
import structlog
from blake3 import blake3
from pydantic import TypeAdapter, ValidationError

from aquifer.cachestore.records import RecordStore

log = structlog.get_logger(__name__)

DocumentStatus = Literal["queued", "reading", "ready", "failed"]
ID_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"
"""No dot in front: a path that ends in `.` or `..` is another one to most clients."""

Place = tuple[str, str]
"""Tenant and id of a document."""


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
    def place(self) -> Place:
        return self.tenant, self.document_id

    @property
    def progress(self) -> float:
        return 1.0 if self.status == "ready" else self.done_tokens / self.tokens


_documents = TypeAdapter(Document)


class DocumentRecords:
    """The records of all tenants' documents. Calls may wait for Redis."""

    def __init__(self, records: RecordStore, owner: str) -> None:
        """owner: whose token ids they are, a digest of model and tokenizer."""
        self._records, self._prefix = records, f"documents/{owner}/"

    def save(self, document: Document) -> None:
        """Keep a state for the rest of the document's lifetime."""
        self._put(document, "state", orjson.dumps(asdict(document)))

    def update(self, document: Document) -> Document | None:
        """Keep the newest state of a reading, and return the document as it stands now. None: meanwhile it
        was deleted, or replaced by another text.

        Servers that were given the same text all read it. The first to be ready says so for all of them;
        until then the state is that of the latest post, whose lifetime and pin count in any case.
        """
        known = self.find(*document.place)
        if known is None or known.digest != document.digest:
            return None
        latest = document if document.created == known.created else known
        state = known if known.status == "ready" else document if document.status == "ready" else latest
        now = replace(state, created=latest.created, pinned=latest.pinned, expires=latest.expires)
        if now != known:
            self.save(now)
        return now

    def finish(self, document: Document) -> Document | None:
        """As `update`, at the end of a reading: a document whose tokens are gone was deleted, too."""
        now = self.update(document)
        if now is None or self.tokens(now) is not None:
            return now
        self._delete_state(*now.place)
        return None

    def save_tokens(self, document: Document, packed: bytes) -> None:
        """Keep a document's tokens, as `pack` gives them, as long. Raises ValueError if they are too many."""
        self._put(document, "tokens", packed)

    def find(self, tenant: str, document_id: str) -> Document | None:
        return self._parsed(self._name(tenant, "state", document_id))

    def tokens(self, document: Document) -> bytes | None:
        """The packed tokens of just this document."""
        name = self._name(document.tenant, "tokens", document.document_id)
        packed = self._records.get(name)
        if packed is not None and not _are_of(packed, document):
            log.warning("record refused", name=name, reason="these are not the document's tokens")
            return None
        return packed

    def delete(self, tenant: str, document_id: str) -> None:
        # In this order: whoever writes the state meanwhile finds no tokens afterwards.
        self._records.delete(self._name(tenant, "tokens", document_id))
        self._delete_state(tenant, document_id)

    def all(self, tenant: str | None = None) -> list[Document]:
        """All documents, or those of one tenant."""
        prefix = self._prefix if tenant is None else self._name(tenant, "state", "")
        names = [name for name in self._records.list(prefix) if name.split("/")[3] == "state"]
        return [document for name in names if (document := self._parsed(name))]

    def touch(self) -> None:
        """To be called now and then, see RecordStore.touch."""
        self._records.touch()

    def _delete_state(self, tenant: str, document_id: str) -> None:
        self._records.delete(self._name(tenant, "state", document_id))

    def _put(self, document: Document, part: str, blob: bytes) -> None:
        lifetime = None if document.expires is None else document.expires - time.time()
        if lifetime is None or lifetime > 0:
            self._records.put(self._name(document.tenant, part, document.document_id), blob, lifetime)

    def _parsed(self, name: str) -> Document | None:
        blob = self._records.get(name)
        if blob is None:
            return None
        try:
            document = _documents.validate_json(blob, strict=True)
        except ValidationError as error:
            log.warning("record refused", name=name, reason=str(error))
            return None
        if self._name(document.tenant, "state", document.document_id) != name:
            log.warning("record refused", name=name, reason="another document's")
            return None
        return document

    def _name(self, tenant: str, part: str, document_id: str) -> str:
        """Name of a record. The tenant is hashed: it may hold any characters."""
        return f"{self._prefix}{blake3(tenant.encode()).hexdigest(length=16)}/{part}/{document_id}"


def pack(token_ids: array[int]) -> bytes:
    """Token ids as a blob: 32-bit integers, deflated (about 1.5 bytes per token of prose)."""
    return zlib.compress(token_ids.tobytes(), 1)


@lru_cache(maxsize=32)
def unpack(packed: bytes) -> array[int]:
    """Token ids of a blob, to be read only: every question about a document asks for them, and inflating
    131,072 takes 2 ms."""
    return array("i", zlib.decompress(packed))


def digest_of(token_ids: array[int], salt: str) -> str:
    """Of the tokens, not of the blob: other versions of zlib deflate them to other bytes."""
    return blake3(token_ids.tobytes() + salt.encode()).hexdigest()


def _are_of(packed: bytes, document: Document) -> bool:
    try:
        return digest_of(unpack(packed), document.salt) == document.digest
    except (zlib.error, ValueError):  # no blob of ours
        return False
