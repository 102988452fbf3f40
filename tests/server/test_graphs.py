"""Recorded decode steps answer like plain ones. On a CPU the same step is computed instead of replayed."""

import copy
import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from asking import answer, ask, prompt
from tiny_models import DEVICE, FAMILIES, SHAPE, build, greedy_reference, tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from aquifer.kernels.backend import PLAIN, backend_for
from aquifer.server.engine.graphed_chunks import GraphedChunks
from aquifer.server.engine.graphs import GraphedStep, PagedLanes, Recordings, bucket_of, record_graph
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.engine.sampling import Choice, Sampler
from aquifer.server.engine.types import SamplingParams
from aquifer.server.models.adapter import DecoderAdapter

ON_GPU = DEVICE.type == "cuda"
MAX_ROWS = 12
PAGES = 40
BEST = Sampler(SamplingParams(), ()).pick


class Setting:
    """A tiny model over one pool: a runner that steps plainly and one with recorded steps."""

    def __init__(self, family: str = "llama") -> None:
        model = tiny_model(family)
        plain = DecoderAdapter(model, max_tokens=4096, backend=PLAIN)
        spec = plain.spec
        self.pool = PagePool(spec, PAGES * 256 * spec.bytes_per_token, DEVICE, keep=False)
        self.plain = ModelRunner(plain, self.pool)
        backend = backend_for(DEVICE, spec.dtype, spec.head_dim)
        fused = DecoderAdapter(model, max_tokens=4096, backend=replace(backend, fuses=True))
        lanes = PagedLanes(self.pool, fused.backend, MAX_ROWS, 16)
        memory = torch.cuda.graph_pool_handle() if ON_GPU else None
        self.step = GraphedStep(fused, self.pool, lanes, MAX_ROWS, memory)
        self.fast = ModelRunner(fused, self.pool, [self.step])

    def read(self, length: int, seed: int) -> PagedCache:
        """A cache of so many random tokens, with room for more, on pages in no order."""
        ids = random.Random(seed).choices(range(299), k=length)
        pages = self.pool.allocate((length + 16) // 256 + 1)
        assert pages is not None
        random.Random(seed).shuffle(pages)
        cache = PagedCache(self.pool, BlockTable(pages))
        self.plain.prefill(ids, 0, cache)
        return cache


def greedy(result: Tensor | Choice) -> Choice:
    return result if isinstance(result, Choice) else Sampler(SamplingParams(), ()).choose(result[0])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3-moe"])
def test_tokens_and_probabilities_equal_those_of_plain_steps(family: str) -> None:
    """Sequences of many lengths, joining and leaving, across the edge of a page."""
    setting = Setting(family)
    lengths = [1, 250, 255, 256, 700, 1300]
    caches = [setting.read(length, seed) for seed, length in enumerate(lengths)]
    tokens = list(range(5, 5 + len(lengths)))
    for step in range(8):
        running = [n for n in range(len(lengths)) if n != step % 4]
        rows = [Rows([tokens[n]], lengths[n], caches[n], pick=BEST) for n in running]
        expected = [greedy(result) for result in setting.plain.step(rows)]
        found = setting.fast.step(rows)
        for n, one, other in zip(running, found, expected, strict=True):
            assert isinstance(one, Choice)
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            tokens[n], lengths[n] = one.token_id, lengths[n] + 1


@pytest.mark.skipif(not ON_GPU, reason="the kernels and operators that serve bfloat16 need a GPU")
def test_in_bfloat16_chunks_and_steps_differ_from_float32_by_rounding_only() -> None:
    """As far as the model's own modules do. Chunks of 1,024 go to cuDNN, of 680 to flash attention; the last
    one is replayed."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 128}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **sizes})).to(DEVICE).eval()
    ids = random.Random(0).choices(range(299), k=6000)
    cuts = [*range(0, 6000, 1024), 5800, 6000]
    found: list[list[Tensor]] = []
    for dtype, backend in ((torch.float32, PLAIN), (torch.bfloat16, PLAIN), (torch.bfloat16, None)):
        adapter = DecoderAdapter(copy.deepcopy(model).to(dtype), max_tokens=8192, backend=backend)
        pool = PagePool(adapter.spec, 32 * 256 * adapter.spec.bytes_per_token, DEVICE, keep=False)
        lanes = PagedLanes(pool, adapter.backend, MAX_ROWS, 32)
        recorded = GraphedStep(adapter, pool, lanes, MAX_ROWS, torch.cuda.graph_pool_handle())
        chunked = GraphedChunks(adapter, pool, torch.cuda.graph_pool_handle())
        fuses = adapter.backend.fuses
        runner = ModelRunner(adapter, pool, [recorded] if fuses else [], chunked if fuses else None)
        cache = PagedCache(pool, BlockTable(list(range(31, -1, -1))[:16] + list(range(16))))
        chunks = [runner.prefill(ids[at:stop], at, cache)[0][-300:] for at, stop in pairwise(cuts)]
        (stepped,) = runner.step([Rows([7], 6000, cache)])
        assert isinstance(stepped, Tensor)
        found.append([runner.logits(torch.cat(chunks)).cpu(), stepped])
    for exact, own_modules, fused in zip(*found, strict=True):
        error, usual = ((found - exact).norm() / exact.norm() for found in (fused, own_modules))
        assert 0 < error < 1.5 * usual < 0.1


def test_rows_that_want_logits_get_theirs() -> None:
    setting = Setting()
    caches = [setting.read(length, length) for length in (300, 40, 600)]
    starts = (300, 40, 600)
    rows = [
        Rows([7], at, cache, pick=BEST if at == 40 else None)
        for at, cache in zip(starts, caches, strict=True)
    ]
    expected = setting.plain.step(rows)
    found = setting.fast.step(rows)
    assert isinstance(found[1], Choice)
    for one, other in ((found[0], expected[0]), (found[2], expected[2])):
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        assert (one.device.type, one.dtype) == ("cpu", torch.float32)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_sampled_tokens_do_not_depend_on_what_else_is_running_or_on_the_path() -> None:
    setting = Setting()
    caches = [setting.read(300 + seed, seed) for seed in range(3)]
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=5)

    def draw(runner: ModelRunner, among: int) -> list[int]:
        sampler, found = Sampler(params, ()), []
        for _ in range(10):
            rows = [
                Rows([7], 300 + n, caches[n], pick=sampler.pick if n == 0 else BEST) for n in range(among)
            ]
            result = runner.step(rows)[0]
            assert isinstance(result, Choice)
            found.append(result.token_id)
        return found

    alone = draw(setting.fast, 1)
    assert len(set(alone)) > 1
    assert draw(setting.fast, 3) == alone
    assert draw(ModelRunner(setting.step._adapter, setting.pool), 2) == alone


def test_rows_that_cannot_be_recorded_are_computed_plainly_beside_the_others() -> None:
    setting = Setting()
    one, several = setting.read(300, 1), setting.read(500, 2)
    rows = [Rows([5, 6, 7], 500, several), Rows([9], 300, one), Rows([8], 500, several)]
    expected = setting.plain.step(rows[:1]) + setting.plain.step(rows[1:2]) + setting.plain.step(rows[2:])
    found = setting.fast.step(rows)
    assert [len(result) for result in found if isinstance(result, Tensor)] == [3, 1, 1]
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


def test_a_page_that_changes_hands_is_read_by_its_new_owner_only() -> None:
    """Tables that stand already are not filled again, so what they show must be noticed when it changes."""
    setting = Setting()
    first, second = setting.read(300, 1), setting.read(300, 2)
    setting.fast.step([Rows([5], 300, first), Rows([5], 300, second)])
    first.table.pages, second.table.pages = second.table.pages, first.table.pages
    rows = [Rows([5], 300, first), Rows([5], 300, second)]
    for result, other in zip(setting.fast.step(rows), setting.plain.step(rows), strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


def test_unused_rows_of_a_bucket_write_nothing() -> None:
    setting = Setting()
    caches = [setting.read(20, seed) for seed in range(3)]
    bits = setting.pool.keys.view(torch.uint8)  # memory that nobody wrote may hold NaNs, which equal nothing
    before = bits.clone()
    setting.fast.step([Rows([5], 20, cache) for cache in caches])
    changed = (bits != before).any(dim=0).any(dim=0).any(dim=-1)
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(
        cache.table.pages[0] * 256 + 20 for cache in caches if cache.table.pages[0] is not None
    )


def test_a_sequence_with_segments_off_the_device_is_not_accepted() -> None:
    setting = Setting()
    cache = setting.read(300, 1)
    assert setting.step.accepts(Rows([5], 300, cache))
    assert not setting.step.accepts(Rows([5, 6], 300, cache))
    cache.table.pages[0] = None
    assert not setting.step.accepts(Rows([5], 300, cache))


def test_steps_that_cannot_be_recorded_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device may have no memory left for another graph."""
    setting = Setting()
    cache = setting.read(300, 1)
    tries: list[int] = []

    def fail(recordings: Recordings, bucket: int, memory: object) -> None:
        tries.append(bucket)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Recordings, "_record", fail)
    monkeypatch.setattr(setting.step._recordings, "_memory", (0, 1))
    rows = [Rows([5], 300, cache)]
    for _ in range(3):
        torch.testing.assert_close(setting.fast.step(rows), setting.plain.step(rows), rtol=1e-4, atol=1e-4)
    assert tries == [1]


