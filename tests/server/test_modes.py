"""Decoding with the KV off the device: which modes are exact, what they hold, and that they give it back."""

import itertools
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from asking import answer, ask, busy, prompt, submit, text_of
from tiny_models import FAMILIES, greedy_reference, tiny_model

from aquifer.cachestore.keys import chain_keys, make_namespace
from aquifer.server.engine.decoding import Verified
from aquifer.server.engine.engine import Engine, EngineError
from aquifer.server.engine.types import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    KVMode,
    ProgressEvent,
    SamplingParams,
    TokenEvent,
)

MakeEngine = Callable[..., Engine]
EXACT: tuple[KVMode, ...] = ("streamed", "verified")
OFF_DEVICE: tuple[KVMode, ...] = ("streamed", "selective", "verified")


def assert_nothing_held(engine: Engine) -> None:
    """Of an engine that keeps no pages of finished requests."""
    assert engine.flush(30)
    load = engine.load()
    assert (load.device_bytes["resident"], load.device_bytes["landmarks"]) == (0, 0)
    assert engine.store.ram.open_leases == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", EXACT)
def test_exact_modes_answer_like_generate_on_a_device_too_small_for_the_prompt(
    family: str, mode: KVMode, make_engine: MakeEngine
) -> None:
    model = tiny_model(family)
    engine = make_engine(model, pages=4, keep=False)
    ids = prompt(1, 1300)
    expected = greedy_reference(model, ids, 12)
    cold, first = answer(engine, ask(ids, 12, mode=mode))
    warm, second = answer(engine, ask(ids, 12, mode=mode))
    assert cold == expected
    assert warm == expected
    assert (first.kv.mode, first.computed_tokens) == (mode, 1300)
    assert (second.cached.ram, second.computed_tokens) == (1280, 20)
    assert_nothing_held(engine)


@pytest.mark.parametrize("pages_kept", [0, 1, 3, 50])
@pytest.mark.parametrize("mode", EXACT)
def test_the_budget_for_kept_segments_changes_no_token(
    mode: KVMode, pages_kept: int, make_engine: MakeEngine
) -> None:
    model = tiny_model("llama")
    page_bytes = make_engine(model)._parts.pool.page_bytes
    engine = make_engine(model, pages=20, keep=False, streamed_bytes=pages_kept * page_bytes)
    ids = prompt(2, 1500)
    expected = greedy_reference(model, ids, 20)
    assert answer(engine, ask(ids, 20, mode=mode))[0] == expected
    assert answer(engine, ask(ids, 20, mode=mode))[0] == expected
    assert_nothing_held(engine)


@pytest.mark.parametrize("codec", ["higgs:2", "higgs:4"])
def test_under_a_lossy_codec_exact_modes_equal_the_restored_cache(
    codec: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny_model("qwen3"), codec, keep=False)
    ids = prompt(3, 1400)
    answer(engine, ask(ids, 12, mode="resident"))
    assert engine.flush(30)
    restored, last = answer(engine, ask(ids, 30, mode="resident"))
    assert last.cached.ram == 1280
    for mode in EXACT:
        assert answer(engine, ask(ids, 30, mode=mode))[0] == restored
    assert_nothing_held(engine)


def test_auto_takes_the_device_if_the_prompt_fits_and_stays_exact_if_not(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=5, keep=False)
    for length, mode in ((1000, "resident"), (1700, "verified")):
        ids = prompt(4, length)
        tokens, last = answer(engine, ask(ids, 12, mode="auto"))
        assert last.kv.mode == mode
        assert tokens == greedy_reference(model, ids, 12)
    without_index = make_engine(model, pages=5, index_pages=2, keep=False)
    assert answer(without_index, ask(prompt(4, 1700), 12, mode="auto"))[1].kv.mode == "streamed"


def test_documents_off_the_device_are_reconstructed_as_many_at_a_time_as_there_is_room(
    make_engine: MakeEngine,
) -> None:
    model = tiny_model("llama")
    prompts = [prompt(70 + n, 900) for n in range(3)]
    most_staged: list[int] = []
    for limit in (None, 1):
        engine = make_engine(model, pages=30, keep=False, staging_bytes=limit)
        staged: list[int] = []

        def watch(event: Event, engine: Engine = engine, staged: list[int] = staged) -> None:
            staged.append(engine.load().device_bytes["staging"])

        with busy(engine):
            asked = [submit(engine, ask(ids, 12, mode="streamed"), watch) for ids in prompts]
        for ids, events in zip(prompts, asked, strict=True):
            assert events.finished.kv.mode == "streamed"
            assert events.tokens == greedy_reference(model, ids, 12)
        most_staged.append(max(staged))
    together, one_by_one = most_staged
    assert one_by_one * 2 <= together


