"""A service that is killed without warning leaves behind what the next one needs."""

from __future__ import annotations

from collections.abc import Callable

from redis_server import RedisServer
from service_process import ServiceProcess, document
from waiting import wait_until

from aquifer.clients import Sampling

QUESTION = "Which crate is due first?"
SAMPLING = Sampling(max_new_tokens=32)


def test_after_kill_9_documents_are_answered_from_redis_as_they_were_from_ram(
    start_service: Callable[..., ServiceProcess], redis_server: RedisServer
) -> None:
    text = document("Contract 17")
    # A lossy codec: the answer after the restart is the same only if it is made from the same bytes.
    settings = {"redis_url": redis_server.url, "codec": "higgs:4"}
    first = start_service(**settings)
    read = first.client.read(text, document_id="contract-17", wait=True)
    warm = first.client.generate(QUESTION, document=text, sampling=SAMPLING)
    records = read.tokens // 256 + 1
    wait_until(lambda: first.metric("tier_write_bytes_total", tier="redis") == read.stored_bytes)
    assert first.metric("tier_entries", tier="redis") >= records
    first.kill()

    second = start_service(**settings)
    again = second.client.generate(QUESTION, document=text, sampling=SAMPLING)
    by_id = second.client.generate(QUESTION, document_id="contract-17", sampling=SAMPLING)
    assert warm.cached_tokens.ram == again.cached_tokens.redis == read.tokens // 256 * 256
    assert again.text == by_id.text == warm.text
    assert second.client.document("contract-17") == read
    assert second.client.delete("contract-17") == read.tokens // 256
    assert second.client.generate(QUESTION, document=text, sampling=SAMPLING).cached_tokens.total == 0
