"""`Client` for threads and `AsyncClient` for asyncio: the same methods, the same results.

    with Client("http://localhost:8080") as client:
        document = client.read(text, wait=True)
        answer = client.generate("Who signed?", document_id=document.document_id)

Errors: see errors.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import httpx

from aquifer.clients import protocol
from aquifer.clients.protocol import DEFAULT_TIMEOUT_SECONDS, EventParser, Sampling
from aquifer.clients.types import (
    Answer,
    Document,
    Info,
    Readiness,
    StreamItem,
    answer_from,
    info_from,
    readiness_from,
)


class Client:
    """Talks to one server over a pool of connections. Thread-safe; close it, or use `with`."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    ) -> None:
        """timeout_seconds: of silence, not of the whole answer."""
        self._url = url
        self._http = httpx.Client(base_url=url, headers=protocol.headers(api_key), timeout=timeout_seconds)

    def generate(
        self,
        inputs: str,
        *,
        document: str | None = None,
        document_id: str | None = None,
        sampling: Sampling = Sampling(),
        mode: str | None = None,
        budget: float | None = None,
        cache_salt: str | None = None,
    ) -> Answer:
        """Ask about a document: its text, or the id of one that was read before.

        mode, budget: how its KV is read while answering, as in the `kv` of a request; None: the server's way.
        """
        body = protocol.generate_body(
            inputs,
            document=document,
            document_id=document_id,
            sampling=sampling,
            mode=mode,
            budget=budget,
            cache_salt=cache_salt,
        )
        data = self._call("POST", "/generate", body)
        return answer_from(data["generated_text"], data["details"])

    def generate_stream(
        self,
        inputs: str,
        *,
        document: str | None = None,
        document_id: str | None = None,
        sampling: Sampling = Sampling(),
        mode: str | None = None,
        budget: float | None = None,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> Iterator[StreamItem]:
        """Tokens as they come, then the Answer; with `progress`, how far the reading is before them.

        Leaving the iteration early (closing it) cancels the request on the server.
        """
        body = protocol.generate_body(
            inputs,
            document=document,
            document_id=document_id,
            sampling=sampling,
            mode=mode,
            budget=budget,
            cache_salt=cache_salt,
            stream_progress=progress,
        )
        try:
            with self._http.stream("POST", "/generate_stream", json=body) as response:
                if response.status_code >= 400:
                    response.read()
                    raise protocol.refusal(response)
                parser = EventParser(response.headers.get("x-request-id"))
                for line in response.iter_lines():
                    yield from parser.feed(line)
                parser.check_finished()
        except httpx.TransportError as error:
            raise protocol.connection_failed(self._url, error) from error

    def read(
        self,
        document: str | None = None,
        *,
        token_ids: list[int] | None = None,
        document_id: str | None = None,
        pin: bool = False,
        ttl_seconds: float | None = None,
        wait: bool = False,
        cache_salt: str | None = None,
    ) -> Document:
        """Have a document read and kept. Returns at once unless `wait`; then poll `document()`."""
        body = protocol.document_body(
            document,
            token_ids=token_ids,
            document_id=document_id,
            pin=pin,
            ttl_seconds=ttl_seconds,
            wait=wait,
            cache_salt=cache_salt,
        )
        return Document(**self._call("POST", "/documents", body))

    def document(self, document_id: str) -> Document:
        """State of a document. Raises NotFoundError."""
        return Document(**self._call("GET", f"/documents/{document_id}"))

    def documents(self) -> list[Document]:
        """All documents of this key's tenant, the oldest first."""
        return [Document(**data) for data in self._call("GET", "/documents")["documents"]]

    def delete(self, document_id: str) -> int:
        """Forget a document in every tier; returns the segments deleted. Raises NotFoundError."""
        return int(self._call("DELETE", f"/documents/{document_id}")["deleted_segments"])

    def info(self) -> Info:
        return info_from(self._call("GET", "/info"))

    def ready(self) -> Readiness:
        """Readiness, also when the answer is no; no server at all is a ConnectionFailedError."""
        return readiness_from(self._call("GET", "/ready", accept=(503,)))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, accept: tuple[int, ...] = ()
    ) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise protocol.connection_failed(self._url, error) from error
        return protocol.checked(response, accept=accept)


