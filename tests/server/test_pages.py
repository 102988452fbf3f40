"""The page pool: shared by key, private otherwise, never handed out twice, evicted from the end."""

import random

import pytest
import torch

from aquifer.cachestore.keys import SegmentKey
from aquifer.compression.spec import KVSpec
from aquifer.server.engine.pages import BlockTable, PagePool

SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, rope="{}")


def pool_of(pages: int, *, keep: bool = True) -> PagePool:
    return PagePool(SPEC, pages * 256 * SPEC.bytes_per_token, torch.device("cpu"), keep=keep)


def key(n: int) -> SegmentKey:
    return SegmentKey(bytes(16), n.to_bytes(32, "big"))


def allocate(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def test_allocation_is_contiguous_on_a_fresh_pool() -> None:
    assert allocate(pool_of(8), 5) == [0, 1, 2, 3, 4]


def test_allocation_takes_the_smallest_gap_that_fits() -> None:
    pool = pool_of(10)
    pages = allocate(pool, 10)
    pool.release(pages[1:3] + pages[5:9])
    assert allocate(pool, 2) == [1, 2]
    assert allocate(pool, 4) == [5, 6, 7, 8]


def test_too_few_pages_gives_none_and_takes_nothing() -> None:
    pool = pool_of(3)
    assert pool.allocate(4) is None
    assert pool.available_pages == 3


def test_registered_page_stays_after_release_and_is_found_again() -> None:
    pool = pool_of(4)
    (page,) = allocate(pool, 1)
    pool.register(page, key(1))
    pool.release([page])
    assert pool.acquire(key(1)) == page
    assert pool.available_pages == 3


def test_without_keep_a_page_is_shared_only_while_used() -> None:
    pool = pool_of(4, keep=False)
    (page,) = allocate(pool, 1)
    pool.register(page, key(1))
    assert pool.acquire(key(1)) == page
    pool.release([page])
    assert pool.holds(key(1))
    pool.release([page])
    assert not pool.holds(key(1))
    assert pool.used_bytes == 0


def test_eviction_takes_the_suffix_of_the_oldest_prompt_first() -> None:
    pool = pool_of(6)
    for base in (0, 10):
        pages = allocate(pool, 3)
        for n, page in enumerate(pages):
            pool.register(page, key(base + n))
        pool.release(pages)
    allocate(pool, 2)
    assert [pool.holds(key(n)) for n in (0, 1, 2)] == [True, False, False]
    assert all(pool.holds(key(n)) for n in (10, 11, 12))


def test_forgotten_page_in_use_is_freed_by_its_user() -> None:
    pool = pool_of(2)
    (page,) = allocate(pool, 1)
    pool.register(page, key(1))
    pool.forget([key(1), key(2)])
    assert pool.acquire(key(1)) is None
    pool.release([page])
    assert pool.available_pages == 2


def test_a_pool_of_no_page_is_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match="AQUIFER_GPU_KV_BYTES"):
        PagePool(SPEC, 100, torch.device("cpu"), keep=True)


@pytest.mark.parametrize("keep", [True, False])
def test_random_use_never_hands_a_page_to_two_and_ends_at_zero(keep: bool) -> None:
    dice = random.Random(7)
    pool = pool_of(16, keep=keep)
    running: list[tuple[list[int], list[int]]] = []
    for _ in range(3000):
        if running and dice.random() < 0.5:
            shared, private = running.pop(dice.randrange(len(running)))
            pool.release(shared + private)
            continue
        names = dice.sample(range(20), 3)
        shared = [page for name in names if (page := pool.acquire(key(name))) is not None]
        private = pool.allocate(dice.randrange(1, 5))
        if private is None:
            pool.release(shared)
            continue
        owned = {page for _, pages in running for page in pages} | {p for pages, _ in running for p in pages}
        assert not owned & set(private)
        assert len(set(private)) == len(private)
        if dice.random() < 0.5:
            pool.register(private[0], key(dice.randrange(20)))
        running.append((shared, private))
    for shared, private in running:
        pool.release(shared + private)
    assert pool.available_pages == 16
    pool.drop_idle()
    assert pool.used_bytes == 0


def test_runs_join_neighbouring_pages_and_cover_exactly_the_spans() -> None:
    table = BlockTable([4, 5, 9, 2])
    assert table.runs([(0, 1024)]) == [(1024, 1536), (2304, 2560), (512, 768)]
    assert table.runs([(0, 4), (4, 252)]) == [(1024, 1280)]
    assert table.runs([(250, 10)]) == [(1274, 1284)]
    assert table.runs([(0, 0)]) == []
    assert table.slot(513) == 9 * 256 + 1
