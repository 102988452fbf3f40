"""What can go wrong between a client and a server.

AquiferError
├── ConnectionFailedError    no server there, or the connection broke
└── ApiError                 the server said no: status, error_type, message, request_id
    ├── InvalidRequestError  400, 409, 422: this request is wrong; sending it again will not help
    ├── UnauthorizedError    401
    ├── NotFoundError        404: an unknown document, mostly
    ├── TooLongError         413
    ├── OverloadedError      429, 503: try again after `retry_after_seconds`
    └── ServerFailedError    500 and above; also an answer that broke off
"""

from __future__ import annotations

import json


class AquiferError(Exception):
    """Base of everything these clients raise."""


class ConnectionFailedError(AquiferError):
    """No server there, or the connection broke. The cause is the httpx error."""


class ApiError(AquiferError):
    """The server's refusal; str() is its message."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        error_type: str,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(ApiError):
    pass


class UnauthorizedError(ApiError):
    pass


class NotFoundError(ApiError):
    pass


class TooLongError(ApiError):
    pass


class OverloadedError(ApiError):
    pass


class ServerFailedError(ApiError):
    pass


_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequestError,
    401: UnauthorizedError,
    404: NotFoundError,
    409: InvalidRequestError,
    413: TooLongError,
    422: InvalidRequestError,
    429: OverloadedError,
    503: OverloadedError,
}


def error_from_answer(status: int, body: bytes, request_id: str | None, retry_after: str | None) -> ApiError:
    """The exception for a status of 400 or above."""
    try:
        envelope = json.loads(body)
        message, error_type = str(envelope["error"]), str(envelope["error_type"])
    except (ValueError, KeyError, TypeError):
        # A proxy answered, not the server.
        message, error_type = f"HTTP {status}: {body[:200].decode(errors='replace')}", "unknown"
    return _BY_STATUS.get(status, ServerFailedError)(
        message,
        status=status,
        error_type=error_type,
        request_id=request_id,
        retry_after_seconds=float(retry_after) if retry_after and retry_after.isdecimal() else None,
    )


def error_in_stream(message: str, error_type: str, request_id: str | None) -> ServerFailedError:
    """The exception for an answer that broke off after its status line."""
    return ServerFailedError(message, status=500, error_type=error_type, request_id=request_id)
