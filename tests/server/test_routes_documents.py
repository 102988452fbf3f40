"""/documents over real HTTP and a real Redis: lifecycle, tenants, restarts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_service import RunningService, running_service
from tiny_tokenizer import ids, tiny_tokenizer

from aquifer.server import documents
from aquifer.server.engine.types import FailedEvent

WaitUntil = Callable[[Callable[[], bool]], None]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tiny_tokenizer().decode)


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine) as running:
        yield running


def test_waiting_returns_the_ready_document_and_its_cost(service: RunningService, engine: FakeEngine) -> None:
    response = service.post("/documents", document="Crate 12 left.", document_id="c-1", pin=True, wait=True)
    assert response.status_code == 200
    document = response.json()
    assert (document["document_id"], document["status"], document["progress"]) == ("c-1", "ready", 1.0)
    assert document["tokens"] == 1 + len(ids("Crate 12 left."))
    assert (document["raw_bytes"], document["stored_bytes"], document["bits_per_value"]) == (1024, 256, 4.0)
    assert (document["pinned"], document["expires"], document["error"]) == (True, None, None)
    request = engine.requests[0]
    assert request.token_ids == (0, *ids("Crate 12 left."))
    assert request.sampling.max_new_tokens == 0 and request.store
    assert engine.pinned == [(request.token_ids, "")]


def test_not_waiting_returns_202_and_a_status_to_poll(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()
    response = service.post("/documents", document="Crate 12 left.")
    assert response.status_code == 202
    document_id = response.json()["document_id"]
    wait_until(lambda: service.document_status(document_id) == "reading")
    assert 0 < service.http.get(f"/documents/{document_id}").json()["progress"] < 1
    engine.hold_reading.clear()
    wait_until(lambda: service.document_status(document_id) == "ready")


def test_a_question_by_id_reads_the_documents_tokens_and_salt(
    service: RunningService, engine: FakeEngine
) -> None:
    service.post("/documents", document="Crate 12 left.", document_id="c", cache_salt="s", wait=True)
    answer = service.post("/generate", inputs="Why?", document_id="c").json()
    assert answer["generated_text"] == "Crate 12 left.Why?"
    assert engine.requests[1].cache_salt == engine.requests[0].cache_salt == "\0s"
    service.post("/generate", inputs="Why?", document_id="c", cache_salt="other")
    assert engine.requests[2].cache_salt == "\0other"


def test_token_ids_are_a_document_too_with_or_without_bos(
    service: RunningService, engine: FakeEngine
) -> None:
    for token_ids in ([7, 8], [0, 7, 8]):
        assert service.post("/documents", token_ids=token_ids, wait=True).status_code == 200
    assert [request.token_ids for request in engine.requests] == [(0, 7, 8), (0, 7, 8)]


def test_documents_are_listed_oldest_first_and_forgotten_when_deleted(
    service: RunningService, engine: FakeEngine
) -> None:
    for name in ("b", "a"):
        service.post("/documents", document=f"text {name}", document_id=name, wait=True)
    assert [item["document_id"] for item in service.http.get("/documents").json()["documents"]] == ["b", "a"]
    assert service.http.delete("/documents/b").json() == {"document_id": "b", "deleted_segments": 0}
    assert engine.forgotten == [((0, *ids("text b")), "")]
    assert [item["document_id"] for item in service.http.get("/documents").json()["documents"]] == ["a"]
    assert service.http.get("/documents/b").status_code == 404


def test_deleting_a_document_that_is_being_read_cancels_the_reading(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()
    service.post("/documents", document="text", document_id="d")
    assert service.http.delete("/documents/d").status_code == 200
    assert engine.cancelled == [engine.requests[0].request_id]
    assert service.http.get("/documents/d").status_code == 404


def test_the_same_text_may_be_posted_again_and_another_may_not(service: RunningService) -> None:
    for _ in range(2):
        assert service.post("/documents", document="one", document_id="d", wait=True).status_code == 200
    response = service.post("/documents", document="two", document_id="d", wait=True)
    assert response.status_code == 409
    assert "delete it first or choose another id" in response.json()["error"]


def test_a_post_of_what_is_being_read_joins_the_reading(service: RunningService, engine: FakeEngine) -> None:
    engine.hold_reading.set()
    service.post("/documents", document="text", document_id="d")
    assert service.post("/documents", document="text", document_id="d").status_code == 202
    engine.hold_reading.clear()
    assert service.post("/documents", document="text", document_id="d", wait=True).json()["status"] == "ready"
    assert engine.cancelled == []


def test_posting_a_pinned_document_again_lifts_its_old_pin(
    service: RunningService, engine: FakeEngine
) -> None:
    service.post("/documents", document="text", document_id="d", wait=True, pin=True)
    assert engine.unpinned == []
    service.post("/documents", document="text", document_id="d", wait=True)
    assert [token_ids for token_ids, _ in engine.unpinned] == [engine.requests[0].token_ids]


@pytest.mark.parametrize("wait", [True, False])
def test_a_refused_document_has_the_refusals_status(
    service: RunningService, engine: FakeEngine, wait: bool
) -> None:
    engine.refuse_with = FailedEvent("overloaded", "256 requests are waiting already")
    response = service.post("/documents", document="text", document_id="d", wait=wait)
    assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
    failed = service.http.get("/documents/d").json()
    assert (failed["status"], failed["error"]) == ("failed", "256 requests are waiting already")


def test_an_expired_document_is_gone_and_leaves_the_tiers(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    fields = {"document": "text", "document_id": "d", "ttl_seconds": 1.0, "pin": True, "wait": True}
    assert service.post("/documents", **fields).json()["expires"] is not None
    wait_until(lambda: service.http.get("/documents/d").status_code == 404)
    wait_until(lambda: engine.forgotten == [((0, *ids("text")), "")])
    assert service.post("/generate", inputs="a", document_id="d").status_code == 404


def test_posts_of_what_is_being_read_join_it_and_set_its_lifetime(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()

    def post(ttl_seconds: float) -> httpx.Response:
        return service.post(
            "/documents", document="text", document_id="d", ttl_seconds=ttl_seconds, wait=True, pin=True
        )

    with ThreadPoolExecutor(max_workers=4) as clients:
        first = clients.submit(post, 2.0)
        wait_until(lambda: bool(engine.requests))
        others = [clients.submit(post, 60.0) for _ in range(3)]
        wait_until(lambda: len(engine.pinned) == 4)
        time.sleep(2.1)  # the first post's lifetime is over
        engine.hold_reading.clear()
        answers = [future.result() for future in (first, *others)]
    assert [answer.json()["status"] for answer in answers] == ["ready"] * 4
    assert len(engine.requests) == 1 and engine.cancelled == []
    time.sleep(0.5)
    assert service.http.get("/documents/d").json()["expires"] > time.time() + 30


def test_the_last_post_says_whether_what_is_being_read_is_pinned(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()
    for pin in (True, False, True):
        service.post("/documents", document="text", document_id="d", pin=pin)
        assert service.http.get("/documents/d").json()["pinned"] == pin
        assert len(engine.pinned) - len(engine.unpinned) == pin
    engine.hold_reading.clear()
    wait_until(lambda: service.document_status("d") == "ready")
    assert service.http.get("/documents/d").json()["pinned"]
    assert len(engine.pinned) - len(engine.unpinned) == 1 and len(engine.requests) == 1


def test_a_pin_that_comes_as_the_reading_fails_is_lifted(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.hold_reading.set()
    service.post("/documents", document="text", document_id="d")
    pin = engine.pin

    def fail_meanwhile(token_ids: Sequence[int], cache_salt: str) -> None:
        engine.cancelled.append(engine.requests[0].request_id)
        wait_until(lambda: service.document_status("d") == "failed")
        assert engine.unpinned == []
        pin(token_ids, cache_salt)

    monkeypatch.setattr(engine, "pin", fail_meanwhile)
    service.post("/documents", document="text", document_id="d", pin=True)
    assert engine.unpinned == engine.pinned == [((0, *ids("text")), "")]


def test_who_waits_for_a_document_that_is_deleted_is_told(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()
    with ThreadPoolExecutor() as clients:
        waiting = clients.submit(service.post, "/documents", document="text", document_id="d", wait=True)
        wait_until(lambda: bool(engine.requests))
        service.http.delete("/documents/d")
        assert waiting.result().status_code == 409


def test_a_pinned_document_that_cannot_be_read_is_let_go(service: RunningService, engine: FakeEngine) -> None:
    engine.refuse_with = FailedEvent("overloaded", "256 requests are waiting already")
    assert service.post("/documents", document="text", document_id="d", pin=True).status_code == 429
    assert engine.unpinned == engine.pinned == [((0, *ids("text")), "")]


def test_posting_again_sets_the_lifetime_anew(service: RunningService, engine: FakeEngine) -> None:
    service.post("/documents", document="text", document_id="d", ttl_seconds=2.0, wait=True)
    service.post("/documents", document="text", document_id="d", wait=True)
    time.sleep(2.2)
    assert service.http.get("/documents/d").json()["expires"] is None
    assert engine.forgotten == []


def test_tenants_do_not_see_each_others_documents(engine: FakeEngine) -> None:
    keys = {"k1": "ann", "k2": "bob"}
    with running_service(engine, api_keys=keys) as service:
        as_ann, as_bob = ({"Authorization": f"Bearer {key}"} for key in keys)

        def post(path: str, headers: dict[str, str], **body: Any) -> int:
            return service.http.post(path, json=body, headers=headers).status_code

        assert post("/documents", as_ann, document="of ann", document_id="d", wait=True) == 200
        assert post("/documents", as_bob, document="of bob", document_id="d", wait=True) == 200
        assert post("/documents", as_ann, document="more", document_id="e", wait=True) == 200
        assert post("/generate", as_bob, inputs="a", document_id="e") == 404
        assert service.http.get("/documents/e", headers=as_bob).status_code == 404
        assert service.http.delete("/documents/e", headers=as_bob).status_code == 404
        listed = service.http.get("/documents", headers=as_bob).json()["documents"]
        assert [item["document_id"] for item in listed] == ["d"]
        assert service.http.delete("/documents/d", headers=as_bob).status_code == 200
        assert service.http.get("/documents/d", headers=as_ann).status_code == 200
    assert len({request.cache_salt for request in engine.requests}) == 2


def test_a_lifetime_that_ends_while_another_text_is_posted_does_not_end_that_one(
    engine: FakeEngine, service: RunningService, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wait for the deletion of a third document."""
    forget, slow = engine.forget, threading.Event()

    def forget_slowly(token_ids: Sequence[int], cache_salt: str) -> int:
        slow.set()
        time.sleep(1.0)
        return forget(token_ids, cache_salt)

    for name, lifetime in (("other", None), ("d", 0.8)):
        service.post("/documents", document=f"{name} text", document_id=name, ttl_seconds=lifetime, wait=True)
    with monkeypatch.context() as slowly, ThreadPoolExecutor() as clients:
        slowly.setattr(engine, "forget", forget_slowly)
        deleting = clients.submit(service.http.delete, "/documents/other")
        assert slow.wait(10)
        slowly.setattr(engine, "forget", forget)
        posted = clients.submit(
            service.post, "/documents", document="new", document_id="d", pin=True, wait=True
        )
        assert deleting.result().is_success and posted.result().is_success
    wait_until(lambda: ((0, *ids("d text")), "") in engine.forgotten)
    assert service.document_status("d") == "ready" and engine.unpinned == []
    assert len(engine.forgotten) == 2


