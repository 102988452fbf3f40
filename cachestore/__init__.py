"""Where compressed segments live: keys, RAM arena, Redis, tier policy. Free of torch."""

from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import PromptKeys, SegmentKey, chain_keys, make_namespace
from aquifer.cachestore.records import RecordStore
from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.cachestore.store import TieredStore
from aquifer.cachestore.tier import Lease, Tier, TierStats

__all__ = [
    "Lease",
    "PromptKeys",
    "RamArena",
    "RecordStore",
    "RedisLink",
    "RedisTier",
    "SegmentKey",
    "Tier",
    "TierStats",
    "TieredStore",
    "chain_keys",
    "make_namespace",
]
