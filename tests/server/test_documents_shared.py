"""Documents on two servers that share a Redis: what one does, the other finds out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_service import RunningService, running_service
from tiny_tokenizer import ids, tiny_tokenizer

from aquifer.server import documents
from aquifer.server.document_records import Document
from aquifer.server.engine.types import FailedEvent

WaitUntil = Callable[[Callable[[], bool]], None]
Servers = list[tuple[RunningService, FakeEngine]]


@pytest.fixture
def heartbeat(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds between two looks at the records; 10, as in the service, where a test says nothing."""
    seconds = float(getattr(request, "param", documents.HEARTBEAT_SECONDS))
    monkeypatch.setattr(documents, "HEARTBEAT_SECONDS", seconds)
    return seconds


@pytest.fixture
def servers(heartbeat: float, redis_server: Any) -> Iterator[Servers]:
    engines = [FakeEngine(tiny_tokenizer().decode) for _ in range(2)]
    with (
        running_service(engines[0], redis_url=redis_server.url) as one,
        running_service(engines[1], redis_url=redis_server.url) as two,
    ):
        yield [(one, engines[0]), (two, engines[1])]


def posted(server: RunningService, **fields: Any) -> httpx.Response:
    return server.post("/documents", document="text", document_id="d", **fields)


def test_another_server_on_the_same_redis_answers_by_id(redis_server: Any) -> None:
    first, second = (FakeEngine(tiny_tokenizer().decode) for _ in range(2))
    with running_service(first, redis_url=redis_server.url) as service:
        service.post("/documents", document="Crate 12 left.", document_id="c", wait=True)
    with running_service(second, redis_url=redis_server.url) as service:
        assert service.document_status("c") == "ready"
        assert service.post("/generate", inputs="", document_id="c").status_code == 422
        answer = service.post("/generate", inputs="Why?", document_id="c").json()
    assert answer["generated_text"] == "Crate 12 left.Why?"


@pytest.mark.parametrize("heartbeat", [0.05], indirect=True)
def test_a_delete_on_another_server_lifts_the_pin_here(servers: Servers, wait_until: WaitUntil) -> None:
    (service, engine), (stranger, other) = servers
    service.post("/documents", document="text", document_id="d", pin=True, wait=True)
    time.sleep(0.2)
    assert engine.unpinned == []
    assert stranger.http.delete("/documents/d").status_code == 200
    wait_until(lambda: engine.forgotten == engine.pinned)
    assert engine.unpinned == engine.pinned and other.unpinned == []