def test_pins_and_lifetimes_outlive_a_restart(
    engine: FakeEngine, redis_server: Any, wait_until: WaitUntil
) -> None:
    with running_service(engine, redis_url=redis_server.url) as service:
        service.post("/documents", document="one", document_id="pinned", pin=True, wait=True)
        service.post("/documents", document="two", document_id="short", ttl_seconds=4.0, wait=True)
        service.post("/documents", document="three", document_id="plain", wait=True)
    again = FakeEngine(tiny_tokenizer().decode)
    with running_service(again, redis_url=redis_server.url) as service:
        wait_until(lambda: again.pinned == [((0, *ids("one")), "")])
        wait_until(lambda: again.forgotten == [((0, *ids("two")), "")])
        service.http.delete("/documents/pinned")
        assert again.unpinned == again.pinned


def test_documents_work_on_while_redis_is_down(engine: FakeEngine, redis_server: Any) -> None:
    with running_service(engine, redis_url=redis_server.url) as service:
        redis_server.stop()
        service.post("/documents", document="Crate 12 left.", document_id="c", wait=True)
        assert service.document_status("c") == "ready"
        assert service.post("/generate", inputs="Why?", document_id="c").status_code == 200


def test_a_reading_that_a_shutdown_interrupted_is_failed_with_the_way_out(redis_server: Any) -> None:
    engine = FakeEngine(tiny_tokenizer().decode)
    engine.hold_reading.set()
    with running_service(engine, redis_url=redis_server.url) as service:
        service.post("/documents", document="text", document_id="d")
    assert engine.cancelled
    with running_service(engine, redis_url=redis_server.url) as service:
        found = service.http.get("/documents/d").json()
    assert (found["status"], found["error"]) == ("failed", "interrupted while it was read; post it again")


def test_a_reading_whose_server_died_is_found_interrupted(
    engine: FakeEngine, redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.hold_reading.set()
    with running_service(engine, redis_url=redis_server.url) as dying:
        dying.post("/documents", document="text", document_id="d")
        other = FakeEngine(tiny_tokenizer().decode)
        with running_service(other, redis_url=redis_server.url) as service:
            assert service.document_status("d") in ("queued", "reading")
            monkeypatch.setattr(documents, "INTERRUPTED_AFTER_SECONDS", 0.0)
            found = service.http.get("/documents/d").json()
            assert (found["status"], found["error"]) == (
                "failed",
                "interrupted while it was read; post it again",
            )
            assert service.post("/generate", inputs="a", document_id="d").status_code == 200


def test_a_client_that_leaves_does_not_stop_the_reading(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.hold_reading.set()
    body = json.dumps({"document": "text", "document_id": "d", "wait": True}).encode()
    head = f"POST /documents HTTP/1.1\r\nHost: {service.http.base_url.host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((service.http.base_url.host, service.http.base_url.port)) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: service.http.get("/documents/d").status_code == 200)
    engine.hold_reading.clear()
    wait_until(lambda: service.document_status("d") == "ready")
    assert engine.cancelled == []
