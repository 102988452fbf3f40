"""What goes wrong, as HTTP: one envelope per dialect, as TGI's and OpenAI's clients expect them.

HTTPException (starlette)
└── ApiError    a refusal with its status, error type, message and headers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from aquifer.server.engine.types import FailedEvent

OPENAI_PREFIX = "/v1/"
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


class OpenAIProblemDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIProblem(BaseModel):
    """Every answer of /v1 that is not a success."""

    error: OpenAIProblemDetail


class ApiError(HTTPException):
    """A refusal. The message names the number and the way out; param is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.error_type = error_type or _TYPES_BY_STATUS.get(status, "error")
        self.param = param

    def envelope(self, path: str) -> dict[str, Any]:
        """The body that clients of this path's dialect understand."""
        if not path.startswith(OPENAI_PREFIX):
            return {"error": self.detail, "error_type": self.error_type}
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status_code)
        kind = kind or ("server_error" if self.status_code >= 500 else "invalid_request_error")
        code = "context_length_exceeded" if self.error_type == "too_long" else self.error_type
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": code}}

    def response(self, path: str) -> JSONResponse:
        # OpenAI's clients know no 422.
        is_openai_validation = self.status_code == 422 and path.startswith(OPENAI_PREFIX)
        status = 400 if is_openai_validation else self.status_code
        return JSONResponse(self.envelope(path), status, self.headers)


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


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": OpenAIProblem} for status in statuses}


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what this server answers"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response(request.url.path)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors(), request).response(request.url.path)


def invalid(errors: Sequence[Mapping[str, Any]], request: Request) -> ApiError:
    """pydantic's findings as one refusal."""
    if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
        return ApiError(422, "the body must be JSON: send it with Content-Type: application/json")
    return ApiError(422, "; ".join(_sentence(item) for item in errors), param=_place(errors[0]))


def _sentence(item: Mapping[str, Any]) -> str:
    """`parameters.top_p: Input should be less than or equal to 1 (got 7)`"""
    text = f"{_place(item)}: {str(item['msg']).removeprefix('Value error, ')}"
    got = item.get("input")
    # Never echo a document, only what fits in a line.
    if isinstance(got, bool | int | float) or (isinstance(got, str) and len(got) <= 80):
        text += f" (got {got!r})"
    return text


def _place(item: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in item["loc"] if part != "body") or "body"
