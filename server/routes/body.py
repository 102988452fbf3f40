"""Reading request bodies of hundreds of megabytes: bounded while they arrive, parsed off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from aquifer.server.routes.errors import ApiError

# Below this, parsing takes less time than handing the work to a thread.
_PARSE_INLINE_BYTES = 64 << 10
# A client that still sends cannot read the refusal; give it this long to finish.
_LINGER_SECONDS = 5.0


class BoundedRequest(Request):
    """A request whose body may be large: refused as soon as it passes the limit."""

    async def body(self) -> bytes:
        """The whole body. Raises ApiError 413 beyond `max_body_bytes`."""
        if not hasattr(self, "_body"):
            limit: int = self.app.state.service.settings.max_body_bytes
            announced = self.headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > limit:
                await self._discard()
                raise _too_large(f"{int(announced):,}", limit)
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit:
                    body.clear()
                    await self._discard()
                    raise _too_large(f"more than {limit:,}", limit)
            # A bytearray serves as bytes everywhere it is used, and json() can empty it.
            self._body = cast(bytes, body)
        return self._body

    async def json(self) -> Any:
        """The body as JSON. Raises ApiError 400 when it is not UTF-8 or not JSON."""
        if not hasattr(self, "_json"):
            body = cast(bytearray, await self.body())
            try:
                if len(body) <= _PARSE_INLINE_BYTES:
                    self._json = orjson.loads(body)
                else:
                    self._json = await asyncio.to_thread(orjson.loads, body)
            except orjson.JSONDecodeError as error:
                raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from None
            # FastAPI keeps the body until the answer is sent; a document need not be held twice.
            body.clear()
        return self._json

    async def _discard(self) -> None:
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                async for _ in self.stream():
                    pass
        except (TimeoutError, ClientDisconnect):
            return


class BodyRoute(APIRoute):
    """A route whose handler gets its body through BoundedRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handle_bounded


def _too_large(size: str, limit: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes; this server takes {limit:,} (AQUIFER_MAX_BODY_BYTES)")
