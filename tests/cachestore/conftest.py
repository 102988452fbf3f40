from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aquifer.cachestore import RedisLink, RedisTier


@pytest.fixture
def make_link() -> Iterator[Callable[..., RedisLink]]:
    """Make links that look for a lost Redis every 50 ms and close with the test."""
    links: list[RedisLink] = []

    def make(url: str, *, timeout_seconds: float = 5.0) -> RedisLink:
        links.append(RedisLink(url, timeout_seconds=timeout_seconds, probe_seconds=0.05))
        return links[-1]

    yield make
    for link in links:
        link.close()


@pytest.fixture
def make_tier(make_link: Callable[..., RedisLink]) -> Iterator[Callable[..., RedisTier]]:
    """Make Redis tiers for records of up to 5 MiB, which is three parts, read over two connections."""
    tiers: list[RedisTier] = []

    def make(url: str, *, timeout_seconds: float = 5.0, **options: Any) -> RedisTier:
        link = make_link(url, timeout_seconds=timeout_seconds)
        tiers.append(RedisTier(link, max_record_bytes=5 << 20, connections=2, **options))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()
