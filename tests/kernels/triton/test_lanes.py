"""Recorded steps of selective decoding against plain ones. Without a device the same step is computed by the
interpreter instead of being replayed."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from no_queues import Mark, NoQueues
from tiny_models import SHAPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from aquifer.compression.landmarks import TokenCodec
from aquifer.compression.spec import SINK_TOKENS
from aquifer.kernels.backend import PLAIN, backend_for
from aquifer.kernels.triton import landmarks, row_attention, select
from aquifer.kernels.triton.rows import fetch_rows
from aquifer.server.engine import lanes, selective
from aquifer.server.engine.graphs import GraphedStep
from aquifer.server.engine.index import IndexPool
from aquifer.server.engine.lanes import LaneCache, OwnCells, SelectiveLanes
from aquifer.server.engine.pages import BlockTable, PagePool, pages_of
from aquifer.server.engine.parts import EngineLimits, EngineParts
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.engine.sampling import Choice
from aquifer.server.engine.selective import Selection, SelectiveCache, build_index, fill_sinks
from aquifer.server.engine.streams import SegmentReader
from aquifer.server.metrics import Metrics
from aquifer.server.models.adapter import DecoderAdapter

# What numpy says where the interpreter takes the logarithm of an empty block, which is -inf as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")


class Setting:
    """A tiny model over one pool, an index, and both kinds of selective decoding over them."""

    def __init__(self, device: torch.device, *, shared: bool, max_running: int = 4) -> None:
        config = {**SHAPE, "num_hidden_layers": 2, "head_dim": 64, "hidden_size": 48}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4.0)
        model = model.to(device).eval()
        plain = DecoderAdapter(model, max_tokens=4096, backend=PLAIN)
        spec = plain.spec
        self.pool = PagePool(spec, 60 * 256 * spec.bytes_per_token, device, keep=False)
        self.index = IndexPool(TokenCodec(spec, None, device), 12, device, keep=False)
        if device.type == "cuda":
            self.index.rows = self.index.rows.pin_memory()
        self.metrics = Metrics()
        self.parts = cast(
            EngineParts,
            SimpleNamespace(
                adapter=plain,
                pool=self.pool,
                index=self.index,
                metrics=self.metrics,
                limits=EngineLimits(max_running, 4, 512, shared_selection=shared),
            ),
        )
        self.plain = ModelRunner(plain, self.pool)
        backend = backend_for(device, spec.dtype, spec.head_dim)
        fused = DecoderAdapter(model, max_tokens=4096, backend=replace(backend, fuses=True))
        self.lanes = SelectiveLanes(self.parts)
        memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.step = GraphedStep(fused, self.pool, self.lanes, max_running, memory)
        self.fast = ModelRunner(fused, self.pool, [self.step])

    def read(self, length: int, budget: float, *, filled: bool = False) -> tuple[SelectiveCache, LaneCache]:
        """One random prompt, twice: for plain and for recorded steps. filled: those find their rows in cells
        of their own."""
        ids = random.Random(length).choices(range(299), k=length)
        packing = self.index.codec.rows_per_slot
        shared = self.parts.limits.shared_selection
        selection = Selection.of(length, budget, shared=shared, rows_per_slot=packing)
        segments = (length - 1) // 256
        index_pages = self.index.allocate(segments)
        assert index_pages is not None
        random.Random(length).shuffle(index_pages)
        caches: list[SelectiveCache | LaneCache] = []
        reader = cast(SegmentReader, SimpleNamespace(adapter=self.parts.adapter))
        for kind in (SelectiveCache, LaneCache):
            pages, row_pages = (
                self.pool.allocate(pages_of(length + 32)),
                self.pool.allocate(selection.row_pages),
            )
            assert pages is not None and row_pages is not None
            random.Random(length).shuffle(pages)
            whole = PagedCache(self.pool, BlockTable(pages))
            self.plain.prefill(ids, 0, whole)
            where = self.parts, whole.table, index_pages, row_pages, selection
            if kind is SelectiveCache:
                build_index(self.index, index_pages, range(segments), whole, reader)
                caches.append(SelectiveCache(*where))
            else:
                if filled:
                    cells = OwnCells(self.parts, row_pages)
                    build_index(self.index, index_pages, range(segments), whole, reader, cells)
                caches.append(LaneCache(*where, filled=filled))
            fill_sinks(self.pool, row_pages, whole, reader)
        one, other = caches
        assert isinstance(one, SelectiveCache) and isinstance(other, LaneCache)
        return one, other

    def counted(self) -> tuple[float, float, float]:
        """Chosen rows, hits and fetched bytes, as the metrics have them."""
        names = ("selected_tokens_total", "selected_hits_total", "fetched_bytes_total")
        labels: list[dict[str, str]] = [{}, {}, {"mode": "selective"}]
        values = [
            self.metrics.registry.get_sample_value(f"aquifer_{name}", label)
            for name, label in zip(names, labels, strict=True)
        ]
        return cast(tuple[float, float, float], tuple(values))


@pytest.fixture(params=[True, False], ids=["shared", "per head"])
def setting(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Where there is room for all rows, and they come at once."""
    monkeypatch.setattr(lanes, "STEPS_BEFORE_LOADING", 0)
    if device.type == "cpu":  # the interpreter takes them one by one
        for module in (landmarks, row_attention, select):
            monkeypatch.setattr(module, "PROGRAMS", 4)
        monkeypatch.setattr(lanes, "fetch_rows", partial(fetch_rows, programs=8))
        monkeypatch.setattr(lanes, "queues_of", lambda device: NoQueues())
    return Setting(device, shared=request.param)