def test_requests_in_all_modes_decode_together(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=30, keep=False)
    modes: Sequence[KVMode] = ("resident", "streamed", "verified", "selective") * 2
    requests = [ask(prompt(40 + n, 300 + 150 * n), 15, mode=mode) for n, mode in enumerate(modes)]
    finished = engine.generate(requests)
    for request, event in zip(requests, finished, strict=True):
        assert event.kv.mode == request.mode
        if request.mode != "selective":
            expected = greedy_reference(model, request.token_ids, 15)
            assert event.text == text_of(expected)
    assert_nothing_held(engine)


def test_two_users_of_one_document_share_its_landmarks(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=12, index_pages=6)
    document = prompt(5, 1024)
    finished = engine.generate(
        [ask(document + prompt(50 + user, 20), 12, mode="selective") for user in range(3)]
    )
    assert {event.kv.mode for event in finished} == {"selective"}
    page = engine._parts.index.capacity_bytes // 6
    assert engine.load().device_bytes["landmarks"] == 4 * page


@pytest.mark.parametrize("mode", ["selective", "verified"])
def test_what_an_answer_holds_is_on_the_books_as_long_as_it_runs(
    mode: KVMode, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny_model("llama"), keep=False)
    staged: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, TokenEvent):
            staged.append(engine.load().device_bytes["staging"])

    for seed in (14, 15):  # steps that are recorded count from the first time on
        staged.clear()
        submit(engine, ask(prompt(seed, 1100), 12, mode=mode), look).wait()
        answer(engine, ask(prompt(seed, 20), 2))  # whose steps need nothing of this kind
    slot_of_each_token = 4 * 1024 * 3 * 2  # bytes: in each of 3 layers, for each of 2 heads
    assert max(staged) > engine.load().device_bytes["staging"] + slot_of_each_token


def test_a_stored_document_is_streamed_to_several_users_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=12, keep=False)
    document = prompt(12, 1024)
    answer(engine, ask(document + prompt(13, 20), 12, mode="streamed"))
    running: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, TokenEvent):
            running.append(engine.load().running)

    requests = [ask(document + prompt(70 + user, 20), 30, mode="streamed") for user in range(3)]
    with busy(engine):
        asked = [submit(engine, request, look) for request in requests]
    for events in asked:
        events.wait()
    assert max(running) == 3


@pytest.mark.parametrize("mode", OFF_DEVICE)
def test_holes_are_recomputed(mode: KVMode, make_engine: MakeEngine) -> None:
    model = tiny_model("qwen3")
    engine = make_engine(model, pages=4, keep=False)
    ids = prompt(6, 1500)
    first, _ = answer(engine, ask(ids, 12, mode=mode))
    namespace = make_namespace(engine.info.model_fingerprint, engine.info.codec_fingerprint, "")
    keys = chain_keys(namespace, ids)
    engine.store.delete([keys.segments[0], keys.segments[3]])
    again, last = answer(engine, ask(ids, 12, mode=mode))
    assert again == first
    assert last.cached.ram == 3 * 256
    assert_nothing_held(engine)


@pytest.mark.parametrize("mode", OFF_DEVICE)
def test_a_request_that_stores_nothing_reads_from_memory_of_its_own(
    mode: KVMode, make_engine: MakeEngine
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=4, keep=False)
    ids = prompt(7, 1100)
    tokens, _ = answer(engine, ask(ids, 12, mode=mode, store=False))
    if mode != "selective":
        assert tokens == greedy_reference(model, ids, 12)
    assert engine.store.ram.stats().entries == 0
    assert_nothing_held(engine)


@pytest.mark.parametrize("mode", OFF_DEVICE)
@pytest.mark.parametrize("after", range(1, 12))
def test_cancelled_requests_give_everything_back(mode: KVMode, after: int, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=4, keep=False, chunk_tokens=256)
    request = ask(prompt(8, 1200), 200, mode=mode)
    seen = itertools.count(1)

    def leave(event: Event) -> None:
        if next(seen) == after:
            engine.cancel(request.request_id)

    assert submit(engine, request, leave).finished.reason == "cancelled"
    assert_nothing_held(engine)


def test_a_selective_answer_frees_the_document_while_it_runs(make_engine: MakeEngine) -> None:
    """Pages and leases of the document are needed to read the prompt, not to answer."""
    engine = make_engine(tiny_model("llama"), pages=12, keep=False, streamed_bytes=1 << 30)
    held: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, TokenEvent):
            held.append(engine.store.ram.open_leases)

    submit(engine, ask(prompt(9, 1500), 10, mode="selective"), look).wait()
    assert held[-1] == 0


def test_prompts_that_fit_nowhere_are_refused_with_the_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=4, slots=5, index_pages=3)
    refusals: dict[KVMode, str] = {
        "resident": r"AQUIFER_GPU_KV_BYTES",
        "streamed": r"needs 12 records in RAM, the arena holds \d.*AQUIFER_RAM_BYTES",
        "selective": r"AQUIFER_SELECTIVE_RAM_BYTES",
        "auto": r"3,000 tokens does not fit.*resident:.*verified:.*streamed:",
    }
    for mode, setting in refusals.items():
        with pytest.raises(EngineError, match=setting):
            engine.generate([ask(prompt(1, 3000), 12, mode=mode)])