def test_of_equal_logits_the_first_token_is_taken() -> None:
    """As on the plain path: otherwise texts would differ."""
    setting = Setting()
    model = setting.step._adapter._model
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[200:] = weight[:100]
    cache = setting.read(50, 1)
    for token in range(20):
        (result,) = setting.fast.step([Rows([token], 50, cache, pick=BEST)])
        assert isinstance(result, Choice) and result.token_id < 200


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (9, 16), (16, 16), (17, 24), (25, 32), (33, 36), (36, 36)]
)
def test_buckets_waste_little_and_never_exceed_the_limit(rows: int, bucket: int) -> None:
    assert bucket_of(rows, most=36) == bucket


@pytest.mark.skipif(not ON_GPU, reason="graphs are recorded on a CUDA device")
def test_engines_start_answer_and_end_while_another_thread_records() -> None:
    """One that has recorded what it needs answers and ends meanwhile, another one starts."""
    model, ids = tiny_model("llama", num_hidden_layers=2, head_dim=64), prompt(1, 300)
    expected, engine = greedy_reference(model, ids, 4), build(model)
    for _ in range(2):  # cold, and with the document on the device: each records what it needs
        assert answer(engine, ask(ids, 4))[0] == expected
    recording, numbers = threading.Event(), torch.zeros(4, device=DEVICE)
    launches = itertools.count()

    def launch() -> None:
        numbers.add_(1)
        if next(launches):  # the first one compiles only
            recording.set()
            time.sleep(1.0)
        numbers.add_(1)

    with ThreadPoolExecutor(1) as other:
        recorded = other.submit(record_graph, launch, torch.cuda.graph_pool_handle())
        assert recording.wait(30)
        assert answer(engine, ask(ids, 4))[0] == expected
        assert not recorded.done()
        engine.close()
        late = build(model)
        assert answer(late, ask(ids, 4))[0] == expected
        late.close()
        graph, _ = recorded.result()
    numbers.zero_()
    graph.replay()
    assert numbers.tolist() == [2.0] * 4
