"""What goes wrong, as HTTP: one envelope, `{"error", "error_type"}`, as TGI's clients expect it.

HTTPException (starlette)
└── ApiError    a refusal with its status, error type, message and headers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from aquifer.server.engine.types import FailedEvent

RETRY_AFTER_SECONDS = 5
_TYPES_BY_STATUS = {
    400: "bad_request",
    401: "authentication",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_long",
    422: "validation",
    429: "overloaded",
    499: "client_left",
    500: "internal",
    503: "unavailable",
}
_FAILURES = {
    "too_long": (413, "too_long"),
    "overloaded": (429, "overloaded"),
    "shutting_down": (503, "unavailable"),
    "internal": (500, "generation"),
}


class Problem(BaseModel):
    """Every answer that is not a success."""

    error: str
    error_type: str


class ApiError(HTTPException):
    """A refusal. The message names the number and the way out."""

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.error_type = error_type or _TYPES_BY_STATUS.get(status, "error")

    @property
    def envelope(self) -> dict[str, str]:
        return {"error": self.detail, "error_type": self.error_type}

    def response(self) -> JSONResponse:
        return JSONResponse(self.envelope, self.status_code, self.headers)


def failure(event: FailedEvent) -> ApiError:
    """The engine's refusal as an HTTP error."""
    status, error_type = _FAILURES[event.kind]
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
    return ApiError(status, event.message, error_type, headers)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route, for the OpenAPI page."""
    return {status: {"model": Problem} for status in statuses}


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what this server answers"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if request.method == "POST" and "json" not in request.headers.get("content-type", "application/json"):
        message = "the body must be JSON: send it with Content-Type: application/json"
    else:
        message = "; ".join(_sentence(item) for item in error.errors())
    return ApiError(422, message).response()


def _sentence(item: Mapping[str, Any]) -> str:
    """`parameters.top_p: Input should be less than or equal to 1 (got 7)`"""
    place = ".".join(str(part) for part in item["loc"] if part != "body") or "body"
    text = f"{place}: {str(item['msg']).removeprefix('Value error, ')}"
    got = item.get("input")
    # Never echo a document, only what fits in a line.
    if isinstance(got, bool | int | float) or (isinstance(got, str) and len(got) <= 80):
        text += f" (got {got!r})"
    return text
