"""More documents than RAM holds, and a load gate that decides by itself: right answers all the same."""

from __future__ import annotations

from collections.abc import Callable

from redis_server import RedisServer
from service_process import ServiceProcess, document, plain_answer
from transformers import PreTrainedModel

from aquifer.clients import Sampling

QUESTION = "What is the lightest crate?"
SOURCES = ("computed", "gpu", "ram", "redis")


def test_documents_beyond_ram_and_device_are_answered_and_accounted_for(
    start_service: Callable[..., ServiceProcess], redis_server: RedisServer, model: PreTrainedModel
) -> None:
    service = start_service(
        redis_url=redis_server.url,
        load_gate="auto",
        gpu_cache=True,
        ram_bytes=4 << 20,  # 21 records
        gpu_kv_bytes=4 << 20,  # 21 pages
    )
    texts = [document(f"{number} of many", num_tokens=1500) for number in range(6)]
    expected = {text: plain_answer(model, text, QUESTION, 8) for text in texts}
    prompt_tokens = 0
    for text in [*texts, *texts, texts[-1], *reversed(texts)]:
        answer = service.client.generate(QUESTION, document=text, sampling=Sampling(max_new_tokens=8))
        assert [token.id for token in answer.tokens] == expected[text]
        prompt_tokens += answer.prompt_tokens
    counted = {source: service.metric("prompt_tokens_total", source=source) for source in SOURCES}
    assert sum(counted.values()) == prompt_tokens
    assert 0 < counted["gpu"] < prompt_tokens, "the last document is still on the device, the first is not"
    assert service.metric("tier_evictions_total", tier="ram") > 0
    assert service.metric("tier_used_bytes", tier="ram") <= service.metric("tier_capacity_bytes", tier="ram")
    assert service.metric("requests_total", status="200") == len(texts) * 3 + 1
