"""Keys, request ids, readiness, metrics, and the OpenAPI page over real HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_engine import FakeEngine, tier
from http_service import RunningService, running_service
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_tokenizer import tiny_tokenizer

KEYS = {"key-of-ann": "ann", "key-of-bob": "bob"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tiny_tokenizer().decode)


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine) as running:
        yield running


@pytest.fixture
def locked(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine, api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("path", ["/info", "/documents", "/openapi.json", "/docs", "/nowhere"])
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic key-of-ann",
        "key-of-ann",
        "Bearer key-of-ann x",
        "Bearer \xe9",
    ],
)
def test_without_a_good_key_every_route_is_closed(
    locked: RunningService, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = locked.http.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error_type"] == "authentication"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_a_good_key_opens(locked: RunningService, key: str) -> None:
    assert locked.http.get("/info", headers={"Authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize("key", ["schl\u00fcssel", "\u9375"])
def test_a_key_of_any_characters_opens_as_utf8(key: str, engine: FakeEngine) -> None:
    with running_service(engine, api_keys={key: "ann"}) as service:
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert service.http.get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_and_scrapes_need_no_key(locked: RunningService, path: str) -> None:
    assert locked.http.get(path).status_code == 200


def test_metrics_need_a_key_when_set(engine: FakeEngine) -> None:
    with running_service(engine, api_keys=KEYS, metrics_need_key=True) as service:
        assert service.http.get("/metrics").status_code == 401
        assert service.http.get("/metrics", headers={"Authorization": "Bearer key-of-bob"}).status_code == 200


def test_a_body_is_not_read_without_a_key(locked: RunningService, engine: FakeEngine) -> None:
    assert locked.http.post("/generate", content=b"{not json").status_code == 401
    assert engine.requests == []


def test_request_id_is_echoed_on_success_and_failure(service: RunningService) -> None:
    for path in ("/health", "/nowhere"):
        response = service.http.get(path, headers={"X-Request-Id": "abc-123"})
        assert response.headers["x-request-id"] == "abc-123"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "\xe9"])
def test_a_request_id_is_made_where_none_is_fit_to_echo(service: RunningService, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode("latin-1")}
    made = service.http.get("/health", headers=headers).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_an_unforeseen_error_is_a_500_with_the_request_id(
    service: RunningService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "submit", lambda request, sink: 1 / 0)
    response = service.http.post("/generate", json={"inputs": "a"}, headers={"X-Request-Id": "r-1"})
    assert response.status_code == 500
    assert response.json()["error_type"] == "internal"
    assert "ZeroDivisionError" in response.json()["error"] and "r-1" in response.json()["error"]
    assert service.http.get("/health").status_code == 200


def test_ready_shows_model_tiers_and_load(service: RunningService) -> None:
    ready = service.http.get("/ready").json()
    assert ready == {
        "ready": True,
        "degraded": False,
        "model": "fake",
        "codec": "higgs:4",
        "codec_note": "no matching predictors",
        "running": 0,
        "waiting": 0,
        "tiers": {"ram": "up", "redis": "up"},
    }


def test_without_redis_it_is_ready_and_degraded(service: RunningService, engine: FakeEngine) -> None:
    engine.store.tiers = [tier("ram"), tier("redis", up=False)]
    response = service.http.get("/ready")
    assert response.status_code == 200
    assert response.json()["degraded"] is True
    assert response.json()["tiers"] == {"ram": "up", "redis": "down"}


def test_without_ram_it_is_not_ready(service: RunningService, engine: FakeEngine) -> None:
    engine.store.tiers = [tier("ram", up=False)]
    assert service.http.get("/ready").status_code == 503


def test_info_has_limits_and_tgis_names(engine: FakeEngine) -> None:
    with running_service(engine, served_model_name="big-model") as service:
        info = service.http.get("/info").json()
    assert (info["model_id"], info["model_sha"], info["model_dtype"]) == ("big-model", "f00d", "float32")
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (4000, 4096)
    assert info["kv_modes"] == ["auto", "resident", "streamed", "selective", "verified"]


def test_tokenize_gives_ids_and_places(service: RunningService) -> None:
    text = "crate é 12"
    tokens = service.post("/tokenize", inputs=text).json()
    assert [token["id"] for token in tokens] == tiny_tokenizer().encode(text, add_special_tokens=False)
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in tokens)


def test_requests_are_counted_by_status_and_probes_are_not(service: RunningService) -> None:
    service.post("/generate", inputs="a")
    service.post("/generate", inputs=5)
    service.http.get("/health")
    assert service.metric("aquifer_requests_total", status="200") == 1
    assert service.metric("aquifer_requests_total", status="422") == 1
    assert service.metric("aquifer_e2e_request_latency_seconds_count") == 2


@pytest.fixture
def openapi(service: RunningService) -> dict[str, Any]:
    specification: dict[str, Any] = service.http.get("/openapi.json").json()
    return specification


def test_openapi_is_valid_and_lists_every_route(openapi: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(openapi).validate()
    assert set(openapi["paths"]) == {
        "/generate",
        "/generate_stream",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/documents",
        "/documents/{document_id}",
        "/tokenize",
        "/info",
        "/health",
        "/ready",
        "/metrics",
    }
    assert set(openapi["components"]["schemas"]["GenerateBody"]["properties"]) >= {"inputs", "document", "kv"}


def test_generated_requests_get_the_answers_the_specification_promises(
    service: RunningService, openapi: dict[str, Any]
) -> None:
    schema = schemathesis.openapi.from_dict(openapi)
    schema.config.update(base_url=service.url)
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=15,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            response = case.call(base_url=service.url)
            case.validate_response(
                response,
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        call()
