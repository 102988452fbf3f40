"""/generate and /generate_stream over real HTTP: shapes, sampling, tenants, leaving clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import EOS, FakeEngine
from http_service import RunningService, running_service
from huggingface_hub import InferenceClient
from tiny_tokenizer import ids, tiny_tokenizer

from aquifer.server.engine.types import FailedEvent

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(TOKENIZER.decode)


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine, ping_seconds=0.05) as running:
        yield running


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of every plain `data:` event."""
    blocks = [block for block in text.split("\n\n") if block.startswith("data:")]
    return [json.loads(block.removeprefix("data:")) for block in blocks]


def test_answer_has_text_and_details(service: RunningService) -> None:
    answer = service.post("/generate", inputs="Which crate?", document="Crate 12 left. ").json()
    assert answer["generated_text"] == "Crate 12 left. Which crate?"
    details = answer["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["prompt_tokens"] == 1 + len(ids("Crate 12 left. ")) + len(ids("Which crate?"))
    assert details["generated_tokens"] == len(details["tokens"])
    assert details["tokens"][-1] == {"id": EOS, "text": "", "logprob": -0.5, "special": True}
    assert details["cached_tokens"] == {"gpu": 0, "ram": 0, "redis": 0}
    assert details["kv"]["bits_per_value"] == 4.0
    assert details["timings"]["tokenize_seconds"] > 0


def test_document_and_inputs_are_tokenized_apart(service: RunningService, engine: FakeEngine) -> None:
    service.post("/generate", inputs="rates", document="crat")
    assert engine.requests[0].token_ids == (0, *ids("crat"), *ids("rates"))


def test_details_are_left_out_on_request(service: RunningService) -> None:
    answer = service.post("/generate", inputs="a", parameters={"details": False}).json()
    assert answer == {"generated_text": "a", "details": None}


def test_return_full_text_begins_with_the_inputs(service: RunningService) -> None:
    answer = service.post("/generate", inputs="ab", parameters={"return_full_text": True}).json()
    assert answer["generated_text"] == "abab"


def test_stream_has_one_event_per_token_and_the_text_in_the_last(service: RunningService) -> None:
    response = service.post("/generate_stream", inputs="crate 12")
    assert response.headers["content-type"].startswith("text/event-stream")
    stream = events(response.text)
    assert [event["index"] for event in stream] == list(range(1, len(stream) + 1))
    assert all(event["generated_text"] is None and event["details"] is None for event in stream[:-1])
    assert "".join(event["token"]["text"] for event in stream) == "crate 12"
    assert stream[-1]["generated_text"] == "crate 12"
    assert stream[-1]["details"]["generated_tokens"] == len(stream)


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_an_event_stays_on_one_line_whatever_is_in_it(path: str) -> None:
    piece = "a\u2028b\u2029c\u0085d\v\f\x1c\r\n"
    body = {"inputs": "a"} if path == "/generate_stream" else {"prompt": "a", "stream": True}
    with running_service(FakeEngine(lambda ids: piece)) as service:
        lines = service.post(path, **body).text.splitlines()
    said = [json.loads(line.removeprefix("data:")) for line in lines if line not in ("", "data: [DONE]")]
    pieces = [one["choices"][0]["text"] if "choices" in one else one["token"]["text"] for one in said]
    assert "".join(pieces).count(piece) > 0 and not "".join(pieces).replace(piece, "")


@pytest.mark.parametrize("parameters", [{"max_new_tokens": 3}, {"stop": ["zz"]}, {"max_new_tokens": 1}])
def test_stream_carries_the_details_in_the_last_tokens_event(
    service: RunningService, parameters: dict[str, Any]
) -> None:
    stream = events(service.post("/generate_stream", inputs="crate 12", parameters=parameters).text)
    assert len(stream) == stream[-1]["details"]["generated_tokens"]
    assert stream[-1]["generated_text"] == "".join(event["token"]["text"] for event in stream)


@pytest.mark.parametrize("path", ["/generate", "/"])
def test_stream_flag_gives_the_stream(service: RunningService, path: str) -> None:
    response = service.post(path, inputs="ab", stream=True)
    assert events(response.text)[-1]["generated_text"] == "ab"


def test_progress_events_come_only_when_asked_for(service: RunningService) -> None:
    with_progress = service.post("/generate_stream", inputs="crate 12", stream_progress=True).text
    total = 1 + len(ids("crate 12"))
    assert f'event: progress\ndata:{{"done_tokens":{total},"total_tokens":{total}}}\n\n' in with_progress
    assert "progress" not in service.post("/generate_stream", inputs="crate 12").text


def test_silence_on_a_stream_is_filled_with_comments(service: RunningService, engine: FakeEngine) -> None:
    engine.go_on.clear()
    with service.http.stream("POST", "/generate_stream", json={"inputs": "ab"}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        engine.go_on.set()
        assert any('"generated_text":"ab"' in line for line in lines)


def test_huggingface_client_understands_both_answers(service: RunningService) -> None:
    client = InferenceClient(service.url)
    assert client.text_generation("crate 12", max_new_tokens=50) == "crate 12"
    details = client.text_generation("crate 12", details=True, max_new_tokens=2)
    assert details.details is not None and details.details.generated_tokens == 2
    assert "".join(client.text_generation("crate 12", stream=True, max_new_tokens=50)) == "crate 12"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 0.0),
        ({"temperature": 0, "do_sample": True}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 0}, 0.0),
    ],
)
def test_greedy_unless_sampling_is_asked_for(
    service: RunningService, engine: FakeEngine, parameters: dict[str, Any], temperature: float
) -> None:
    assert service.post("/generate", inputs="a", parameters=parameters).status_code == 200
    assert engine.requests[0].sampling.temperature == temperature


