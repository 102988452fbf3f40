"""Selective and verified decoding by recorded steps, in a whole engine on a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from asking import answer, ask, prompt, submit
from tiny_models import DEVICE, greedy_reference, tiny_model

from aquifer.server.engine import graphs, selective
from aquifer.server.engine.admission import Plan
from aquifer.server.engine.engine import Engine

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="steps are recorded on a CUDA device")

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("shared", [True, False])
def test_with_the_whole_prompt_chosen_answers_equal_those_of_plain_steps(
    shared: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", head_dim=64)
    recorded = make_engine(model, shared_selection=shared)
    assert selective.selects_on_device(recorded._parts)
    for module in (graphs, selective):
        monkeypatch.setattr(module, "selects_on_device", lambda parts: False)
    plain = make_engine(model, shared_selection=shared)
    prompts = [prompt(1, 700), prompt(2, 1300)]
    expected = [answer(plain, ask(ids, 16, mode="selective", budget=1.0))[0] for ids in prompts]
    monkeypatch.undo()
    found = [answer(recorded, ask(ids, 16, mode="selective", budget=1.0))[0] for ids in prompts]
    assert found == expected


@pytest.mark.parametrize("crowded", [True, False])
def test_a_request_answers_alike_alone_and_beside_others(
    crowded: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows of two steps on the device, or all of them."""
    monkeypatch.setattr(selective, "ROW_CACHE_STEPS", 2 if crowded else 16)
    engine = make_engine(tiny_model("llama", head_dim=64), max_running=64 if crowded else 8)
    for length in (700, 1300, 2000):
        plan = engine._admission.plan(ask(prompt(1, length), 12, mode="selective", budget=0.2))
        assert isinstance(plan, Plan) and plan.selection
        assert plan.selection.keeps_all(plan.segments) != crowded
    requests = [(prompt(seed, length), 0.2) for seed, length in ((1, 700), (2, 1300), (3, 2000))]
    alone = [answer(engine, ask(ids, 12, mode="selective", budget=budget))[0] for ids, budget in requests]
    events = [submit(engine, ask(ids, 12, mode="selective", budget=budget)) for ids, budget in requests]
    for one, expected in zip(events, alone, strict=True):
        one.wait()
        assert one.tokens == expected


def test_rows_that_come_beside_the_steps_are_those_that_steps_fetch(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aquifer.server.engine import lanes  # imports Triton

    engine = make_engine(tiny_model("llama", head_dim=64))
    request = partial(ask, prompt(3, 2000), 24, mode="selective", budget=0.1)
    load_layer, loads = lanes.LaneCache.load_layer, []

    def watched(cache: lanes.LaneCache) -> torch.cuda.Event | None:
        loads.append(load_layer(cache))
        return loads[-1]

    monkeypatch.setattr(lanes.LaneCache, "load_layer", watched)
    made = answer(engine, request())[0]
    assert not any(loads), "they were there as they were made"
    loaded = answer(engine, request())[0]
    assert any(loads)
    monkeypatch.setattr(lanes, "load_rows_of", lambda *args: None)
    fetched = answer(engine, request())[0]
    assert made == loaded == fetched


def test_pages_that_rows_were_on_their_way_to_serve_the_next_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while its rows are being loaded; prompts that fill the device get its pages right after."""
    from aquifer.server.engine import lanes  # imports Triton

    monkeypatch.setattr(lanes, "STEPS_BEFORE_LOADING", 0)
    model = tiny_model("llama", head_dim=64)
    engine = make_engine(model)
    answer(engine, ask(prompt(3, 2000), 2, mode="selective", budget=0.1))  # is selectable from now on
    load_layer, loads = lanes.LaneCache.load_layer, []

    def cancel(cache: lanes.LaneCache) -> torch.cuda.Event | None:
        loads.append(load_layer(cache))
        engine.cancel(request.request_id)
        return loads[-1]

    monkeypatch.setattr(lanes.LaneCache, "load_layer", cancel)
    for seed in range(4, 10):
        loads.clear()
        request = ask(prompt(3, 2000), 200, mode="selective", budget=0.1)
        assert answer(engine, request)[1].reason == "cancelled" and any(loads)
        ids = prompt(seed, 3900)
        assert answer(engine, ask(ids, 4, mode="resident"))[0] == greedy_reference(model, ids, 4)


def test_verified_answers_equal_those_of_generate(make_engine: MakeEngine) -> None:
    model = tiny_model("llama", head_dim=64)
    engine = make_engine(model, pages=30, keep=False)
    ids = prompt(6, 1300)
    tokens, last = answer(engine, ask(ids, 20, mode="verified", budget=0.3))
    assert tokens == greedy_reference(model, ids, 20)
    assert last.drafts is not None and last.drafts.accepted > 0
