"""The engine's promise: with a lossless codec, whatever else is running and wherever the KV came
from, the tokens are those of plain `generate`."""

import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import Events, answer, ask, prompt, submit, text_of
from tiny_models import DEVICE, FAMILIES, greedy_reference, tiny_model

from aquifer.cachestore.keys import PromptKeys, SegmentKey
from aquifer.server.engine import loop
from aquifer.server.engine.engine import Engine, EngineError
from aquifer.server.engine.pages import PagePool
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    GenerateRequest,
    KVMode,
    ProgressEvent,
    SamplingParams,
    TokenEvent,
)

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("family", FAMILIES)
def test_cold_and_restored_answers_equal_generate(family: str, make_engine: MakeEngine) -> None:
    model = tiny_model(family)
    engine = make_engine(model, keep=False)
    ids = prompt(1, 1100)
    expected = greedy_reference(model, ids, 12)
    cold, first = answer(engine, ask(ids, 12))
    assert engine.flush(30)
    warm, second = answer(engine, ask(ids, 12))
    assert cold == expected
    assert warm == expected
    assert first.computed_tokens == 1100
    assert (second.cached.ram, second.computed_tokens) == (1024, 1100 - 1024)


def test_pages_on_the_device_are_shared_and_counted_as_gpu_hits(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model)
    ids = prompt(2, 1000)
    answer(engine, ask(ids))
    used = engine.load().device_bytes["resident"]
    tokens, last = answer(engine, ask(ids[:768] + prompt(3, 50)))
    assert last.cached.gpu == 768
    assert tokens == greedy_reference(model, ids[:768] + prompt(3, 50), 8)
    assert engine.load().device_bytes["resident"] - used == 0