class AsyncClient:
    """As Client, with coroutines. Close it, or use `async with`."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    ) -> None:
        """timeout_seconds: of silence, not of the whole answer."""
        self._url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=protocol.headers(api_key),
            timeout=timeout_seconds,
            # A load test opens hundreds; the caller decides how many, not the pool.
            limits=httpx.Limits(max_connections=None),
        )

    async def generate(
        self,
        inputs: str,
        *,
        document: str | None = None,
        document_id: str | None = None,
        sampling: Sampling = Sampling(),
        mode: str | None = None,
        budget: float | None = None,
        cache_salt: str | None = None,
    ) -> Answer:
        """Ask about a document: its text, or the id of one that was read before."""
        body = protocol.generate_body(
            inputs,
            document=document,
            document_id=document_id,
            sampling=sampling,
            mode=mode,
            budget=budget,
            cache_salt=cache_salt,
        )
        data = await self._call("POST", "/generate", body)
        return answer_from(data["generated_text"], data["details"])

    async def generate_stream(
        self,
        inputs: str,
        *,
        document: str | None = None,
        document_id: str | None = None,
        sampling: Sampling = Sampling(),
        mode: str | None = None,
        budget: float | None = None,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> AsyncIterator[StreamItem]:
        """Tokens as they come, then the Answer; with `progress`, how far the reading is before them."""
        body = protocol.generate_body(
            inputs,
            document=document,
            document_id=document_id,
            sampling=sampling,
            mode=mode,
            budget=budget,
            cache_salt=cache_salt,
            stream_progress=progress,
        )
        try:
            async with self._http.stream("POST", "/generate_stream", json=body) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise protocol.refusal(response)
                parser = EventParser(response.headers.get("x-request-id"))
                async for line in response.aiter_lines():
                    for item in parser.feed(line):
                        yield item
                parser.check_finished()
        except httpx.TransportError as error:
            raise protocol.connection_failed(self._url, error) from error

    async def read(
        self,
        document: str | None = None,
        *,
        token_ids: list[int] | None = None,
        document_id: str | None = None,
        pin: bool = False,
        ttl_seconds: float | None = None,
        wait: bool = False,
        cache_salt: str | None = None,
    ) -> Document:
        """Have a document read and kept. Returns at once unless `wait`; then poll `document()`."""
        body = protocol.document_body(
            document,
            token_ids=token_ids,
            document_id=document_id,
            pin=pin,
            ttl_seconds=ttl_seconds,
            wait=wait,
            cache_salt=cache_salt,
        )
        return Document(**await self._call("POST", "/documents", body))

    async def document(self, document_id: str) -> Document:
        """State of a document. Raises NotFoundError."""
        return Document(**await self._call("GET", f"/documents/{document_id}"))

    async def documents(self) -> list[Document]:
        """All documents of this key's tenant, the oldest first."""
        return [Document(**data) for data in (await self._call("GET", "/documents"))["documents"]]

    async def delete(self, document_id: str) -> int:
        """Forget a document in every tier; returns the segments deleted. Raises NotFoundError."""
        return int((await self._call("DELETE", f"/documents/{document_id}"))["deleted_segments"])

    async def info(self) -> Info:
        return info_from(await self._call("GET", "/info"))

    async def ready(self) -> Readiness:
        """Readiness, also when the answer is no; no server at all is a ConnectionFailedError."""
        return readiness_from(await self._call("GET", "/ready", accept=(503,)))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, accept: tuple[int, ...] = ()
    ) -> Any:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise protocol.connection_failed(self._url, error) from error
        return protocol.checked(response, accept=accept)