@pytest.fixture
def crowded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Where there is room for the rows of two steps."""
    monkeypatch.setattr(selective, "ROW_CACHE_STEPS", 2)
    return setting


def logits_of(results: list[Tensor | Choice]) -> list[Tensor]:
    assert all(isinstance(result, Tensor) for result in results)
    return [cast(Tensor, result)[0] for result in results]


def test_with_the_whole_prompt_chosen_tokens_equal_those_of_plain_steps(
    setting: Setting, launched: list[str]
) -> None:
    lengths = [300, 270]
    caches = [setting.read(length, 1.0) for length in lengths]
    tokens = [5, 6]
    for _ in range(2):
        plain, fast = (
            logits_of(
                runner.step(
                    [
                        Rows([token], at, pair[kind])
                        for token, at, pair in zip(tokens, lengths, caches, strict=True)
                    ]
                )
            )
            for kind, runner in enumerate((setting.plain, setting.fast))
        )
        for one, other in zip(fast, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        tokens = [int(logits.argmax()) for logits in plain]
        lengths = [length + 1 for length in lengths]
    assert "_fetch_rows" in launched


def steps_of_both_kinds(
    setting: Setting, steps: int = 4, length: int = 600, *, filled: bool = False
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """Plain and recorded steps side by side, which stay close. What each counted: chosen rows, hits and
    fetched bytes.

    What is chosen differs where two tokens weigh the same up to the rounding of landmarks' products."""
    caches, token, agreed, counts = setting.read(length, 0.2, filled=filled), 7, 0, []
    for at in range(length, length + steps):
        before = setting.counted()
        (plain,) = logits_of(setting.plain.step([Rows([token], at, caches[0])]))
        between = setting.counted()
        (fast,) = logits_of(setting.fast.step([Rows([token], at, caches[1])]))
        after = setting.counted()
        one, other = (
            tuple(now - then for now, then in zip(*pair, strict=True))
            for pair in ((between, before), (after, between))
        )
        counts.append(cast(tuple[tuple[float, float, float], tuple[float, float, float]], (one, other)))
        assert (fast - plain).square().mean() < 0.02 * plain.var()
        agreed += int(fast.argmax()) == int(plain.argmax())
        token = int(plain.argmax())
        if fast.is_cuda:
            torch.cuda.synchronize()
    assert agreed >= steps - 1
    return counts


def test_with_few_chosen_steps_stay_close_and_are_counted(crowded: Setting, launched: list[str]) -> None:
    counts = steps_of_both_kinds(crowded)
    for plain, fast in counts:
        assert fast[0] == plain[0]  # as many are chosen
        assert fast[2] == (fast[0] - fast[1]) * crowded.index.row_bytes
    first, *later = (fast for _, fast in counts)
    assert first[1] == 0
    assert all(0 < hits < chosen for chosen, hits, _ in later)
    assert "_load_rows" not in launched


def test_rows_that_all_have_room_come_beside_the_first_steps(setting: Setting, launched: list[str]) -> None:
    (_, first), *later = steps_of_both_kinds(setting, steps=3)
    spec = setting.parts.adapter.spec
    every_row = spec.num_layers * spec.num_kv_heads * (512 - SINK_TOKENS) * setting.index.row_bytes
    chosen, hits, fetched = first
    assert fetched == (chosen - hits) * setting.index.row_bytes + every_row
    assert [fast for _, fast in later] == [(chosen, chosen, 0)] * 2  # nothing more is fetched
    assert launched.count("_load_rows") == spec.num_layers


def test_short_answers_load_nothing(
    setting: Setting, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "STEPS_BEFORE_LOADING", 2)
    for number, (_, (chosen, hits, fetched)) in enumerate(steps_of_both_kinds(setting, steps=3)):
        assert ("_load_rows" in launched) or number < 2
        assert (fetched > (chosen - hits) * setting.index.row_bytes) == (number == 2)


