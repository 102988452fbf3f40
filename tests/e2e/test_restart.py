"""A service that is killed without warning leaves behind what the next one needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from redis_server import RedisServer
from service_process import ServiceProcess, document
from waiting import wait_until

from aquifer.clients import Answer, Document, Sampling

QUESTION = "Which crate is due first?"
SAMPLING = Sampling(max_new_tokens=32)
TEXT = document("Contract 17")


@dataclass(frozen=True)
class Before:
    """What the killed service said. warm: made from compressed KV in its RAM."""

    read: Document
    warm: Answer
    half_read: Document


@pytest.fixture(scope="module")
def restarted(
    start_service: Callable[..., ServiceProcess], module_redis: RedisServer
) -> tuple[Before, ServiceProcess]:
    """A service on the Redis of one that was killed, once it had read a document, amid a second one."""
    # A lossy codec: the answer after the restart is the same only if it is made from the same bytes.
    settings = {"redis_url": module_redis.url, "codec": "higgs:4", "prefill_chunk_tokens": 256}
    first = start_service(**settings)
    read = first.client.read(TEXT, document_id="contract-17", wait=True)
    warm = first.client.generate(QUESTION, document=TEXT, sampling=SAMPLING)
    wait_until(lambda: first.metric("tier_write_bytes_total", tier="redis") == read.stored_bytes)
    half_read = first.client.read(document("Contract 18", num_tokens=3900), document_id="contract-18")
    first.kill()
    return Before(read, warm, half_read), start_service(**settings)


def test_after_kill_9_a_document_is_answered_from_redis_as_it_was_from_ram(
    restarted: tuple[Before, ServiceProcess],
) -> None:
    before, service = restarted
    again = service.client.generate(QUESTION, document=TEXT, sampling=SAMPLING)
    by_id = service.client.generate(QUESTION, document_id="contract-17", sampling=SAMPLING)
    stored_tokens = before.read.tokens // 256 * 256
    assert before.warm.cached_tokens.ram == again.cached_tokens.redis == stored_tokens
    assert again.text == by_id.text == before.warm.text
    assert service.client.document("contract-17") == before.read


def test_after_kill_9_a_document_that_was_being_read_can_still_be_asked_about(
    restarted: tuple[Before, ServiceProcess],
) -> None:
    before, service = restarted
    answer = service.client.generate(QUESTION, document_id="contract-18", sampling=SAMPLING)
    assert (answer.generated_tokens, answer.finish_reason) == (32, "length")
    assert answer.prompt_tokens > before.half_read.tokens
    again = service.client.read(
        document("Contract 18", num_tokens=3900), document_id="contract-18", wait=True
    )
    assert (again.status, again.tokens) == ("ready", before.half_read.tokens)


def test_after_kill_9_a_document_can_be_deleted(restarted: tuple[Before, ServiceProcess]) -> None:
    before, service = restarted
    service.client.read(TEXT, document_id="contract-17", wait=True)
    assert service.client.delete("contract-17") == before.read.tokens // 256
    cold = service.client.generate(QUESTION, document=TEXT, sampling=SAMPLING)
    assert cold.cached_tokens.total == 0
