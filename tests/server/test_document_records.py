"""What the records of documents are believed: their own model's, whole, and each under its own name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_engine import FakeEngine
from http_service import running_service
from redis import Redis
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tiny_tokenizer().decode)


def test_servers_of_other_models_on_the_same_redis_have_documents_of_their_own(redis_server: Any) -> None:
    mine, other = (FakeEngine(tiny_tokenizer().decode) for _ in range(2))
    other.info = replace(other.info, model_fingerprint="another")
    with (
        running_service(mine, redis_url=redis_server.url) as service,
        running_service(other, redis_url=redis_server.url) as stranger,
    ):
        service.post("/documents", document="one", document_id="d", wait=True)
        assert stranger.post("/generate", inputs="Why?", document_id="d").status_code == 404
        assert stranger.http.get("/documents").json() == {"documents": []}
        assert stranger.post("/documents", document="two", document_id="d", wait=True).status_code == 200
        assert stranger.http.delete("/documents/d").status_code == 200
        assert service.post("/generate", inputs="Why?", document_id="d").json()["generated_text"] == "oneWhy?"


def records_of(redis_server: Any, part: str) -> list[bytes]:
    with Redis.from_url(redis_server.url) as client:
        return sorted(client.keys(f"*/{part}/*"))


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"tokens": 1}', b"\xff"])
def test_a_damaged_state_is_no_document_and_can_be_posted_anew(
    damage: bytes, engine: FakeEngine, redis_server: Any
) -> None:
    with running_service(engine, redis_url=redis_server.url) as service:
        for name in ("a", "b"):
            service.post("/documents", document=f"text {name}", document_id=name, wait=True)
        with Redis.from_url(redis_server.url) as client:
            client.set(records_of(redis_server, "state")[0], damage)
        assert service.post("/generate", inputs="Why?", document_id="a").status_code == 404
        assert service.http.get("/documents/a").status_code == 404
        assert [item["document_id"] for item in service.http.get("/documents").json()["documents"]] == ["b"]
        assert service.post("/documents", document="text a", document_id="a", wait=True).status_code == 200
        assert service.post("/generate", inputs="Why?", document_id="a").status_code == 200


@pytest.mark.parametrize("part", ["state", "tokens"])
@pytest.mark.parametrize("swapped", [True, False])
def test_records_of_another_document_are_not_believed(
    part: str, swapped: bool, engine: FakeEngine, redis_server: Any
) -> None:
    with running_service(engine, redis_url=redis_server.url) as service:
        for name in ("a", "b"):
            service.post("/documents", document=f"text {name}", document_id=name, wait=True)
        own, other = records_of(redis_server, part)
        with Redis.from_url(redis_server.url) as client:
            client.set(own, client.get(other) if swapped else client.get(other)[:-3])
        assert service.post("/generate", inputs="Why?", document_id="a").status_code == 404
        answer = service.post("/generate", inputs="Why?", document_id="b").json()
        assert answer["generated_text"] == "text bWhy?"
        service.http.delete("/documents/a")
        assert service.post("/documents", document="text a", document_id="a", wait=True).status_code == 200
