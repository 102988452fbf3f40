"""Decode modes as users ask for them: over HTTP, with a device too small for the document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from redis_server import RedisServer
from service_process import ServiceProcess, document, plain_answer
from transformers import PreTrainedModel

from aquifer.clients import Sampling

QUESTION = "What is the lightest crate?"
TEXT = document("modes", num_tokens=2600)
NEW_TOKENS = 24
SMALL = {"gpu_kv_bytes": 1600 << 10, "streamed_gpu_bytes": 0}  # 7 pages beside the landmarks


@pytest.fixture(scope="module")
def service(start_service: Callable[..., ServiceProcess]) -> Iterator[ServiceProcess]:
    return start_service(**SMALL)


def ask(service: ServiceProcess, mode: str, **kv: Any) -> httpx.Response:
    body = {
        "inputs": QUESTION,
        "document": TEXT,
        "parameters": {"max_new_tokens": NEW_TOKENS, "details": True},
        "kv": {"mode": mode, **kv},
    }
    return httpx.post(f"{service.url}/generate", json=body, timeout=120)


@pytest.mark.parametrize("mode", ["streamed", "verified", "auto"])
def test_exact_modes_answer_like_plain_generate(
    service: ServiceProcess, model: PreTrainedModel, mode: str
) -> None:
    expected = plain_answer(model, TEXT, QUESTION, NEW_TOKENS)
    for _ in range(2):
        details = ask(service, mode).raise_for_status().json()["details"]
        assert [token["id"] for token in details["tokens"]] == expected
        assert details["kv"]["mode"] == ("verified" if mode == "auto" else mode)
        if mode == "streamed":
            assert details["drafts"] is None
        else:
            assert details["drafts"]["accepted"] <= details["drafts"]["drafted"]
            assert 1 <= details["drafts"]["checks"] <= NEW_TOKENS


def test_the_client_asks_for_a_mode_and_sees_what_it_did(service: ServiceProcess) -> None:
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    verified = service.client.generate(
        QUESTION, document=TEXT, sampling=sampling, mode="verified", budget=0.1
    )
    assert verified.kv.mode == "verified"
    assert verified.drafts is not None and verified.drafts.checks > 0
    streamed = service.client.generate(QUESTION, document=TEXT, sampling=sampling, mode="streamed")
    assert (streamed.text, streamed.drafts) == (verified.text, None)


def test_a_document_larger_than_the_device_can_be_read_ahead(service: ServiceProcess) -> None:
    text = document("read ahead", num_tokens=2600)
    kept = service.client.read(text, document_id="large", wait=True)
    assert kept.status == "ready"
    answer = service.client.generate(QUESTION, document_id="large", sampling=Sampling(max_new_tokens=4))
    assert answer.kv.mode == "verified"
    assert answer.cached_tokens.ram >= 2560


def test_selective_reads_a_part_and_says_what_it_fetched(service: ServiceProcess) -> None:
    before = service.metric("selected_tokens_total")
    details = ask(service, "selective", budget=0.12).raise_for_status().json()["details"]
    assert details["kv"]["mode"] == "selective"
    assert details["generated_tokens"] == NEW_TOKENS
    selected = service.metric("selected_tokens_total") - before
    indexed = (details["prompt_tokens"] - 1) // 256 * 256 - 4
    count = round(0.12 * details["prompt_tokens"]) - (details["prompt_tokens"] - indexed)
    assert selected == count * 3 * 2 * (NEW_TOKENS - 1)  # layers, KV heads, steps after the first token
    assert 0 < service.metric("selected_hits_total") < service.metric("selected_tokens_total")
    assert service.metric("fetched_bytes_total", mode="selective") > 0


def test_what_the_modes_hold_and_do_is_in_the_metrics(service: ServiceProcess) -> None:
    ask(service, "verified").raise_for_status()
    drafted = [service.metric("draft_tokens_total", result=result) for result in ("accepted", "rejected")]
    assert sum(drafted) > 0
    assert service.metric("fetched_bytes_total", mode="streamed") > 0
    assert service.metric("gpu_memory_bytes", use="staging") > 0
    for use in ("resident", "landmarks"):
        assert service.metric("gpu_memory_bytes", use=use) == 0, "nothing runs, and nothing is kept here"


def test_modes_side_by_side_do_not_disturb_each_other(
    service: ServiceProcess, model: PreTrainedModel
) -> None:
    expected = plain_answer(model, TEXT, QUESTION, NEW_TOKENS)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda mode: ask(service, mode), ["streamed", "verified", "selective"] * 2))
    for mode, answer in zip(["streamed", "verified", "selective"] * 2, answers, strict=True):
        details = answer.raise_for_status().json()["details"]
        assert details["kv"]["mode"] == mode
        if mode != "selective":
            assert [token["id"] for token in details["tokens"]] == expected


def test_a_mode_that_cannot_be_is_refused_with_the_setting(
    service: ServiceProcess, start_service: Callable[..., ServiceProcess]
) -> None:
    answer = ask(service, "resident")
    assert (answer.status_code, answer.json()["error_type"]) == (413, "too_long")
    assert "AQUIFER_GPU_KV_BYTES" in answer.json()["error"]
    poor = start_service(**SMALL, ram_bytes=1 << 20, selective_ram_bytes=0)
    for mode, setting in (("streamed", "AQUIFER_RAM_BYTES"), ("selective", "AQUIFER_SELECTIVE_RAM_BYTES")):
        answer = ask(poor, mode)
        assert answer.status_code == 413
        assert setting in answer.json()["error"]


def test_streamed_answers_survive_the_loss_of_redis(
    start_service: Callable[..., ServiceProcess], redis_server: RedisServer, model: PreTrainedModel
) -> None:
    """What a running request reads is leased in RAM; what is not there is recomputed."""
    service = start_service(**SMALL, redis_url=redis_server.url)
    expected = plain_answer(model, TEXT, QUESTION, NEW_TOKENS)
    for stop in (False, True, False):
        if stop:
            redis_server.stop()
        details = ask(service, "streamed").raise_for_status().json()["details"]
        assert [token["id"] for token in details["tokens"]] == expected
