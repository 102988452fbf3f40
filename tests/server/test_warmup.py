"""What is done before the service is ready leaves no trace in the engine that serves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import answer, ask, prompt
from tiny_models import greedy_reference, tiny_model

from aquifer.server.engine import warmup
from aquifer.server.engine.engine import Engine
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.types import FinishedEvent
from aquifer.server.engine.warmup import warm_up


@pytest.mark.parametrize("index_pages", [64, 0])
@pytest.mark.parametrize("codec", ["raw", "higgs:2"])
def test_a_warmed_up_engine_serves_as_if_nothing_had_happened(
    codec: str, index_pages: int, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, codec, index_pages=index_pages)
    asked: list[FinishedEvent] = []
    generate = Engine.generate

    def watched(own: Engine, requests: Any) -> list[FinishedEvent]:
        finished = generate(own, requests)
        asked.extend(finished)
        return finished

    monkeypatch.setattr(Engine, "generate", watched)
    before = engine._parts.metrics.render()
    warm_up(engine._parts, engine.info)
    cold, restored, short, off_device = asked
    assert (cold.computed_tokens, restored.cached.ram) == (cold.prompt_tokens, 1024)
    assert (short.computed_tokens, short.cached.ram) == (10, 1024)
    assert off_device.kv.mode == ("verified" if index_pages else "streamed")
    assert engine.store.ram.stats().entries == 0
    assert engine._parts.metrics.render() == before
    ids = prompt(5, 600)
    assert answer(engine, ask(ids, 8))[0] == greedy_reference(model, ids, 8)


def test_a_device_without_room_for_it_is_served_cold(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> PagePool:
        raise torch.OutOfMemoryError("no room")

    engine = make_engine(tiny_model("llama"))
    monkeypatch.setattr(warmup, "PagePool", full)
    warm_up(engine._parts, engine.info)


def test_a_model_that_takes_short_prompts_only_is_warmed_up_with_one(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(tiny_model("llama"))
    warm_up(engine._parts, replace(engine.info, max_total_tokens=40))
    assert engine.store.ram.stats().entries == 0