@pytest.mark.parametrize(
    "heartbeat", [0.05, 10.0], ids=["noticed while it is read", "noticed at the end"], indirect=True
)
@pytest.mark.parametrize("new_text", ["new text", None])
def test_what_another_server_deletes_or_replaces_while_it_is_read_here_stays_so(
    heartbeat: float, new_text: str | None, servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    engine.hold_reading.set()
    with ThreadPoolExecutor() as clients:
        waiting = clients.submit(
            service.post, "/documents", document="old text", document_id="d", pin=True, wait=True
        )
        wait_until(lambda: bool(engine.requests))
        assert stranger.http.delete("/documents/d").status_code == 200
        if new_text:
            assert stranger.post("/documents", document=new_text, document_id="d").status_code == 202
        if heartbeat > 1.0:
            engine.hold_reading.clear()
        assert waiting.result().status_code == 409
    engine.hold_reading.clear()
    old = (0, *ids("old text")), ""
    assert engine.forgotten == engine.unpinned == engine.pinned == [old]
    for server in (service, stranger):
        answer = server.post("/generate", inputs="Why?", document_id="d")
        assert answer.status_code == 404 if new_text is None else "new textWhy?" in answer.text


@pytest.mark.parametrize("text", ["old text", "new text"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_post_finds_out_what_another_server_did_to_what_is_read_here(
    text: str, replaced: bool, servers: Servers, wait_until: WaitUntil
) -> None:
    """Before the reading itself does."""
    (service, engine), (stranger, _) = servers
    engine.hold_reading.set()
    service.post("/documents", document="old text", document_id="d", pin=True)
    stranger.http.delete("/documents/d")
    if replaced:
        assert stranger.post("/documents", document="new text", document_id="d", wait=True).is_success
    conflicts = replaced and text == "old text"
    again = service.post("/documents", document=text, document_id="d", pin=True)
    assert again.status_code == (409 if conflicts else 202)
    engine.hold_reading.clear()
    wait_until(lambda: service.document_status("d") == "ready")
    now = "new text" if replaced else text
    for server in (service, stranger):
        answer = server.post("/generate", inputs="Why?", document_id="d").json()
        assert answer["generated_text"] == f"{now}Why?"
    old = (0, *ids("old text")), ""
    assert engine.forgotten == engine.unpinned == [old] and engine.pinned[0] == old


@pytest.fixture
def updates_do_not_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one server writes between another's look at a record and its write is lost for a while. With
    heartbeats this short that is no rare case."""
    update, turn = documents.DocumentRecords.update, Lock()

    def alone(records: documents.DocumentRecords, document: Document) -> Document | None:
        with turn:
            return update(records, document)

    monkeypatch.setattr(documents.DocumentRecords, "update", alone)


@pytest.mark.usefixtures("updates_do_not_cross")
@pytest.mark.parametrize("heartbeat", [0.05], indirect=True)
@pytest.mark.parametrize("first_ends", ["here", "there", "here, because it is refused there"])
def test_a_post_of_the_same_text_to_another_server_lets_both_read(
    first_ends: str, servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, other) = servers

    engine.hold_reading.set()
    with ThreadPoolExecutor() as clients:
        here = clients.submit(posted, service, wait=True)
        wait_until(lambda: bool(engine.requests))
        if first_ends == "there":
            there = clients.submit(posted, stranger, wait=True, ttl_seconds=60)
            assert there.result().json()["status"] == "ready"
        elif first_ends == "here":
            other.hold_reading.set()
            there = clients.submit(posted, stranger, wait=True, ttl_seconds=60)
            wait_until(lambda: bool(other.requests))
        else:
            other.refuse_with = FailedEvent("overloaded", "busy")
            there = clients.submit(posted, stranger, wait=True, ttl_seconds=60)
            assert there.result().status_code == 429
        time.sleep(0.2)  # some heartbeats
        engine.hold_reading.clear()
        assert here.result().json()["status"] == "ready"
        refused = there.done() and there.result().status_code == 429
        assert (here.result().json()["expires"] is None) == refused
        time.sleep(0.2)  # some more, of the one that still reads
        assert service.document_status("d") == "ready"
        other.hold_reading.clear()
        there.result()
        assert service.document_status("d") == stranger.document_status("d") == "ready"
    assert engine.forgotten == other.forgotten == []


@pytest.mark.parametrize(
    ("by", "heartbeat"),
    [("a heartbeat", 0.05), ("a post", 10.0), ("a delete", 10.0)],
    indirect=["heartbeat"],
)
def test_a_pin_of_what_another_server_replaced_is_lifted_and_its_text_forgotten(
    by: str, servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    time.sleep(0.2)  # the first look at the records is over
    old, new = (((0, *ids(text)), "") for text in ("old text", "new text"))
    assert service.post("/documents", document="old text", document_id="d", pin=True, wait=True).is_success
    stranger.http.delete("/documents/d")
    assert stranger.post("/documents", document="new text", document_id="d", wait=True).is_success
    if by == "a post":
        assert service.post("/documents", document="new text", document_id="d", wait=True).is_success
    elif by == "a delete":
        assert service.http.delete("/documents/d").status_code == 200
    wait_until(lambda: len(engine.forgotten) == 1 + (by == "a delete"))
    assert engine.forgotten == ([old, new] if by == "a delete" else [old])
    assert engine.unpinned == engine.pinned == [old]


@pytest.mark.parametrize("heartbeat", [0.05], indirect=True)
def test_progress_is_visible_from_another_server(servers: Servers, wait_until: WaitUntil) -> None:
    (service, engine), (stranger, _) = servers
    engine.hold_reading.set()
    service.post("/documents", document="Crate 12 left.", document_id="d")
    wait_until(lambda: stranger.document_status("d") == "reading")
    assert stranger.http.get("/documents/d").json()["progress"] > 0


def state_at(server: RunningService) -> tuple[str, bool, bool]:
    """Status, whether it is pinned, and whether it has a lifetime."""
    document = server.http.get("/documents/d").json()
    return document["status"], document["pinned"], document["expires"] is not None


@pytest.mark.parametrize("heartbeat", [0.05], indirect=True)
@pytest.mark.parametrize(
    "joined_with", [{"pin": True}, {"ttl_seconds": 60}, {"ttl_seconds": 60, "pin": True}]
)
def test_the_latest_post_counts_wherever_it_joined_a_reading(
    joined_with: dict[str, Any], servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    engine.hold_reading.set()
    posted(service, ttl_seconds=60)
    other_way = {} if "ttl_seconds" in joined_with else {"ttl_seconds": 60}
    assert posted(stranger, wait=True, **other_way).json()["status"] == "ready"
    posted(service, **joined_with)
    expected = "ready", "pin" in joined_with, "ttl_seconds" in joined_with
    assert state_at(stranger) == expected
    time.sleep(0.2)  # some heartbeats
    engine.hold_reading.clear()
    wait_until(lambda: state_at(service) == expected)
    assert state_at(stranger) == expected
    assert len(engine.pinned) - len(engine.unpinned) == ("pin" in joined_with)


def test_a_lifetime_that_another_server_lifted_ends_no_reading(
    servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    engine.hold_reading.set()
    with ThreadPoolExecutor() as clients:
        here = clients.submit(posted, service, ttl_seconds=3, wait=True)
        wait_until(lambda: bool(engine.requests))
        over = time.time() + 3
        assert posted(stranger, wait=True).is_success
        wait_until(lambda: time.time() > over + 0.1)
        engine.hold_reading.clear()
        assert here.result().json()["status"] == "ready"
    assert engine.forgotten == []


@pytest.mark.parametrize("lifetime", [None, 60])
def test_a_refused_post_leaves_a_document_as_it_was(
    lifetime: float | None, servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    assert posted(service, pin=True, ttl_seconds=lifetime, wait=True).is_success
    before = state_at(service)
    engine.refuse_with = FailedEvent("overloaded", "busy")
    assert posted(service, ttl_seconds=2, wait=True).status_code == 429
    time.sleep(2.2)  # its lifetime is over
    wait_until(lambda: len(engine.pinned) - len(engine.unpinned) == 1)
    assert state_at(service) == state_at(stranger) == before
    assert stranger.post("/generate", inputs="Why?", document_id="d").json()["generated_text"] == "textWhy?"
    assert engine.forgotten == []
    assert service.http.delete("/documents/d").is_success
    assert len(engine.pinned) == len(engine.unpinned)


def test_a_delete_between_a_posts_two_records_wins(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    (service, _), (stranger, _) = servers
    save_tokens = documents.DocumentRecords.save_tokens
    assert posted(service, wait=True).is_success

    def then_deleted(*arguments: Any) -> None:
        save_tokens(*arguments)
        assert stranger.http.delete("/documents/d").is_success

    with monkeypatch.context() as patch:
        patch.setattr(documents.DocumentRecords, "save_tokens", then_deleted)
        assert posted(service, wait=True).status_code == 409
    for server in (service, stranger):
        assert server.http.get("/documents/d").status_code == 404
    assert posted(stranger, wait=True).is_success


def test_a_state_written_late_does_not_bring_a_deleted_document_back(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (service, engine), _ = servers
    monkeypatch.setattr(documents, "HEARTBEAT_SECONDS", 0.05)
    save, writing = documents.DocumentRecords.save, Event()

    def late(*arguments: Any) -> None:
        first = not writing.is_set()
        writing.set()
        time.sleep(0.3 * first)
        save(*arguments)

    engine.hold_reading.set()
    posted(service)
    monkeypatch.setattr(documents.DocumentRecords, "save", late)
    assert writing.wait(10)
    assert service.http.delete("/documents/d").is_success
    time.sleep(0.5)
    assert service.http.get("/documents/d").status_code == 404


@pytest.mark.parametrize("heartbeat", [0.05], indirect=True)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_lifetime_of_what_another_server_deleted_is_nobodys(
    replaced: bool, servers: Servers, wait_until: WaitUntil
) -> None:
    (service, engine), (stranger, _) = servers
    old = (0, *ids("text")), ""
    assert posted(service, ttl_seconds=3600, wait=True).is_success
    assert stranger.http.delete("/documents/d").is_success
    if replaced:
        assert stranger.post("/documents", document="new text", document_id="d", wait=True).is_success
    wait_until(lambda: engine.forgotten == [old])
    time.sleep(0.2)  # some more looks
    assert engine.forgotten == [old]