def test_without_room_a_request_waits_or_is_refused(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    requests = [ask(prompt(60 + n, 900), 40, mode="resident") for n in range(3)]
    patient = make_engine(model, pages=4)
    assert [event.generated_tokens for event in patient.generate(requests)] == [40] * 3
    hasty = make_engine(model, pages=4, refuse_when_full=True)
    with pytest.raises(EngineError, match="AQUIFER_WHEN_FULL"):
        hasty.generate(requests)
    assert_nothing_running(hasty)


@pytest.mark.parametrize("mode", OFF_DEVICE)
def test_idle_pages_of_its_own_document_do_not_keep_a_request_from_starting(
    mode: KVMode, make_engine: MakeEngine
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=5, keep=True)
    ids = prompt(14, 1000)
    answer(engine, ask(ids, 12, mode="resident"))
    tokens, last = answer(engine, ask(ids, 300, mode=mode))
    assert last.cached.gpu + last.cached.ram == 768
    if mode != "selective":
        assert tokens == greedy_reference(model, ids, 300)
    assert answer(engine, ask(prompt(15, 20), 12, mode="auto"))[1].generated_tokens > 0


def test_a_waiting_request_evicts_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=12, index_pages=8)
    answer(engine, ask(prompt(16, 1100), 12, mode="selective"))
    landmarks = engine.load().device_bytes["landmarks"]
    seen: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, TokenEvent):
            seen.append(engine.load().device_bytes["landmarks"])

    running = submit(engine, ask(prompt(17, 1800), 200, mode="resident"), look)  # leaves 4 pages
    second = ask(prompt(18, 1100), 1200, mode="selective")  # needs 6
    submit(engine, second)
    running.wait()
    assert set(seen) == {landmarks}
    engine.cancel(second.request_id)


def test_a_refusal_names_what_was_lacking(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=30, slots=6, refuse_when_full=True)
    with pytest.raises(EngineError, match=r"streamed needs \d+ records in RAM.*AQUIFER_RAM_BYTES"):
        engine.generate([ask(prompt(80 + n, 1100), 60, mode="streamed") for n in range(3)])
    engine = make_engine(tiny_model("llama"), pages=30, index_pages=5, refuse_when_full=True)
    with pytest.raises(EngineError, match=r"segments indexed.*AQUIFER_SELECTIVE_RAM_BYTES"):
        engine.generate([ask(prompt(80 + n, 1100), 60, mode="selective") for n in range(3)])


def test_one_document_counts_once_in_ram_however_many_stream_it(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=12, slots=8, keep=False, refuse_when_full=True)
    document = prompt(19, 1024)
    answer(engine, ask(document + prompt(20, 20), 12, mode="streamed"))
    engine.generate([ask(document + prompt(90 + user, 20), 30, mode="streamed") for user in range(3)])
    assert_nothing_held(engine)


def test_a_request_that_fails_while_decoding_takes_no_other_with_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine = make_engine(model)

    def broken(*arguments: object) -> None:
        raise ArithmeticError("no such distribution")

    monkeypatch.setattr(Verified, "take", broken)
    failing = submit(engine, ask(prompt(21, 600), 40, mode="verified"))
    other = submit(engine, ask(prompt(22, 600), 40, mode="resident"))
    assert isinstance(failing.wait(), FailedEvent)
    assert isinstance(other.wait(), FinishedEvent)


def test_progress_comes_before_the_first_token(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=6, chunk_tokens=256)
    events = submit(engine, ask(prompt(23, 1100), 6, mode="verified"))
    events.wait()
    kinds = [type(event) for event in events.all]
    assert kinds == sorted(kinds, key=[ProgressEvent, TokenEvent, FinishedEvent].index)


def test_the_hit_ratio_does_not_count_what_was_just_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model("llama"), pages=4, keep=False)
    answer(engine, ask(prompt(24, 1100), 12, mode="streamed"))
    stats = engine.store.stats()[0]
    assert stats.hits == 0
    assert engine._parts.metrics.kv_stored_bytes._value.get() == stats.write_bytes


def assert_nothing_running(engine: Engine) -> None:
    assert engine.flush(30)
    for _ in range(500):
        if engine.load().running == 0:
            return
        threading.Event().wait(0.02)
    raise AssertionError("requests are still running")


def test_scoring_in_a_selective_mode_reads_the_whole_cache(make_engine: MakeEngine) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, pages=4, keep=False)
    ids, scored = prompt(10, 1100), prompt(11, 20)
    finished = [
        engine.generate([GenerateRequest(mode, ids, SamplingParams(0), mode=mode, score_ids=scored)])[0]
        for mode in ("streamed", "selective")
    ]
    assert finished[1].kv.mode == "streamed"
    assert finished[0].score_logprobs == pytest.approx(finished[1].score_logprobs, abs=1e-4)
    logits = model(torch.tensor([ids + scored]).to(model.device)).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(scored, device=logits.device)[:, None])[:, 0]
    assert finished[0].score_logprobs == pytest.approx(expected.tolist(), abs=1e-3)
