"""Python clients of an Aquifer server: one for threads, one for asyncio, and a load generator."""

from aquifer.clients.client import AsyncClient, Client
from aquifer.clients.errors import (
    ApiError,
    AquiferError,
    ConnectionFailedError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerFailedError,
    TooLongError,
    UnauthorizedError,
)
from aquifer.clients.protocol import Sampling
from aquifer.clients.types import (
    Answer,
    CachedTokens,
    Document,
    Drafts,
    FinishReason,
    Info,
    KVUsage,
    Progress,
    Readiness,
    StreamItem,
    Timings,
    Token,
)

__all__ = [
    "Answer",
    "ApiError",
    "AquiferError",
    "AsyncClient",
    "CachedTokens",
    "Client",
    "ConnectionFailedError",
    "Document",
    "Drafts",
    "FinishReason",
    "Info",
    "InvalidRequestError",
    "KVUsage",
    "NotFoundError",
    "OverloadedError",
    "Progress",
    "Readiness",
    "Sampling",
    "ServerFailedError",
    "StreamItem",
    "Timings",
    "Token",
    "TooLongError",
    "UnauthorizedError",
]
