"""What every request passes, before its body is read: its id, its key, its line in log and metrics."""

from __future__ import annotations

import hmac
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aquifer.server.metrics import Metrics
from aquifer.server.routes.errors import ApiError
from aquifer.server.settings import Settings

log = structlog.get_logger(__name__)

PROBES = ("/health", "/ready", "/metrics")
_GOOD_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware. Leaves `request_id` and `tenant` in the request's state.

    Plain ASGI and not starlette's BaseHTTPMiddleware, because that one hides the client's leaving
    from the handlers. Keys are checked here and not in a dependency, because FastAPI reads the body
    before it runs dependencies.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _GOOD_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            tenant = self._tenant(scope["path"], headers)
            if tenant is None:
                await _unauthorized().response(scope["path"])(scope, receive, send_with_id)
            else:
                state["tenant"] = tenant
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request failed", request_id=request_id, path=scope["path"])
            if status is not None:
                # The answer has begun; closing the connection is all that can still be said.
                raise
            message = f"internal error: {type(error).__name__}; the log has it under request id {request_id}"
            await ApiError(500, message).response(scope["path"])(scope, receive, send_with_id)
        finally:
            if scope["path"] not in PROBES:
                self._count(scope, state.get("outcome", status or 499), time.perf_counter() - started)

    def _tenant(self, path: str, headers: Headers) -> str | None:
        """Who asks: "" when no keys are set or none is needed here, None when refused."""
        keys = self._settings.api_keys
        if not keys or path in ("/health", "/ready"):
            return ""
        if path == "/metrics" and not self._settings.metrics_need_key:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        # Every key is compared, each in constant time: how long it takes tells nothing about them.
        found = [tenant for known, tenant in keys.items() if _same(known, key.strip())]
        return found[0] if found else None

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        self._metrics.requests.labels(status=str(status)).inc()
        self._metrics.e2e_request_latency_seconds.observe(seconds)
        log.info(
            "request",
            request_id=scope["state"]["request_id"],
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
        )


def _same(known: str, given: str) -> bool:
    return hmac.compare_digest(known.encode(), given.encode("latin-1"))  # the bytes that came


def _unauthorized() -> ApiError:
    message = "this server needs a key: send Authorization: Bearer KEY"
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