def test_rows_are_read_when_they_stand_and_used_when_they_are_there(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues = NoQueues(late=True)
    monkeypatch.setattr(lanes, "queues_of", lambda device: queues)
    _, lane = setting.read(600, 0.2)
    loads = [cast(Mark, lane.load_layer()) for _ in range(2)]
    assert lane.load_layer() is None
    # Each behind what the caller has queued by then: who makes the rows, and used the pages before.
    assert queues.rows.log == [queues.called[0], "work", queues.called[1], "work"]

    def loaded() -> int:
        return lane.next_step(600)[0].loaded

    assert loaded() == 0
    loads[1].happened = True
    assert loaded() == 0
    loads[0].happened = True
    assert loaded() == 2


def test_few_layers_are_on_the_way_at_a_time(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LAYERS_ON_THE_WAY", 3)
    caches = [setting.read(length, 0.2)[1] for length in (300, 530, 600)]
    on_the_way: deque[torch.cuda.Event] = deque()
    lanes.load_rows_of(caches, on_the_way)
    # Both layers of the first one, and one of the next.
    assert [len(cache._loads) for cache in caches] == [2, 1, 0]
    if setting.pool.keys.is_cuda:
        torch.cuda.synchronize()
    lanes.load_rows_of(caches, on_the_way)
    assert [len(cache._loads) for cache in caches] == [2, 2, 2]


def test_rows_that_are_made_for_a_request_are_never_fetched(setting: Setting, launched: list[str]) -> None:
    for (chosen, _, _), fast in steps_of_both_kinds(setting, steps=2, filled=True):
        assert fast == (chosen, chosen, 0)
    assert launched.count("_load_rows") == setting.parts.adapter.spec.num_layers


def test_rows_may_begin_behind_the_sinks(setting: Setting) -> None:
    cells, heads = OwnCells(setting.parts, [7, 5]), setting.parts.adapter.spec.num_kv_heads
    rows = torch.randint(256, (768, heads * 64), dtype=torch.uint8, device=setting.pool.keys.device)
    pools = setting.pool.keys, setting.pool.values
    found = []
    for spans, first in (([(0, 256), (256, 256), (512, 256)], 0), ([(4, 252), (256, 256), (512, 256)], 4)):
        for half in pools:
            half.zero_()
        cells.filling(spans)(1, rows[first:])
        found.append([half.view(torch.int32).clone() for half in pools])  # some bytes are no numbers
    assert any(half.any() for half in found[0])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_pages_are_given_back_behind_what_is_being_loaded(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[object] = []
    lane, queues = setting.read(600, 0.2)[1], lanes.queues_of(setting.pool.keys.device)
    monkeypatch.setattr(lanes, "queues_of", lambda device: queues)
    monkeypatch.setattr(queues, "let_caller_wait", waited.append)
    lane.release()
    assert not waited
    loads = lane.load_layer(), lane.load_layer()
    lane.release()
    assert waited == [loads[-1]]


def test_a_request_answers_alike_alone_and_beside_others(setting: Setting, launched: list[str]) -> None:
    alone, beside = setting.read(600, 0.15)[1], setting.read(600, 0.15)[1]
    others = [setting.read(length, 0.3)[1] for length in (300, 530)]
    first = logits_of(setting.fast.step([Rows([9], 600, alone)]))[0]
    rows = [Rows([3], 300, others[0]), Rows([9], 600, beside), Rows([4], 530, others[1])]
    torch.testing.assert_close(logits_of(setting.fast.step(rows))[1], first, rtol=1e-4, atol=1e-4)
    assert launched


def test_a_request_counts_what_it_holds_of_the_device(
    crowded: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = crowded.read(600, 0.2)
    layers, sets = 2, crowded.lanes._sets
    maps = 4 * layers * sets * (508 + 2 * 2 * 64)
    assert fast.held_bytes > plain.held_bytes == maps
    monkeypatch.setattr(selective, "ROW_CACHE_STEPS", 16)
    filled, unfilled = (crowded.read(600, 0.2, filled=filled)[1] for filled in (True, False))
    assert unfilled.held_bytes - filled.held_bytes == 4 * layers * sets * 512  # where tokens are


def test_a_lane_takes_part_in_recorded_steps_only(setting: Setting) -> None:
    plain, fast = setting.read(300, 0.5)
    assert setting.step.accepts(Rows([1], 300, fast))
    assert not setting.step.accepts(Rows([1], 300, plain))
    assert not setting.step.accepts(Rows([1, 2], 300, fast))
    with pytest.raises(ValueError, match="one new token"):
        fast.open(300, 2)
