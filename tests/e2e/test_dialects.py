"""The same question in TGI's and in OpenAI's words: one answer, one cache."""

from __future__ import annotations

import json

from service_process import ServiceProcess, document

from aquifer.clients import Sampling


def test_openai_and_tgi_requests_share_cache_and_answers(plain_service: ServiceProcess) -> None:
    text = document("Either way")
    answer = plain_service.client.generate(text, sampling=Sampling(max_new_tokens=8))
    body = {
        "model": plain_service.client.info().model,
        "prompt": text,
        "max_tokens": 8,
        "temperature": 0,
    }
    completion = plain_service.http.post("/v1/completions", json=body).raise_for_status().json()
    assert completion["choices"][0]["text"] == answer.text
    usage = completion["usage"]
    assert usage["prompt_tokens"] == answer.prompt_tokens
    assert usage["prompt_tokens_details"]["cached_tokens"] == answer.prompt_tokens // 256 * 256

    streamed = plain_service.http.post("/v1/completions", json={**body, "stream": True}).raise_for_status()
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == answer.text
