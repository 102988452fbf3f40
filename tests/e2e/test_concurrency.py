"""Many clients at once, and clients that leave."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection

import httpx
from service_process import ServiceProcess, document, plain_answer
from transformers import PreTrainedModel
from waiting import wait_until

from aquifer.clients import Answer, Sampling, Token

THREADS = 12
REQUESTS_PER_THREAD = 5
QUESTIONS = ("What is the heaviest crate?", "Which is due first?")
SAMPLING = Sampling(max_new_tokens=16)
# Nobody waits for the end of it. The small model of these tests takes an H200 less than 0.5 s.
LONG = Sampling(max_new_tokens=2000)


def nothing_runs(service: ServiceProcess) -> bool:
    return (
        service.metric("requests_running") == 0
        and service.metric("requests_waiting") == 0
        and service.metric("gpu_memory_bytes", use="resident") == 0
    )


def test_mixed_requests_at_once_get_the_answers_they_get_alone(
    plain_service: ServiceProcess, model: PreTrainedModel
) -> None:
    texts = [document(f"Shared {number} of them", num_tokens=400 + 400 * number) for number in range(4)]
    expected = {
        (text, question): plain_answer(model, text, question, 16) for text in texts for question in QUESTIONS
    }
    client = plain_service.client

    def request(draw: random.Random) -> tuple[list[int], list[int]]:
        """What was answered, and what should have been."""
        text, question = draw.choice(texts), draw.choice(QUESTIONS)
        kind = draw.choice(("whole", "stream", "leave", "hang up"))
        if kind == "hang up":
            hang_up(plain_service, text, question, after_seconds=draw.uniform(0.01, 0.5))
            return [], []
        if kind == "whole":
            answer = client.generate(question, document=text, sampling=SAMPLING)
            return [token.id for token in answer.tokens], expected[text, question]
        sampling = LONG if kind == "leave" else SAMPLING
        tokens: list[int] = []
        with closing(client.generate_stream(question, document=text, sampling=sampling)) as items:
            for item in items:
                if isinstance(item, Token):
                    tokens.append(item.id)
                if kind == "leave" and len(tokens) == 3:
                    return tokens, expected[text, question][:3]
        assert isinstance(item, Answer) and item.generated_tokens == len(tokens)
        return tokens, expected[text, question]

    def requests(seed: int) -> list[tuple[list[int], list[int]]]:
        draw = random.Random(seed)
        return [request(draw) for _ in range(REQUESTS_PER_THREAD)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [result for results in pool.map(requests, range(THREADS)) for result in results]
    assert len(results) == THREADS * REQUESTS_PER_THREAD
    for answered, should_be in results:
        assert answered == should_be
    wait_until(lambda: nothing_runs(plain_service), poll_seconds=0.05)


def test_leaving_a_stream_ends_its_generation(plain_service: ServiceProcess) -> None:
    left = plain_service.metric("requests_total", status="499") if has_left(plain_service) else 0.0
    generated = plain_service.metric("generation_tokens_total")
    items = plain_service.client.generate_stream("Go on.", sampling=LONG)
    assert isinstance(next(items), Token)
    items.close()
    wait_until(lambda: nothing_runs(plain_service), poll_seconds=0.02)
    assert plain_service.metric("generation_tokens_total") - generated < LONG.max_new_tokens
    assert plain_service.metric("requests_total", status="499") == left + 1


def test_hanging_up_while_waiting_for_an_answer_ends_its_generation(plain_service: ServiceProcess) -> None:
    left = plain_service.metric("requests_total", status="499") if has_left(plain_service) else 0.0
    generated = plain_service.metric("generation_tokens_total")
    address = httpx.URL(plain_service.url)
    with closing(HTTPConnection(address.host, address.port)) as line:
        body = json.dumps(long_request(document("Left", num_tokens=300), "Go on."))
        line.request("POST", "/generate", body, {"Content-Type": "application/json"})
        wait_until(lambda: plain_service.metric("requests_running") == 1, poll_seconds=0.01)
    wait_until(lambda: nothing_runs(plain_service), poll_seconds=0.02)
    assert plain_service.metric("generation_tokens_total") - generated < LONG.max_new_tokens
    assert plain_service.metric("requests_total", status="499") == left + 1


def hang_up(service: ServiceProcess, text: str, question: str, *, after_seconds: float) -> None:
    """Ask for a long answer, and close the connection, wherever the request is by then: a fast device may be
    done with it."""
    client = httpx.Client(base_url=service.url, timeout=after_seconds)
    with client as impatient, suppress(httpx.TimeoutException):
        impatient.post("/generate", json=long_request(text, question))


def long_request(text: str, question: str) -> dict[str, object]:
    return {"document": text, "inputs": question, "parameters": {"max_new_tokens": LONG.max_new_tokens}}


def has_left(service: ServiceProcess) -> bool:
    return 'status="499"' in service.http.get("/metrics").text
