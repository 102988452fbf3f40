"""/v1 over real HTTP, in the words of OpenAI's clients."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from http_service import RunningService, running_service
from tiny_tokenizer import ids, tiny_tokenizer

from aquifer.server.engine.types import FailedEvent

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content | trim }}<|end|>{% endfor %}[assistant]"
)


def chat_tokenizer() -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tiny_tokenizer().decode)


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine, hf_tokenizer=chat_tokenizer(), served_model_name="tiny") as running:
        yield running


def chunks(text: str) -> list[dict[str, Any]]:
    events = [event for event in text.split("\n\n") if event]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_models_lists_the_one_that_is_served(service: RunningService) -> None:
    listed = service.http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]


def test_completion_has_choices_and_usage(service: RunningService) -> None:
    answer = service.post("/v1/completions", model="tiny", prompt="crate 12", max_tokens=50).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    choice = {"index": 0, "text": "crate 12", "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    tokens = len(ids("crate 12"))
    assert answer["usage"] == {
        "prompt_tokens": 1 + tokens,
        "completion_tokens": tokens + 1,
        "total_tokens": 2 + 2 * tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_completion_stops_at_max_tokens(service: RunningService) -> None:
    answer = service.post("/v1/completions", prompt="crate 12", max_tokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_completion_takes_documents_as_generate_does(service: RunningService, engine: FakeEngine) -> None:
    service.post("/v1/completions", prompt=["rates"], document="crat", cache_salt="s")
    service.post("/documents", document="crat", document_id="d", wait=True)
    service.post("/v1/completions", prompt="rates", document_id="d")
    assert engine.requests[0].token_ids == engine.requests[2].token_ids == (0, *ids("crat"), *ids("rates"))
    assert engine.requests[0].cache_salt == "\0s"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_kv_options_are_those_of_generate(path: str, service: RunningService, engine: FakeEngine) -> None:
    asked = (
        {"prompt": "Why?"} if path == "completions" else {"messages": [{"role": "user", "content": "Why?"}]}
    )
    kv = {"mode": "selective", "budget": 0.1}
    assert service.post(f"/v1/{path}", **asked, kv=kv).status_code == 200
    assert (engine.requests[0].mode, engine.requests[0].budget) == ("selective", 0.1)
    assert service.post(f"/v1/{path}", **asked, kv={"mode": "bogus"}).status_code == 400


def test_chat_refuses_the_id_of_a_document(service: RunningService) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    response = service.post("/v1/chat/completions", messages=messages, document_id="d")
    assert response.status_code == 400
    assert "send its text as document" in response.json()["error"]["message"]
    assert service.post("/v1/chat/completions", messages=messages, document_id=None).status_code == 200


def test_chat_goes_through_the_template_with_one_bos(service: RunningService, engine: FakeEngine) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "crate?"}]},
    ]
    answer = service.post("/v1/chat/completions", messages=messages).json()
    rendered = "[system]Be brief.<|end|>[user]Which crate?<|end|>[assistant]"
    assert engine.requests[0].token_ids == (0, *ids(rendered))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_documents_tokens_do_not_depend_on_the_question(
    service: RunningService, engine: FakeEngine
) -> None:
    for question in ("s left when?", "why?"):
        messages = [{"role": "user", "content": question}]
        service.post("/v1/chat/completions", messages=messages, document=" The crate")
    head = (0, *ids("[user]The crate"))
    assert [request.token_ids[: len(head)] for request in engine.requests] == [head, head]
    assert engine.requests[1].token_ids == (*head, *ids("\n\nwhy?<|end|>[assistant]"))


def test_completion_stream_ends_with_reason_usage_and_done(service: RunningService) -> None:
    options = {"include_usage": True}
    response = service.post("/v1/completions", prompt="crate 12", stream=True, stream_options=options)
    assert response.headers["content-type"].startswith("text/event-stream")
    *texts, last, usage = chunks(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == "crate 12"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in texts)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["prompt_tokens"] == 1 + len(ids("crate 12"))
    assert len({chunk["id"] for chunk in [*texts, last, usage]}) == 1


def test_chat_stream_begins_with_the_role(service: RunningService) -> None:
    messages = [{"role": "user", "content": "hi"}]
    stream = chunks(service.post("/v1/chat/completions", messages=messages, stream=True).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "[user]hi[assistant]"
    assert stream[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in stream)


def test_sampling_is_the_default_and_zero_is_greedy(service: RunningService, engine: FakeEngine) -> None:
    service.post("/v1/completions", prompt="a")
    service.post("/v1/completions", prompt="a", temperature=0)
    service.post("/v1/completions", prompt="a", temperature=0.5, top_p=0.9, seed=4, stop="END")
    first, second, third = (request.sampling for request in engine.requests)
    assert (first.temperature, second.temperature) == (1.0, 0.0)
    assert first.seed is not None
    assert (third.temperature, third.top_p, third.seed, third.stop) == (0.5, 0.9, 4, ("END",))


def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored(service: RunningService) -> None:
    extras = {"user": "me", "n": 1, "logprobs": None, "presence_penalty": 0.0, "tools": [], "x_y": 1}
    assert service.post("/v1/completions", prompt="a", **extras).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {"prompt": ""}, "prompt", []),
        ("completions", {}, "prompt", ["required"]),
        ("completions", {"prompt": ["a", "b"]}, "prompt", []),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", []),
        ("completions", {"prompt": "a", "temperature": 3}, "temperature", ["2"]),
        ("completions", {"prompt": "a", "n": 2}, "body", ["n is not supported"]),
        ("completions", {"prompt": "a", "logprobs": 5}, "body", ["logprobs is not supported"]),
        ("completions", {"prompt": "a", "stop": ["x"] * 17}, "parameters.stop", []),
        ("chat/completions", {"messages": []}, "messages", []),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages", ["text"]),
        ("chat/completions", {"messages": [{"role": "boss", "content": "a"}]}, "messages", []),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages", ["no tools here"]),
        (
            "chat/completions",
            {"messages": [{"role": "system", "content": "a"}], "document": "d"},
            "messages",
            ["user message"],
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            [],
        ),
    ],
)
def test_wrong_requests_are_400_in_openais_envelope(
    service: RunningService, path: str, body: dict[str, Any], param: str, words: list[str]
) -> None:
    response = service.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    for word in words:
        assert word in error["message"]


def test_other_errors_have_the_envelope_too(service: RunningService, engine: FakeEngine) -> None:
    def error(response: Any, status: int) -> dict[str, Any]:
        assert response.status_code == status
        found: dict[str, Any] = response.json()["error"]
        return found

    assert error(service.http.get("/v1/nowhere"), 404)["code"] == "not_found"
    wrong_model = error(service.post("/v1/completions", model="gpt", prompt="a"), 404)
    assert wrong_model["param"] == "model" and "'tiny'" in wrong_model["message"]
    too_long = error(service.post("/v1/completions", prompt="why? " * 2000), 413)
    assert too_long["code"] == "context_length_exceeded"
    engine.refuse_with = FailedEvent("overloaded", "full")
    assert error(service.post("/v1/completions", prompt="a", stream=True), 429)["type"] == "rate_limit_error"


def test_a_stream_that_breaks_off_says_so(service: RunningService, engine: FakeEngine) -> None:
    engine.fail_after = 2
    *_, last = chunks(service.post("/v1/completions", prompt="crate", stream=True).text)
    assert last["error"]["type"] == "server_error"


def test_keys_hold_for_v1(engine: FakeEngine) -> None:
    with running_service(engine, api_keys={"k": "ann"}) as locked:
        assert locked.http.get("/v1/models").json()["error"]["type"] == "authentication_error"
        assert locked.http.get("/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_model_without_chat_template_names_the_way_out(engine: FakeEngine) -> None:
    with running_service(engine) as service:
        response = service.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert response.status_code == 400
    assert "use /v1/completions" in response.json()["error"]["message"]
