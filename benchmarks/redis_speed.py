"""`aquifer bench redis`: how fast records go to Redis and come back, against plain redis-py with hiredis.

Records are as large as the codec makes them. Ours arrive in the RAM arena, checked; redis-py's are
`bytes` objects that somebody would still have to copy and check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_bytes

import redis
import torch

from aquifer.benchmarks.engines import (
    Needs,
    engine_for,
    random_prompt,
    redis_at,
    timed_read,
    wait_until_stored,
)
from aquifer.benchmarks.geometries import Subject
from aquifer.benchmarks.harness import Contestant, Report, Run, clocked_fresh
from aquifer.benchmarks.transfer import check_whole, new_report, restore_run
from aquifer.cachestore.arena import RamArena
from aquifer.cachestore.keys import SegmentKey, chain_keys, make_namespace
from aquifer.cachestore.redis_link import RedisLink
from aquifer.cachestore.redis_tier import RedisTier
from aquifer.cachestore.store import TieredStore
from aquifer.compression.spec import SEGMENT_TOKENS
from aquifer.compression.wire import RecordHeader, sealed, verify

_CPU = torch.device("cpu")
_SOCKET_SECONDS = 30.0


def bench_redis(subject: Subject, codec: str, tokens: int, repeat: int, redis_url: str | None) -> Report:
    """The records of one prompt of `tokens` tokens: written, read, and made into KV on the device.

    Raises ValueError unless it is whole segments, LeftOutError without a Redis.
    """
    check_whole(tokens)
    report = new_report("redis", subject, codec=codec, tokens=tokens, repeat=repeat)
    with redis_at(redis_url) as url:
        _bytes_alone(report, subject, codec, tokens, repeat, url)
        _to_ready_kv(report, subject, codec, tokens, repeat, url)
    return report


def _bytes_alone(
    report: Report, subject: Subject, codec: str, tokens: int, repeat: int, redis_url: str
) -> None:
    records = _records(subject.codec(codec).segment_bytes(SEGMENT_TOKENS), tokens // SEGMENT_TOKENS)
    keys, size = list(records), len(next(iter(records.values())))
    tier = RedisTier(RedisLink(redis_url, timeout_seconds=_SOCKET_SECONDS), max_record_bytes=size)
    store = TieredStore(RamArena(len(keys) * (size + 4096), size), tier, verify)
    client = redis.Redis.from_url(redis_url)
    names = {key: b"bench:" + key.redis_name for key in keys}

    def set_theirs() -> None:
        for key, record in records.items():
            client.set(names[key], record)

    def put_ours() -> None:
        if not all(tier.put(key, record) for key, record in records.items()):
            raise RuntimeError("Redis refused a record; is its memory full?")

    def get_theirs() -> None:
        if any(client.get(name) is None for name in names.values()):
            raise RuntimeError("Redis lost a record; is its memory full?")

    def get_ours() -> None:
        leases = store.get(keys)
        if None in leases:
            raise RuntimeError("Redis lost a record; is its memory full?")
        for lease in leases:
            if lease is not None:
                lease.release()

    def after(clear: Callable[[], object], work: Callable[[], object]) -> Run:
        def prepare() -> Callable[[], object]:
            clear()
            return work

        return clocked_fresh(_CPU, prepare)

    rows = report.measure(
        [
            Contestant("write records", "ours", after(lambda: tier.delete(keys), put_ours)),
            Contestant("read records", "ours", after(lambda: store.ram.delete(keys), get_ours)),
            Contestant("redis-py SET", "peer", after(lambda: client.delete(*names.values()), set_theirs)),
            Contestant("redis-py GET", "peer", after(lambda: None, get_theirs)),
        ],
        repeat,
    )
    for row in rows.values():
        row.figures["gb_per_second"] = len(keys) * size / row.figures["seconds"] / 1e9
    for ours, theirs in (("write records", "redis-py SET"), ("read records", "redis-py GET")):
        for name in (ours, theirs):
            rows[name].figures["times"] = rows[name].figures["seconds"] / rows[ours].figures["seconds"]
    tier.delete(keys)
    client.delete(*names.values())
    client.close()
    store.close()


def _to_ready_kv(
    report: Report, subject: Subject, codec: str, tokens: int, repeat: int, redis_url: str
) -> None:
    with engine_for(subject, Needs(codec, tokens, redis_url=redis_url)) as engine:
        prompt = random_prompt(subject, tokens)
        _, event = timed_read(engine, prompt, store=True)
        wait_until_stored(engine, [prompt])
        prefill: Run = lambda: timed_read(engine, random_prompt(subject, tokens), store=False)[0]  # noqa: E731
        rows = report.measure(
            [
                Contestant("Redis to ready KV", "ours", restore_run(engine, [prompt], "redis")),
                Contestant("prefill instead", "ours", prefill),
            ],
            repeat,
        )
        engine.forget(prompt, "")
    ready = rows["Redis to ready KV"].figures
    ready["gb_per_second"] = event.kv.stored_bytes / ready["seconds"] / 1e9
    for row in rows.values():
        row.figures["tokens_per_second"] = tokens / row.figures["seconds"]
        row.figures["times"] = row.figures["seconds"] / ready["seconds"]


def _records(body_bytes: int, count: int) -> dict[SegmentKey, bytes]:
    """Whole records of random bytes by their keys, which no other run uses."""
    namespace = make_namespace("bench", token_bytes(8).hex(), "")
    keys: Sequence[SegmentKey] = chain_keys(namespace, list(range(count * SEGMENT_TOKENS))).segments
    return {
        key: sealed(
            RecordHeader("segment", "bench", key.digest, index * SEGMENT_TOKENS, SEGMENT_TOKENS),
            token_bytes(body_bytes),
        )
        for index, key in enumerate(keys)
    }
