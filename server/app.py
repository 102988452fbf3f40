"""The application: parts put together, and a server that stops without dropping a request."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
from blake3 import blake3
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from aquifer.cachestore.records import RecordStore
from aquifer.server.document_records import DocumentRecords
from aquifer.server.documents import DocumentConflictError, Documents, UnknownDocumentError
from aquifer.server.metrics import Metrics
from aquifer.server.routes import documents, generate, meta, openai
from aquifer.server.routes.errors import ApiError, install_error_handlers
from aquifer.server.routes.gate import Gate
from aquifer.server.routes.schemas import ServerSentEvent
from aquifer.server.routes.service import Service
from aquifer.server.settings import Settings
from aquifer.server.tokenization import Tokenizer, TooLongError

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine

log = structlog.get_logger(__name__)

_STATUS_OF_ERRORS: dict[type[Exception], int] = {
    TooLongError: 413,
    UnknownDocumentError: 404,
    DocumentConflictError: 409,
}


def create_app(
    engine: Engine, tokenizer: Tokenizer, records: RecordStore, settings: Settings, metrics: Metrics
) -> FastAPI:
    """The HTTP service around an engine. It closes neither engine nor records: whoever built them does."""
    owner = blake3(f"{engine.info.model_fingerprint} {tokenizer.fingerprint}".encode()).hexdigest(length=16)
    known = Documents(engine, DocumentRecords(records, owner), tokenizer.bos)
    service = Service(engine, tokenizer, known, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.documents.start()
        yield
        await service.documents.close()
        tokenizer.close()

    app = FastAPI(
        title="Aquifer",
        summary="Questions about very long documents, answered from a compressed KV cache.",
        version=version("aquifer"),
        lifespan=lifespan,
    )
    app.state.service = service
    metrics.observe(engine)
    install_error_handlers(app)
    for error, status in _STATUS_OF_ERRORS.items():
        app.add_exception_handler(error, _as_status(status))
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    for router in (generate.router, openai.router, documents.router, meta.router):
        app.include_router(router)
    app.openapi = _openapi_with_events(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def serve(app: FastAPI, settings: Settings, port_file: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then accept nothing new, answer what was accepted, and return.

    port_file: gets the port once connections are accepted (of use with port 0). A second SIGINT
    stops at once.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    # uvicorn raises the signal that stopped it once more when it is done; the caller, who still has an
    # engine to close, must not be ended by that.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What is loaded by now stays. Looking through all of it for garbage stops every answer for a quarter of a
    # second, on slow cores; what comes later is little.
    gc.collect()
    gc.freeze()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _AnnouncingServer(config, port_file).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _openapi_with_events(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's OpenAPI page with the schema of stream events, which it cannot find in any route."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        page = generated()
        events = ServerSentEvent.model_json_schema(ref_template="#/components/schemas/{model}")
        page["components"]["schemas"].update(events.pop("$defs") | {"ServerSentEvent": events})
        return page

    return openapi


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, port_file: Path | None) -> None:
        super().__init__(config)
        self._port_file = port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        log.info(
            "listening",
            url=f"http://{self.config.host}:{port}",
            docs=f"http://{self.config.host}:{port}/docs",
        )
        if self._port_file is not None:
            # Renamed into place, so that whoever waits for the file never reads half a number.
            partial = self._port_file.with_name(self._port_file.name + ".partial")
            partial.write_text(str(port))
            os.replace(partial, self._port_file)


def _as_status(status: int) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        return ApiError(status, str(error)).response(request.url.path)

    return handle
