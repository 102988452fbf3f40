"""Recorded chunks give what computed ones give. On a CPU the same is computed instead of replayed."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_models import DEVICE, FAMILIES, tiny_model

from aquifer.kernels.backend import PLAIN, backend_for
from aquifer.server.engine.graphed_chunks import LARGEST, GraphedChunks
from aquifer.server.engine.pages import BlockTable, PagePool
from aquifer.server.engine.runner import ModelRunner, PagedCache, Rows
from aquifer.server.engine.sampling import Choice, Sampler
from aquifer.server.engine.types import SamplingParams
from aquifer.server.models.adapter import DecoderAdapter

PAGES = 24


class Setting:
    """A tiny model over two pools: one runner computes chunks in one, one records them in the other."""

    def __init__(self, family: str = "llama") -> None:
        model = tiny_model(family)
        self.plain = DecoderAdapter(model, max_tokens=4096, backend=PLAIN)
        spec = self.plain.spec
        self.pools = [
            PagePool(spec, PAGES * 256 * spec.bytes_per_token, DEVICE, keep=False) for _ in range(2)
        ]
        backend = backend_for(DEVICE, spec.dtype, spec.head_dim)
        fused = DecoderAdapter(model, max_tokens=4096, backend=replace(backend, fuses=True))
        memory = torch.cuda.graph_pool_handle() if DEVICE.type == "cuda" else None
        self.chunks = GraphedChunks(fused, self.pools[1], memory)
        self.runners = (
            ModelRunner(self.plain, self.pools[0]),
            ModelRunner(fused, self.pools[1], (), self.chunks),
        )

    def caches(self, length: int) -> list[PagedCache]:
        """Of the same tokens in both pools, with room for another chunk, on pages in no order."""
        ids = random.Random(length).choices(range(299), k=length)
        caches = []
        for pool in self.pools:
            pages = pool.allocate((length + LARGEST) // 256 + 1)
            assert pages is not None
            random.Random(1).shuffle(pages)
            caches.append(PagedCache(pool, BlockTable(pages)))
            if length:
                ModelRunner(self.plain, pool).prefill(ids, 0, caches[-1])
        return caches


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3-moe"])
def test_chunks_of_any_size_give_the_same(family: str) -> None:
    """The same states of the last layer, KV before RoPE and pages; also when a size is used again."""
    setting = Setting(family)
    for past, count in ((0, 1), (0, 100), (250, 16), (255, 17), (700, 256), (512, 200), (700, 3)):
        ids = random.Random(count).choices(range(299), k=count)
        pair = setting.caches(past)
        (hidden, kept), (found, found_kept) = (
            runner.prefill(ids, past, cache) for runner, cache in zip(setting.runners, pair, strict=True)
        )
        torch.testing.assert_close(found, hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found_kept.keys, kept.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found_kept.values, kept.values, atol=1e-4, rtol=1e-4)
        for layer in range(len(kept.keys)):
            wanted, written = (cache.read(layer, cache.table.runs([(0, past + count)])) for cache in pair)
            torch.testing.assert_close(written, wanted, atol=1e-4, rtol=1e-4)
        for pool, cache in zip(setting.pools, pair, strict=True):
            pool.release(cache.table.held)


def test_a_chunk_writes_nothing_but_its_own_slots() -> None:
    setting = Setting()
    cache, pool = setting.caches(300)[1], setting.pools[1]
    before = _bits(pool)
    setting.runners[1].prefill([5] * 20, 300, cache)
    changed = (_bits(pool) != before).flatten(0, 2).any(dim=0).any(dim=-1)
    ((first, last),) = cache.table.runs([(300, 20)])
    assert changed.nonzero().flatten().tolist() == list(range(first, last))


def _bits(pool: PagePool) -> torch.Tensor:
    """[2, L, H, slots, bytes]: memory that nobody wrote may hold NaNs, which equal nothing."""
    return torch.stack((pool.keys, pool.values)).view(torch.uint8)


def test_what_a_chunk_gave_stays_when_the_next_one_runs() -> None:
    setting = Setting()
    cache = setting.caches(0)[1]
    hidden, kept = setting.runners[1].prefill([7] * 40, 0, cache)
    copies = [t.clone() for t in (hidden, kept.keys, kept.values)]
    setting.runners[1].prefill([9] * 40, 40, cache)
    for one, other in zip((hidden, kept.keys, kept.values), copies, strict=True):
        assert torch.equal(one, other)


def test_long_chunks_and_segments_off_the_device_are_not_accepted() -> None:
    setting = Setting()
    cache = setting.caches(300)[1]
    assert setting.chunks.accepts(Rows([5] * LARGEST, 300, cache))
    assert not setting.chunks.accepts(Rows([5] * (LARGEST + 1), 300, cache))
    cache.table.pages[0] = None
    assert not setting.chunks.accepts(Rows([5], 300, cache))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_token_after_a_prompt_is_the_likeliest(penalty: float) -> None:
    """Chosen on the device, unless choosing needs to know the tokens before."""
    setting = Setting()
    pair = setting.caches(300)
    choices: list[Choice] = []
    for runner, cache in zip(setting.runners, pair, strict=True):
        sampler = Sampler(SamplingParams(repetition_penalty=penalty), (5, 6, 7))
        hidden, _ = runner.prefill([5, 6, 7], 300, cache)
        choices.append(runner.next_choice(hidden[-1:], sampler))
    assert choices[0].token_id == choices[1].token_id
    assert choices[0].logprob == pytest.approx(choices[1].logprob, abs=1e-4)
