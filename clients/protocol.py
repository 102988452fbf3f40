"""What goes over the wire, without the wire: request bodies out, typed results in.

Both clients are thin shells around this; only how bytes travel differs between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from aquifer.clients.errors import (
    ConnectionFailedError,
    ServerFailedError,
    error_from_answer,
    error_in_stream,
)
from aquifer.clients.types import Progress, StreamItem, Token, answer_from

# Reading a long document takes minutes; the server's pings show that it is alive.
DEFAULT_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Sampling:
    """The `parameters` of a request; what is None is left to the server."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


def generate_body(
    inputs: str,
    *,
    document: str | None,
    document_id: str | None,
    sampling: Sampling,
    mode: str | None,
    budget: float | None,
    cache_salt: str | None,
    stream_progress: bool = False,
) -> dict[str, Any]:
    kv = {name: value for name, value in (("mode", mode), ("budget", budget)) if value is not None}
    parameters = {name: value for name, value in vars(sampling).items() if value is not None}
    parameters["stop"] = list(sampling.stop)
    body = {
        "inputs": inputs,
        "document": document,
        "document_id": document_id,
        "parameters": parameters,
        "kv": kv or None,
        "cache_salt": cache_salt,
        "stream_progress": stream_progress,
    }
    return {name: value for name, value in body.items() if value is not None}


def document_body(
    document: str | None,
    *,
    token_ids: list[int] | None,
    document_id: str | None,
    pin: bool,
    ttl_seconds: float | None,
    wait: bool,
    cache_salt: str | None,
) -> dict[str, Any]:
    body = {
        "document": document,
        "token_ids": token_ids,
        "document_id": document_id,
        "pin": pin,
        "ttl_seconds": ttl_seconds,
        "wait": wait,
        "cache_salt": cache_salt,
    }
    return {name: value for name, value in body.items() if value is not None}


def headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def checked(response: httpx.Response, *, accept: tuple[int, ...] = ()) -> Any:
    """The JSON of an answer that was read. Raises ApiError unless it is a success or in `accept`."""
    if response.status_code >= 400 and response.status_code not in accept:
        raise refusal(response)
    return response.json()


def refusal(response: httpx.Response) -> Exception:
    return error_from_answer(
        response.status_code,
        response.content,
        response.headers.get("x-request-id"),
        response.headers.get("retry-after"),
    )


def connection_failed(url: str, error: httpx.TransportError) -> ConnectionFailedError:
    return ConnectionFailedError(f"{url}: {error or type(error).__name__}")


@dataclass
class EventParser:
    """Turns the lines of an event stream into items; `finished` once the last one was seen."""

    request_id: str | None
    finished: bool = False
    _event: str = field(default="message")

    def feed(self, line: str) -> list[StreamItem]:
        """Raises ServerFailedError when the line says that the answer broke off."""
        if line.startswith("event:"):
            self._event = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            return self._items(json.loads(line.removeprefix("data:")))
        elif not line:
            self._event = "message"
        return []

    def check_finished(self) -> None:
        if not self.finished:
            raise ServerFailedError(
                "the stream ended before the answer did",
                status=500,
                error_type="incomplete_generation",
                request_id=self.request_id,
            )

    def _items(self, data: Mapping[str, Any]) -> list[StreamItem]:
        if self._event == "progress":
            return [Progress(**data)]
        if "error" in data:
            raise error_in_stream(data["error"], data["error_type"], self.request_id)
        items: list[StreamItem] = [Token(**data["token"])]
        if data["generated_text"] is not None:
            self.finished = True
            items.append(answer_from(data["generated_text"], data["details"]))
        return items
