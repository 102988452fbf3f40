"""Whatever is sent, the answer is a 4xx with a message that helps, and the service goes on."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_service import RunningService, running_service
from tiny_tokenizer import tiny_tokenizer

MIB = 1 << 20
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(FakeEngine(tiny_tokenizer().decode), max_body_bytes=64 * MIB) as running:
        yield running


def refused(response: httpx.Response, status: int, error_type: str, *words: str) -> str:
    assert response.status_code == status, response.text
    envelope = response.json()
    assert set(envelope) == {"error", "error_type"}
    assert envelope["error_type"] == error_type
    for word in words:
        assert word in envelope["error"], envelope["error"]
    return str(envelope["error"])


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/documents", "/tokenize"])
@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, ["body", "required"]),
        (b"{", 400, ["not JSON"]),
        (b"\xff\xfe{}", 400, ["UTF-8"]),
        (b'{"inputs": "caf\xe9"}', 400, ["UTF-8"]),
        (b'{"inputs": "\\ud800"}', 400, ["not JSON"]),
        (b'{"inputs": NaN}', 400, ["not JSON"]),
        (b"[" * 100_000, 400, ["not JSON"]),
        (b"[]", 422, ["body"]),
        (b'"text"', 422, ["body"]),
        (b"null", 422, ["body"]),
        (b"{}", 422, []),
    ],
)
def test_bodies_that_are_no_request(
    service: RunningService, path: str, content: bytes, status: int, words: list[str]
) -> None:
    response = service.http.post(path, content=content, headers=JSON)
    refused(response, status, {400: "bad_request", 422: "validation"}[status], *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": ""}, ["inputs", "at least 1 character"]),
        ({"inputs": 5}, ["inputs", "string", "(got 5)"]),
        ({"inputs": ["a"]}, ["inputs", "string"]),
        ({"inputs": None}, ["inputs"]),
        ({"inputs": "a", "document": ""}, ["document"]),
        ({"inputs": "a", "document": "x", "document_id": "y"}, ["document or document_id, not both"]),
        ({"inputs": "a", "document_id": "../etc/passwd"}, ["document_id", "pattern"]),
        ({"inputs": "a", "prompt": "b"}, ["prompt", "not permitted"]),
        ({"inputs": "a", "parameters": {"max_tokens": 3}}, ["parameters.max_tokens", "not permitted"]),
        ({"inputs": "a", "parameters": []}, ["parameters"]),
        ({"inputs": "a", "stream": "yes"}, ["stream", "boolean"]),
        ({"inputs": "a", "cache_salt": "s" * 257}, ["cache_salt"]),
        ({"inputs": "a", "kv": {"mode": "magic"}}, ["kv.mode"]),
        ({"inputs": "a", "kv": {"mode": "magic"}}, ["kv.mode", "'selective'"]),
        ({"inputs": "a", "kv": {"budget": 0}}, ["kv.budget", "greater than 0"]),
        ({"inputs": "a", "kv": {"budget": 1.5}}, ["kv.budget", "less than or equal to 1"]),
        ({"inputs": "a", "kv": {"mode": "streamed", "budget": 0.03}}, ["kv.budget", "no effect"]),
    ],
)
def test_bodies_with_a_wrong_field(service: RunningService, body: dict[str, Any], words: list[str]) -> None:
    refused(service.http.post("/generate", json=body), 422, "validation", *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 10**30),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "5"),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 7),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", "END"),
        ("stop", [""]),
        ("stop", [5]),
        ("stop", ["x"] * 17),
        ("truncate", 0),
        ("details", "no"),
        ("best_of", 2),
        ("typical_p", 0.5),
        ("watermark", True),
        ("decoder_input_details", True),
        ("top_n_tokens", 3),
        ("grammar", {"type": "json"}),
        ("adapter_id", "lora"),
        ("frequency_penalty", 0.5),
    ],
)
def test_parameters_that_are_wrong_absurd_or_not_supported(
    service: RunningService, name: str, value: Any
) -> None:
    response = service.post("/generate", inputs="a", parameters={name: value})
    refused(response, 422, "validation", f"parameters.{name}")


def test_more_new_tokens_than_fit_names_how_many_do(service: RunningService) -> None:
    response = service.post("/generate", inputs="a", parameters={"max_new_tokens": 4095})
    refused(response, 422, "validation", "max_new_tokens", "4,096", "at most 4,094")


def test_a_prompt_over_the_limit_names_the_setting(service: RunningService) -> None:
    for path in ("/generate", "/generate_stream"):
        response = service.post(path, inputs="why? " * 2000)
        refused(response, 413, "too_long", "this server takes 4,000", "AQUIFER_MAX_PROMPT_TOKENS")
    response = service.post("/documents", token_ids=[1] * 4000)
    refused(response, 413, "too_long", "4,001 tokens", "AQUIFER_MAX_PROMPT_TOKENS")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"document": "a", "token_ids": [1]}, ["one of them"]),
        ({"token_ids": []}, ["token_ids"]),
        ({"token_ids": [-1]}, ["token_ids.0"]),
        ({"token_ids": [1, 299]}, ["299", "vocabulary"]),
        ({"token_ids": [10**12]}, ["vocabulary"]),
        ({"token_ids": [1.5]}, ["token_ids.0"]),
        ({"document": "a", "ttl_seconds": 0}, ["ttl_seconds"]),
        ({"document": "a", "ttl_seconds": -5}, ["ttl_seconds"]),
        ({"document": "a", "ttl_seconds": 1e300}, ["ttl_seconds"]),
        ({"document": "a", "document_id": ""}, ["document_id"]),
        ({"document": "a", "document_id": "a b"}, ["document_id"]),
        ({"document": "a", "document_id": ".."}, ["document_id"]),
        ({"document": "a", "pin": "yes"}, ["pin"]),
        ({"document": "a", "name": "x"}, ["name"]),
    ],
)
def test_documents_with_a_wrong_field(
    service: RunningService, body: dict[str, Any], words: list[str]
) -> None:
    refused(service.http.post("/documents", json=body), 422, "validation", *words)


def test_an_unknown_document_is_a_404_with_the_way_out(service: RunningService) -> None:
    for response in (
        service.post("/generate", inputs="a", document_id="contract-17"),
        service.http.get("/documents/contract-17"),
        service.http.delete("/documents/contract-17"),
    ):
        refused(response, 404, "not_found", "'contract-17'", "post its text to /documents again")


def test_messages_do_not_echo_what_was_sent_at_length(service: RunningService) -> None:
    message = refused(service.post("/generate", inputs="a", kv="k" * 100_000), 422, "validation", "kv")
    assert len(message) < 500


@pytest.mark.parametrize("body", [{"data": {"inputs": "a"}}, {"content": b'{"inputs": "a"}'}])
def test_a_form_or_no_type_is_refused_with_a_word_about_json(
    body: dict[str, Any], service: RunningService
) -> None:
    refused(service.http.post("/generate", **body), 422, "validation", "Content-Type: application/json")


def test_unknown_paths_and_methods_have_the_envelope(service: RunningService) -> None:
    refused(service.http.get("/generrate"), 404, "not_found", "/docs")
    refused(service.http.get("/generate"), 405, "method_not_allowed", "GET /generate")


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_over_the_limit_is_refused_while_it_arrives(announced: bool) -> None:
    with running_service(FakeEngine(tiny_tokenizer().decode), max_body_bytes=MIB) as service:
        body = json.dumps({"inputs": "x" * 3 * MIB}).encode()
        content = body if announced else (body[at : at + 65536] for at in range(0, len(body), 65536))
        response = service.http.post("/generate", content=content, headers=JSON)
        refused(response, 413, "too_long", "1,048,576", "AQUIFER_MAX_BODY_BYTES")


def test_fifty_megabytes_over_the_token_limit_are_refused_in_bounded_memory(
    service: RunningService,
) -> None:
    body = json.dumps({"inputs": "why?", "document": "The crate weighs 12 kg. " * (50 * MIB // 24)}).encode()
    pieces = (body[at : at + MIB] for at in range(0, len(body), MIB))  # else the client copies what is left
    headers = {**JSON, "Content-Length": str(len(body))}
    with _PeakRss() as peak:
        refused(service.http.post("/generate", content=pieces, headers=headers), 413, "too_long", "4,000")
    # The body (assembled from its chunks, hence up to twice), its text, and little else.
    assert peak.grown_bytes < 4 * len(body)
    assert service.post("/generate", inputs="still there?").status_code == 200


def test_a_body_that_breaks_off_does_no_harm(service: RunningService) -> None:
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert service.post("/generate", inputs="a").status_code == 200


class _PeakRss:
    """The most memory this process grew by, sampled every few milliseconds."""

    def __enter__(self) -> _PeakRss:
        self._before = self._peak = _rss_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self._peak = max(self._peak, _rss_bytes())


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
