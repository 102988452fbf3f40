"""Documents that are asked about, posted again and deleted while they are still being read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from service_process import ServiceProcess, document, plain_answer
from transformers import PreTrainedModel
from waiting import wait_until

from aquifer.clients import InvalidRequestError, NotFoundError, Sampling

QUESTION = "Which crate is oldest?"
SAMPLING = Sampling(max_new_tokens=8)


def test_a_document_can_be_asked_about_before_it_is_read(
    plain_service: ServiceProcess, model: PreTrainedModel
) -> None:
    client, text = plain_service.client, document("Early question", num_tokens=3000)
    posted = client.read(text, document_id="early")
    answer = client.generate(QUESTION, document_id="early", sampling=SAMPLING)
    assert [token.id for token in answer.tokens] == plain_answer(model, text, QUESTION, 8)
    wait_until(lambda: client.document("early").status == "ready", poll_seconds=0.02)
    assert client.document("early").tokens == posted.tokens
    assert client.delete("early") == posted.tokens // 256


def test_a_document_deleted_while_it_is_read_is_gone(plain_service: ServiceProcess) -> None:
    client, text = plain_service.client, document("Deleted early", num_tokens=3000)
    client.read(text, document_id="short-lived")
    client.delete("short-lived")
    with pytest.raises(NotFoundError):
        client.generate(QUESTION, document_id="short-lived", sampling=SAMPLING)
    assert "short-lived" not in [known.document_id for known in client.documents()]


def test_one_document_posted_by_many_at_once_is_read_once(plain_service: ServiceProcess) -> None:
    client, text = plain_service.client, document("Wanted by all", num_tokens=2000)
    computed = plain_service.metric("prompt_tokens_total", source="computed")
    with ThreadPoolExecutor(6) as pool:
        posts = [pool.submit(client.read, text, document_id="popular", wait=True) for _ in range(6)]
        read = [post.result() for post in posts]
    assert {document.status for document in read} == {"ready"}
    assert len({(document.document_id, document.tokens) for document in read}) == 1
    extra = plain_service.metric("prompt_tokens_total", source="computed") - computed
    assert extra < 2 * read[0].tokens
    with pytest.raises(InvalidRequestError, match="another text"):
        client.read(text + " And more.", document_id="popular")
    assert client.delete("popular") == read[0].tokens // 256


def test_a_pin_ends_with_its_document_however_often_it_was_posted(plain_service: ServiceProcess) -> None:
    client, text = plain_service.client, document("Pinned twice")
    for _ in range(2):
        read = client.read(text, document_id="pinned", pin=True, wait=True)
        # Its full segments, and the record of its first tokens.
        assert plain_service.metric("tier_pinned", tier="ram") == read.tokens // 256 + 1
    client.delete("pinned")
    client.read(text, document_id="pinned", wait=True)
    assert plain_service.metric("tier_pinned", tier="ram") == 0
    client.delete("pinned")
