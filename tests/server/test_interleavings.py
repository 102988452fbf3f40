"""Whatever happens to stored documents, and in whatever order: the tokens are those of plain `generate`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import pytest
from interleavings import Ask, Forget, Interleaving, Machine, Restart, Run, Settle, check_interleavings
from redis_server import RedisServer
from tiny_models import DEVICE

from aquifer.server.engine import selective

_BLOCK = 25
"""Interleavings of one test."""

_COUNT = int(os.environ.get("TEST_INTERLEAVINGS", "100"))


@pytest.fixture(scope="module")
def small_redis() -> Iterator[RedisServer]:
    """A Redis that evicts, too."""
    server = RedisServer("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru")
    yield server
    server.remove()


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts find room for the rows of a single step on machines that are small, and for all on others, where
    a device loads them from the first step on."""
    monkeypatch.setattr(selective, "ROW_CACHE_STEPS", 1)
    if DEVICE.type == "cuda":
        from aquifer.server.engine import lanes  # imports Triton

        monkeypatch.setattr(lanes, "STEPS_BEFORE_LOADING", 0)


@pytest.mark.parametrize("first", range(0, _COUNT, _BLOCK))
def test_any_interleaving_gives_the_tokens_of_generate_and_everything_back(
    first: int, small_redis: RedisServer, record_property: Callable[[str, object], None]
) -> None:
    counts = check_interleavings(range(first, min(first + _BLOCK, _COUNT)), small_redis.url)
    for name, count in counts.items():
        record_property(f"counted in interleavings: {name}", count)


@dataclass(frozen=True)
class Spoil:
    """Keys in one layer of every page change behind the engine's back."""

    @classmethod
    def draw(cls, dice: random.Random, numbers: Sequence[int]) -> Self:
        return cls()

    def do(self, run: Run) -> None:
        keys = run.engine._parts.pool.keys
        run.engine._call(lambda: keys[1].copy_(keys[1].roll(1, dims=1)))


def test_one_wrong_layer_of_kv_is_noticed_and_traced_to_what_made_it(small_redis: RedisServer) -> None:
    """The proof that the test above can fail."""
    machine = Machine("llama", 12, 8, 12, True, None, 512, 8, False, False)
    first, again = (Ask(3, 0, "resident", count, True, None) for count in (1, 8))
    spoilt = Interleaving(
        machine, (Forget(3, 0), Restart(), first, Ask(9, 0, "auto", 4, True, None), Settle(), Spoil(), again)
    )
    failure = spoilt.failure(small_redis.url)
    assert failure is not None and "answered" in failure
    assert spoilt.shrunk(small_redis.url).actions == (first, Settle(), Spoil(), again)
