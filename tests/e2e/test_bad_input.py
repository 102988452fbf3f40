"""What nobody should send is refused with the reason, and the service goes on."""

from __future__ import annotations

from typing import Any

import pytest
from service_process import ServiceProcess

MIB = 1 << 20


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "body"),
        (b'{"inputs": "\xff\xfe"}', 400, "UTF-8"),
        (b'{"inputs": "hello"', 400, "JSON"),
        (b"[]", 422, "body"),
        (b"{}", 422, "inputs"),
        (b'{"inputs": ""}', 422, "inputs"),
        (b'{"inputs": "hello", "docment": "text"}', 422, "docment"),
        (b'{"inputs": "hello", "parameters": {"max_new_tokens": -1}}', 422, "max_new_tokens"),
        (b'{"inputs": "hello", "parameters": {"max_new_tokens": "5"}}', 422, "max_new_tokens"),
        (b'{"inputs": "hello", "parameters": {"max_new_tokens": 100000}}', 422, "4,096"),
        (b'{"inputs": "hello", "document_id": "nobody-posted-this"}', 404, "nobody-posted-this"),
        (b'{"inputs": "hello", "document": "a", "document_id": "b"}', 422, "not both"),
        (b'{"inputs": "hello", "kv": {"mode": "sideways"}}', 422, "kv.mode"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_bad_request_is_refused_with_the_reason(
    plain_service: ServiceProcess, path: str, body: bytes, status: int, says: str
) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "bad-input"}
    response = plain_service.http.post(path, content=body, headers=headers)
    problem: dict[str, Any] = response.json()
    assert (response.status_code, set(problem)) == (status, {"error", "error_type"})
    assert says in problem["error"]
    assert response.headers["X-Request-Id"] == "bad-input"


def test_a_document_far_over_the_limit_is_refused_without_being_held_many_times(
    plain_service: ServiceProcess,
) -> None:
    before = plain_service.peak_memory_bytes
    text = "Fifty megabytes of freight records, of which this is one.\n" * (50 * MIB // 58)
    for path, extra in (("/generate", {"inputs": "How many?"}), ("/documents", {})):
        response = plain_service.http.post(path, json={"document": text, **extra})
        assert response.status_code == 413
        assert "more than 4,095 tokens" in response.json()["error"]
        assert "AQUIFER_MAX_PROMPT_TOKENS" in response.json()["error"]
    assert plain_service.peak_memory_bytes - before < 400 * MIB
    assert plain_service.client.generate("Still there?").generated_tokens > 0