def test_every_parameter_reaches_the_engine(service: RunningService, engine: FakeEngine) -> None:
    parameters = {
        "max_new_tokens": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 11,
        "stop": ["END"],
    }
    answer = service.post("/generate", inputs="a", parameters=parameters).json()
    sampling = engine.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (7, 0.5, 3, 0.9)
    assert (sampling.repetition_penalty, sampling.seed, sampling.stop) == (1.2, 11, ("END",))
    assert answer["details"]["seed"] == 11


def test_sampling_without_a_seed_reports_the_one_it_drew(service: RunningService) -> None:
    seeds = {
        service.post("/generate", inputs="a", parameters={"do_sample": True}).json()["details"]["seed"]
        for _ in range(3)
    }
    assert len(seeds) == 3 and None not in seeds


def test_unsupported_parameters_are_taken_at_their_defaults(service: RunningService) -> None:
    neutral = {"best_of": 1, "typical_p": None, "watermark": False, "top_n_tokens": 0, "grammar": None}
    assert service.post("/generate", inputs="a", parameters=neutral).status_code == 200
    assert service.post("/generate", inputs="a", parameters=None, kv=None).status_code == 200


def test_truncate_keeps_the_end_of_inputs_and_all_of_the_document(
    service: RunningService, engine: FakeEngine
) -> None:
    service.post("/generate", inputs="one two three", document="doc", parameters={"truncate": 2})
    assert engine.requests[0].token_ids == (0, *ids("doc"), *ids("one two three")[-2:])


def test_max_new_tokens_defaults_to_the_setting_within_the_room(engine: FakeEngine) -> None:
    with running_service(engine, max_new_tokens=200) as service:
        service.post("/generate", inputs="a")
        service.post("/generate", inputs="a" * 3950)
    assert engine.requests[0].sampling.max_new_tokens == 200
    assert engine.requests[1].sampling.max_new_tokens == 4096 - len(engine.requests[1].token_ids)


def test_cache_salt_joins_tenant_and_request(engine: FakeEngine) -> None:
    with running_service(engine, api_keys={"k1": "ann", "k2": "bob"}) as service:
        for key, salt in (("k1", "x"), ("k2", "x"), ("k1", None)):
            headers = {"Authorization": f"Bearer {key}"}
            service.http.post("/generate", json={"inputs": "a", "cache_salt": salt}, headers=headers)
    assert [request.cache_salt for request in engine.requests] == ["ann\0x", "bob\0x", "ann\0"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        ("overloaded", 429, "overloaded"),
        ("too_long", 413, "too_long"),
        ("shutting_down", 503, "unavailable"),
        ("internal", 500, "generation"),
    ],
)
def test_engine_refusals_have_their_own_status(
    service: RunningService, engine: FakeEngine, path: str, kind: Any, status: int, error_type: str
) -> None:
    engine.refuse_with = FailedEvent(kind, "no, because 3 > 2")
    response = service.post(path, inputs="a")
    assert response.status_code == status
    assert response.json() == {"error": "no, because 3 > 2", "error_type": error_type}
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_failure_in_mid_answer_is_a_500(service: RunningService, engine: FakeEngine) -> None:
    engine.fail_after = 2
    assert service.post("/generate", inputs="crate").json()["error_type"] == "generation"


def test_failure_in_mid_stream_is_its_last_event(service: RunningService, engine: FakeEngine) -> None:
    engine.fail_after = 2
    stream = events(service.post("/generate_stream", inputs="crate").text)
    assert len(stream) == 3
    assert stream[-1] == {"error": "generation failed: the device is gone", "error_type": "generation"}
    assert service.metric("aquifer_requests_total", status="500") == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_cancels_its_request(
    service: RunningService, engine: FakeEngine, path: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    engine.go_on.clear()
    body = json.dumps({"inputs": "a long question"}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: bool(engine.requests))
        assert engine.cancelled == []
    wait_until(lambda: engine.cancelled == [engine.requests[0].request_id])
    wait_until(lambda: service.metric("aquifer_requests_total", status="499") == 1)


def test_a_finished_request_is_not_cancelled(service: RunningService, engine: FakeEngine) -> None:
    service.post("/generate", inputs="a")
    service.post("/generate_stream", inputs="a")
    assert engine.cancelled == []


def test_clients_may_share_a_request_id(service: RunningService, engine: FakeEngine) -> None:
    for _ in range(2):
        service.http.post("/generate", json={"inputs": "a"}, headers={"X-Request-Id": "same"})
    assert len({request.request_id for request in engine.requests}) == 2