def test_records_of_a_restore_that_fails_are_leased_until_the_device_reads_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    ids = prompt(31, 1100)
    answer(engine, ask(ids))
    assert engine.flush(30)
    leased: list[int] = []
    monkeypatch.setattr(loop, "until_idle", lambda device: leased.append(engine.store.ram.open_leases))
    write = PagePool.write

    def fail(pool: PagePool, layer: int, *rest: Any) -> None:
        if layer == 1:
            raise RuntimeError("out of memory")
        write(pool, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "write", fail)
        with pytest.raises(EngineError, match="out of memory"):
            engine.generate([ask(ids)])
    assert leased == [1024 // 256 + 1]  # with the sinks
    assert engine.flush(30) and engine.store.ram.open_leases == 0
    tokens, last = answer(engine, ask(ids))
    assert tokens == greedy_reference(model, ids, 8) and last.cached.ram == 1024


@pytest.mark.parametrize("bad", [-1, 300, 2**31])
@pytest.mark.parametrize("where", ["token_ids", "score_ids"])
def test_a_token_id_that_the_model_does_not_know_is_named(
    bad: int, where: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny_model("llama"))
    good = ask(prompt(32, 20))
    named = re.escape(f"{bad:,}") if bad < 2**31 else str(bad)
    with pytest.raises(ValueError, match=f"token id {named} at place 1"):
        engine.generate([replace(good, **{where: (7, bad)})])
    assert answer(engine, good)[1].generated_tokens == 8


def test_eight_concurrent_users_of_one_document_share_its_pages(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=4 + 8 * 1)
    document = prompt(4, 1024)
    requests = [ask(document + prompt(10 + user, 20)) for user in range(8)]
    finished = engine.generate(requests)
    for request, event in zip(requests, finished, strict=True):
        expected = greedy_reference(model, request.token_ids, 8)
        assert event.text == text_of(expected)
    assert sorted(event.cached.gpu for event in finished) == [0] + [1024] * 7


def test_prompt_that_is_a_whole_number_of_segments(make_engine: MakeEngine) -> None:
    """The last token must be computed, or there would be no logits to choose from."""
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    ids = prompt(5, 512)
    expected = greedy_reference(model, ids, 8)
    for cached in (0, 256):
        tokens, last = answer(engine, ask(ids))
        assert engine.flush(30)
        assert tokens == expected
        assert last.cached.ram == cached


@pytest.mark.parametrize("length", [1, 3, 4, 5, 255, 256, 257])
def test_short_prompts(length: int, make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model)
    ids = prompt(length, length)
    expected = greedy_reference(model, ids, 8)
    assert answer(engine, ask(ids))[0] == expected
    assert answer(engine, ask(ids))[0] == expected


def test_all_pages_come_back(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    engine.generate([ask(prompt(n, 700)) for n in range(6)])
    assert engine.load().device_bytes["resident"] == 0
    assert engine.load().running == 0


def test_salts_never_share(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    ids = prompt(8, 600)
    answer(engine, ask(ids, cache_salt="one"))
    assert engine.flush(30)
    assert answer(engine, ask(ids, cache_salt="two"))[1].cached.total == 0
    assert answer(engine, ask(ids, cache_salt="one"))[1].cached.total == 512


def test_prompt_only_request_stores_and_the_next_question_finds_it(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)
    document = prompt(9, 1000)
    last = engine.generate([ask(document, 0)])[0]
    assert (last.generated_tokens, last.computed_tokens) == (0, 768)
    tokens, warm = answer(engine, ask(document + prompt(11, 30)))
    assert warm.cached.ram == 768
    assert tokens == greedy_reference(model, document + prompt(11, 30), 8)


def test_forgotten_documents_are_gone_everywhere(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    ids = prompt(12, 1000)
    engine.generate([ask(ids, 0)])
    assert engine.forget(ids, "") == 3
    assert answer(engine, ask(ids))[1].cached.total == 0


def test_what_another_document_has_pinned_is_not_forgotten_with_this_one(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    whole = prompt(12, 1300)
    engine.pin(whole, "")
    for ids in (whole, whole[:600] + prompt(13, 700)):
        engine.generate([ask(ids, 0)])
    assert engine.forget(whole[:600] + prompt(13, 700), "") == 3  # of five, behind the two that both have
    assert answer(engine, ask(whole))[1].cached.ram == 1280
    engine.unpin(whole, "")
    assert engine.forget(whole, "") == 5
    assert answer(engine, ask(whole))[1].cached.total == 0


@pytest.mark.parametrize("mode", ["resident", "streamed", "selective"])
def test_a_document_that_is_forgotten_while_it_is_read_is_kept_nowhere(
    mode: KVMode, make_engine: MakeEngine
) -> None:
    """Neither what was read before nor what is read afterwards, and its reader is answered all the same."""
    model = tiny_model("llama")
    engine = make_engine(model, chunk_tokens=256)
    ids, half_read, forgotten = prompt(35, 2100), threading.Event(), threading.Event()

    def forget_halfway(event: Event) -> None:
        """The engine's thread goes on as soon as it is asked to forget."""
        if isinstance(event, ProgressEvent) and event.done_tokens >= 1024 and not half_read.is_set():
            half_read.set()
            deadline = time.monotonic() + 30
            while engine._inbox.empty() and time.monotonic() < deadline:
                time.sleep(0.001)

    def forget() -> None:
        half_read.wait(30)
        engine.forget(ids, "")
        forgotten.set()

    thread = threading.Thread(target=forget)
    thread.start()
    events = submit(engine, ask(ids, mode=mode), forget_halfway)
    last = events.finished
    thread.join()
    assert half_read.is_set() and forgotten.is_set() and last.computed_tokens == len(ids)
    if mode != "selective":
        assert events.tokens == greedy_reference(model, ids, 8)
    assert engine.flush(30)
    assert not any(engine.store.contains(engine._keys(ids, "").segments))
    again = answer(engine, ask(ids, mode=mode))[1]
    assert again.cached.total == 0
    assert engine.flush(30)
    assert answer(engine, ask(ids, mode=mode))[1].cached.total == 2048


def test_a_waiting_request_starts_when_room_comes_back_while_another_one_waits_for_a_tier(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"), keep=False, max_running=2)
    contains, answered = engine.store.contains, threading.Event()

    def stall(keys: Sequence[SegmentKey]) -> list[str | None]:
        assert answered.wait(30), "a request waits for one that waits for a tier"
        return contains(keys)

    running = submit(engine, ask(prompt(1, 20), 200))
    monkeypatch.setattr(engine.store, "contains", stall)
    fetching = submit(engine, ask(prompt(5, 600), 4))
    waiting = submit(engine, ask(prompt(3, 20), 4), lambda event: None)
    running.wait()
    waiting.wait(20)
    answered.set()
    assert len(fetching.finished.text) == 4


def test_scoring_gives_the_log_probabilities_of_the_models_own_forward(make_engine: MakeEngine) -> None:
    model = tiny_model("qwen2")
    engine = make_engine(model, keep=False)
    ids, target = prompt(13, 770), prompt(14, 600)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + target], device=DEVICE)).logits[0].float().log_softmax(-1)
    rows = torch.arange(len(ids) - 1, len(ids) + len(target) - 1)
    expected = logits[rows, torch.tensor(target)].tolist()
    for _ in ("cold", "restored"):
        last = engine.generate([GenerateRequest("s", ids, score_ids=target)])[0]
        assert engine.flush(30)
        assert list(last.score_logprobs) == pytest.approx(expected, abs=2e-3)
    assert last.cached.ram == 768


def test_cancelled_request_ends_and_gives_its_pages_back(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    seen = itertools.count()

    def leave(event: Event) -> None:
        if isinstance(event, TokenEvent) and next(seen) > 1:
            engine.cancel("long")

    sampling = SamplingParams(max_new_tokens=3000, ignore_eos=True)
    last = submit(engine, GenerateRequest("long", prompt(15, 300), sampling), leave).finished
    assert last.reason == "cancelled"
    assert last.generated_tokens < 3000
    assert engine.load().device_bytes["resident"] == 0


def test_progress_is_reported_while_a_prompt_is_read(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), chunk_tokens=256)
    events = submit(engine, ask(prompt(16, 1000)))
    events.wait()
    done = [event.done_tokens for event in events.all if isinstance(event, ProgressEvent)]
    assert done == sorted(done)
    assert len(done) >= 3


def test_prompts_beyond_the_limits_are_refused_with_number_and_way_out(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=4)
    with pytest.raises(EngineError, match=r"4,001 tokens.*AQUIFER_MAX_PROMPT_TOKENS"):
        engine.generate([ask(prompt(1, 4001), 8)])
    with pytest.raises(EngineError, match=r"3,000 tokens.*AQUIFER_GPU_KV_BYTES"):
        engine.generate([ask(prompt(1, 3000), 8, mode="resident")])
    with pytest.raises(EngineError, match="max_new_tokens"):
        engine.generate([ask(prompt(1, 10), 5000)])


def test_same_seed_draws_the_same_tokens_whatever_else_runs(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    sampling = SamplingParams(max_new_tokens=20, temperature=0.9, top_p=0.95, top_k=50, seed=7)
    request = GenerateRequest("a", prompt(17, 300), sampling)
    alone = engine.generate([request])[0].text
    crowd = [replace(ask(prompt(n, 200), 30), request_id=str(n)) for n in range(3)]
    together = engine.generate([*crowd, replace(request, request_id="b")])[-1].text
    assert alone == together
    other = replace(request, request_id="c", sampling=replace(sampling, seed=8))
    assert engine.generate([other])[0].text != alone


def test_closing_answers_every_request(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    events: list[Event] = []
    sampling = SamplingParams(max_new_tokens=3000, ignore_eos=True)
    for n in range(3):
        engine.submit(GenerateRequest(str(n), prompt(n, 300), sampling), events.append)
    engine.close()
    failed = [event for event in events if isinstance(event, FailedEvent)]
    assert [event.kind for event in failed] == ["shutting_down"] * 3


def test_a_request_that_is_named_while_the_engine_closes_is_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"))
    name, begun, closed = engine._keys, threading.Event(), threading.Event()

    def late(*args: Any) -> PromptKeys:
        begun.set()
        assert closed.wait(30)
        return name(*args)

    monkeypatch.setattr(engine, "_keys", late)
    events = Events()
    thread = threading.Thread(target=engine.submit, args=(ask(prompt(1, 600)), events))
    thread.start()
    assert begun.wait(30)
    engine.close()
    closed.set()
    last = events.wait()
    thread.join()
    assert isinstance(last, FailedEvent) and last.kind == "shutting_down"
    with pytest.raises(EngineError, match="shutting down"):
        engine._call(lambda: None)


def test_closing_twice_gives_host_memory_back_once(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"))
    give_back, given = engine._on_close, []
    engine._on_close = lambda: given.append(give_back())
    engine.close()
    engine.close()
    assert given == [None]


@pytest.mark.parametrize("codec", ["higgs:4", "higgs:2"])
def test_lossy_codec_restores_the_same_bytes_to_the_same_text(codec: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), codec, keep=False)
    ids = prompt(18, 1100)
    answer(engine, ask(ids))
    assert engine.flush(30)
    first, second = (answer(engine, ask(ids)) for _ in range(2))
    assert first[0] == second[0]
    assert first[1].cached.ram == 1024


def test_a_sink_that_raises_ends_only_its_own_request(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, keep=False)

    def broken(event: Event) -> None:
        raise RuntimeError("nobody listens")

    sampling = SamplingParams(max_new_tokens=3000, ignore_eos=True)
    engine.submit(GenerateRequest("deaf", prompt(20, 300), sampling), broken)
    ids = prompt(21, 300)
    assert answer(engine, ask(ids))[0] == greedy_reference(model, ids, 8)
    while engine.load().running:
        time.sleep(0.01)
    assert engine.load().device_bytes["resident"] == 0


def test_the_first_token_is_timed_from_before_the_prompt_is_named(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"))
    name = engine._keys

    def named(*args: Any) -> PromptKeys:
        time.sleep(0.05)
        return name(*args)

    monkeypatch.setattr(engine, "_keys", named)
    events = submit(engine, ask(prompt(1, 20), 2))
    assert events.finished.timings.ttft_seconds >= 0.05
